"""Parked processes that each behave in one way, with no model: ``python -m parked_programs FD WAY``.

``Parking`` takes them for a base's: the name of its folder is the way.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from tunefleet.messages import Fork, Forked, ForkRefused, Parked, ParkFailed, Reaped
from tunefleet.runtime.wire import BlockingLink

EXIT_CODE = 3  # of its children

Link = BlockingLink[Fork]


def main() -> None:
    link: Link = BlockingLink(socket.socket(fileno=int(sys.argv[1])), Fork)
    WAYS[Path(sys.argv[2]).name](link)


def obey(link: Link) -> None:
    """Its children end at once."""
    ready(link)
    for message in received(link):
        pid = os.fork()
        if pid == 0:
            os._exit(EXIT_CODE)
        link.send(Forked(replica_id=message.replica_id, pid=pid))
        exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        link.send(Reaped(replica_id=message.replica_id, pid=pid, exit_code=exit_code))


def refuse(link: Link) -> None:
    ready(link)
    for message in received(link):
        link.send(ForkRefused(replica_id=message.replica_id, reason="it has 2 threads"))


def fail(link: Link) -> None:
    link.send(ParkFailed(message="the base is damaged"))


def die(link: Link) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def never_get_ready(link: Link) -> None:
    signal.pause()


def stay(link: Link) -> None:
    """Neither SIGTERM nor the end of its link ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready(link)
    while True:
        signal.pause()


WAYS = {way.__name__: way for way in (obey, refuse, fail, die, never_get_ready, stay)}


def ready(link: Link) -> None:
    link.send(Parked(pid=os.getpid(), stages={"load": 0.5}))


def received(link: Link) -> Iterator[Fork]:
    """One after another, until the link closes."""
    while (messages := link.receive()) is not None:
        yield from messages


if __name__ == "__main__":
    main()
