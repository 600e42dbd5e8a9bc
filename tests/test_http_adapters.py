"""Uploads and what is made of them, over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from starlette.testclient import TestClient

from adapter_factory import adapter_files
from malformed.archives import tar_of, zip_of
from malformed.bodies import multipart, part
from router_kit import Kit, api, ask, code, serving, staged, upload
from tunefleet.auth import anyone
from tunefleet.core import ADAPTER_FILES
from tunefleet.http.app import create_app

URL = "/v1/users/alice/adapter"


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path, max_upload_bytes=1_000_000)


@pytest.fixture
def client(kit: Kit) -> Iterator[TestClient]:
    with api(kit) as client:
        yield client
        assert staged(kit) == []


def digest_of(body: bytes, name: str = "sha-256") -> dict[str, str]:
    value = base64.b64encode(hashlib.new(name.replace("-", ""), body).digest()).decode()
    return {"Content-Digest": f"{name}=:{value}:"}


def test_an_upload_answers_with_the_version_and_is_live(kit: Kit, client: TestClient) -> None:
    response = upload(client, kit.adapter())
    body = response.json()
    assert response.status_code == 201
    assert set(body) == {
        "user_id", "name", "version", "digest", "base", "size_bytes",
        "rank", "target_modules", "live", "metadata", "warnings", "created_at",
    }  # fmt: skip
    assert (body["user_id"], body["name"], body["version"], body["live"]) == ("alice", "default", 1, True)
    assert ask(client, "alice").headers["x-adapter-digest"] == body["digest"]


def test_every_way_to_upload_the_same_bytes_is_the_same_version(kit: Kit, client: TestClient) -> None:
    folder = kit.adapter()
    first = upload(client, folder)
    bodies = {
        "application/x-tar": tar_of(adapter_files(folder)),
        "application/gzip": tar_of(adapter_files(folder), mode="w:gz"),
        "application/zip": zip_of(adapter_files(folder)),
        "application/octet-stream": zip_of(adapter_files(folder)),
    }
    for kind, body in bodies.items():
        again = client.put(URL, content=body, headers={"content-type": kind, **digest_of(body)})
        assert (again.status_code, again.json()) == (200, first.json()), kind


def test_an_upload_may_stay_dark_until_it_is_promoted(kit: Kit, client: TestClient) -> None:
    upload(client, kit.adapter(1))
    dark = upload(client, kit.adapter(2), f"{URL}?promote=false").json()
    assert (dark["version"], dark["live"]) == (2, False)
    assert ask(client, "alice").headers["x-adapter-version"] == "1"
    promoted = client.post(f"{URL}/promote", json={"version": 2, "if_live": 1})
    assert promoted.json()["live"] is True
    assert ask(client, "alice").headers["x-adapter-digest"] == dark["digest"]
    assert code(client.post(f"{URL}/promote", json={"version": 1, "if_live": 1}))[0] == 409
    assert code(client.post(f"{URL}/promote", json={"version": 7})) == (404, "adapter_not_found")
    assert code(client.post(f"{URL}/promote", json={"version": "2"})) == (400, "invalid_request")
    assert code(client.post(f"{URL}/promote", json={"version": 2, "when": "now"})) == (400, "invalid_request")
    assert code(upload(client, kit.adapter(3), f"{URL}?promote=maybe")) == (400, "invalid_request")


def test_metadata_comes_by_header_or_part(kit: Kit, client: TestClient) -> None:
    by_header = upload(client, kit.adapter(1), headers={"X-Adapter-Metadata": '{"run": 1}'})
    assert by_header.json()["metadata"] == {"run": 1}
    files = {**adapter_files(kit.adapter(2)), "metadata": json.dumps({"run": "é"}).encode()}
    assert client.put(URL, files=files).json()["metadata"] == {"run": "é"}
    both = client.put(URL, files=files, headers={"X-Adapter-Metadata": "{}"})
    assert code(both) == (400, "invalid_request")
    assert code(upload(client, kit.adapter(1), headers={"X-Adapter-Metadata": "[1]"})) == (
        400,
        "invalid_metadata",
    )
    large = {**adapter_files(kit.adapter(2)), "metadata": json.dumps({"x": "y" * 5000}).encode()}
    assert code(client.put(URL, files=large)) == (400, "invalid_metadata")


def test_versions_are_looked_at_and_downloaded_byte_for_byte(kit: Kit, client: TestClient) -> None:
    for seed in (1, 2, 3):
        upload(client, kit.adapter(seed))
    live = client.get(URL).json()
    assert live == client.get("/v1/users/alice/adapters/default").json()
    assert live == {**client.get(f"{URL}/versions/3").json(), "canary": None, "pin": None}
    page = client.get(f"{URL}/versions?limit=2").json()
    assert ([version["version"] for version in page["data"]], page["has_more"]) == ([3, 2], True)
    rest = client.get(f"{URL}/versions?limit=2&after=2").json()
    assert ([version["version"] for version in rest["data"]], rest["has_more"]) == ([1], False)
    for name, content in adapter_files(kit.adapter(2)).items():
        file = client.get(f"{URL}/versions/2/files/{name}")
        assert (file.content, file.headers["content-length"]) == (content, str(len(content)))
        assert file.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
        head = client.head(f"{URL}/versions/2/files/{name}")
        assert (head.content, head.headers["content-length"]) == (b"", str(len(content)))
    assert code(client.get(f"{URL}/versions/2/files/passwd")) == (404, "file_not_found")
    assert code(client.get(f"{URL}/versions/9")) == (404, "adapter_not_found")
    assert client.get(f"{URL}/versions/0").status_code == 400
    assert client.get(f"{URL}/versions/x").status_code == 400
    assert client.get(f"{URL}/versions?limit=0").status_code == 400
    assert client.get(f"{URL}/versions?after=-1").status_code == 400


def test_users_are_listed_by_page(kit: Kit, client: TestClient) -> None:
    for name in ("carol", "alice", "a1", "a"):
        upload(client, kit.adapter(), f"/v1/users/{name}/adapter")
    upload(client, kit.adapter(), "/v1/users/alice/adapters/poems")
    page = client.get("/v1/users?limit=3").json()
    assert ([user["user_id"] for user in page["data"]], page["has_more"]) == (["a", "a1", "alice"], True)
    assert page["data"][2]["num_adapters"] == 2
    assert [user["user_id"] for user in client.get("/v1/users?after=alice").json()["data"]] == ["carol"]
    assert client.get("/v1/users/alice").json() == page["data"][2]
    assert code(client.get("/v1/users/dave")) == (404, "user_not_found")
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["tiny", "user:a", "user:a1", "user:alice", "user:carol"]
    assert models[1]["parent"] == "tiny"
    assert client.get("/v1/models/user:alice/poems").json()["id"] == "user:alice/poems"
    assert client.get("/v1/models/user:alice%2Fpoems").json()["id"] == "user:alice/poems"
    assert client.get("/v1/models/tiny").json() == models[0]
    assert code(client.get("/v1/models/user:dave")) == (404, "adapter_not_found")
    assert code(client.get("/v1/models/gpt-4")) == (404, "model_not_found")


def test_a_parts_file_name_means_nothing(kit: Kit, client: TestClient) -> None:
    files = adapter_files(kit.adapter())
    names = ("../../../x", "/etc/passwd\x00")
    parts = [part(name, files[name], file) for name, file in zip(ADAPTER_FILES, names, strict=True)]
    assert client.put(URL, **multipart(*parts)).status_code == 201


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 422), (b"not an archive", 422), (b"\x1f\x8b", 422), (b"PK\x03\x04", 422), (b"{}", 422)],
)
def test_what_is_no_adapter_is_refused(client: TestClient, body: bytes, status: int) -> None:
    assert client.put(URL, content=body).status_code == status


def test_a_missing_file_is_named(kit: Kit, client: TestClient) -> None:
    response = client.put(URL, files={ADAPTER_FILES[0]: adapter_files(kit.adapter())[ADAPTER_FILES[0]]})
    assert (code(response), response.json()["error"]["param"]) == ((422, "missing_file"), ADAPTER_FILES[1])


def test_a_hostile_adapter_says_what_is_wrong_and_leaves_nothing(kit: Kit, client: TestClient) -> None:
    files = adapter_files(kit.adapter())
    response = client.put(URL, files={**files, ADAPTER_FILES[1]: files[ADAPTER_FILES[1]][:-1]})
    assert response.status_code == 422
    assert client.get("/v1/users").json()["data"] == []


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_over_the_limit_is_413_with_the_limit(client: TestClient, chunked: bool) -> None:
    body = b"x" * 1_000_001
    response = client.put(URL, content=iter([body[:600_000], body[600_000:]]) if chunked else body)
    assert code(response) == (413, "body_too_large")
    assert "1000000" in response.json()["error"]["message"]


def test_a_content_digest_is_verified(kit: Kit, client: TestClient) -> None:
    body = zip_of(adapter_files(kit.adapter()))
    assert code(client.put(URL, content=body, headers=digest_of(body + b"x"))) == (400, "digest_mismatch")
    assert code(client.put(URL, content=body, headers={"Content-Digest": "md5=:aa:"})) == (
        400,
        "invalid_digest",
    )
    assert client.get("/v1/users").json()["data"] == []
    assert client.put(URL, content=body, headers=digest_of(body, "sha-512")).status_code == 201


def test_an_encoded_body_is_refused(kit: Kit, client: TestClient) -> None:
    response = client.put(URL, content=b"x", headers={"content-encoding": "gzip"})
    assert code(response) == (415, "unsupported_media_type")


def test_a_connection_that_breaks_leaves_nothing_behind(kit: Kit) -> None:
    body = zip_of(adapter_files(kit.adapter()))
    fleet = kit.fleet()
    with serving(create_app(fleet, anyone, with_lifespan=True)) as url:
        port = int(url.rpartition(":")[2])
        for part_of in (0, len(body) // 2, len(body) - 1):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                head = f"PUT {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body[:part_of])
        with httpx2.Client(base_url=url) as client:
            assert client.get("/v1/users").json()["data"] == []
    assert staged(kit) == []


def test_a_refused_upload_tells_a_client_that_is_still_sending(kit: Kit) -> None:
    with (
        serving(create_app(kit.fleet(max_upload_bytes=1_000_000), anyone, with_lifespan=True)) as url,
        httpx2.Client(base_url=url) as client,
    ):
        for _ in range(5):
            response = client.put(URL, content=iter([b"x" * 500_000] * 8))
            assert code(response) == (413, "body_too_large")
            response = client.put(URL, content=b"x" * 4_000_000)
            assert code(response) == (413, "body_too_large")
