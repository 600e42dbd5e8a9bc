from __future__ import annotations

from pathlib import Path

import pytest

from catalog_kit import ALICE, BASE, Clock, push, upload
from tunefleet.adapters_store.catalog import AdapterName, Catalog
from tunefleet.errors import AdapterConflict, AdapterNotFound


def test_an_upload_is_found_live_and_by_number(catalog: Catalog) -> None:
    record, created = catalog.add_version(ALICE, upload(1), promote=True)
    assert created
    assert (record.version, record.live, record.created_at) == (1, True, "2026-11-24T12:00:00.000005Z")
    assert record == catalog.version(ALICE, 1)
    found = catalog.live(ALICE)
    assert found == catalog.numbered(ALICE, 1)
    assert (found.version, found.fallback) == (1, None)
    assert (found.ref.digest, found.ref.key, found.ref.weights_sha256) == (
        upload(1).digest,
        "default/1",
        upload(1).weights_sha256,
    )
    assert (found.ref.tenant, found.ref.size_bytes, found.ref.rank) == ("default", 101, 8)
    assert record.metadata == {"run": 1}
    assert (record.target_modules, record.warnings) == (("q_proj", "v_proj"), ("odd",))


def test_the_digest_of_the_newest_version_changes_nothing(catalog: Catalog) -> None:
    first = catalog.add_version(ALICE, upload(1), promote=True)
    again = catalog.add_version(ALICE, upload(1, key="other"), promote=False)
    assert (again.created, again.record) == (False, first.record)
    assert len(catalog.versions(ALICE, after=None, limit=10)) == 1


def test_the_digest_of_an_older_version_is_a_new_version(catalog: Catalog) -> None:
    for number, key in ((1, "a"), (2, "b"), (1, "c")):
        catalog.add_version(ALICE, upload(number, key), promote=True)
    assert [record.version for record in catalog.versions(ALICE, after=None, limit=10)] == [3, 2, 1]
    assert catalog.live(ALICE).ref.key == "c"


def test_an_upload_without_promote_stays_behind_the_live_one(catalog: Catalog) -> None:
    catalog.add_version(ALICE, upload(1), promote=True)
    record, _ = catalog.add_version(ALICE, upload(2), promote=False)
    assert not record.live
    assert catalog.live(ALICE).version == 1
    assert catalog.numbered(ALICE, 2).ref.digest == upload(2).digest
    newest = catalog.answered(ALICE, upload(2).digest)
    assert newest is not None
    assert (newest.record.version, newest.created) == (2, False)


def test_promote_with_another_live_version_is_a_conflict(catalog: Catalog) -> None:
    for number in (1, 2):
        catalog.add_version(ALICE, upload(number), promote=True)
    with pytest.raises(AdapterConflict, match="version 2 of 'alice' is live, not 1") as refusal:
        catalog.promote(ALICE, 1, if_live=1)
    assert refusal.value.code == "live_version_changed"
    assert catalog.live(ALICE).version == 2


def test_what_is_not_there_is_not_found_with_what_to_do(catalog: Catalog) -> None:
    with pytest.raises(AdapterNotFound, match="tunefleet adapters push alice DIR"):
        catalog.live(ALICE)
    catalog.add_version(ALICE, upload(1), promote=False)
    with pytest.raises(AdapterNotFound, match="none is live: promote"):
        catalog.live(ALICE)
    for call in (catalog.numbered, catalog.version, catalog.promote):
        with pytest.raises(AdapterNotFound, match="no version 2") as refusal:
            call(ALICE, 2)
        assert refusal.value.code == "adapter_not_found"
    with pytest.raises(AdapterNotFound) as missing:
        catalog.user("default", "nobody")
    assert missing.value.code == "user_not_found"


@pytest.mark.parametrize(
    "other",
    [
        ALICE._replace(tenant="other"),
        ALICE._replace(user_id="Alice"),
        ALICE._replace(user_id="alice1"),
        ALICE._replace(user_id="alic"),
        ALICE._replace(user_id="' OR 1=1 --"),
        ALICE._replace(name="work"),
        ALICE._replace(base="tiny@2"),
    ],
)
def test_tenants_users_names_and_bases_never_mix(catalog: Catalog, other: AdapterName) -> None:
    catalog.add_version(ALICE, upload(1), promote=True)
    with pytest.raises(AdapterNotFound):
        catalog.live(other)
    record, _ = catalog.add_version(other, upload(2), promote=True)
    assert record.version == 1
    assert catalog.live(ALICE).ref.digest == upload(1).digest
    assert catalog.live(other).ref.digest == upload(2).digest


IDS = sorted(
    [
        "a", "a1", "A", "ab", "a.b", "a_b", "a-b", "-a", "--", "__base__", "default", "a/b", "a\\b", "null",
        "NULL", "x'; DROP TABLE users", 'a"b', "a%", "a%2e", "%", "_", "${a}", "{{a}}", ":name", "a:b", "0",
        "00", "1e3", "true", "~", "|", "+", "=", "@", "http://169.254.169.254", "s3://other", "a" * 128,
        "a" * 127, "K", "k", "i", "I", "ss", "a\nb", "a b", "a ", "\u00e9", "e\u0301", "\u212a", "\u0131",
        "\u00df", "\U0001f600",
    ],
    key=str.encode,
)  # fmt: skip


def test_any_two_ids_are_two_users_in_one_order_on_every_database(catalog: Catalog) -> None:
    for number, user_id in enumerate(IDS):
        push(catalog, AdapterName("default", user_id, "default", BASE), number)
    for number, user_id in enumerate(IDS):
        found = catalog.live(AdapterName("default", user_id, "default", BASE))
        assert (found.ref.digest, found.version) == (upload(number).digest, 1)
    paged: list[str] = []
    while page := catalog.users("default", after=paged[-1] if paged else None, limit=7):
        paged += [user.user_id for user in page]
    assert paged == IDS


@pytest.mark.parametrize(
    "pair", [("a", "A"), ("a", "a "), ("K", "\u212a"), ("\u00e9", "e\u0301"), ("x", "x'")]
)
def test_tenants_and_bases_differ_as_their_bytes_do(catalog: Catalog, pair: tuple[str, str]) -> None:
    named = [AdapterName(pair[n], "u", "default", pair[m]) for n in (0, 1) for m in (0, 1)]
    for number, adapter in enumerate(named):
        push(catalog, adapter, number)
    assert [catalog.live(adapter).ref.digest for adapter in named] == [upload(n).digest for n in range(4)]
    assert [len(catalog.users(tenant, after=None, limit=9)) for tenant in pair] == [1, 1]


def test_a_users_own_fallback_is_told_found_or_not(catalog: Catalog) -> None:
    catalog.add_version(ALICE, upload(1), promote=True)
    catalog.update_user("default", "alice", fallback="base")
    assert catalog.live(ALICE).fallback == "base"
    for call in (catalog.live, lambda adapter: catalog.numbered(adapter, 1)):
        with pytest.raises(AdapterNotFound) as refusal:
            call(ALICE._replace(name="work"))
        assert refusal.value.fallback == "base"


def test_pages_go_by_cursor(catalog: Catalog) -> None:
    for number in range(5):
        catalog.add_version(ALICE, upload(number), promote=True)
        catalog.add_version(ALICE._replace(user_id=f"u{number}"), upload(number, f"u{number}"), promote=True)
    catalog.add_version(ALICE._replace(user_id="u1", name="work"), upload(9), promote=True)
    assert [record.version for record in catalog.versions(ALICE, after=4, limit=2)] == [3, 2]
    page = catalog.users("default", after="alice", limit=2)
    assert [(user.user_id, user.num_adapters) for user in page] == [("u0", 1), ("u1", 2)]
    assert catalog.users("default", after="u4", limit=2) == []
    assert catalog.users("other", after=None, limit=2) == []
    assert catalog.user("default", "u1").num_adapters == 2


def test_a_catalog_is_what_the_last_process_left(database_url: str) -> None:
    for expected in (1, 2):
        catalog = Catalog(database_url)
        record, _ = catalog.add_version(ALICE, upload(expected), promote=True)
        catalog.close()
        assert record.version == expected


def test_known_digests_and_referenced_prefixes_are_found_however_many(catalog: Catalog) -> None:
    for number in range(3):
        catalog.add_version(ALICE, upload(number), promote=False)
    many = [f"{number:064x}" for number in range(1200)]
    assert catalog.known_digests(many) == set(many[:3])
    assert catalog.known_digests([]) == set()
    assert catalog.referenced([f"default/{number}" for number in range(1200)]) == {
        "default/0",
        "default/1",
        "default/2",
    }


def test_a_catalogs_id_is_its_own_and_stays(database_url: str, tmp_path: Path) -> None:
    ids = []
    for url in (database_url, database_url, f"sqlite:///{tmp_path}/other.db"):
        catalog = Catalog(url)
        ids.append(catalog.catalog_id)
        catalog.close()
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0]) == 36


def test_the_catalogs_clock_is_told_in_utc_with_microseconds(catalog: Catalog) -> None:
    assert catalog.timestamp() == "2026-11-24T12:00:00.000005Z"
    assert catalog.timestamp(-0.5) == "2026-11-24T11:59:59.500005Z"


def test_a_clock_that_goes_back_takes_nothing_away(database_url: str) -> None:
    clock = Clock()
    catalog = Catalog(database_url, now=clock)
    for number in (1, 2, 3):
        push(catalog, ALICE, number)
        clock.move(-3600)
    assert catalog.live(ALICE).version == 3
    assert [catalog.rollback(ALICE).version for _ in range(2)] == [2, 1]
    assert [record.version for record in catalog.versions(ALICE, after=None, limit=9)] == [3, 2, 1]
    catalog.close()
