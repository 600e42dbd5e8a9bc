"""Promote pushes, rollback pops: what was live before follows history, not numbers."""

from __future__ import annotations

import pytest

from catalog_kit import ALICE, at_once, push, rows, upload
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.errors import AdapterConflict, AdapterNotFound


def history(catalog: Catalog) -> list[tuple[int, bool]]:
    """Versions in the order in which they became live, and whether the entry still stands."""
    return [(row[2], row[4] is None) for row in rows(catalog, "live_history")]  # type: ignore[misc]


def test_promote_is_one_commit_with_its_history(catalog: Catalog) -> None:
    for number in (1, 2):
        catalog.add_version(ALICE, upload(number), promote=number == 1)
    assert catalog.promote(ALICE, 2, if_live=1).live
    catalog.promote(ALICE, 2)  # already live: no entry
    catalog.promote(ALICE, 1)
    assert history(catalog) == [(1, True), (2, True), (1, True)]
    assert [record.live for record in catalog.versions(ALICE, after=None, limit=10)] == [False, True]


def test_rollback_goes_to_what_was_live_before_and_again_one_further(catalog: Catalog) -> None:
    push(catalog, ALICE, 1, 2, 3)
    catalog.promote(ALICE, 1)
    seen = [catalog.rollback(ALICE) for _ in range(3)]
    assert [(record.version, record.live) for record in seen] == [(3, True), (2, True), (1, True)]
    assert history(catalog) == [(1, True), (2, False), (3, False), (1, False)]
    with pytest.raises(AdapterConflict, match="promote a version instead") as refusal:
        catalog.rollback(ALICE)
    assert refusal.value.code == "no_earlier_version"
    assert catalog.live(ALICE).version == 1


def test_after_a_rollback_a_promote_begins_a_new_branch(catalog: Catalog) -> None:
    push(catalog, ALICE, 1, 2, 3)
    catalog.rollback(ALICE)
    push(catalog, ALICE, 4)
    assert [catalog.rollback(ALICE).version for _ in range(2)] == [2, 1]


def test_rollback_to_a_version_goes_down_to_it(catalog: Catalog) -> None:
    push(catalog, ALICE, 1, 2, 3, 4)
    assert catalog.rollback(ALICE, to=2).version == 2
    assert catalog.rollback(ALICE).version == 1


def test_rollback_to_a_version_that_was_rolled_back_brings_it_back(catalog: Catalog) -> None:
    push(catalog, ALICE, 1, 2)
    catalog.rollback(ALICE)
    assert catalog.rollback(ALICE, to=2).version == 2
    assert history(catalog) == [(1, True), (2, False), (2, True)]
    assert catalog.rollback(ALICE).version == 1


def test_rollback_to_the_live_version_changes_nothing(catalog: Catalog) -> None:
    push(catalog, ALICE, 1, 2)
    assert catalog.rollback(ALICE, to=2).live
    assert history(catalog) == [(1, True), (2, True)]


def test_rollback_to_a_version_that_never_was_live_is_a_conflict(catalog: Catalog) -> None:
    push(catalog, ALICE, 1)
    catalog.add_version(ALICE, upload(2), promote=False)
    with pytest.raises(AdapterConflict, match="version 2 of 'alice' was never live: promote it") as refusal:
        catalog.rollback(ALICE, to=2)
    assert (refusal.value.code, refusal.value.param) == ("never_live", "to")
    with pytest.raises(AdapterNotFound, match="no version 3"):
        catalog.rollback(ALICE, to=3)
    assert catalog.live(ALICE).version == 1


def test_rollback_needs_something_live(catalog: Catalog) -> None:
    with pytest.raises(AdapterNotFound):
        catalog.rollback(ALICE)
    catalog.add_version(ALICE, upload(1), promote=False)
    with pytest.raises(AdapterConflict) as refusal:
        catalog.rollback(ALICE)
    assert refusal.value.code == "no_earlier_version"


def test_rollback_of_another_live_version_is_a_conflict(catalog: Catalog) -> None:
    push(catalog, ALICE, 1, 2)
    with pytest.raises(AdapterConflict, match="version 2 of 'alice' is live, not 1") as refusal:
        catalog.rollback(ALICE, if_live=1)
    assert refusal.value.code == "live_version_changed"
    assert catalog.rollback(ALICE, if_live=2).version == 1


def test_a_deleted_version_leaves_the_history(catalog: Catalog) -> None:
    push(catalog, ALICE, 1, 2)
    catalog.promote(ALICE, 1)
    push(catalog, ALICE, 3)
    catalog.delete_version(ALICE, 2)
    assert history(catalog) == [(1, True), (1, True), (3, True)]
    assert catalog.rollback(ALICE).version == 1
    with pytest.raises(AdapterConflict):  # version 1 below version 1 is nothing to go back to
        catalog.rollback(ALICE)


def test_of_changes_that_expect_the_same_live_version_one_wins(catalog: Catalog) -> None:
    push(catalog, ALICE, 1, 2, 3)
    for _ in range(5):
        live = catalog.live(ALICE).version
        others = [number for number in (1, 2, 3) if number != live]
        results = at_once(
            [lambda n=n, live=live: catalog.promote(ALICE, n, if_live=live) for n in others * 3]
        )
        winners = [result for result in results if not isinstance(result, Exception)]
        losers = [result for result in results if isinstance(result, AdapterConflict)]
        assert (len(winners), len(losers)) == (1, 5)
        assert catalog.live(ALICE).version == winners[0].version  # type: ignore[attr-defined]


def test_of_rollbacks_at_once_one_wins_and_goes_one_back(catalog: Catalog) -> None:
    push(catalog, ALICE, 1, 2, 3, 4)
    results = at_once([lambda: catalog.rollback(ALICE, if_live=4) for _ in range(6)])
    assert sum(isinstance(result, AdapterConflict) for result in results) == 5
    assert catalog.live(ALICE).version == 3
