"""Prefixes: found by their own scope only, as long as they go, and never more than there is to know."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunefleet.runtime.prefixes import MAX_ENTRIES, MIN_MATCH, Match, PrefixTable, Scope

ALICE = Scope("default", "alice", "a")
TOKENS = tuple(range(100, 140))


def saved(scope: Scope = ALICE, tokens: tuple[int, ...] = TOKENS) -> PrefixTable:
    prefixes = PrefixTable()
    prefixes.save(scope, tokens)
    return prefixes


def save(prefixes: PrefixTable, scope: Scope, tokens: tuple[int, ...]) -> list[int]:
    """As the KV table does it; the entries that went."""
    if prefixes.covers(scope, tokens):
        return []
    dropped = prefixes.drop_superseded(scope, tokens)
    prefixes.save(scope, tokens)
    prefixes.check()
    return dropped


def test_a_longer_prompt_finds_what_it_begins_with() -> None:
    assert Match(0, 40) == saved().lookup(ALICE, [*TOKENS, 1, 2, 3])


def test_a_prompt_that_turns_off_finds_what_is_shared() -> None:
    assert Match(0, 20) == saved().lookup(ALICE, [*TOKENS[:20], 1, 2, 3])


def test_one_token_at_least_is_left_to_compute() -> None:
    assert Match(0, 39) == saved().lookup(ALICE, TOKENS)
    assert Match(0, 24) == saved().lookup(ALICE, TOKENS[:25])


def test_a_short_match_is_not_worth_it() -> None:
    assert saved().lookup(ALICE, [*TOKENS[:MIN_MATCH], 1]) is not None
    assert saved().lookup(ALICE, [*TOKENS[: MIN_MATCH - 1], 1]) is None
    assert saved().lookup(ALICE, [7]) is None


@pytest.mark.parametrize(
    "other",
    [
        Scope("default", "alice", "a2"),  # another version
        Scope("default", "alice", None),  # the base
        Scope("default", "bob", "a"),  # the same adapter, another user
        Scope("default", None, "a"),
        Scope("acme", "alice", "a"),  # another tenant
    ],
)
def test_no_other_scope_finds_it(other: Scope) -> None:
    assert saved().lookup(other, [*TOKENS, 1]) is None
    assert saved(other).lookup(ALICE, [*TOKENS, 1]) is None


def test_the_longest_of_several_is_found() -> None:
    prefixes = saved(tokens=(*TOKENS[:20], 1, 2, 3))
    prefixes.save(ALICE, (*TOKENS[:30], 4, 5, 6))
    assert Match(1, 30) == prefixes.lookup(ALICE, [*TOKENS, 1])


def test_a_longer_entry_takes_the_place_of_what_it_begins_with() -> None:
    prefixes = saved(tokens=TOKENS[:20])
    save(prefixes, ALICE, (*TOKENS[:10], 1, 2, 3))
    assert save(prefixes, ALICE, TOKENS) == [0]
    assert prefixes.num_tokens == 13 + 40


def test_what_is_there_already_is_not_saved_again() -> None:
    prefixes = saved()
    assert prefixes.covers(ALICE, TOKENS[:20])
    assert prefixes.covers(ALICE, TOKENS)
    assert not prefixes.covers(ALICE, (*TOKENS, 1))
    assert not prefixes.covers(ALICE._replace(user_id="bob"), TOKENS)


def test_a_scope_has_few_entries_and_the_least_recently_used_goes() -> None:
    prefixes = PrefixTable()
    for number in range(MAX_ENTRIES):
        assert save(prefixes, ALICE, (number, *TOKENS)) == []
    save(prefixes, ALICE._replace(user_id="bob"), TOKENS)
    prefixes.touch(0)
    assert save(prefixes, ALICE, TOKENS) == [1]
    assert len(prefixes) == MAX_ENTRIES + 1


def test_the_least_recently_used_of_all_scopes_is_dropped_first() -> None:
    prefixes = PrefixTable()
    for user_id in ("alice", "bob", "carol"):
        prefixes.save(Scope("default", user_id, None), TOKENS)
    prefixes.touch(0)
    assert [prefixes.drop_oldest() for _ in range(3)] == [1, 2, 0]
    assert (len(prefixes), prefixes.num_tokens) == (0, 0)


def test_a_deleted_adapter_or_user_leaves_nothing() -> None:
    prefixes = PrefixTable()
    for tenant, user_id, digest in itertools.product(["acme", "default"], ["alice", "bob"], ["a", "b"]):
        prefixes.save(Scope(tenant, user_id, digest), TOKENS)
    assert sorted(prefixes.forget("a")) == [0, 2, 4, 6]
    assert prefixes.forget_user("default", "alice") == [5]
    assert prefixes.lookup(ALICE, [*TOKENS, 1]) is None
    prefixes.check()
    assert len(prefixes) == 3


TEXT = st.lists(st.integers(0, 2), max_size=60)
SCOPES = st.sampled_from([ALICE, ALICE._replace(user_id="bob")])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(SCOPES, st.integers(0, 60), TEXT), max_size=20), SCOPES, st.integers(0, 60), TEXT)
def test_any_history_finds_the_longest_common_beginning(
    history: list[tuple[Scope, int, list[int]]], scope: Scope, num_shared: int, own: list[int]
) -> None:
    prefixes = PrefixTable()
    held: dict[int, tuple[Scope, tuple[int, ...]]] = {}
    for number, (of, num_same, rest) in enumerate(history):
        tokens = (*TOKENS[:num_same], *rest, number)
        if not prefixes.covers(of, tokens):
            for gone in prefixes.drop_superseded(of, tokens):
                del held[gone]
            held[prefixes.save(of, tokens)] = (of, tokens)
        prefixes.check()
    wanted = (*TOKENS[:num_shared], *own, 1)
    lengths = [num_common(tokens, wanted[:-1]) for of, tokens in held.values() if of == scope]
    longest = max(lengths, default=0)
    match = prefixes.lookup(scope, wanted)
    assert (longest if longest >= MIN_MATCH else None) == (match.num_tokens if match else None)
    if match is not None:
        of, tokens = held[match.entry]
        assert (scope, wanted[:longest]) == (of, tokens[:longest])


def num_common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
