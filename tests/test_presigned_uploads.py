"""Uploads whose files go straight to the object store, over HTTP and with the store's own URLs."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from adapter_factory import adapter_files
from router_kit import Kit, api, ask, code, staged
from s3_servers import S3Server
from tunefleet.adapters_store.staged_uploads import TTL_S
from tunefleet.core import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.s3

URL = "/v1/users/alice/adapter"
BEGIN = f"{URL}/uploads"
PREFIX = "prod/"
MAX_UPLOAD_BYTES = 1_000_000


@pytest.fixture(params=["juicefs", "seaweedfs"])
def server(request: pytest.FixtureRequest) -> S3Server:
    """Each real S3 server."""
    server: S3Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture
def bucket(server: S3Server) -> str:
    return server.make_bucket()


@pytest.fixture
def kit(tmp_path: Path, server: S3Server, bucket: str) -> Kit:
    store_url = server.url(bucket, PREFIX.rstrip("/"))
    database_url = f"sqlite:///{tmp_path}/catalog.db"
    return Kit(tmp_path, store_url=store_url, database_url=database_url, max_upload_bytes=MAX_UPLOAD_BYTES)


@pytest.fixture
def client(kit: Kit) -> Iterator[TestClient]:
    with api(kit) as client:
        yield client
        assert staged(kit) == []


@pytest.fixture
def plain() -> Iterator[httpx2.Client]:
    """A client that knows nothing of S3 or of us."""
    with httpx2.Client() as plain:
        yield plain


def begun(client: TestClient, **asked: Any) -> dict[str, Any]:
    response = client.post(BEGIN, json=asked)
    assert response.status_code == 201, response.text
    ticket: dict[str, Any] = response.json()
    return ticket


def put(plain: httpx2.Client, ticket: dict[str, Any], contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        file = ticket["files"][name]
        response = plain.request(file["method"], file["url"], content=content, headers=file["headers"])
        assert response.status_code == 200, response.text


def complete(client: TestClient, ticket: dict[str, Any]) -> httpx2.Response:
    return client.post(f"{BEGIN}/{ticket['upload_id']}/complete")


def names(server: S3Server, bucket: str, below: str) -> list[str]:
    """What the bucket has, as its administrator sees it."""
    found = server.client().list_objects(bucket, PREFIX + below, recursive=True)
    return sorted(str(each.object_name).removeprefix(PREFIX) for each in found)


def test_files_put_to_the_stores_own_urls_are_live_and_come_back_byte_for_byte(
    kit: Kit, client: TestClient, plain: httpx2.Client, server: S3Server, bucket: str
) -> None:
    contents = adapter_files(kit.adapter())
    ticket = begun(client, metadata={"run": "é"})
    assert set(ticket["files"]) == set(ADAPTER_FILES)
    for file in ticket["files"].values():
        assert (file["method"], file["url"].startswith(f"{server.endpoint}/")) == ("PUT", True)
    put(plain, ticket, contents)
    assert names(server, bucket, "staging/") == [
        f"staging/default/{ticket['upload_id']}/{name}" for name in sorted(contents)
    ]
    assert code(client.get(URL)) == (404, "adapter_not_found")
    done = complete(client, ticket)
    body = done.json()
    assert (done.status_code, body["version"], body["live"], body["metadata"]) == (201, 1, True, {"run": "é"})
    assert names(server, bucket, "staging/") == []
    assert ask(client, "alice").headers["x-adapter-digest"] == body["digest"]
    got = {name: client.get(f"{URL}/versions/1/files/{name}").content for name in ADAPTER_FILES}
    assert contents == got
    again = complete(client, ticket)
    assert (again.status_code, again.json()) == (done.status_code, body)
    assert [each["version"] for each in client.get(f"{URL}/versions").json()["data"]] == [1]


def test_both_ways_to_upload_the_same_bytes_are_one_version(
    kit: Kit, client: TestClient, plain: httpx2.Client
) -> None:
    ticket = begun(client)
    put(plain, ticket, adapter_files(kit.adapter()))
    digest = complete(client, ticket).json()["digest"]
    direct = client.put(URL, files=adapter_files(kit.adapter()))
    assert (direct.status_code, direct.json()["digest"]) == (200, digest)


def spoiled(weights: bytes) -> dict[str, bytes]:
    """What else may be where the weights were put."""
    return {
        "rubbish": b"x" * len(weights),
        "truncated": weights[: len(weights) // 2],
        "longer": weights + b"\0",
        "empty": b"",
        "too large": b"\0" * (MAX_UPLOAD_BYTES + 1),
    }


def test_files_that_are_something_else_when_it_completes_are_refused_and_the_old_version_stays(
    kit: Kit, client: TestClient, plain: httpx2.Client, server: S3Server, bucket: str
) -> None:
    first = client.put(URL, files=adapter_files(kit.adapter(1))).json()["digest"]
    stored = names(server, bucket, "default/")
    good = adapter_files(kit.adapter(2))
    ticket = begun(client)
    put(plain, ticket, good)
    refusals = {}
    for what, content in spoiled(good[WEIGHTS_FILE]).items():
        put(plain, ticket, {WEIGHTS_FILE: content})
        refusals[what], _ = code(complete(client, ticket))
        assert client.get(URL).json()["digest"] == first
        assert names(server, bucket, "default/") == stored
    expected = {"rubbish": 422, "truncated": 422, "longer": 422, "empty": 422, "too large": 413}
    assert expected == refusals
    assert ask(client, "alice").headers["x-adapter-digest"] == first
    server.client().remove_object(bucket, f"{PREFIX}staging/default/{ticket['upload_id']}/{WEIGHTS_FILE}")
    assert code(complete(client, ticket)) == (422, "missing_file")
    put(plain, ticket, good)
    assert complete(client, ticket).json()["version"] == 2
    assert names(server, bucket, "staging/") == []


def test_a_put_after_it_was_completed_changes_nothing(
    kit: Kit, client: TestClient, plain: httpx2.Client
) -> None:
    contents = adapter_files(kit.adapter())
    ticket = begun(client)
    put(plain, ticket, contents)
    body = complete(client, ticket).json()
    put(plain, ticket, {WEIGHTS_FILE: b"late"})
    assert complete(client, ticket).json() == body
    assert client.get(f"{URL}/versions/1/files/{WEIGHTS_FILE}").content == contents[WEIGHTS_FILE]


def signed(server: S3Server, bucket: str, ticket: dict[str, Any], seconds_ago: float) -> str:
    """The URL of an upload's configuration, as it would be had the upload begun then."""
    then = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    name = f"{PREFIX}staging/default/{ticket['upload_id']}/{CONFIG_FILE}"
    return server.client().get_presigned_url("PUT", bucket, name, timedelta(seconds=TTL_S), request_date=then)


def test_the_server_refuses_a_url_that_expired(
    client: TestClient, plain: httpx2.Client, server: S3Server, bucket: str
) -> None:
    ticket = begun(client)
    urls = [file["url"] for file in ticket["files"].values()]
    assert [f"X-Amz-Expires={TTL_S}&" in url for url in urls] == [True, True]
    for seconds_ago, expected in ((TTL_S + 60, 403), (TTL_S - 60, 200)):
        url = signed(server, bucket, ticket, seconds_ago)
        assert plain.put(url, content=b"{}").status_code == expected
        assert len(names(server, bucket, "staging/")) == (expected == 200)


def test_a_url_puts_one_file_in_one_place_and_reads_nothing(
    kit: Kit, client: TestClient, plain: httpx2.Client, server: S3Server, bucket: str
) -> None:
    ticket = begun(client)
    url = ticket["files"][CONFIG_FILE]["url"]
    changed = {
        "another file": url.replace(CONFIG_FILE, WEIGHTS_FILE),
        "another upload": url.replace(ticket["upload_id"], "0" * 32),
        "out of staging": url.replace("/staging/", "/default/"),
        "longer": url.replace(f"X-Amz-Expires={TTL_S}", "X-Amz-Expires=604800"),
        "no signature": url.partition("?")[0],
    }
    answers = {what: plain.put(each, content=b"{}").status_code for what, each in changed.items()}
    assert dict.fromkeys(changed, 403) == answers
    assert names(server, bucket, "staging/") == names(server, bucket, "default/") == []
    put(plain, ticket, adapter_files(kit.adapter()))
    assert [plain.request(method, url).status_code for method in ("GET", "DELETE")] == [403, 403]
    assert complete(client, ticket).status_code == 201
