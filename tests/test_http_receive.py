"""Bodies on their way to disk: clients that stop, disks that are full, digests and metadata that are none."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest
from starlette.types import Message

from adapter_factory import adapter_files
from faults import no_file_above
from router_kit import Kit, api, code, run_async, sent_by, serving, staged, upload
from tunefleet.auth import anyone
from tunefleet.http.app import create_app

URL = "/v1/users/alice/adapter"


async def answer_to_a_client_that_stops(kit: Kit, method: str, path: str, kind: bytes) -> tuple[int, object]:
    """The answer to one piece of a body, after which nothing comes, not even the connection's end."""
    pieces: list[Message] = [{"type": "http.request", "body": b"--b\r\n", "more_body": True}]

    async def receive() -> Message:
        if not pieces:
            await asyncio.Event().wait()
        return pieces.pop()

    headers = [(b"content-type", kind)]
    fleet = kit.fleet()
    async with fleet:
        app = create_app(fleet, anyone, idle_s=0.001)
        start, body = await sent_by(app, receive, path, method=method, headers=headers)
    return start["status"], json.loads(body["body"])["error"]


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("PUT", URL, b"multipart/form-data; boundary=b"),
        ("PUT", URL, b"application/x-tar"),
        ("POST", "/v1/chat/completions", b"application/json"),
    ],
)
def test_a_client_that_stops_sending_gets_a_408(tmp_path: Path, method: str, path: str, kind: bytes) -> None:
    kit = Kit(tmp_path)

    @run_async
    async def run() -> None:
        status, error = await answer_to_a_client_that_stops(kit, method, path, kind)
        assert (status, error) == (
            408,
            {
                "message": "nothing of the body came for 0.001 s",
                "type": "invalid_request_error",
                "param": None,
                "code": "body_too_slow",
            },
        )
        assert staged(kit) == []

    run()


def test_a_real_connection_that_stops_is_answered_and_leaves_nothing(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    head = f"PUT {URL} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    with serving(create_app(kit.fleet(), anyone, with_lifespan=True, idle_s=0.05)) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(head.encode() + b"x" * 500)
            assert connection.recv(65536).startswith(b"HTTP/1.1 408")
    assert staged(kit) == []


@pytest.mark.parametrize("max_bytes", [50, 200, 1000])
def test_a_full_disk_is_our_trouble_and_leaves_nothing(tmp_path: Path, max_bytes: int) -> None:
    kit = Kit(tmp_path)
    folder = kit.adapter()
    body = b"x" * 6000
    with api(kit) as client:
        with no_file_above(max_bytes):
            responses = [upload(client, folder), client.put(URL, content=body)]
        for response in responses:
            assert code(response) == (503, "store_error")
            assert str(tmp_path) not in response.text
        assert staged(kit) == []
        assert upload(client, folder).status_code == 201


@pytest.mark.parametrize(
    "digest", ["sha-256=:A:", "sha-256=:=A=:", "sha-256=::", "sha-256", "md5=:AAAA:", ""]
)
def test_a_content_digest_that_is_none_is_refused(tmp_path: Path, digest: str) -> None:
    with api(Kit(tmp_path)) as client:
        response = client.put(URL, content=b"x", headers={"Content-Digest": digest})
    assert code(response) == (400, "invalid_digest")
    assert response.json()["error"]["param"] == "Content-Digest"


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b'{"a": NaN}', b'{"a": 1e999}', b"\xff", b'{"a": "\\ud800"}']
)
def test_metadata_that_is_no_json_object_is_named_by_header_and_part(tmp_path: Path, text: bytes) -> None:
    kit = Kit(tmp_path)
    files = adapter_files(kit.adapter())
    with api(kit) as client:
        by_header = client.put(URL, files=files, headers={b"X-Adapter-Metadata": text})
        by_part = client.put(URL, files={**files, "metadata": text})
        for response, where in ((by_header, "X-Adapter-Metadata"), (by_part, "metadata")):
            assert code(response) == (400, "invalid_metadata")
            assert response.json()["error"]["param"] == where
            assert where in response.json()["error"]["message"]
        assert client.get("/v1/users").json()["data"] == []


def test_an_upload_in_many_small_pieces_is_taken(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    with api(kit) as client:
        request = client.build_request("PUT", URL, files=adapter_files(kit.adapter()))
        body = request.read()
        headers = {"content-type": request.headers["content-type"]}
        pieces = (body[index : index + 3] for index in range(0, len(body), 3))
        assert client.put(URL, content=pieces, headers=headers).status_code == 201
