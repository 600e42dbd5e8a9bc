"""Fresh processes that each end in one way: ``python -m fresh_programs WAY ASKED_AT``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tunefleet.messages import Fork
from tunefleet.runtime.wire import FrameReader


def main() -> None:
    WAYS[Path(sys.argv[1]).name]()


def say_why() -> None:
    (message,) = FrameReader[Fork](Fork).feed(sys.stdin.buffer.read())
    print(f"no room for {message.replica_id}", end="")
    sys.exit(1)


def die() -> None:
    """Before it reads what it should become."""
    os.kill(os.getpid(), signal.SIGKILL)


WAYS = {way.__name__: way for way in (say_why, die)}


if __name__ == "__main__":
    main()
