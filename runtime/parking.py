"""The host process's side of the parked process: start it, have it fork, hear what became of its children."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tunefleet.errors import ReplicaError
from tunefleet.messages import Fork, Forked, Parked, ParkedToHost, ParkFailed, Reaped
from tunefleet.runtime.wire import Connection

ENVIRON = {  # of the parked process and so of its replicas; what is set already stays as it is
    "GOMP_SPINCOUNT": "10000",  # a moment: who spins longer at a barrier may rob whom it waits for
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # weights on huge pages: products are a tenth faster
    "TOKENIZERS_PARALLELISM": "false",
}


class Parking:
    """One parked process, started when first needed and again when it is gone.

    Args:
        on_forked, on_reaped: called for each child that begins or ends.
        on_lost: the parked process ended unasked; its children live on, but nobody reports their ends.
    """

    def __init__(
        self,
        base_dir: Path,
        *,
        on_forked: Callable[[Forked], None],
        on_reaped: Callable[[Reaped], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.pid = 0
        self.stages: dict[str, float] = {}
        self._base_dir = base_dir
        self._on_forked = on_forked
        self._on_reaped = on_reaped
        self._on_lost = on_lost
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[ParkedToHost] | None = None
        self._ready: asyncio.Future[None] | None = None

    async def fork(self, message: Fork) -> None:
        """Asks for a child; ``on_forked`` tells when it exists.

        Raises:
            ReplicaError: the parked process can't get ready.
        """
        await self.ensure()
        assert self._connection is not None
        self._connection.send(message)

    async def ensure(self) -> None:
        """Returns when the parked process is ready to fork."""
        if self._ready is None or (
            self._ready.done() and (self._connection is None or not self._connection.is_open)
        ):
            await self._start()
        assert self._ready is not None
        await asyncio.shield(self._ready)

    async def close(self) -> None:
        """Ends the parked process."""
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await asyncio.to_thread(process.wait)

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        ours, theirs = socket.socketpair()
        with theirs:
            if self._process is not None:
                self._process.wait()  # it is gone already: reap it
            command = [
                sys.executable,
                "-m",
                "tunefleet.runtime.parked",
                str(theirs.fileno()),
                str(self._base_dir),
            ]
            environ = {**ENVIRON, **os.environ, "OPENBLAS_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environ)
        ours.setblocking(False)
        _, self._connection = await loop.create_connection(
            lambda: Connection[ParkedToHost](ParkedToHost, self._on_message, self._on_close), sock=ours
        )

    def _on_message(self, _: Connection[ParkedToHost], message: ParkedToHost) -> None:
        match message:
            case Parked():
                self.pid, self.stages = message.pid, message.stages
                if self._ready is not None and not self._ready.done():
                    self._ready.set_result(None)
            case ParkFailed():
                self._fail(message.message)
            case Forked():
                self._on_forked(message)
            case Reaped():
                self._on_reaped(message)

    def _on_close(self, _: Connection[ParkedToHost]) -> None:
        was_ready, self.pid = self.pid != 0, 0
        self._fail("the parked process ended while starting; see host.log in cache_dir/hosts")
        if was_ready and self._process is not None:
            self._on_lost()

    def _fail(self, message: str) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(ReplicaError(message, code="replica_start_failed"))
