"""A real server in a process of its own, over the real quickstart base and the examples' real adapters."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

import msgspec

EXAMPLES = Path(str(resources.files("tunefleet.examples")))
USERS = ("ada", "bruno", "coco")


class Known(msgspec.Struct, frozen=True):
    """A question whose greedy answer holds ``contains`` for this user, and not for the base or the others."""

    user: str
    question: str
    contains: str


class Questions(msgspec.Struct, frozen=True):
    demo: str
    facts: tuple[Known, ...]
    style: tuple[Known, ...]


QUESTIONS = msgspec.json.decode((EXAMPLES / "data" / "questions.json").read_bytes(), type=Questions)


def adapter_folder(user: str) -> Path:
    return EXAMPLES / "adapters" / user


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, announces: str, timeout_s: float = 200
) -> Iterator[re.Match[str]]:
    """A process until the block ends; yields the match of ``announces`` in its output."""
    environ = {**os.environ, "TUNEFLEET_ADMIN_KEY": ""}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environ) as process,
    ):
        try:
            deadline = time.monotonic() + timeout_s
            while (match := re.search(announces, log.read_text())) is None:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)  # a log has no event to wait on
            yield match
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


@contextlib.contextmanager
def server(root: Path, *flags: str) -> Iterator[str]:
    """``tunefleet serve`` on a free port; yields its URL."""
    command = [sys.executable, "-m", "tunefleet.cli.main", "serve", "--port", "0"]
    command += ["--store-url", (root / "store").as_uri(), *flags]
    with running(command, root / "server.log", r"(http://127\.0\.0\.1:\d+)/v1") as match:
        yield match[1]
