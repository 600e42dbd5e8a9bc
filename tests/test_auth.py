"""Who may do what."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.requests import Request

from router_kit import Kit, api, ask, upload
from tunefleet.auth import SCOPES, Caller, admin_key, check_exposure
from tunefleet.errors import AdapterNotFound, AuthError, ConfigError, RequestInvalid

KEY = "s3cret-ключ"
PATH_WORDS = {
    "user_id": "alice",
    "name": "default",
    "version": "1",
    "file": "adapter_config.json",
    "model": "user:alice",
    "upload_id": "0" * 32,
    "deletion_id": "0" * 32,
}


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


def test_every_route_but_health_and_metrics_asks_for_a_key(tmp_path: Path) -> None:
    with api(Kit(tmp_path), admin_key(KEY)) as client:
        paths = {route.path: route.methods for route in client.app.routes}  # type: ignore[attr-defined]
        for path, methods in paths.items():
            url = path.replace(":path", "").format_map(PATH_WORDS)
            for method in methods - {"HEAD"}:
                expected = 200 if path in {"/healthz", "/readyz", "/metrics"} else 401
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


CALLERS = {
    "admin": Caller(scopes=frozenset({"admin"})),
    "tenant": Caller(scopes=frozenset({"tenant"})),
    "upload": Caller(scopes=frozenset({"upload"})),
    "infer": Caller(scopes=frozenset({"infer"})),
    "alice": Caller("alice", frozenset({"infer", "upload"})),
    "bob": Caller("bob", frozenset({"infer", "upload"})),
    "claims all": Caller("alice", SCOPES),
    "elsewhere": Caller(scopes=SCOPES, tenant="acme"),
    "nobody": None,
}
SCOPE_OF = {  # where nothing is said: infer to look, upload to change
    "/v1/users": "tenant",
    "/v1/status": "tenant",
    "/v1/replicas": "tenant",
    "/v1/adapters": "tenant",
    "/v1/deletions/{deletion_id}": "tenant",
    "/v1/warmup": "infer",
    "/v1/chat/completions": "infer",
    "/v1/completions": "infer",
}


def scope_of(method: str, path: str) -> str:
    if "/files/" in path:
        return "upload"
    if path == "/v1/users/{user_id}":
        return "infer" if method == "GET" else "tenant"
    return SCOPE_OF.get(path, "infer" if method == "GET" else "upload")


def refusal_of(who: str, method: str, path: str) -> int | None:
    """The status that a caller must get for want of rights."""
    scope = scope_of(method, path)
    if who == "nobody":
        return 401
    if who in {"upload", "infer"} and scope != who:
        return 403
    if who in {"alice", "bob", "claims all"} and scope == "tenant":
        return 403
    of_alice = "{user_id}" in path or "{model:path}" in path
    return 404 if who == "bob" and of_alice else None


async def _as_listed(request: Request) -> Caller | None:
    return CALLERS[request.headers["x-caller"]]


@pytest.mark.parametrize("who", CALLERS)
def test_every_route_lets_in_whom_it_should(tmp_path: Path, who: str) -> None:
    kit = Kit(tmp_path)
    with api(kit, _as_listed) as client:
        upload(client, kit.adapter(), headers={"x-caller": "admin"})
        for route in client.app.routes[3:]:  # type: ignore[attr-defined]  # the first three are open to all
            for method in sorted(route.methods - {"HEAD"}):
                url = route.path.replace(":path", "").format_map(PATH_WORDS)
                response = client.request(method, url, headers={"x-caller": who})
                refusal = refusal_of(who, method, route.path)
                shown = (method, route.path, response.text)
                assert response.status_code == (refusal or response.status_code), shown
                assert refusal or response.status_code not in {401, 403, 500}, shown
        if who in {"nobody", "bob", "elsewhere", "infer"}:
            assert client.get("/v1/users/alice/adapter", headers={"x-caller": "admin"}).status_code == 200


def test_another_tenant_sees_nothing_of_a_user(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    with api(kit, _as_listed) as client:
        there = upload(client, kit.adapter(), headers={"x-caller": "admin"}).json()
        for route in client.app.routes:  # type: ignore[attr-defined]
            if "{user_id}" in route.path and "GET" in route.methods:
                url = route.path.format_map(PATH_WORDS)
                response = client.get(url, headers={"x-caller": "elsewhere"})
                assert response.status_code == 404 or response.json()["data"] == [], url
                assert there["digest"] not in response.text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_this_machine_may_be_served_without_keys(host: str) -> None:
    check_exposure(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.com", ""])
def test_others_may_not(host: str) -> None:
    with pytest.raises(ConfigError, match="TUNEFLEET_ADMIN_KEY"):
        check_exposure(host, None)
    check_exposure(host, "key")
