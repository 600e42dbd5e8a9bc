"""What is another tenant's, another user's or another adapter's is simply not there, for every method."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from catalog_kit import ALICE, begun, dump, push, upload
from tunefleet.adapters_store.catalog import AdapterName, Catalog
from tunefleet.core import Pin
from tunefleet.errors import AdapterConflict, AdapterNotFound

Call = Callable[[Catalog, AdapterName, str], object]

REFUSED: dict[str, Call] = {  # with alice's version numbers and ids, as somebody else
    "live": lambda catalog, other, _: catalog.live(other, session="s"),
    "numbered": lambda catalog, other, _: catalog.numbered(other, 1),
    "version": lambda catalog, other, _: catalog.version(other, 1),
    "adapter": lambda catalog, other, _: catalog.adapter(other),
    "promote": lambda catalog, other, _: catalog.promote(other, 1),
    "rollback": lambda catalog, other, _: catalog.rollback(other, to=1),
    "set_canary": lambda catalog, other, _: catalog.set_canary(other, 1, 10),
    "clear_canary": lambda catalog, other, _: catalog.clear_canary(other),
    "set_pin": lambda catalog, other, _: catalog.set_pin(other, Pin("disk")),
    "clear_pin": lambda catalog, other, _: catalog.clear_pin(other),
    "upload": lambda catalog, other, _: catalog.upload(other, "u1"),
    "add_version": lambda catalog, other, _: catalog.add_version(
        other, upload(9), promote=True, upload_id="u1"
    ),
    "delete_version": lambda catalog, other, _: catalog.delete_version(other, 1),
}
EMPTY: dict[str, Call] = {
    "versions": lambda catalog, other, _: catalog.versions(other, after=None, limit=9),
    "answered": lambda catalog, other, _: catalog.answered(other, upload(2).digest),
}
BY_TENANT: dict[str, Call] = {
    "user": lambda catalog, other, _: catalog.user(other.tenant, "alice"),
    "delete_user": lambda catalog, other, _: catalog.delete_user(other.tenant, "alice"),
    "deletion": lambda catalog, other, deletion_id: catalog.deletion(other.tenant, deletion_id),
}
TENANT_PAGES: dict[str, Call] = {
    "users": lambda catalog, other, _: catalog.users(other.tenant, after=None, limit=9),
}
MAKES_ITS_OWN = {"update_user", "begin_upload"}  # of whoever is named
NO_USERS = {  # of routers, or of digests and prefixes that only the store itself names
    "timestamp", "known_digests", "referenced", "pinned", "extend_upload", "end_upload", "expired_uploads",
    "pending_deletions", "claim_deletion", "note_objects", "ack_deletion", "finish_deletion", "unacked",
    "beat", "leave", "claim",
}  # fmt: skip
TABLES: list[dict[str, Call]] = [REFUSED, EMPTY, BY_TENANT, TENANT_PAGES]


@pytest.fixture
def catalog(catalog: Catalog) -> Catalog:
    push(catalog, ALICE, 1, 2)
    catalog.begin_upload(ALICE, begun(catalog, "u1"))
    return catalog


def test_every_method_is_in_one_table() -> None:
    methods = {name for name in vars(Catalog) if not name.startswith("_")} - {"close"}
    named = [*(name for table in TABLES for name in table), *MAKES_ITS_OWN, *NO_USERS]
    assert sorted(methods) == sorted(named)


@pytest.mark.parametrize("other", [
    ALICE._replace(tenant="other"), ALICE._replace(tenant="Default"), ALICE._replace(user_id="alice2"),
    ALICE._replace(user_id="ALICE"), ALICE._replace(name="work"), ALICE._replace(base="tiny@2"),
])  # fmt: skip
def test_no_adapter_reaches_anothers(catalog: Catalog, other: AdapterName) -> None:
    before = dump(catalog)
    for name, call in REFUSED.items():
        with pytest.raises((AdapterNotFound, AdapterConflict)) as refusal:
            call(catalog, other, "")
        if name != "add_version":
            assert isinstance(refusal.value, AdapterNotFound), name
    assert {name: call(catalog, other, "") for name, call in EMPTY.items()} == {
        "versions": [],
        "answered": None,
    }
    assert dump(catalog) == before


@pytest.mark.parametrize("tenant", ["other", "Default", "default ", "defaul", "%", "default' OR '1'='1"])
def test_no_tenant_reaches_anothers(catalog: Catalog, tenant: str) -> None:
    deletion_id = catalog.delete_version(ALICE, 1).deletion_id
    before = dump(catalog)
    other = ALICE._replace(tenant=tenant)
    for call in BY_TENANT.values():
        with pytest.raises(AdapterNotFound):
            call(catalog, other, deletion_id)
    assert [call(catalog, other, "") for call in TENANT_PAGES.values()] == [[]]
    assert dump(catalog) == before


def test_a_namesakes_own_things_are_his(catalog: Catalog) -> None:
    twin = ALICE._replace(tenant="other")
    before = [row for row in dump(catalog).splitlines() if row.startswith("users")]
    catalog.update_user("other", "alice", fallback="base")
    catalog.begin_upload(twin, begun(catalog, "u2"))
    assert catalog.user("default", "alice").fallback is None
    assert catalog.delete_user("other", "alice").prefixes == ("staging/default/u2",)
    assert [row for row in dump(catalog).splitlines() if row.startswith("users")] == before
    assert catalog.upload(ALICE, "u1").upload_id == "u1"
    assert catalog.live(ALICE).version == 2
