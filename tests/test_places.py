"""Places: equal shares, and who gives way to whom."""

from __future__ import annotations

from scheduler_kit import new_sequence
from tunefleet.runtime.fairness import Owner, ServiceCounters
from tunefleet.runtime.places import MIN_PROGRESS, Places
from tunefleet.runtime.sequence import Sequence

ALICE, BOB, CAROL = (Owner("default", name) for name in ("alice", "bob", "carol"))


def new_places(max_places: int, *user_ids: str) -> tuple[Places, list[Sequence]]:
    """One running sequence for each, and who else has sequences at all: carol."""
    counters = ServiceCounters()
    counters.enter(CAROL)
    places = Places(max_places, counters)
    sequences = [new_sequence(f"{n}", user_id=user_id) for n, user_id in enumerate(user_ids)]
    for arrival, sequence in enumerate(sequences):
        sequence.arrival = arrival
        counters.enter(sequence.owner)
        places.take(sequence)
        places.check()
    return places, sequences


def test_a_share_is_an_equal_part_of_the_places_and_one_at_least() -> None:
    assert new_places(8, "alice")[0].share == 4
    assert new_places(8, "alice", "bob")[0].share == 2
    assert new_places(2, "alice", "bob")[0].share == 1


def test_the_biggest_owners_youngest_gives_way() -> None:
    places, sequences = new_places(6, "alice", "alice", "bob", "alice", "bob", "bob")
    sequences[5].num_preemptions = 1
    assert places.overserved() == {ALICE, BOB}
    assert places.victim_for(CAROL) is sequences[4]
    places.give_back(sequences[2])
    assert places.victim_for(CAROL) is sequences[3]
    places.check()


def test_who_has_its_share_takes_nobodys_place() -> None:
    places, _ = new_places(4, "alice", "alice", "alice", "bob")
    assert places.served() == {ALICE, BOB}
    assert places.victim_for(BOB) is None
    assert places.victim_for(CAROL) is not None


def test_nobody_gives_way_while_all_keep_to_their_share() -> None:
    places, _ = new_places(3, "alice", "bob")
    assert places.victim_for(CAROL) is None


def test_who_gave_way_makes_some_progress_before_it_does_again() -> None:
    places, (first, second) = new_places(2, "alice", "alice")
    for sequence in (first, second):
        sequence.num_preemptions, sequence.preempted_at = 1, len(sequence.tokens)
        sequence.tokens += [5] * (MIN_PROGRESS - 1)
    assert places.victim_for(CAROL) is None
    first.tokens.append(5)
    assert places.victim_for(CAROL) is first
