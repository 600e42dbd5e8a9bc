from __future__ import annotations

import pytest

from catalog_kit import ALICE, Clock, at_once, begun, upload
from tunefleet.adapters_store.catalog import Added, Catalog
from tunefleet.adapters_store.repeats import upload_key
from tunefleet.errors import AdapterConflict, AdapterNotFound


def test_a_begun_upload_is_found_and_its_objects_are_referred_to(catalog: Catalog) -> None:
    record = begun(catalog, "u1")
    catalog.begin_upload(ALICE, record)
    assert catalog.upload(ALICE, "u1") == record
    assert catalog.referenced([record.object_key, "staging/default/u2"]) == {record.object_key}
    assert catalog.users("default", after=None, limit=9) == []


def test_the_commit_of_a_version_ends_its_upload(catalog: Catalog) -> None:
    catalog.begin_upload(ALICE, begun(catalog, "u1"))
    assert catalog.add_version(ALICE, upload(1), promote=True, upload_id="u1").created
    with pytest.raises(AdapterNotFound) as missing:
        catalog.upload(ALICE, "u1")
    assert (missing.value.code, missing.value.param) == ("upload_not_found", "upload_id")
    assert catalog.referenced(["staging/default/u1", "default/1"]) == {"default/1"}


def test_an_upload_that_changes_nothing_ends_too(catalog: Catalog) -> None:
    catalog.add_version(ALICE, upload(1), promote=True)
    catalog.begin_upload(ALICE, begun(catalog, "u1"))
    assert not catalog.add_version(ALICE, upload(1, "again"), promote=True, upload_id="u1").created
    with pytest.raises(AdapterNotFound):
        catalog.upload(ALICE, "u1")


def test_an_upload_whose_row_is_gone_or_over_cant_be_committed(catalog: Catalog, clock: Clock) -> None:
    catalog.begin_upload(ALICE, begun(catalog, "u1"))
    catalog.begin_upload(ALICE, begun(catalog, "u2"))
    catalog.end_upload("u1")
    catalog.end_upload("u1")
    for upload_id in ("u1", "u2", "never"):
        clock.move(30)  # u2 ends with the second step
        with pytest.raises(AdapterConflict, match="upload again") as refusal:
            catalog.add_version(ALICE, upload(1), promote=True, upload_id=upload_id)
        assert refusal.value.code == "upload_expired"
    with pytest.raises(AdapterNotFound):
        catalog.live(ALICE)
    assert catalog.users("default", after=None, limit=9) == []  # nothing of the commit stays


def test_a_repeat_with_its_key_is_answered_though_the_upload_is_gone(catalog: Catalog) -> None:
    key = upload_key("k1", "bytes")
    catalog.begin_upload(ALICE, begun(catalog, "u1"))
    first = catalog.add_version(ALICE, upload(1), promote=True, key=key, upload_id="u1")
    again = catalog.add_version(ALICE, upload(1, "again"), promote=True, key=key, upload_id="u1")
    assert again == first


def test_an_upload_expires_unless_it_is_extended(catalog: Catalog, clock: Clock) -> None:
    for upload_id in ("u1", "u2", "u3"):
        catalog.begin_upload(ALICE, begun(catalog, upload_id))
    assert catalog.extend_upload("u2", catalog.timestamp(120))
    clock.move(60)
    assert [each.upload_id for each in catalog.expired_uploads(9)] == ["u1", "u3"]
    assert len(catalog.expired_uploads(1)) == 1
    assert not catalog.extend_upload("u1", catalog.timestamp(60))  # whoever collects it may be on the way
    assert not catalog.extend_upload("never", catalog.timestamp(60))
    assert catalog.upload(ALICE, "u2").upload_id == "u2"
    for upload_id in ("u1", "u3"):
        with pytest.raises(AdapterNotFound, match="begin a new one"):
            catalog.upload(ALICE, upload_id)
    assert catalog.referenced(["staging/default/u1", "staging/default/u2"]) == {"staging/default/u2"}


@pytest.mark.parametrize("changed", ["tenant", "user_id", "name", "base"])
def test_an_upload_is_one_adapters_alone(catalog: Catalog, changed: str) -> None:
    other = ALICE._replace(**{changed: "other"})
    catalog.begin_upload(ALICE, begun(catalog, "u1"))
    with pytest.raises(AdapterNotFound):
        catalog.upload(other, "u1")
    with pytest.raises(AdapterConflict):
        catalog.add_version(other, upload(1), promote=True, upload_id="u1")
    assert catalog.upload(ALICE, "u1").upload_id == "u1"


def test_of_commits_of_one_upload_one_makes_a_version(catalog: Catalog) -> None:
    catalog.begin_upload(ALICE, begun(catalog, "u1"))
    calls = [
        lambda n=n: catalog.add_version(ALICE, upload(n), promote=True, upload_id="u1") for n in range(6)
    ]
    results = at_once(calls)
    assert sum(isinstance(result, Added) for result in results) == 1
    assert sum(isinstance(result, AdapterConflict) for result in results) == 5
    assert len(catalog.versions(ALICE, after=None, limit=9)) == 1
