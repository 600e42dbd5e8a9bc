"""Uploads with an Idempotency-Key."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from router_kit import Kit, code, stored, upload
from tunefleet.adapters_store.catalog import AdapterName, Catalog, NewVersion
from tunefleet.adapters_store.repeats import KEEP, upload_key
from tunefleet.errors import AdapterConflict

URL = "/v1/users/alice/adapter"


def keyed(client: TestClient, path: Path, url: str = URL, *, key: str = "k1", **headers: str) -> Any:
    return upload(client, path, url, headers={"Idempotency-Key": key, **headers})


def versions(client: TestClient, url: str = URL) -> list[tuple[int, bool]]:
    return [(each["version"], each["live"]) for each in client.get(f"{url}/versions").json()["data"]]


def test_the_same_upload_again_is_answered_as_before_whatever_happened_since(
    kit: Kit, client: TestClient
) -> None:
    first = keyed(client, kit.adapter(1))
    assert upload(client, kit.adapter(2)).json()["version"] == 2
    again = keyed(client, kit.adapter(1))
    assert (again.status_code, again.json()) == (first.status_code, first.json()) == (201, first.json())
    assert versions(client) == [(2, True), (1, False)]
    assert len(stored(kit)) == 4


def test_without_its_key_it_would_have_been_a_new_version(kit: Kit, client: TestClient) -> None:
    for seed in (1, 2, 1):
        upload(client, kit.adapter(seed))
    assert versions(client) == [(3, True), (2, False), (1, False)]


def test_an_answer_that_changed_nothing_is_remembered_too(kit: Kit, client: TestClient) -> None:
    upload(client, kit.adapter(1))
    first = keyed(client, kit.adapter(1))
    upload(client, kit.adapter(2))
    again = keyed(client, kit.adapter(1))
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.json() == first.json()
    assert versions(client) == [(2, True), (1, False)]
    assert len(stored(kit)) == 4


@pytest.mark.parametrize("other", ["bytes", "metadata", "promote"])
def test_a_key_with_another_upload_is_a_conflict(kit: Kit, client: TestClient, other: str) -> None:
    keyed(client, kit.adapter(1))
    if other == "bytes":
        refused = keyed(client, kit.adapter(2))
    elif other == "metadata":
        refused = keyed(client, kit.adapter(1), **{"X-Adapter-Metadata": '{"run": 2}'})
    else:
        refused = keyed(client, kit.adapter(1), f"{URL}?promote=false")
    assert code(refused) == (409, "idempotency_key_reused")
    error = refused.json()["error"]
    assert (error["param"], "version 1" in error["message"]) == ("Idempotency-Key", True)
    assert versions(client) == [(1, True)]
    assert len(stored(kit)) == 2


def test_a_key_means_nothing_to_other_users_names_and_keys(kit: Kit, client: TestClient) -> None:
    places = [(URL, "k1"), (URL, "K1"), ("/v1/users/bob/adapter", "k1"), ("/v1/users/alice/adapters/x", "k1")]
    answers = [keyed(client, kit.adapter(seed), url, key=key) for seed, (url, key) in enumerate(places)]
    assert [answer.status_code for answer in answers] == [201] * 4
    assert [answer.json()["version"] for answer in answers] == [1, 2, 1, 1]


def test_a_refused_upload_leaves_its_key_free(kit: Kit, client: TestClient) -> None:
    bad = kit.adapter(1)
    (bad / "adapter_config.json").write_text("{}")
    assert keyed(client, bad).status_code == 422
    assert keyed(client, kit.adapter(2)).status_code == 201


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "é", "a\tb"])
def test_a_key_that_is_none_is_refused(kit: Kit, client: TestClient, key: str) -> None:
    response = upload(client, kit.adapter(), headers={b"Idempotency-Key": key.encode()})
    assert code(response) == (400, "invalid_idempotency_key")
    assert response.json()["error"]["param"] == "Idempotency-Key"
    assert client.get("/v1/users").json()["data"] == []


@pytest.mark.parametrize("key", ["x", "x" * 255, '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "';--"])
def test_any_printable_key_is_taken(kit: Kit, client: TestClient, key: str) -> None:
    assert [keyed(client, kit.adapter(), key=key).status_code for _ in range(2)] == [201, 201]


def test_uploads_with_one_key_at_once_become_one_version(kit: Kit, client: TestClient) -> None:
    folder, answers = kit.adapter(), []
    threads = [threading.Thread(target=lambda: answers.append(keyed(client, folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [201] * 4
    assert len({answer.text for answer in answers}) == 1
    assert versions(client) == [(1, True)]
    assert len(stored(kit)) == 2


def test_keys_outlive_the_process_for_a_day(tmp_path: Path) -> None:
    """On the catalog alone, whose clock is an argument."""
    alice = AdapterName("default", "alice", "default", "tiny@1")
    clock = [datetime(2026, 1, 1, tzinfo=UTC)]

    def added(number: int, key: str) -> tuple[int, bool]:
        catalog = Catalog(f"sqlite:///{tmp_path}/catalog.db", now=lambda: clock[0])
        digest = f"{number:064x}"
        new = NewVersion(
            digest=digest, object_key=f"default/{clock[0]}", config_sha256="c" * 64, weights_sha256=digest,
            size_bytes=1, rank=1, target_modules=("q_proj",), warnings=(), metadata={},
        )  # fmt: skip
        try:
            record, created = catalog.add_version(alice, new, promote=True, key=upload_key(key, digest))
        finally:
            catalog.close()
        return record.version, created

    assert added(1, "k1") == (1, True)
    clock[0] += KEEP / 2
    assert added(2, "k2") == (2, True)
    assert added(1, "k1") == (1, True)
    with pytest.raises(AdapterConflict):
        added(3, "k1")
    clock[0] += KEEP / 2 + timedelta(microseconds=1)
    assert added(3, "k1") == (3, True)  # k1 is forgotten,
    assert added(2, "k2") == (2, True)  # k2 is not
