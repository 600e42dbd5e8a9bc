"""Fairness: what counts as service, and that neither absence nor coming back pays."""

from __future__ import annotations

from tunefleet.runtime.fairness import DECODE_WEIGHT, MAX_ABSENT, Owner, ServiceCounters

ALICE, BOB, CAROL = (Owner("default", name) for name in ("alice", "bob", "carol"))


def test_decoded_tokens_weigh_twice_those_of_a_prompt() -> None:
    counters = ServiceCounters()
    counters.enter(ALICE)
    counters.charge(ALICE, num_prefill=10)
    counters.charge(ALICE, num_decode=3)
    assert counters[ALICE] == 10 + 3 * DECODE_WEIGHT


def test_a_newcomer_begins_at_the_least_served_of_those_who_are_there() -> None:
    counters = ServiceCounters()
    counters.enter(ALICE)
    counters.enter(BOB)
    counters.charge(ALICE, num_prefill=100)
    counters.charge(BOB, num_prefill=70)
    counters.enter(CAROL)
    assert counters[CAROL] == 70


def test_absence_earns_no_credit() -> None:
    counters = ServiceCounters()
    counters.enter(ALICE)
    counters.enter(BOB)
    counters.leave(BOB)
    counters.charge(ALICE, num_prefill=500)
    counters.enter(BOB)
    assert counters[BOB] == 500


def test_leaving_pays_no_debts() -> None:
    counters = ServiceCounters()
    counters.enter(ALICE)
    counters.enter(BOB)
    counters.charge(BOB, num_prefill=500)
    counters.leave(BOB)
    counters.enter(BOB)
    assert counters[BOB] == 500


def test_a_second_sequence_of_an_owner_changes_nothing() -> None:
    counters = ServiceCounters()
    counters.enter(ALICE)
    counters.enter(BOB)
    counters.charge(BOB, num_prefill=50)
    counters.enter(ALICE)
    assert (counters[ALICE], counters.num_active) == (0, 2)
    counters.leave(ALICE)
    assert counters.num_active == 2


def test_users_of_two_tenants_are_two_owners() -> None:
    counters = ServiceCounters()
    counters.enter(ALICE)
    counters.enter(Owner("acme", "alice"))
    assert counters.num_active == 2


def test_owners_without_sequences_are_forgotten_when_nobody_is_there() -> None:
    counters = ServiceCounters()
    for owner in (ALICE, BOB):
        counters.enter(owner)
        counters.charge(owner, num_prefill=10)
        counters.leave(owner)
    assert len(counters) == 0


def test_only_so_many_absent_owners_are_remembered_and_those_with_debts_first() -> None:
    counters = ServiceCounters()
    counters.enter(ALICE)
    for number in range(MAX_ABSENT + 10):
        visitor = Owner("default", f"{number}")
        counters.enter(visitor)
        counters.charge(visitor, num_prefill=number)
        counters.leave(visitor)
        counters.check()
    assert len(counters) == MAX_ABSENT + 1
    for number, service in ((0, 0), (MAX_ABSENT + 9, MAX_ABSENT + 9)):
        counters.enter(Owner("default", f"{number}"))
        assert service == counters[Owner("default", f"{number}")]
