"""The host process's interface, as a router sees it: start or join, place, watch, leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tunefleet.core import AdapterRef, PinTier, ReplicaInfo
from tunefleet.messages import Forgotten, HeldAdapter, Status

OnChange = Callable[[tuple[ReplicaInfo, ...]], None]


class HostLink(Protocol):
    """One router's link to whoever owns devices, replicas and adapter tiers.

    Implementations: ``local_link.LocalLink`` (this machine's host process over its Unix socket) and
    ``memory_link.MemoryLink`` (no processes at all: the shortest to read). To have a distributed engine
    place replicas, write a third, give it to ``Machine``, and run ``tests/host_conformance.py`` on it.

    What every implementation keeps:

    - A replica that is READY serves ``messages.RouterToReplica`` at its ``address``, which is anything that
      ``addresses.dial`` understands. Nobody else looks into an address, or uses a ``pid``.
    - A ``replica_id`` names one process for as long as the link lives, except over a loss of the host
      process, of which the watcher is told.
    - A replica that lost its host process ends by itself, so that none is left without one.
    - Links come and go without harm to each other: what a router asked for ends with its link.
    - All methods are called on one event loop, which none of them blocks.
    """

    def watch(self, on_change: OnChange) -> None:
        """Names who hears of replicas; once, before ``join``.

        Called with all replicas there are, at ``join`` and again at every change of a state or load: each
        state is told, in order (see ``core.ReplicaState``), and those STOPPED or FAILED are left out. While
        the host process is lost there are none.
        """
        ...

    async def join(self) -> None:
        """Joins the host process, starting it if there is none; however many do so at once, one starts.

        Returns once the watcher knows all replicas. From then on a host process that is lost is started and
        joined again without being asked, and told again what this router holds and what it waits for.

        Raises:
            ConfigError: one runs for the same store and base with other options.
            ReplicaError: none comes up (``host_unavailable``).
        """
        ...

    async def leave(self) -> None:
        """Ends the link; the host process leaves after its last one. Safe to call again, and unjoined."""
        ...

    async def place(self, request_id: str) -> None:
        """Has one more request wait for a replica, from this call until it returns or is cancelled.

        Returns when a replica has *become* READY since the call; the watcher has heard of it by then. That is
        no promise of room there: who finds none calls again, and counts on. How many replicas so many waiting
        requests are worth is for the host process to decide.

        Raises:
            CapacityError: no replica can be started (``replica_start_failed``), with the reason, and when it
                will be tried again as ``retry_after_s``. Never later than a start takes to fail.
            ReplicaError: there is no host process, and none comes up (``host_unavailable``).
        """
        ...

    async def forget(self, digest: str, keys: Sequence[str] = ()) -> Forgotten:
        """Drops every copy of an adapter on the machine, and says how many there were.

        Args:
            keys: of its deleted objects; what is on its way from others' with the same bytes goes on.

        Raises:
            ReplicaError: there was no answer (``host_unavailable``); ask again.
        """
        ...

    def hold(self, adapters: Sequence[HeldAdapter]) -> None:
        """Exempts these adapters from eviction, and no others of this router; brings them to their tier."""
        ...

    async def prefetch(self, ref: AdapterRef, tier: PinTier) -> None:
        """Has an adapter brought up to ``tier``; returns once that is asked for, not when it is there."""
        ...

    async def status(self) -> Status:
        """What there is, and the last error.

        Raises:
            ReplicaError: there was no answer (``host_unavailable``); ask again.
        """
        ...
