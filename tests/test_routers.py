from __future__ import annotations

from catalog_kit import Clock, at_once, rows
from tunefleet.adapters_store.catalog import Catalog


def test_a_lease_goes_on_with_each_beat_until_the_router_leaves(catalog: Catalog, clock: Clock) -> None:
    catalog.beat("r1", 10)
    clock.move(5)
    catalog.beat("r1", 10)
    assert rows(catalog, "routers") == [("r1", "2026-11-24T12:00:15.000005Z")]
    catalog.leave("r1")
    catalog.leave("r1")
    assert rows(catalog, "routers") == []


def test_routers_that_died_are_forgotten_after_a_day(catalog: Catalog, clock: Clock) -> None:
    catalog.beat("r1", 10)
    clock.move(24 * 3600)
    catalog.beat("r2", 10)
    assert [row[0] for row in rows(catalog, "routers")] == ["r1", "r2"]
    clock.move(11)
    catalog.beat("r2", 10)
    assert [row[0] for row in rows(catalog, "routers")] == ["r2"]


def test_a_claim_is_one_holders_until_it_runs_out_or_he_leaves(catalog: Catalog, clock: Clock) -> None:
    assert catalog.claim("collector", "r1", 10)
    assert catalog.claim("collector", "r1", 10)
    assert not catalog.claim("collector", "r2", 10)
    assert catalog.claim("other", "r2", 10)
    clock.move(10)
    assert catalog.claim("collector", "r2", 10)
    assert not catalog.claim("collector", "r1", 10)
    catalog.leave("r2")
    assert catalog.claim("collector", "r1", 10)


def test_of_claims_at_once_one_is_given(catalog: Catalog) -> None:
    results = at_once([lambda n=n: catalog.claim("collector", f"r{n}", 10) for n in range(8)])
    assert sorted(map(bool, results)) == [False] * 7 + [True]


def test_a_claim_from_before_the_clock_went_back_is_no_claim(catalog: Catalog, clock: Clock) -> None:
    clock.move(3600)
    assert catalog.claim("collector", "r1", 10)
    clock.move(-3600)
    assert catalog.claim("collector", "r2", 10)
