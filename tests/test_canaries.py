from __future__ import annotations

import pytest

from catalog_kit import ALICE, push, upload
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.lookups import share
from tunefleet.core import Canary
from tunefleet.errors import AdapterConflict, AdapterNotFound, RequestInvalid

SESSIONS = [f"session-{number}" for number in range(200)]


@pytest.fixture
def catalog(catalog: Catalog) -> Catalog:
    push(catalog, ALICE, 1)
    catalog.add_version(ALICE, upload(2), promote=False)
    return catalog


def on_canary(catalog: Catalog) -> set[str]:
    return {session for session in SESSIONS if catalog.live(ALICE, session=session).version == 2}


def test_a_canary_answers_its_share_of_sessions_and_a_session_stays(catalog: Catalog) -> None:
    assert on_canary(catalog) == set()
    found = catalog.set_canary(ALICE, 2, 25)
    assert (found.record.version, found.canary) == (1, Canary(2, 25.0))
    quarter = on_canary(catalog)
    assert 25 < len(quarter) < 75
    assert on_canary(catalog) == quarter
    catalog.set_canary(ALICE, 2, 60)
    assert quarter < on_canary(catalog)
    catalog.set_canary(ALICE, 2, 100)
    assert on_canary(catalog) == set(SESSIONS)


def test_what_the_canary_answers_is_all_its_own(catalog: Catalog) -> None:
    catalog.update_user("default", "alice", fallback="base")
    catalog.set_canary(ALICE, 2, 100)
    assert catalog.live(ALICE, session="s") == catalog.numbered(ALICE, 2)
    assert catalog.live(ALICE, session="s").fallback == "base"


def test_without_a_session_the_live_version_answers(catalog: Catalog) -> None:
    catalog.set_canary(ALICE, 2, 100)
    assert catalog.live(ALICE).version == 1


def test_a_canary_ends_when_it_is_cleared(catalog: Catalog) -> None:
    catalog.set_canary(ALICE, 2, 100)
    assert catalog.clear_canary(ALICE).canary is None
    assert catalog.clear_canary(ALICE).canary is None
    assert on_canary(catalog) == set()


def test_promoting_the_canary_ends_it_and_promoting_another_version_does_not(catalog: Catalog) -> None:
    catalog.set_canary(ALICE, 2, 10)
    push(catalog, ALICE, 3)
    assert catalog.adapter(ALICE).canary == Canary(2, 10.0)
    catalog.promote(ALICE, 2)
    assert catalog.adapter(ALICE).canary is None


def test_rolling_back_to_the_canary_ends_it(catalog: Catalog) -> None:
    push(catalog, ALICE, 3)
    catalog.set_canary(ALICE, 1, 10)
    assert catalog.rollback(ALICE).version == 1
    assert catalog.adapter(ALICE).canary is None


@pytest.mark.parametrize("percent", [0, -1, 100.1, float("nan"), float("inf"), True])
def test_a_share_that_is_none_is_refused(catalog: Catalog, percent: float) -> None:
    with pytest.raises(RequestInvalid, match="above 0 and at most 100") as refusal:
        catalog.set_canary(ALICE, 2, percent)
    assert (refusal.value.code, refusal.value.param) == ("invalid_percent", "percent")


def test_a_canary_must_be_a_version_that_is_not_live(catalog: Catalog) -> None:
    with pytest.raises(AdapterConflict, match="version 1 of 'alice' is live already") as refusal:
        catalog.set_canary(ALICE, 1, 10)
    assert refusal.value.code == "version_is_live"
    with pytest.raises(AdapterNotFound, match="no version 9"):
        catalog.set_canary(ALICE, 9, 10)
    with pytest.raises(AdapterNotFound):
        catalog.set_canary(ALICE._replace(user_id="bob"), 1, 10)


def test_a_canary_beside_nothing_live_is_refused(catalog: Catalog) -> None:
    bob = ALICE._replace(user_id="bob")
    catalog.add_version(bob, upload(1, "bob/1"), promote=False)
    with pytest.raises(AdapterNotFound, match="none is live: promote one"):
        catalog.set_canary(bob, 1, 10)
    catalog.promote(bob, 1)
    assert catalog.adapter(bob).canary is None


def test_a_sessions_place_is_the_same_forever() -> None:
    """Test vectors: another hash would move everybody's sessions on an upgrade."""
    places = [round(share(1, session), 6) for session in ("", "a", "b", "\ud800")]
    assert places == [26.302555, 52.985655, 17.278141, 94.945926]
    assert share(2, "a") != share(1, "a")


def test_places_are_spread_evenly() -> None:
    places = [share(7, session) for session in SESSIONS]
    assert all(0 <= place < 100 for place in places)
    assert all(25 < sum(low <= place < low + 25 for place in places) < 75 for low in (0, 25, 50, 75))
