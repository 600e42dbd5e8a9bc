"""Promote, rollback, canary and pin over HTTP: the next request sees what was decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from router_kit import Kit, api, ask, code, upload

URL = "/v1/users/alice/adapter"
NAMED = "/v1/users/alice/adapters/poems"


@pytest.fixture
def client(kit: Kit) -> Iterator[TestClient]:
    """Versions 1, 2 and 3 of Alice's, the last one live."""
    with api(kit) as client:
        for seed in (1, 2, 3):
            assert upload(client, kit.adapter(seed)).status_code == 201
        yield client


def answering(client: TestClient, **headers: str) -> int:
    """The number of the version that answers."""
    return int(ask(client, "alice", headers=headers).headers["x-adapter-version"])


def test_a_rollback_goes_to_what_was_live_before_and_then_further(client: TestClient) -> None:
    for expected in (2, 1):
        response = client.post(f"{URL}/rollback", json={})
        assert (response.status_code, response.json()["version"], response.json()["live"]) == (
            200,
            expected,
            True,
        )
        assert answering(client) == expected
    assert code(client.post(f"{URL}/rollback")) == (409, "no_earlier_version")


def test_a_rollback_follows_history_and_not_numbers(client: TestClient) -> None:
    client.post(f"{URL}/promote", json={"version": 1})
    assert client.post(f"{URL}/rollback", json={}).json()["version"] == 3
    assert client.post(f"{URL}/rollback", json={"to": 1}).json()["version"] == 1


def test_a_rollback_may_name_what_it_expects(kit: Kit, client: TestClient) -> None:
    assert code(client.post(f"{URL}/rollback", json={"if_live": 2}))[0] == 409
    assert client.post(f"{URL}/rollback", json={"to": 1, "if_live": 3}).json()["version"] == 1
    dark = upload(client, kit.adapter(4), f"{URL}?promote=false").json()["version"]
    assert code(client.post(f"{URL}/rollback", json={"to": dark})) == (409, "never_live")


def test_a_canary_answers_its_share_of_sessions_and_sticks(client: TestClient) -> None:
    put = client.put(f"{URL}/canary", json={"version": 1, "percent": 50})
    assert (put.status_code, put.json()["canary"], put.json()["version"]) == (
        200,
        {"version": 1, "percent": 50.0},
        3,
    )
    assert client.get(URL).json() == put.json()
    by_session = {f"s{number}": answering(client, **{"X-Session-Id": f"s{number}"}) for number in range(30)}
    assert Counter(by_session.values()).keys() == {1, 3}
    for session, version in by_session.items():
        assert answering(client, **{"X-Session-Id": session, "X-Request-Id": "x"}) == version
    by_request = {f"s{number}": answering(client, **{"X-Request-Id": f"s{number}"}) for number in range(30)}
    assert by_session == by_request
    ended = client.delete(f"{URL}/canary")
    assert (ended.status_code, ended.json()["canary"]) == (200, None)
    assert {answering(client, **{"X-Session-Id": session}) for session in by_session} == {3}


def test_a_canary_shows_itself_in_answers_and_never_when_a_version_is_asked_for(client: TestClient) -> None:
    client.put(f"{URL}/canary", json={"version": 2, "percent": 100})
    versions = {each["version"]: each["digest"] for each in client.get(f"{URL}/versions").json()["data"]}
    answer = ask(client, "alice")
    assert answer.headers["x-adapter-digest"] == versions[2]
    assert answer.json()["tunefleet"]["adapter_version"] == 2
    assert answering(client, **{"X-Adapter-Version": "3"}) == 3
    promoted = client.post(f"{URL}/promote", json={"version": 2}).json()
    assert (promoted["version"], client.get(URL).json()["canary"]) == (2, None)


def test_a_pin_is_shown_until_it_is_taken_away_or_over(client: TestClient) -> None:
    until = "2999-01-01T00:00:00Z"
    put = client.put(f"{URL}/pin", json={"tier": "host", "until": until})
    assert put.status_code == 200
    assert put.json()["pin"]["tier"] == "host"
    assert put.json()["pin"]["until"].startswith("2999-01-01T00:00:00")
    assert client.get(URL).json() == put.json()
    assert client.put(f"{URL}/pin", json={"tier": "disk"}).json()["pin"] == {"tier": "disk", "until": None}
    assert client.delete(f"{URL}/pin").json()["pin"] is None
    assert client.delete(f"{URL}/pin").json()["pin"] is None


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "rollback", {"to": 9}, 404),
        ("POST", "rollback", {"to": 0}, 400),
        ("POST", "rollback", {"to": 2**70}, 400),
        ("POST", "rollback", {"to": "1"}, 400),
        ("POST", "rollback", {"to": 1.5}, 400),
        ("POST", "rollback", {"too": 1}, 400),
        ("PUT", "canary", {}, 400),
        ("PUT", "canary", {"version": 1}, 400),
        ("PUT", "canary", {"version": 9, "percent": 5}, 404),
        ("PUT", "canary", {"version": 1, "percent": 0}, 400),
        ("PUT", "canary", {"version": 1, "percent": -1}, 400),
        ("PUT", "canary", {"version": 1, "percent": 100.1}, 400),
        ("PUT", "canary", {"version": 1, "percent": "5"}, 400),
        ("PUT", "canary", {"version": 1, "percent": True}, 400),
        ("PUT", "pin", {}, 400),
        ("PUT", "pin", {"tier": "device"}, 400),
        ("PUT", "pin", {"tier": "host", "until": "tomorrow"}, 400),
        ("PUT", "pin", {"tier": "host", "until": 5}, 400),
        ("PUT", "pin", {"tier": "host", "until": "2001-01-01T00:00:00Z"}, 400),
        ("PUT", "pin", {"tier": "host", "until": "2999-01-01T00:00:00"}, 400),
        ("PUT", "pin", {"tier": "host", "for": 5}, 400),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    client: TestClient, method: str, path: str, body: dict[str, Any], status: int
) -> None:
    before = client.get(URL).json()
    response = client.request(method, f"{URL}/{path}", json=body)
    assert code(response)[0] == status, response.text
    assert client.get(URL).json() == before


def test_every_route_is_there_for_named_adapters_and_404_where_nothing_is(
    kit: Kit, client: TestClient
) -> None:
    calls: list[tuple[str, str, object]] = [
        ("POST", "rollback", {}),
        ("PUT", "canary", {"version": 1, "percent": 5}),
        ("DELETE", "canary", None),
        ("PUT", "pin", {"tier": "disk"}),
        ("DELETE", "pin", None),
        ("DELETE", "versions/1", None),
    ]
    for method, path, body in calls:
        assert code(client.request(method, f"{NAMED}/{path}", json=body))[0] == 404, path
    for seed in (1, 2):
        upload(client, kit.adapter(seed), NAMED)
    for method, path, body in calls:
        assert client.request(method, f"{NAMED}/{path}", json=body).status_code in {200, 409}, path


def test_the_live_version_and_the_canary_are_not_deleted(client: TestClient) -> None:
    client.put(f"{URL}/canary", json={"version": 2, "percent": 5})
    assert code(client.delete(f"{URL}/versions/3")) == (409, "version_is_live")
    assert code(client.delete(f"{URL}/versions/2")) == (409, "version_is_canary")
    receipt = client.delete(f"{URL}/versions/1")
    assert receipt.status_code == 200
    body = receipt.json()
    assert (body["status"], body["name"], body["version"], body["removed"]["versions"]) == (
        "done",
        "default",
        1,
        1,
    )
    assert client.get(f"/v1/deletions/{body['deletion_id']}").json() == body
    assert code(client.get(f"{URL}/versions/1")) == (404, "adapter_not_found")
    assert code(client.delete(f"{URL}/versions/1")) == (404, "adapter_not_found")
    assert [each["version"] for each in client.get(f"{URL}/versions").json()["data"]] == [3, 2]
