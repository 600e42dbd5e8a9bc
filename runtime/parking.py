"""The host process's side of the parked process: start it, have it fork, hear what became of its children."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tunefleet.errors import ReplicaError
from tunefleet.messages import Fork, Forked, ForkRefused, Message, Parked, ParkedToHost, ParkFailed, Reaped
from tunefleet.runtime.environ import model_environ
from tunefleet.runtime.fresh import FreshStarts
from tunefleet.runtime.starter import StarterFactory
from tunefleet.runtime.wire import Connection

END_TIMEOUT_S = 1.0  # for the parked process to leave on SIGTERM: it has nothing to finish

log = logging.getLogger("tunefleet.host")

News = Forked | ForkRefused | Reaped


class Parking:
    """A ``starter.Starter`` with one parked process, started when first needed and again when it is gone.

    A replica that the parked process may not fork starts as a fresh process.

    Args:
        module: what is run with ``python -m``.
    """

    def __init__(
        self,
        base_dir: Path,
        *,
        on_forked: Callable[[Forked], None],
        on_reaped: Callable[[Reaped], None],
        on_lost: Callable[[], None],
        module: str = "tunefleet.runtime.parked",
    ) -> None:
        self._base_dir = base_dir
        self._on_forked = on_forked
        self._on_reaped = on_reaped
        self._on_lost = on_lost
        self._module = module
        self._fresh = FreshStarts(base_dir, on_forked=on_forked, on_reaped=on_reaped, on_lost=on_lost)
        self._process: _Process | None = None
        self._forks: dict[str, Fork] = {}  # asked of the parked process, not answered yet

    @property
    def pid(self) -> int:
        """Of a parked process that is ready to fork, else 0."""
        return self._process.parked.pid if self._process is not None and self._process.parked else 0

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage of its start."""
        return self._process.parked.stages if self._process is not None and self._process.parked else {}

    async def fork(self, message: Fork) -> None:
        """Asks for a child; ``on_forked`` tells when it exists.

        Raises:
            ReplicaError: the parked process can't get ready.
        """
        process = await self._ready()
        self._forks[message.replica_id] = message
        process.send(message)

    async def ensure(self) -> None:
        """Returns when the parked process is ready to fork."""
        await self._ready()

    async def close(self) -> None:
        """Ends the parked process, also one that is still starting; ``fork`` starts another."""
        process, self._process = self._process, None
        self._forks.clear()
        if process is not None:
            await process.end()

    async def _ready(self) -> _Process:
        process = self._process
        if process is None or process.is_over:
            command = [sys.executable, "-m", self._module]
            process = _Process(command, self._base_dir, self._on_news, self._on_ended)
            self._process = process
        await asyncio.shield(process.ready)
        return process

    def _on_news(self, news: News) -> None:
        match news:
            case Forked():
                self._forks.pop(news.replica_id, None)
                self._on_forked(news)
            case ForkRefused():
                message = self._forks.pop(news.replica_id, None)
                if message is not None:
                    self._start_fresh(message, news.reason)
            case Reaped():
                self._on_reaped(news)

    def _start_fresh(self, message: Fork, reason: str) -> None:
        log.error("replica %s starts as a fresh process, which is slow: %s", message.replica_id, reason)
        try:
            self._fresh.start(message, instead_of_fork=reason)
        except ReplicaError as error:
            self._on_reaped(
                Reaped(replica_id=message.replica_id, pid=0, exit_code=1, reason=f"{reason}; {error.message}")
            )

    def _on_ended(self) -> None:
        self._forks.clear()
        self._on_lost()


class _Process:
    """One parked process, from its start until it is reaped.

    Attributes:
        ready: done when it can fork; a ReplicaError when it ended before.
        parked: what it said of itself, while it can fork.

    Args:
        on_news: called for what it tells once it is ready.
        on_lost: called when it ended unasked after that.
    """

    def __init__(
        self,
        command: Sequence[str],
        base_dir: Path,
        on_news: Callable[[News], None],
        on_lost: Callable[[], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.parked: Parked | None = None
        self._on_news = on_news
        self._on_lost = on_lost
        self._connection: Connection[ParkedToHost] | None = None
        self._closed = asyncio.Event()
        self._is_ending = False
        self._life = loop.create_task(self._live(command, base_dir))

    @property
    def is_over(self) -> bool:
        """It forks no more."""
        return self._is_ending or self._closed.is_set() or self._life.done()

    def send(self, message: Message) -> None:
        if self._connection is not None:
            self._connection.send(message)

    async def end(self) -> None:
        """Returns when it is gone."""
        self._is_ending = True
        if self._connection is not None:
            self._connection.close()
        await asyncio.shield(self._life)

    async def _live(self, command: Sequence[str], base_dir: Path) -> None:
        try:
            process, link = _spawn(command, base_dir)
        except OSError as error:
            self._fail(f"the parked process can't be started: {error.strerror}")
            return
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection[ParkedToHost](ParkedToHost, self._on_message, self._on_close), sock=link
        )
        self._connection = connection
        if self._is_ending:
            connection.close()
        await self._closed.wait()
        await _reap(process)

    def _on_message(self, _: Connection[ParkedToHost], message: ParkedToHost) -> None:
        match message:
            case Parked():
                self.parked = message
                self.ready.set_result(None)
            case ParkFailed():
                self._fail(message.message)
            case _:
                self._on_news(message)

    def _on_close(self, _: Connection[ParkedToHost]) -> None:
        was_ready, self.parked = self.parked is not None, None
        self._closed.set()
        self._fail("the parked process ended while starting; see host.log in cache_dir/hosts")
        if was_ready and not self._is_ending:
            self._on_lost()

    def _fail(self, message: str) -> None:
        if not self.ready.done():
            self.ready.set_exception(ReplicaError(message, code="replica_start_failed"))


def _spawn(command: Sequence[str], base_dir: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process and our end of its link."""
    ours, theirs = socket.socketpair()
    with theirs, contextlib.ExitStack() as undo:
        undo.callback(ours.close)
        arguments = [*command, str(theirs.fileno()), str(base_dir)]
        process = subprocess.Popen(arguments, pass_fds=[theirs.fileno()], env=model_environ())
        undo.pop_all()
    ours.setblocking(False)
    return process, ours


async def _reap(process: subprocess.Popen[bytes]) -> None:
    """Returns when it is gone: its link is closed, but it may be busy, or stopped."""
    for end in (process.terminate, process.kill):
        end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, END_TIMEOUT_S)
            return
    log.error("the parked process %d doesn't end on SIGKILL", process.pid)


def starter_for(platform: str) -> StarterFactory:
    """By fork on Linux only: elsewhere the system's own libraries have threads, or there is no fork."""
    return Parking if platform == "linux" else FreshStarts


PLATFORM_STARTER = starter_for(sys.platform)
