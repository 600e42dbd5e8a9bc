from __future__ import annotations

import pytest

from catalog_kit import ALICE, BASE, Clock, push, upload
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.core import Pin, PinTier
from tunefleet.errors import AdapterNotFound, RequestInvalid

BOB = ALICE._replace(user_id="bob", tenant="other")


@pytest.fixture
def catalog(catalog: Catalog) -> Catalog:
    push(catalog, ALICE, 1, 2)
    push(catalog, BOB, 3)
    return catalog


def pinned(catalog: Catalog, base: str = BASE) -> list[tuple[str, str, PinTier]]:
    return [(each.ref.tenant, each.ref.digest.lstrip("0"), each.tier) for each in catalog.pinned(base)]


def test_the_live_versions_of_pinned_adapters_are_told(catalog: Catalog) -> None:
    assert pinned(catalog) == []
    assert catalog.set_pin(ALICE, Pin("host")).pin == Pin("host")
    catalog.set_pin(BOB, Pin("disk"))
    assert pinned(catalog) == [("default", "2", "host"), ("other", "3", "disk")]
    assert pinned(catalog, "tiny@2") == []
    assert catalog.pinned(BASE)[0].ref == catalog.live(ALICE).ref
    assert len(catalog.pinned(BASE, limit=1)) == 1


def test_a_pin_follows_what_is_live_and_covers_the_canary(catalog: Catalog) -> None:
    catalog.set_pin(ALICE, Pin("host"))
    catalog.rollback(ALICE)
    assert pinned(catalog) == [("default", "1", "host")]
    catalog.set_canary(ALICE, 2, 5)
    assert pinned(catalog) == [("default", "1", "host"), ("default", "2", "host")]


def test_a_pin_ends_with_its_time_or_when_it_is_cleared(catalog: Catalog, clock: Clock) -> None:
    found = catalog.set_pin(ALICE, Pin("disk", "2026-11-24T13:01:00+01:00"))
    assert found.pin == Pin("disk", "2026-11-24T12:01:00.000000Z")
    clock.move(59)
    assert len(pinned(catalog)) == 1
    clock.move(1)
    assert pinned(catalog) == []
    assert catalog.adapter(ALICE).pin is None
    catalog.set_pin(ALICE, Pin("host"))
    assert catalog.clear_pin(ALICE).pin is None
    assert catalog.clear_pin(ALICE).pin is None
    assert pinned(catalog) == []


@pytest.mark.parametrize(
    "until", ["2026-11-24T12:00:00Z", "2020-01-01T00:00:00Z", "tomorrow", "", "2026-11-24T12:01:00", "9999"]
)
def test_a_time_that_is_none_or_over_is_refused(catalog: Catalog, until: str) -> None:
    with pytest.raises(RequestInvalid, match="until") as refusal:
        catalog.set_pin(ALICE, Pin("disk", until))
    assert (refusal.value.code, refusal.value.param) == ("invalid_until", "until")


def test_a_tier_must_be_one(catalog: Catalog) -> None:
    with pytest.raises(RequestInvalid, match="disk or host"):
        catalog.set_pin(ALICE, Pin("device"))  # type: ignore[arg-type]


def test_what_has_nothing_live_cant_be_pinned(catalog: Catalog) -> None:
    carol = ALICE._replace(user_id="carol")
    with pytest.raises(AdapterNotFound):
        catalog.set_pin(carol, Pin("disk"))
    catalog.add_version(carol, upload(1), promote=False)
    with pytest.raises(AdapterNotFound):
        catalog.set_pin(carol, Pin("disk"))
    assert pinned(catalog) == []
