"""Any text as an id, name or number in a path: an answer or a clean refusal, never Alice's data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import quote

import httpx2
import pytest
from hypothesis import strategies as st

import hazards
from router_kit import Kit, serving, upload
from tunefleet.auth import anyone
from tunefleet.http.app import create_app

SECRET = "planted-7c1f"
SUFFIXES = (
    "",
    "/adapter",
    "/adapter/versions",
    "/adapter/versions/1",
    "/adapter/versions/1/files/adapter_config.json",
)
TWINS = ("alice ", "Alice", "ALICE", "alic\u0435", "alice\0", "alice/", "alice/adapter", "./alice", "alice\n")
TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from([*TWINS, "..", ".", "", "alice%00", "%61lice", "alice;x", "alice?", "alice#", "'--"]),
    st.builds(lambda before, after: f"{before}alice{after}", st.text(max_size=3), st.text(max_size=3)),
)


class Server(NamedTuple):
    client: httpx2.Client  # of a real server: test clients decode paths twice
    digest: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    kit = Kit(tmp_path_factory.mktemp("ids"))
    app = create_app(kit.fleet(), anyone, with_lifespan=True)
    with serving(app) as url, httpx2.Client(base_url=url) as client:
        response = upload(client, kit.adapter(), headers={"X-Adapter-Metadata": f'{{"x": "{SECRET}"}}'})
        client.patch("/v1/users/alice", json={"metadata": {"x": SECRET}})
        yield Server(client, response.json()["digest"])


def encoded(text: str) -> str:
    return quote(text.encode("utf-8", "replace"), safe="")


def check(server: Server, method: str, url: str, json: object = None) -> None:
    response = server.client.request(method, url, json=json)
    assert response.status_code in {200, 400, 404, 405, 409, 422}, (url, response.text)
    assert SECRET not in response.text, url
    assert server.digest not in response.text, url
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@hazards.examples(60)
def test_no_text_as_an_id_reaches_another_user(server: Server, num_examples: int) -> None:
    def look(text: str, suffix: str) -> None:
        if text not in {"alice", ".", ".."}:  # clients resolve dots before they send a path
            check(server, "GET", f"/v1/users/{encoded(text)}{suffix}")

    hazards.generate("E", num_examples, lambda one: look(*one), st.tuples(TEXTS, st.sampled_from(SUFFIXES)))


@hazards.examples(40)
def test_no_text_as_an_id_changes_another_user(server: Server, num_examples: int) -> None:
    changes: list[tuple[str, str, object]] = [
        ("DELETE", "", None),
        ("PATCH", "", {"fallback": "base"}),
        ("POST", "/adapter/rollback", {}),
        ("PUT", "/adapter/pin", {"tier": "host"}),
        ("DELETE", "/adapter/versions/1", None),
    ]
    before = server.client.get("/v1/users/alice").json()

    def change(text: str, call: tuple[str, str, object]) -> None:
        method, suffix, json = call
        if text != "alice":
            check(server, method, f"/v1/users/{encoded(text)}{suffix}", json)
            assert server.client.get("/v1/users/alice").json() == before

    hazards.generate("E", num_examples, lambda one: change(*one), st.tuples(TEXTS, st.sampled_from(changes)))


@hazards.examples(40)
def test_no_text_as_a_name_or_number_reaches_more_than_it_says(server: Server, num_examples: int) -> None:
    templates = (
        "/v1/users/bob/adapters/{}",
        "/v1/users/alice/adapters/x{}",
        "/v1/users/alice/adapter/versions/9{}",
        "/v1/deletions/{}",
        "/v1/users/bob/adapter/versions/{}/files/{}",
    )

    def look(text: str, template: str) -> None:
        check(server, "GET", template.replace("{}", encoded(text)))

    hazards.generate("E", num_examples, lambda one: look(*one), st.tuples(TEXTS, st.sampled_from(templates)))
