"""Starting the host process: one, however many routers come at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from pathlib import Path

START_TIMEOUT_S = 30.0

_started: set[int] = set()  # pids of host processes that we started; they outlive us


def ensure_host(folder: Path, state: Path, log: Path) -> bool:
    """Returns when a host process holds the lock of ``folder``; False: one that was started has given up."""
    with (folder / "start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _reap()
        if _is_locked(folder / "host.lock"):
            return True
        state.mkdir(parents=True, exist_ok=True)
        pid = _spawn([sys.executable, "-m", "tunefleet.runtime.host", str(state)], log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if _is_locked(folder / "host.lock"):
                return True
            _reap()
            if pid not in _started:
                break
            time.sleep(0.01)
        return False


def _spawn(command: list[str], log: Path) -> int:
    """A process in a session of its own: a terminal's signals are ours alone. Its output goes to a log.

    Not by subprocess, which expects that its children are waited for before we end.
    """
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), append, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions, setsid=True)
    _started.add(pid)
    return pid


def _reap() -> None:
    for pid in list(_started):
        with contextlib.suppress(ChildProcessError):  # somebody else's SIGCHLD handler was first
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                continue
        _started.discard(pid)


def _is_locked(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False
