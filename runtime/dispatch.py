"""The seam between routers and the machine's side: hand in a sequence, get its tokens.

``runtime.machine.Machine`` is the real one (host process and replicas); ``runtime.fakes.FakeDispatcher``
ships for tests. Nothing on the router's side of this seam may assume that a replica is local.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from tunefleet.core import AdapterRef, PinTier
from tunefleet.messages import Forgotten, HeldAdapter, Progress, Status, Submit


class Run(Protocol):
    """One submitted sequence; lives until its iterator ends or ``aclose`` cancels it."""

    wake_s: float  # time that the request was held for a replica; 0.0 when one was READY
    cold_base: bool  # no replica was READY when it came
    replica_id: str  # empty until placed

    def __aiter__(self) -> AsyncIterator[Progress]:
        """Progress per step, the last with ``finish_reason``.

        A replica that dies in between is replaced: the iteration goes on after the tokens already given.

        Raises:
            CapacityError: queue full, or no replica within ``cold_start_timeout_s``.
            AdapterLoadFailed: the adapter can't be brought to the device.
            ReplicaError: the sequence failed (code says why).
        """
        ...

    async def aclose(self) -> None:
        """Cancels the sequence if it is still running; frees its rows and slot within one step."""
        ...


class Dispatcher(Protocol):
    """Opened once per router, before the first request."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def submit(self, work: Submit) -> Run: ...

    async def warmup(self) -> float:
        """Returns when a replica is READY; seconds that it took."""
        ...

    async def forget(self, digest: str, keys: Sequence[str] = ()) -> Forgotten:
        """Drops every copy of an adapter on the machine, and says how many there were.

        Args:
            keys: of its deleted objects; what is on its way from others' with the same bytes goes on.

        Raises:
            ReplicaError: the host process gave no answer (``host_unavailable``); ask again.
        """
        ...

    async def forget_user(self, tenant: str, user_id: str) -> None:
        """Has replicas drop what finished sequences of a deleted user left in their memory."""
        ...

    def hold(self, adapters: Sequence[HeldAdapter]) -> None:
        """Exempts these adapters from eviction, and no others of this router; brings them to their tier."""
        ...

    async def prefetch(self, ref: AdapterRef, tier: PinTier) -> None:
        """Has an adapter brought up to ``tier``; returns once that is asked for, not when it is there."""
        ...

    async def status(self) -> Status: ...
