"""What surrounds all routes: ids, the access log, errors in one shape, CORS, mounts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient
from starlette.types import Message

from router_kit import Kit, api, ask, run_async, sent_by, serving
from tunefleet.auth import anyone
from tunefleet.http.app import create_app


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with api(Kit(tmp_path_factory.mktemp("boundary"))) as client:
        yield client


@pytest.mark.parametrize("given", ["a", "req_1.2:3", "x" * 128, "!~"])
def test_a_sane_request_id_is_the_answers(client: TestClient, given: str) -> None:
    assert client.get("/healthz", headers={"X-Request-Id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é", "a\tb"])
def test_any_other_is_replaced(client: TestClient, given: str) -> None:
    answered = client.get("/healthz", headers={b"X-Request-Id": given.encode()}).headers["x-request-id"]
    assert answered != given
    assert len(answered) == 32


def test_unknown_routes_and_methods_have_the_shape_of_all_errors(tmp_path: Path) -> None:
    with api(Kit(tmp_path)) as client:
        nowhere = client.get("/v1/nowhere")
        assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "not_found")
        wrong = client.delete("/v1/users/alice/adapter")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
        assert set(wrong.headers["allow"].split(", ")) == {"GET", "HEAD", "PUT"}
        assert client.get("/v1/models/").status_code == 404
        assert client.get("/v1/users/").status_code == 404


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/users/a%2Fadapter", 422),
        ("/v1/users/a%2fb/adapter", 422),
        ("/v1/users/%2e%2e/adapter", 422),
        ("/v1/users/%2E/adapter", 422),
        ("/v1/users/a%00b/adapter", 422),
        ("/v1/users/a%0ab/adapter", 422),
        ("/v1/users/a%5Cb/adapter", 422),
        ("/v1/users/%C3%A9/adapter", 422),
        ("/v1/users/%F0%9F%98%80/adapter", 422),
        ("/v1/users/%20/adapter", 422),
        ("/v1/users/" + "x" * 129, 422),
        ("/v1/users/alice/adapters/%2e%2e", 422),
        ("/v1/users/alice/adapters/Default", 422),
        ("/v1/users//adapter", 404),
        ("/v1/users/a/b/adapter", 404),
    ],
)
def test_an_id_that_can_not_exist_never_becomes_another_users(
    client: TestClient, path: str, status: int
) -> None:
    response = client.get(path)
    assert response.status_code == status
    if status == 422:
        assert response.json()["error"]["code"] in {"invalid_user_id", "invalid_adapter_name"}


@pytest.mark.parametrize("raw", [{}, {"raw_path": None}])
def test_a_server_without_raw_paths_is_served(tmp_path: Path, raw: dict[str, None]) -> None:
    @run_async
    async def run() -> None:
        async def receive() -> Message:
            return {"type": "http.request"}

        app = create_app(Kit(tmp_path).fleet(), anyone)
        assert (await sent_by(app, receive, "/healthz", **raw))[0]["status"] == 200

    run()


def test_every_allowed_character_works_in_a_path(tmp_path: Path) -> None:
    with api(Kit(tmp_path)) as client:
        for path in ("/v1/users/a+b=c|d@e:f~g._-/adapter", "/v1/users/a%2Bb%3Dc%7Cd%40e%3Af~g._-/adapter"):
            error = client.get(path).json()["error"]
            assert (error["code"], "'a+b=c|d@e:f~g._-'" in error["message"]) == ("adapter_not_found", True)


def test_a_failure_of_ours_is_logged_and_hidden(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher.error = RuntimeError("internals")
    with api(kit) as client:
        response = ask(client, headers={"X-Request-Id": "r9"})
    assert response.status_code == 500
    assert "internals" not in response.text
    assert any("r9" in record.getMessage() and record.exc_info for record in caplog.records)


def test_the_access_log_has_a_line_per_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tunefleet.access")
    with api(Kit(tmp_path, access_log=True)) as client:
        client.get("/healthz?secret=1", headers={"X-Request-Id": "r1"})
    lines = [record.getMessage() for record in caplog.records if record.name == "tunefleet.access"]
    assert len(lines) == 1
    assert lines[0].startswith("GET /healthz 200 ")
    assert lines[0].endswith(" r1")


def test_a_path_never_makes_a_line_of_the_access_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tunefleet.access")
    with api(Kit(tmp_path, access_log=True)) as client:
        client.get("/v1/users/a%0D%0AGET%20/forged%20200/adapter")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "tunefleet.access"]
    assert line.startswith("GET /v1/users/a%0D%0AGET%20/forged%20200/adapter 404 ")


def test_pages_of_allowed_origins_may_read_our_headers(tmp_path: Path) -> None:
    with api(Kit(tmp_path, cors_origins=("https://app.example",))) as client:
        answered = ask(client, headers={"Origin": "https://app.example"})
        assert answered.headers["access-control-allow-origin"] == "https://app.example"
        exposed = {name.strip() for name in answered.headers["access-control-expose-headers"].split(",")}
        assert {"X-Adapter-Digest", "X-Cold-Start", "Server-Timing", "X-Request-Id"} <= exposed
        failed = client.get("/v1/users/..x/", headers={"Origin": "https://app.example"})
        assert failed.headers["access-control-allow-origin"] == "https://app.example"
        other = ask(client, headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        assert client.options("/v1/chat/completions", headers=preflight).status_code == 200


def test_without_the_option_no_origin_is_allowed(tmp_path: Path) -> None:
    with api(Kit(tmp_path)) as client:
        answered = ask(client, headers={"Origin": "https://app.example"})
        assert "access-control-allow-origin" not in answered.headers


def test_behind_a_root_path_and_a_mount_everything_is_found(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    fleet = kit.fleet()
    app = Starlette(routes=[Mount("/ai", fleet.asgi(auth="none"))], lifespan=fleet.lifespan)
    with TestClient(app, root_path="/prefix") as client:
        assert client.get("/prefix/ai/v1/models").json()["data"][0]["id"] == "tiny"
        assert client.get("/prefix/ai/v1/users/a%2Fb").status_code == 422
        assert client.get("/prefix/ai/v1/models/").status_code == 404


def test_a_real_server_decodes_a_path_once(tmp_path: Path) -> None:
    app = create_app(Kit(tmp_path).fleet(), anyone, with_lifespan=True)
    with serving(app) as url, httpx2.Client(base_url=url) as client:
        for path in ("/v1/users/a%252Fadapter", "/v1/users/a%2Fadapter", "/v1/users/%252e%252e/adapter"):
            assert client.get(path).status_code == 422
