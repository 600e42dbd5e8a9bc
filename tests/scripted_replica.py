"""A replica that counts instead of computing, and dies when told; speaks a replica's protocol for real."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from tunefleet.core import FinishReason
from tunefleet.errors import ReplicaError
from tunefleet.messages import Cancel, Progress, Rejected, RouterToReplica, Step, Submit, Trial
from tunefleet.runtime.memory_link import MemoryHost
from tunefleet.runtime.wire import Connection

Router = Connection[RouterToReplica]
Ends = Callable[[Sequence[Submit], int], bool]


class _Counting:
    """One request as it stands here."""

    def __init__(self, work: Submit, router: Router) -> None:
        self.work = work
        self.router = router
        self.num_tokens = len(work.generated)
        self.is_suspect = work.suspect


def never(together: Sequence[Submit], num_tokens: int) -> bool:
    """Ends no replica."""
    return False


class ScriptedReplica:
    """The token at index i of every answer is i. Suspects are computed alone, in turn with all others.

    Args:
        ends: whether a step of these requests, whose longest has so many tokens, ends the process.
    """

    def __init__(self, address: str, ends: Ends = never) -> None:
        self.address = address
        self.submitted: list[Submit] = []
        self.is_draining = False
        self.num_rejected = 0
        self.stepping = asyncio.Event()  # cleared: it stands still
        self.stepping.set()
        self._ends = ends
        self._sequences: dict[str, _Counting] = {}
        self._routers: set[Router] = set()
        self._news = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._loop: asyncio.Task[None] | None = None

    @property
    def num_running(self) -> int:
        return len(self._sequences)

    async def serve(self, port: int | None = None) -> None:
        loop = asyncio.get_running_loop()

        def connection() -> Router:
            return Connection[RouterToReplica](
                RouterToReplica, self._on_message, self._routers.discard, self._routers.add
            )

        if port is None:
            self._server = await loop.create_unix_server(connection, self.address)
        else:
            self._server = await loop.create_server(connection, "127.0.0.1", port)
            port = self._server.sockets[0].getsockname()[1]
            self.address = f"tcp://127.0.0.1:{port}"
        self._loop = asyncio.create_task(self._run())

    def die(self) -> None:
        """As a killed process leaves: every connection closes, what was sent arrives."""
        if self._server is not None:
            self._server.close()
        for router in list(self._routers):
            router.close()
        if self._loop is not None:
            self._loop.cancel()
        Path(self.address).unlink(missing_ok=True)

    def _on_message(self, router: Router, message: RouterToReplica) -> None:
        if isinstance(message, Submit):
            if self.is_draining:
                self.num_rejected += 1
                router.send(Rejected(request_id=message.request_id))
                return
            self.submitted.append(message)
            self._sequences[message.request_id] = _Counting(message, router)
        elif isinstance(message, Cancel):
            self._sequences.pop(message.request_id, None)
        self._news.set()

    async def _run(self) -> None:
        while True:
            await self._news.wait()
            while self._sequences:
                await self.stepping.wait()
                await asyncio.sleep(0)
                suspects = [each for each in self._sequences.values() if each.is_suspect]
                others = [each for each in self._sequences.values() if not each.is_suspect]
                for suspect in suspects[:1]:
                    self._tell(Trial(request_id=suspect.work.request_id))
                    self._step([suspect])
                    self._tell(Trial(request_id=""))
                self._step(others)
            self._news.clear()

    def _tell(self, message: Trial) -> None:
        for router in self._routers:
            router.send(message)

    def _step(self, sequences: list[_Counting]) -> None:
        together = [each.work for each in sequences]
        if sequences and self._ends(together, max(each.num_tokens for each in sequences)):
            self.die()
            raise asyncio.CancelledError
        for each in sequences:
            each.router.send(Step(items=(self._token(each),)))

    def _token(self, sequence: _Counting) -> Progress:
        work, token = sequence.work, sequence.num_tokens
        sequence.num_tokens += 1
        sequence.is_suspect = False
        reason = FinishReason.LENGTH if sequence.num_tokens == work.sampling.max_tokens else None
        if reason is not None:
            self._sequences.pop(work.request_id, None)
        return Progress(request_id=work.request_id, tokens=(token,), finish_reason=reason)


class ScriptedReplicas:
    """A MemoryHost whose replicas are scripted; close it after the routers."""

    def __init__(self, folder: Path, ends: Ends = never, *, max_replicas: int = 1, concurrency: int = 32):
        self.all: list[ScriptedReplica] = []
        self.num_failures = 0  # starts that fail, once there was a replica
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.host = MemoryHost(self._start, max_replicas=max_replicas, target_concurrency=concurrency)
        self._folder = folder
        self._ends = ends

    async def _start(self, replica_id: str) -> str:
        await self.may_start.wait()
        if self.all and self.num_failures:
            self.num_failures -= 1
            raise ReplicaError("no memory")

        def ends(together: Sequence[Submit], num_tokens: int) -> bool:
            is_end = self._ends(together, num_tokens)
            if is_end:
                asyncio.get_running_loop().call_soon(self.host.lose, replica_id)
            return is_end

        replica = ScriptedReplica(str(self._folder / f"{replica_id}.sock"), ends)
        await replica.serve()
        self.all.append(replica)
        return replica.address

    def close(self) -> None:
        for replica in self.all:
            replica.die()
