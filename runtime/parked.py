"""The parked process: ``python -m tunefleet.runtime.parked FD``.

It has imported torch and transformers, built the model on meta and mapped its weights; on a Fork message it
becomes, in a child, a replica. It has one thread and never touches an accelerator, so that forking it is
safe. What it costs at zero is its own small private memory: the weights are pages of a file that the kernel
may drop.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's OpenBLAS starts a thread at import otherwise

import contextlib
import gc
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from tunefleet.core import Manifest
from tunefleet.errors import TunefleetError
from tunefleet.messages import Fork, Forked, ForkRefused, Parked, ParkFailed, Reaped
from tunefleet.runtime import replica
from tunefleet.runtime.base import read_manifest
from tunefleet.runtime.model import load_model
from tunefleet.runtime.wire import BlockingLink


class ParkedProcess:
    """Waits for Fork messages and for the ends of its children; leaves when the host process does."""

    def __init__(self, link: BlockingLink[Fork], model: nn.Module, manifest: Manifest) -> None:
        self._link = link
        self._model = model
        self._manifest = manifest
        self._children: dict[int, str] = {}

    def serve(self) -> None:
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            readable, _, _ = select.select([self._link.fileno(), wake_read], [], [])
            if wake_read in readable:
                os.read(wake_read, 4096)
                self._reap()
            if self._link.fileno() in readable:
                messages = self._link.receive()
                if messages is None:
                    return
                for message in messages:
                    self._fork(message)

    def _fork(self, message: Fork) -> None:
        if reason := why_unsafe():
            self._refuse(message, f"the parked process {reason}")
            return
        started = time.time()
        try:
            pid = os.fork()
        except OSError as error:
            self._refuse(message, f"the parked process can't fork: {error.strerror}")
            return
        if pid == 0:
            self._become(message, started)
        self._children[pid] = message.replica_id
        self._link.send(Forked(replica_id=message.replica_id, pid=pid))

    def _refuse(self, message: Fork, reason: str) -> None:
        self._link.send(ForkRefused(replica_id=message.replica_id, reason=reason))

    def _become(self, message: Fork, started: float) -> NoReturn:
        """In the child: it must never go on as a second parked process."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._link.close()
            replica.main(self._model, self._manifest, message, started)
        finally:
            os._exit(1)

    def _reap(self) -> None:
        for pid in list(self._children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                self._link.send(Reaped(replica_id=self._children.pop(pid), pid=pid, exit_code=code))


def why_unsafe() -> str:
    """Why this process must not be forked; empty: it may be."""
    if num_threads() != 1:
        return f"has {num_threads()} threads, and a fork would have locks that nobody opens"
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return "has opened the GPU, and a fork can't use it"
    return ""


def num_threads() -> int:
    """Threads of this process; 1 where the system doesn't tell."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def main() -> None:
    link: BlockingLink[Fork] = BlockingLink(socket.socket(fileno=int(sys.argv[1])), Fork)
    with contextlib.suppress(ConnectionError):  # the host process is gone, and with it the need for this one
        _park(link, Path(sys.argv[2]))


def _park(link: BlockingLink[Fork], base_dir: Path) -> None:
    started = time.monotonic()
    torch.set_num_threads(1)
    try:
        manifest = read_manifest(base_dir)
        model = load_model(base_dir)
    except TunefleetError as error:
        link.send(ParkFailed(message=error.message))
        sys.exit(1)
    gc.collect()
    gc.freeze()  # the children's collector leaves these pages alone, so that they stay shared
    link.send(Parked(pid=os.getpid(), stages={"load": time.monotonic() - started}))
    ParkedProcess(link, model, manifest).serve()


if __name__ == "__main__":
    main()
