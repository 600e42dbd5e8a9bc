"""Which replica takes a request. Pure: loads and randomness come in as arguments."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tunefleet.core import ReplicaInfo, ReplicaState

STARTING = frozenset({ReplicaState.NEW, ReplicaState.STARTING})


class Room(NamedTuple):
    """What a router knows of the replicas' room, beside what they tell.

    Attributes:
        max_num_seqs: sequences that a replica runs at once; more than that wait in its queue.
        in_flight: this router's own requests by replica id. What replicas tell is some milliseconds old
            (they tell every 50 ms), in which a burst would all go the same way.
    """

    max_num_seqs: int
    in_flight: Mapping[str, int]

    def load(self, replica: ReplicaInfo) -> int:
        """Requests running and waiting there, as far as anybody knows."""
        return max(replica.num_running + replica.num_waiting, self.in_flight.get(replica.replica_id, 0))

    def is_full(self, replica: ReplicaInfo) -> bool:
        """One more request would only wait."""
        return self.load(replica) >= self.max_num_seqs

    @property
    def margin(self) -> int:
        """So much lower a load is worth bringing an adapter there that is in a slot elsewhere."""
        return max(1, self.max_num_seqs // 4)


def choose(
    replicas: Iterable[ReplicaInfo], digest: str | None, room: Room, rng: random.Random, *, hold: bool = True
) -> ReplicaInfo | None:
    """A READY replica for a request, or None: hold it, and look again when something has changed.

    - An adapter goes where it is in a slot; to a second replica only when it is *hot*, see ``_spread``.
    - An adapter that is in no slot goes to its home, see ``by_weight``: every router knows the same one, so
      that requests which come while it is on its way follow it.
    - The base is everywhere: the less loaded of two.

    Args:
        digest: of the adapter; None for the base.
        hold: whether to wait for a replica that is starting, rather than in the queue of one that is full.
    """
    known = list(replicas)
    ready = [replica for replica in known if replica.state is ReplicaState.READY]
    with_room = [replica for replica in ready if not room.is_full(replica)]
    if not with_room and hold and any(replica.state in STARTING for replica in known):
        return None
    if not ready:
        return None
    if digest is None:
        return less_loaded_of_two(with_room or ready, room, rng)
    holders = [replica for replica in ready if digest in replica.digests]
    if holders:
        fit = [replica for replica in holders if not room.is_full(replica)]
        return _spread(ready, holders, digest, room) or less_loaded_of_two(fit or holders, room, rng)
    if with_room:
        return by_weight(with_room, digest)[0]
    return less_loaded_of_two(ready, room, rng)


def less_loaded_of_two(replicas: Sequence[ReplicaInfo], room: Room, rng: random.Random) -> ReplicaInfo:
    """Two replicas by chance, and of these the less loaded one.

    Nearly as even as the least loaded of all (the fullest of n has log log n / log 2 + O(1) above the mean
    instead of log n / log log n), and unlike it, routers that act at the same moment on the same news don't
    all choose the same replica. M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing",
    IEEE Transactions on Parallel and Distributed Systems 12(10), 2001.
    """
    return min(rng.sample(replicas, min(2, len(replicas))), key=room.load)


def by_weight(replicas: Iterable[ReplicaInfo], digest: str) -> list[ReplicaInfo]:
    """Replicas in an order that depends on the digest and their ids alone: the first is its home.

    Rendezvous hashing: of a replica that goes only its own digests move, evenly to all others; one that comes
    takes an even share, and nothing else moves. D. Thaler and C. Ravishankar, "Using Name-Based Mappings to
    Increase Hit Rates", IEEE/ACM Transactions on Networking 6(1), 1998.
    """
    return sorted(replicas, key=lambda replica: _weight(digest, replica.replica_id), reverse=True)


def _weight(digest: str, replica_id: str) -> bytes:
    """Not ``hash``, which differs between processes."""
    return hashlib.blake2b(f"{digest}\0{replica_id}".encode(), digest_size=8).digest()


def _spread(
    ready: Sequence[ReplicaInfo], holders: Sequence[ReplicaInfo], digest: str, room: Room
) -> ReplicaInfo | None:
    """One more replica for a hot adapter: all that have it are full, and the other has fewer by a margin.

    By weight, so that routers which see it at once agree on the one.
    """
    if not all(room.is_full(replica) for replica in holders):
        return None
    least = min(room.load(replica) for replica in holders)
    others = [replica for replica in ready if digest not in replica.digests]
    cooler = [replica for replica in others if room.load(replica) <= least - room.margin]
    return by_weight(cooler, digest)[0] if cooler else None
