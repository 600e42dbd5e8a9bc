from __future__ import annotations

import pytest

from catalog_kit import ALICE, at_once, push
from tunefleet.adapters_store.catalog import Catalog, UserRecord
from tunefleet.errors import AdapterNotFound, RequestInvalid

CREATED = "2026-11-24T12:00:00.000005Z"


def test_what_isnt_given_stays(catalog: Catalog) -> None:
    catalog.update_user("default", "alice", fallback="base", limits={"rpm": 5}, metadata={"plan": "é"})
    catalog.update_user("default", "alice", metadata={})
    expected = UserRecord("alice", 0, CREATED, "base", {"rpm": 5}, {})
    assert catalog.user("default", "alice") == expected
    assert catalog.update_user("default", "alice") == expected
    assert catalog.update_user("default", "alice", fallback=None).fallback is None


def test_a_user_is_made_where_there_is_none(catalog: Catalog) -> None:
    assert catalog.update_user("default", "bob") == UserRecord("bob", 0, CREATED, None, {}, {})
    push(catalog, ALICE._replace(user_id="bob"), 1)
    assert catalog.users("default", after=None, limit=9) == [UserRecord("bob", 1, CREATED, None, {}, {})]


def test_a_fallback_must_be_none_or_base(catalog: Catalog) -> None:
    with pytest.raises(RequestInvalid, match="none, base or null") as refusal:
        catalog.update_user("default", "alice", fallback="live")
    assert (refusal.value.code, refusal.value.param) == ("invalid_fallback", "fallback")
    with pytest.raises(AdapterNotFound):
        catalog.user("default", "alice")


def test_one_tenants_change_is_not_anothers(catalog: Catalog) -> None:
    for tenant, fallback in (("a", "base"), ("b", "none")):
        catalog.update_user(tenant, "alice", fallback=fallback)
    assert [catalog.user(tenant, "alice").fallback for tenant in ("a", "b")] == ["base", "none"]


def test_a_user_made_by_many_at_once_is_one(catalog: Catalog) -> None:
    calls = [lambda n=n: catalog.update_user("new", "alice", metadata={str(n): n}) for n in range(12)]
    results = at_once(calls)
    assert all(isinstance(result, UserRecord) for result in results), results
    assert len(catalog.users("new", after=None, limit=99)) == 1
