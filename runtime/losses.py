"""Whether a request is what ends the replicas that it runs on. Pure."""

from __future__ import annotations

import enum

from tunefleet.errors import ReplicaError

MAX_SOLO_DEATHS = 2  # once may be chance: somebody killed the process just then
MAX_REPLICA_LOSSES = 8  # of a request that was never found out alone


class Loss(enum.Enum):
    """How a request's replica was lost, as far as its router can tell."""

    ALONE = "only this request was being computed"
    BESIDE = "another was being computed alone"
    TOGETHER = "any request of that replica may have done it"


class Losses:
    """What became of one request's replicas, from its first one to its end.

    A request that was there when a replica ended is a *suspect*: the next replica computes it alone until it
    has a new token, and says so before it does (``messages.Trial``). If that ends the replica too, nobody
    else is to blame. Everybody else's requests go on as if nothing had happened.
    """

    def __init__(self) -> None:
        self.is_suspect = False
        self._num_losses = 0
        self._num_solo_deaths = 0

    def note(self, loss: Loss) -> None:
        """One more replica is lost.

        Raises:
            ReplicaError: it is tried no more (``request_ends_replicas``, ``replica_lost``).
        """
        self._num_losses += 1
        self._num_solo_deaths += loss is Loss.ALONE
        self.is_suspect = self.is_suspect or loss is not Loss.BESIDE
        if self._num_solo_deaths >= MAX_SOLO_DEATHS:
            raise ReplicaError(
                f"{self._num_solo_deaths} replicas ended while they computed this request alone: it is not "
                "tried again; change its prompt, its parameters or its adapter before you repeat it",
                code="request_ends_replicas",
            )
        if self._num_losses > MAX_REPLICA_LOSSES:
            raise ReplicaError(
                f"the request was running when {self._num_losses} replicas ended; it is not tried again",
                code="replica_lost",
            )

    def clear(self) -> None:
        """It got a new token: whatever ended the last replica, this step of it doesn't."""
        self.is_suspect = False
