"""Who may do what."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.requests import Request

from router_kit import Kit, api, ask, upload
from tunefleet.auth import Caller, admin_key, check_exposure
from tunefleet.errors import AdapterNotFound, AuthError, ConfigError, RequestInvalid

KEY = "s3cret-ключ"


def test_the_admin_key_opens_and_nothing_else_does(tmp_path: Path) -> None:
    with api(Kit(tmp_path), admin_key(KEY)) as client:
        for header in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"):
            refused = client.get("/v1/users", headers={b"Authorization": header.encode()})
            assert refused.status_code == 401, header
            assert refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["code"] == "unauthenticated"
        assert (
            client.get("/v1/users", headers={b"Authorization": f"Bearer {KEY}".encode()}).status_code == 200
        )
        assert client.get("/healthz").status_code == 200


def test_every_route_but_health_asks_for_a_key(tmp_path: Path) -> None:
    with api(Kit(tmp_path), admin_key(KEY)) as client:
        paths = {route.path: route.methods for route in client.app.routes}  # type: ignore[attr-defined]
        for path, methods in paths.items():
            url = path.replace(":path", "").format(user_id="u", name="x", version="1", file="f", model="m")
            for method in methods - {"HEAD"}:
                expected = 200 if path in {"/healthz", "/readyz"} else 401
                assert client.request(method, url).status_code == expected, (method, path)


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        ({"infer"}, {"infer"}),
        ({"upload"}, {"upload"}),
        ({"tenant"}, {"infer", "upload", "tenant"}),
        ({"admin"}, {"infer", "upload", "tenant", "admin"}),
        (set(), set()),
    ],
)
def test_scopes_include_what_is_below_them(scopes: set[str], allowed: set[str]) -> None:
    caller = Caller(scopes=frozenset(scopes))
    for scope in ("infer", "upload", "tenant", "admin"):
        if scope in allowed:
            caller.require(scope)
        else:
            with pytest.raises(AuthError) as caught:
                caller.require(scope)
            assert caught.value.code == "forbidden"


def test_an_end_user_never_acts_for_the_tenant() -> None:
    with pytest.raises(AuthError):
        Caller(user_id="alice", scopes=frozenset({"admin"})).require("tenant")


def test_an_end_user_reaches_nobody_else() -> None:
    caller = Caller(user_id="alice")
    assert caller.reach("alice") == "alice"
    for other in ("alice1", "Alice", "alic"):
        with pytest.raises(AdapterNotFound):
            caller.reach(other)


def test_unknown_scopes_and_ids_are_refused() -> None:
    with pytest.raises(ConfigError, match="everything"):
        Caller(scopes=frozenset({"everything"}))
    with pytest.raises(RequestInvalid):
        Caller(user_id="a/b")


async def _as_named(request: Request) -> Caller | None:
    """``X-Session: user scope,scope``."""
    user_id, _, scopes = request.headers.get("x-session", "").partition(" ")
    return Caller(user_id or None, frozenset(scopes.split(",")) if scopes else frozenset({"infer"}))


def test_over_http_another_user_is_as_if_not_there(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    with api(kit, _as_named) as client:
        for name in ("alice", "bob"):
            url = f"/v1/users/{name}/adapter"
            assert (
                upload(client, kit.adapter(), url, headers={"x-session": f"{name} upload"}).status_code == 201
            )
        alice = {"x-session": "alice infer,upload"}
        for path in ("", "/adapter", "/adapter/versions", "/adapter/versions/1"):
            there = client.get(f"/v1/users/bob{path}", headers=alice)
            nowhere = client.get(f"/v1/users/nobody{path}", headers=alice)
            assert (there.status_code, nowhere.status_code) == (404, 404)
            assert there.json() == {
                **nowhere.json(),
                "error": {**nowhere.json()["error"], **_bob(there.json())},
            }
        assert upload(client, kit.adapter(1), "/v1/users/bob/adapter", headers=alice).status_code == 404
        assert (
            client.post("/v1/users/bob/adapter/promote", json={"version": 1}, headers=alice).status_code
            == 404
        )
        assert client.get("/v1/models/user:bob", headers=alice).status_code == 404
        assert client.post("/v1/warmup", json={"user_id": "bob"}, headers=alice).json()["error"]["code"] == (
            "user_mismatch"
        )
        mismatch = ask(client, "bob", headers=alice)
        assert (mismatch.status_code, mismatch.json()["error"]["code"]) == (400, "user_mismatch")
        assert ask(client, model="user:bob", headers=alice).status_code == 400
        assert ask(client, headers=alice).json()["tunefleet"]["user_id"] == "alice"
        assert client.get("/v1/models", headers=alice).json()["data"][1:] == [
            client.get("/v1/models/user:alice", headers=alice).json()
            | {"created": client.get("/v1/models", headers=alice).json()["data"][1]["created"]}
        ]


def _bob(body: dict[str, dict[str, str]]) -> dict[str, str]:
    """The message names the user that was asked for; nothing else may differ."""
    return {"message": body["error"]["message"]} if "'bob'" in body["error"]["message"] else {}


def test_over_http_somebody_without_uploads_sees_the_base(tmp_path: Path) -> None:
    with api(Kit(tmp_path), _as_named) as client:
        models = client.get("/v1/models", headers={"x-session": "alice infer"})
        assert [model["id"] for model in models.json()["data"]] == ["tiny"]


def test_over_http_scopes_are_checked(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    with api(kit, _as_named) as client:
        infer = {"x-session": " infer"}
        assert client.get("/v1/users", headers=infer).status_code == 403
        assert client.get("/v1/status", headers=infer).status_code == 403
        assert upload(client, kit.adapter(), headers=infer).status_code == 403
        assert ask(client, headers={"x-session": " upload"}).status_code == 403
        assert ask(client, headers=infer).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_this_machine_may_be_served_without_keys(host: str) -> None:
    check_exposure(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.com", ""])
def test_others_may_not(host: str) -> None:
    with pytest.raises(ConfigError, match="TUNEFLEET_ADMIN_KEY"):
        check_exposure(host, None)
    check_exposure(host, "key")
