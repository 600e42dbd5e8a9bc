"""Deletions in the catalog: everything of a user goes in one transaction, and the receipt adds up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from catalog_kit import ALICE, Clock, at_once, begun, dump, push, rows, upload
from tunefleet.adapters_store.catalog import Added, Catalog, DeletionRecord
from tunefleet.adapters_store.repeats import upload_key
from tunefleet.core import Pin
from tunefleet.errors import AdapterConflict, AdapterNotFound

ZOE = ALICE._replace(user_id="zoe-the-user")
WORK = ZOE._replace(name="work")


@pytest.fixture
def catalog(catalog: Catalog) -> Catalog:
    push(catalog, ALICE, 1)
    return catalog


def fill(catalog: Catalog) -> None:
    """All that a user can have."""
    for number, adapter in ((1, ZOE), (2, ZOE), (3, ZOE), (4, WORK)):
        key = upload_key(f"k{number}", number)
        catalog.add_version(adapter, upload(number, f"default/z{number}"), promote=True, key=key)
    catalog.rollback(ZOE)
    catalog.set_canary(ZOE, 1, 5)
    catalog.set_pin(ZOE, Pin("host"))
    catalog.begin_upload(ZOE, begun(catalog, "u1"))
    catalog.update_user("default", "zoe-the-user", fallback="base", metadata={"name": "zoe-the-user"})


def finished(catalog: Catalog, record: DeletionRecord) -> DeletionRecord:
    for prefix in record.prefixes:
        catalog.note_objects(record.deletion_id, prefix, 2, [])
    done = catalog.finish_deletion(record.deletion_id)
    assert done is not None
    return done


def test_a_deleted_user_is_in_no_table_once_it_is_done(catalog: Catalog) -> None:
    before = dump(catalog)
    fill(catalog)
    record = catalog.delete_user("default", "zoe-the-user")
    assert (record.status, record.user_id, record.name, record.version) == (
        "pending",
        "zoe-the-user",
        None,
        None,
    )
    done = finished(catalog, record)
    assert (done.status, done.user_id, done.finished_at) == ("done", None, "2026-11-24T12:00:00.000005Z")
    after = dump(catalog)
    assert "zoe-the-user" not in after
    receipt = [line for line in after.splitlines() if line not in before.splitlines()]
    assert [line.partition(":")[0] for line in receipt] == ["deletions", "deletion_items"]


def test_what_is_deleted_is_not_there_from_the_commit_on(catalog: Catalog) -> None:
    fill(catalog)
    catalog.delete_user("default", "zoe-the-user")
    lookups: list[Callable[[], object]] = [
        lambda: catalog.live(ZOE),
        lambda: catalog.numbered(ZOE, 1),
        lambda: catalog.version(WORK, 1),
        lambda: catalog.adapter(ZOE),
        lambda: catalog.user("default", "zoe-the-user"),
        lambda: catalog.upload(ZOE, "u1"),
        lambda: catalog.delete_user("default", "zoe-the-user"),
    ]
    for lookup in lookups:
        with pytest.raises(AdapterNotFound):
            lookup()
    assert catalog.versions(ZOE, after=None, limit=9) == []
    assert catalog.pinned(ZOE.base) == []
    assert catalog.known_digests([upload(4).digest, upload(1).digest]) == {upload(1).digest}  # alice's
    assert catalog.referenced(["default/z1", "staging/default/u1"]) == set()
    assert catalog.live(ALICE).version == 1


def test_the_receipt_lists_what_must_go_and_adds_up_what_went(catalog: Catalog) -> None:
    fill(catalog)
    record = catalog.delete_user("default", "zoe-the-user")
    prefixes = {"default/z1", "default/z2", "default/z3", "default/z4", "staging/default/u1"}
    assert set(record.prefixes) == set(record.unnoted) == prefixes
    assert record.digests == tuple(upload(number).digest for number in (1, 2, 3, 4))
    assert record.removed == {"versions": 4, "uploads": 1, "objects": 0}
    for _ in range(2):  # the second time counts nothing
        catalog.note_objects(record.deletion_id, "default/z1", 2, ["an object version stays: locked"])
        catalog.ack_deletion(record.deletion_id, "r1", {"disk": 3, "host": 1}, [])
    catalog.ack_deletion(record.deletion_id, "r2", {"disk": 1, "streams": 2}, ["a device keeps it: in use"])
    found = catalog.deletion("default", record.deletion_id)
    assert found.removed == {"versions": 4, "uploads": 1, "objects": 2, "disk": 4, "host": 1, "streams": 2}
    assert found.kept == ("an object version stays: locked", "a device keeps it: in use")
    assert set(found.unnoted) == prefixes - {"default/z1"}
    assert found.status == "pending"


def test_a_deletion_is_one_tenants(catalog: Catalog) -> None:
    record = catalog.delete_user("default", "alice")
    for tenant, deletion_id in (("other", record.deletion_id), ("default", "never")):
        with pytest.raises(AdapterNotFound) as missing:
            catalog.deletion(tenant, deletion_id)
        assert missing.value.code == "deletion_not_found"


def test_another_tenants_user_of_the_same_name_stays(catalog: Catalog) -> None:
    twin = ALICE._replace(tenant="other")
    push(catalog, twin, 5)
    catalog.delete_user("default", "alice")
    assert catalog.live(twin).version == 1
    with pytest.raises(AdapterNotFound) as missing:
        catalog.delete_user("third", "alice")
    assert missing.value.code == "user_not_found"


def test_a_user_who_only_began_an_upload_can_be_deleted(catalog: Catalog) -> None:
    catalog.begin_upload(ZOE, begun(catalog, "u1"))
    record = catalog.delete_user("default", "zoe-the-user")
    assert record.prefixes == ("staging/default/u1",)
    assert record.removed == {"versions": 0, "uploads": 1, "objects": 0}
    with pytest.raises(AdapterConflict) as refusal:
        catalog.add_version(ZOE, upload(9), promote=True, upload_id="u1")
    assert refusal.value.code == "upload_expired"
    finished(catalog, record)
    assert "zoe-the-user" not in dump(catalog)


def test_a_user_without_anything_is_deleted_at_once(catalog: Catalog) -> None:
    catalog.update_user("default", "zoe-the-user")
    record = catalog.delete_user("default", "zoe-the-user")
    assert (record.prefixes, record.digests) == ((), ())
    assert finished(catalog, record).status == "done"


def test_a_version_is_deleted_alone(catalog: Catalog) -> None:
    fill(catalog)
    record = catalog.delete_version(ZOE, 3)
    assert (record.user_id, record.name, record.version) == ("zoe-the-user", "default", 3)
    assert (record.prefixes, record.digests) == (("default/z3",), (upload(3).digest,))
    assert record.removed == {"versions": 1, "objects": 0}
    assert [each.version for each in catalog.versions(ZOE, after=None, limit=9)] == [2, 1]
    with pytest.raises(AdapterNotFound, match="no version 3"):
        catalog.numbered(ZOE, 3)
    assert finished(catalog, record).user_id is None


def test_a_deleted_number_is_never_used_again(catalog: Catalog) -> None:
    push(catalog, ALICE, 2)
    catalog.promote(ALICE, 1)
    catalog.delete_version(ALICE, 2)
    push(catalog, ALICE, 3)
    assert catalog.live(ALICE).version == 3


def test_what_answers_cant_be_deleted(catalog: Catalog) -> None:
    push(catalog, ALICE, 2, 3)
    catalog.set_canary(ALICE, 1, 5)
    for version, code in ((3, "version_is_live"), (1, "version_is_canary")):
        with pytest.raises(AdapterConflict) as refusal:
            catalog.delete_version(ALICE, version)
        assert (refusal.value.code, refusal.value.param) == (code, "version")
    with pytest.raises(AdapterNotFound, match="no version 9"):
        catalog.delete_version(ALICE, 9)
    with pytest.raises(AdapterNotFound):
        catalog.delete_version(ZOE, 1)
    assert rows(catalog, "deletions") == []


def test_pending_deletions_come_oldest_first_and_one_router_has_each(catalog: Catalog, clock: Clock) -> None:
    ids = []
    for number in range(3):
        push(catalog, ZOE, number)
        ids.append(catalog.delete_user("default", "zoe-the-user").deletion_id)
        clock.move(1)
    assert [record.deletion_id for record in catalog.pending_deletions(9)] == ids
    assert [record.deletion_id for record in catalog.pending_deletions(2)] == ids[:2]
    assert catalog.claim_deletion(ids[0], "r1", 30)
    assert catalog.claim_deletion(ids[0], "r1", 30)  # renewed
    assert not catalog.claim_deletion(ids[0], "r2", 30)
    assert [record.deletion_id for record in catalog.pending_deletions(9)] == ids[1:]
    clock.move(30)
    assert catalog.claim_deletion(ids[0], "r2", 30)
    finished(catalog, catalog.deletion("default", ids[0]))
    assert not catalog.claim_deletion(ids[0], "r2", 30)
    assert [record.deletion_id for record in catalog.pending_deletions(9)] == ids[1:]


def test_it_is_done_when_objects_are_noted_and_all_living_routers_told(catalog: Catalog) -> None:
    for router in ("r1", "r2"):
        catalog.beat(router, 10)
    deletion_id = catalog.delete_user("default", "alice").deletion_id
    assert [record.deletion_id for record in catalog.unacked("r1", 9)] == [deletion_id]
    catalog.ack_deletion(deletion_id, "r1", {"disk": 1}, [])
    assert catalog.unacked("r1", 9) == []
    assert catalog.finish_deletion(deletion_id) is None  # objects, and r2
    catalog.note_objects(deletion_id, "default/alice/default/tiny@1/1", 2, [])
    assert catalog.finish_deletion(deletion_id) is None  # r2
    catalog.leave("r2")
    done = catalog.finish_deletion(deletion_id)
    assert done is not None
    assert (done.status, done.kept) == ("done", ())
    assert catalog.finish_deletion(deletion_id) == done
    assert catalog.unacked("r2", 9) == []
    with pytest.raises(AdapterNotFound):
        catalog.finish_deletion("never")


def test_a_router_that_died_is_named_in_the_receipt(catalog: Catalog, clock: Clock) -> None:
    catalog.beat("long-dead", 10)
    clock.move(20)
    catalog.beat("dying", 10)
    record = catalog.delete_user("default", "alice")
    assert len(record.prefixes) == 1
    catalog.note_objects(record.deletion_id, record.prefixes[0], 2, [])
    clock.move(9)
    assert catalog.finish_deletion(record.deletion_id) is None
    clock.move(1)
    done = catalog.finish_deletion(record.deletion_id)
    assert done is not None
    assert done.kept == (
        "router dying died before it told: its machine drops its copies when it starts again",
    )


def test_a_router_that_joins_tells_too(catalog: Catalog) -> None:
    """It may have looked at the catalog just before the deletion."""
    record = catalog.delete_user("default", "alice")
    catalog.note_objects(record.deletion_id, record.prefixes[0], 2, [])
    catalog.beat("new", 10)
    assert len(catalog.unacked("new", 9)) == 1
    assert catalog.finish_deletion(record.deletion_id) is None
    catalog.ack_deletion(record.deletion_id, "new", {}, [])
    assert catalog.finish_deletion(record.deletion_id) is not None


def test_a_deletion_and_a_commit_at_once_leave_a_whole_user_or_none(catalog: Catalog) -> None:
    for number in range(12):
        upload_id, key = f"u{number}", f"default/r{number}"
        catalog.begin_upload(ZOE, begun(catalog, upload_id))
        added, deleted = at_once(
            [
                lambda n=number, k=key, u=upload_id: catalog.add_version(
                    ZOE, upload(n, k), promote=True, upload_id=u
                ),
                lambda: catalog.delete_user("default", "zoe-the-user"),
            ]
        )
        assert isinstance(deleted, DeletionRecord)
        if isinstance(added, Added):  # first, then deleted
            assert deleted.prefixes == (key,)
        else:
            assert isinstance(added, AdapterConflict)
            assert deleted.prefixes == (f"staging/default/{upload_id}",)
        with pytest.raises(AdapterNotFound):
            catalog.user("default", "zoe-the-user")
