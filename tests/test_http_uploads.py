"""Uploads in steps, through the server's own URLs: begin, put, complete."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from adapter_factory import adapter_files
from router_kit import Kit, api, ask, code, staged
from tunefleet.core import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE

URL = "/v1/users/alice/adapter"
BEGIN = f"{URL}/uploads"


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path, max_upload_bytes=100_000)


@pytest.fixture
def client(kit: Kit) -> Iterator[TestClient]:
    with api(kit) as client:
        yield client
        assert staged(kit) == []


def begun(client: TestClient, url: str = BEGIN, **asked: Any) -> dict[str, Any]:
    response = client.post(url, json=asked)
    assert response.status_code == 201, response.text
    ticket: dict[str, Any] = response.json()
    return ticket


def put_files(client: TestClient, ticket: dict[str, Any], folder: Path) -> None:
    for name, content in adapter_files(folder).items():
        file = ticket["files"][name]
        response = client.request(file["method"], file["url"], content=content, headers=file["headers"])
        assert (response.status_code, response.content) == (204, b"")


def complete(client: TestClient, ticket: dict[str, Any], url: str = BEGIN, **more: Any) -> Any:
    return client.post(f"{url}/{ticket['upload_id']}/complete", **more)


def test_files_put_one_by_one_become_a_version(kit: Kit, client: TestClient) -> None:
    ticket = begun(client, metadata={"run": "é"})
    assert set(ticket) == {"upload_id", "files", "expires_at"}
    assert set(ticket["files"]) == set(ADAPTER_FILES)
    put_files(client, ticket, kit.adapter())
    assert code(client.get(URL)) == (404, "adapter_not_found")
    done = complete(client, ticket)
    body = done.json()
    assert (done.status_code, body["version"], body["live"], body["metadata"]) == (201, 1, True, {"run": "é"})
    assert ask(client, "alice").headers["x-adapter-digest"] == body["digest"]
    again = complete(client, ticket)
    assert again.json() == body


def test_it_is_promoted_only_if_that_was_asked_for(kit: Kit, client: TestClient) -> None:
    for seed, promote in ((1, True), (2, False)):
        ticket = begun(client, promote=promote)
        put_files(client, ticket, kit.adapter(seed))
        assert complete(client, ticket, json={}).json()["live"] is promote
    assert client.get(URL).json()["version"] == 1


def test_a_file_may_be_put_again_and_the_last_one_counts(kit: Kit, client: TestClient) -> None:
    ticket = begun(client)
    put_files(client, ticket, kit.adapter(1))
    put_files(client, ticket, kit.adapter(2))
    staged_digest = complete(client, ticket).json()["digest"]
    direct = client.put(URL, files=adapter_files(kit.adapter(2)))
    assert (direct.status_code, direct.json()["digest"]) == (200, staged_digest)


def test_what_is_missing_can_be_put_and_completed_again(kit: Kit, client: TestClient) -> None:
    ticket = begun(client)
    refused = complete(client, ticket)
    assert code(refused) == (422, "missing_file")
    put_files(client, ticket, kit.adapter())
    assert complete(client, ticket).status_code == 201


def test_a_put_is_checked_like_any_upload(client: TestClient) -> None:
    files = begun(client)["files"]
    weights, config = files[WEIGHTS_FILE]["url"], files[CONFIG_FILE]["url"]
    wrong = base64.b64encode(hashlib.sha256(b"y").digest()).decode()
    refusals = [
        (weights, b"x" * 100_001, {}, (413, "body_too_large")),
        (config, b"x" * 65_537, {}, (413, "body_too_large")),
        (weights, b"x", {"content-encoding": "gzip"}, (415, "unsupported_media_type")),
        (weights, b"x", {"content-digest": f"sha-256=:{wrong}:"}, (400, "digest_mismatch")),
        (weights, b"x", {"content-digest": "rubbish"}, (400, "invalid_digest")),
        (weights.replace(WEIGHTS_FILE, "adapter_model.bin"), b"x", {}, (404, "file_not_found")),
        (weights.replace(WEIGHTS_FILE, "..%5Cx"), b"x", {}, (404, "file_not_found")),
    ]
    for url, content, headers, expected in refusals:
        assert code(client.put(url, content=content, headers=headers)) == expected, url
    right = base64.b64encode(hashlib.sha256(b"x").digest()).decode()
    headers = {"content-digest": f"sha-256=:{right}:"}
    assert client.put(weights, content=b"x", headers=headers).status_code == 204


@pytest.mark.parametrize("upload_id", ["nope", "0" * 32, "..", "a" * 500, "é", "%00"])
def test_an_upload_that_never_began_is_404(client: TestClient, upload_id: str) -> None:
    for method, path in (("PUT", CONFIG_FILE), ("POST", "complete")):
        assert client.request(method, f"{BEGIN}/{upload_id}/{path}").status_code == 404


def test_an_upload_is_one_users_and_one_adapters(kit: Kit, client: TestClient) -> None:
    ticket = begun(client)
    put_files(client, ticket, kit.adapter())
    for url in ("/v1/users/bob/adapter/uploads", "/v1/users/alice/adapters/poems/uploads"):
        assert code(complete(client, ticket, url)) == (404, "upload_not_found")
        assert client.put(f"{url}/{ticket['upload_id']}/{CONFIG_FILE}", content=b"{}").status_code == 404
    assert complete(client, ticket).status_code == 201


def test_a_user_deleted_meanwhile_has_no_upload_any_more(kit: Kit, client: TestClient) -> None:
    client.put(URL, files=adapter_files(kit.adapter(1)))
    ticket = begun(client)
    put_files(client, ticket, kit.adapter(2))
    assert client.delete("/v1/users/alice").json()["removed"]["uploads"] == 1
    assert code(complete(client, ticket)) == (404, "upload_not_found")
    assert code(client.get(URL)) == (404, "adapter_not_found")


@pytest.mark.parametrize(
    "asked", [{"promote": "yes"}, {"metadata": []}, {"metadata": {"x": "y" * 4096}}, {"files": []}, {"x": 1}]
)
def test_a_beginning_that_makes_no_sense_is_refused(client: TestClient, asked: dict[str, object]) -> None:
    assert code(client.post(BEGIN, json=asked))[0] == 400


def test_urls_hold_below_a_mount_and_for_every_allowed_id(kit: Kit) -> None:
    fleet = kit.fleet()
    app = Starlette(routes=[Mount("/ai", fleet.asgi(auth="none"))], lifespan=fleet.lifespan)
    begin = "/ai/v1/users/a+b=c%7Cd@e:f~g._-/adapters/poems/uploads"
    with TestClient(app) as client:
        ticket = begun(client, begin)
        put_files(client, ticket, kit.adapter())
        assert complete(client, ticket, begin).json()["user_id"] == "a+b=c|d@e:f~g._-"
