"""A step that hangs ends its process, whatever it hangs in."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, time
from tunefleet.runtime.watchdog import Watchdog
watchdog = Watchdog(0.2)
for _ in range(3):
    with watchdog.step():
        pass
{then}
print("survived", flush=True)
"""
HANGS = {
    "python": "while True: pass",
    "sleep": "time.sleep(60)",
    "native code with the lock": "ctypes.PyDLL(None).sleep(60)",
}


def run(then: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(then=then)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_a_step_that_hangs_ends_the_process_and_shows_where(hang: str) -> None:
    ended = run(f"with watchdog.step():\n    {hang}")
    assert ended.returncode == -signal.SIGALRM
    assert "most recent call first" in ended.stderr
    assert ended.stdout == ""


def test_time_between_steps_doesnt_count() -> None:
    ended = run("time.sleep(0.5)")
    assert (ended.returncode, ended.stdout) == (0, "survived\n")
