"""Users over HTTP: settings, deletion with its receipt, and answers that end with their user."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.testclient import TestClient
from starlette.types import Message

from router_kit import HELLO, Kit, ask, code, run_async, sent_by, stored, upload
from tunefleet.auth import anyone
from tunefleet.errors import AdapterNotFound
from tunefleet.fleet import Fleet
from tunefleet.http.app import create_app

USER = "/v1/users/alice"
URL = f"{USER}/adapter"


def test_settings_stay_unless_given_and_null_takes_them_away(kit: Kit, client: TestClient) -> None:
    upload(client, kit.adapter())
    new = client.get(USER).json()
    assert (new["fallback"], new["limits"], new["metadata"], new["num_adapters"]) == (None, {}, {}, 1)
    changes: list[tuple[dict[str, object], tuple[object, ...]]] = [
        ({"fallback": "base"}, ("base", {}, {})),
        ({"limits": {"tokens": 5}, "metadata": {"plan": "é"}}, ("base", {"tokens": 5}, {"plan": "é"})),
        ({}, ("base", {"tokens": 5}, {"plan": "é"})),
        ({"fallback": "none", "limits": {}}, ("none", {}, {"plan": "é"})),
        ({"fallback": None, "limits": None, "metadata": None}, (None, {}, {})),
    ]
    for change, expected in changes:
        response = client.patch(USER, json=change)
        body = response.json()
        assert (response.status_code, (body["fallback"], body["limits"], body["metadata"])) == (200, expected)
        assert client.get(USER).json() == body


def test_settings_may_come_before_the_first_upload(client: TestClient) -> None:
    assert client.patch("/v1/users/bob", json={"fallback": "base"}).json()["num_adapters"] == 0
    assert ask(client, "bob").headers["x-adapter-digest"] == "base"
    client.patch("/v1/users/bob", json={"fallback": "none"})
    assert code(ask(client, "bob")) == (404, "adapter_not_found")


@pytest.mark.parametrize(
    "change",
    [
        {"fallback": "other"},
        {"fallback": True},
        {"limits": []},
        {"limits": "5"},
        {"limits": {"x": "y" * 4096}},
        {"metadata": {"x": "y" * 4096}},
        {"metadata": 5},
        {"user_id": "bob"},
        {"name": "x"},
    ],
)
def test_settings_that_make_no_sense_are_refused_and_make_no_user(
    client: TestClient, change: dict[str, Any]
) -> None:
    response = client.patch(USER, json=change)
    assert code(response)[0] == 400
    assert response.json()["error"]["param"] in {*change, None}
    assert code(client.get(USER)) == (404, "user_not_found")


def test_a_deleted_user_is_gone_from_everywhere_and_the_receipt_says_so(kit: Kit, client: TestClient) -> None:
    digests = {upload(client, kit.adapter(seed)).json()["digest"] for seed in (1, 2)}
    upload(client, kit.adapter(3), "/v1/users/bob/adapter")
    upload(client, kit.adapter(3), f"{USER}/adapters/poems")
    bobs = client.get("/v1/users/bob/adapter").json()
    response = client.delete(USER)
    receipt = response.json()
    assert (response.status_code, receipt["status"]) == (200, "done"), receipt
    assert (receipt["user_id"], receipt["name"], receipt["version"]) == (None, None, None)
    assert set(receipt["digests"]) == {*digests, bobs["digest"]}
    assert (receipt["removed"]["versions"], receipt["removed"]["objects"]) == (3, 6)
    assert client.get(f"/v1/deletions/{receipt['deletion_id']}").json() == receipt
    assert "alice" not in response.text
    assert code(client.get(USER)) == (404, "user_not_found")
    assert code(client.get(URL)) == (404, "adapter_not_found")
    assert code(client.delete(USER)) == (404, "user_not_found")
    assert code(ask(client, "alice")) == (404, "adapter_not_found")
    assert client.get("/v1/users/bob/adapter").json() == bobs
    assert ask(client, "bob").headers["x-adapter-digest"] == bobs["digest"]
    assert len(stored(kit)) == 2
    assert digests <= set(kit.dispatcher.forgotten)


def test_a_deleted_user_may_come_back_with_the_same_bytes(kit: Kit, client: TestClient) -> None:
    first = upload(client, kit.adapter()).json()
    client.delete(USER)
    again = upload(client, kit.adapter())
    assert (again.status_code, again.json()["digest"], again.json()["version"]) == (201, first["digest"], 1)
    assert ask(client, "alice").status_code == 200


@pytest.mark.parametrize("deletion_id", ["nope", "0" * 32, "..%2f", "a" * 500, "é"])
def test_a_deletion_that_never_was_is_404(client: TestClient, deletion_id: str) -> None:
    assert client.get(f"/v1/deletions/{deletion_id}").status_code == 404


class Asked:
    """A chat request called without a server; its client never goes."""

    def __init__(self, fleet: Fleet, user: str, *, stream: bool) -> None:
        self._body = [json.dumps({"messages": HELLO, "stream": stream}).encode()]
        headers = [(b"x-user-id", user.encode())]
        self.sent = asyncio.ensure_future(
            sent_by(
                create_app(fleet, anyone),
                self._receive,
                "/v1/chat/completions",
                method="POST",
                headers=headers,
            )
        )

    async def _receive(self) -> Message:
        if not self._body:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": self._body.pop()}

    async def answer(self) -> tuple[int, str]:
        start, *rest = await self.sent
        return start["status"], b"".join(message["body"] for message in rest).decode()


async def begun(kit: Kit, num: int) -> None:
    """Returns once so many sequences wait for a token."""
    while len(kit.dispatcher.running) < num:
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def with_alice_and_bob(kit: Kit) -> AsyncIterator[Fleet]:
    async with kit.fleet() as fleet:
        for seed, name in enumerate(("alice", "bob")):
            await fleet.adapters.push(name, kit.adapter(seed))
        yield fleet


@run_async
async def test_a_deleted_users_answers_end_and_others_go_on(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher.gate = asyncio.Semaphore(0)
    async with with_alice_and_bob(kit) as fleet, asyncio.timeout(20):
        alices = [Asked(fleet, "alice", stream=stream) for stream in (True, False)]
        bobs = Asked(fleet, "bob", stream=True)
        await begun(kit, 3)
        for _ in range(3):
            kit.dispatcher.gate.release()
        receipt = await fleet.delete_user("alice")
        assert (receipt.status, receipt.removed["streams"]) == ("done", 2)
        for asked, status in zip(alices, (200, 410), strict=True):
            answered = await asked.answer()
            assert answered[0] in {status, 410}
            assert '"code":"user_deleted"' in answered[1]
            assert "[DONE]" not in answered[1]
        for _ in range(100):
            kit.dispatcher.gate.release()
        status, text = await bobs.answer()
        assert (status, text.endswith("data: [DONE]\n\n")) == (200, True)
        assert len(fleet.generations.open_requests) == 0
        assert msgspec.to_builtins(await fleet.deletion(receipt.deletion_id)) == msgspec.to_builtins(receipt)


@run_async
async def test_an_answer_under_way_ends_with_the_error_in_its_stream(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher.gate = asyncio.Semaphore(1)
    async with with_alice_and_bob(kit) as fleet, asyncio.timeout(20):
        chunks = fleet.stream("alice", HELLO)
        assert (await anext(chunks)).text
        rest = asyncio.ensure_future(anext(chunks))
        while not kit.dispatcher.gate.locked():
            await asyncio.sleep(0)
        await fleet.delete_user("alice")
        with pytest.raises(AdapterNotFound, match="was deleted while") as caught:
            await rest
        assert caught.value.code == "user_deleted"
        assert kit.dispatcher.running == set()
        assert len(fleet.generations.open_requests) == 0
