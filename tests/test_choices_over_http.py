"""Choices and logprobs over HTTP: OpenAI's shapes, and in the clients the library's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.testclient import TestClient

from router_kit import HELLO, Kit, Server, ask, code, events, run_async
from tunefleet import Client
from tunefleet.answers import Answer
from tunefleet.asking import Asking

HALF = -math.log(2)  # of the fake's tokens; what comes after is half as likely each time


def test_a_chats_logprobs_have_openais_shape(kit: Kit, client: TestClient) -> None:
    kit.dispatcher.answer = lambda work: kit.tokenizer.encode("aé")
    body = ask(client, logprobs=True, top_logprobs=1).json()
    a, first, second = body["choices"][0]["logprobs"]["content"]
    assert body["choices"][0]["logprobs"]["refusal"] is None
    top = {"token": "a", "logprob": HALF, "bytes": [97]}
    assert a == {**top, "top_logprobs": [top]}
    assert (first["token"], first["bytes"]) == ("\\xc3", [0xC3])
    assert (second["token"], second["bytes"]) == ("\\xa9", [0xA9])
    bare = ask(client, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert bare[0] == {**top, "top_logprobs": []}


def test_a_completions_logprobs_have_openais_shape(kit: Kit, client: TestClient) -> None:
    kit.dispatcher.answer = lambda work: kit.tokenizer.encode("aé!")
    body = client.post("/v1/completions", json={"prompt": "x", "logprobs": 1}).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9", "!"],
        "token_logprobs": [HALF] * 4,
        "top_logprobs": [{"a": HALF}, {"bytes:\\xc3": HALF}, {"bytes:\\xa9": HALF}, {"!": HALF}],
        "text_offset": [0, 1, 1, 2],
    }
    body = client.post("/v1/completions", json={"prompt": "x", "logprobs": 0}).json()
    assert body["choices"][0]["logprobs"]["top_logprobs"][0] == {"a": HALF}


def test_streamed_logprobs_are_those_of_the_whole_answer(kit: Kit, client: TestClient) -> None:
    kit.dispatcher.answer = lambda work: kit.tokenizer.encode("hello 🎉, stop it")
    asked: dict[str, Any] = {"stop": "stop", "logprobs": True, "top_logprobs": 3}
    whole = ask(client, **asked).json()["choices"][0]
    streamed = [chunk["choices"][0] for chunk in events(ask(client, **asked, stream=True).text)]
    content = [entry for choice in streamed for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert content == whole["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == whole["message"]["content"]
    for choice in streamed:
        assert (choice["logprobs"] is None) == (choice["delta"].get("content", "") == "")


def test_streamed_completions_keep_counting_their_offsets(kit: Kit, client: TestClient) -> None:
    kit.dispatcher.answer = lambda work: kit.tokenizer.encode("ab🎉c")
    body = {"prompt": "x", "logprobs": 0, "stream": True}
    chunks = events(client.post("/v1/completions", json=body).text)
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [offset for logprobs in told if logprobs for offset in logprobs["text_offset"]] == [
        0,
        1,
        2,
        2,
        2,
        2,
        3,
    ]


def test_n_choices_come_by_index_and_usage_sums_them(kit: Kit, client: TestClient) -> None:
    texts = iter(["one", "two two", "three"] * 2)
    kit.dispatcher.answer = lambda work: kit.tokenizer.encode(next(texts))
    body = ask(client, n=3).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["one", "two two", "three"]
    lengths = [len(kit.tokenizer.encode(text)) for text in ("one", "two two", "three")]
    assert body["usage"]["completion_tokens"] == sum(lengths)
    assert body["usage"]["prompt_tokens"] == len(kit.dispatcher.submitted[0].prompt)


@pytest.mark.parametrize("usage", [False, True])
def test_n_streamed_choices_each_open_and_end_once(kit: Kit, client: TestClient, usage: bool) -> None:
    texts = iter(["one", "two two", "three"])
    kit.dispatcher.answer = lambda work: kit.tokenizer.encode(next(texts))
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = events(ask(client, n=3, stream=True, **options).text)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index, text in enumerate(("one", "two two", "three")):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in own) == text
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert ["tunefleet" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [bool(chunk.get("usage")) for chunk in chunks] == [False] * (len(chunks) - 1) + [usage]


@pytest.mark.parametrize(
    ("field", "limit"), [({"n": 17}, "16"), ({"n": 0}, "1"), ({"n": 1e6}, "int"), ({"n": "2"}, "int")]
)
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_too_many_choices_are_refused_with_the_limit(
    client: TestClient, route: str, field: dict[str, Any], limit: str
) -> None:
    prompt = {"messages": HELLO} if "chat" in route else {"prompt": "x"}
    response = client.post(f"/v1/{route}", json={**prompt, **field})
    assert code(response) == (400, "invalid_request")
    assert (response.json()["error"]["param"], limit in response.json()["error"]["message"]) == ("n", True)


LOGPROBS: dict[str, Asking] = {
    "chat": {"logprobs": True, "top_logprobs": 2, "n": 2, "seed": 7, "min_p": 0.1},
    "complete": {"logprobs": 2, "n": 2, "seed": 7, "min_p": 0.1},
}


@run_async
async def _in_process(kit: Kit, told: list[Answer]) -> None:
    async with kit.fleet() as fleet:
        told.append(await fleet.chat(None, HELLO, **LOGPROBS["chat"]))
        told.append(await fleet.complete(None, "x", **LOGPROBS["complete"]))


def test_choices_and_logprobs_are_the_librarys(server: Server, tmp_path: Path) -> None:
    """Chats over HTTP don't tell offsets; all else is the same."""
    kit = Kit(tmp_path / "library")
    for each in (kit, server.kit):
        each.dispatcher.answer = lambda work: kit.tokenizer.encode(f"é🎉 {work.sampling.seed}")
    ours: list[Answer] = []
    _in_process(kit, ours)
    with Client(server.url) as client:
        chat = client.chat(None, HELLO, **LOGPROBS["chat"])
        assert (client.complete(None, "x", **LOGPROBS["complete"]).choices, 2) == (
            ours[1].choices,
            len(chat.choices),
        )
    for choice, own in zip(chat.choices, ours[0].choices, strict=True):
        assert (choice.index, choice.text, choice.finish_reason) == (own.index, own.text, own.finish_reason)
        assert choice.logprobs is not None
        assert own.logprobs is not None
        assert choice.logprobs == tuple(
            msgspec.structs.replace(logprob, text_offset=None) for logprob in own.logprobs
        )
    assert chat.logprobs == chat.choices[0].logprobs
    assert chat.usage == ours[0].usage


def test_a_stream_of_choices_is_the_whole_answers(server: Server) -> None:
    server.kit.dispatcher.answer = lambda work: server.kit.tokenizer.encode(f"é🎉 {work.sampling.seed}")
    with Client(server.url) as client:
        whole = client.chat(None, HELLO, **LOGPROBS["chat"])
        chunks = list(client.stream(None, HELLO, **LOGPROBS["chat"]))
    for choice in whole.choices:
        own = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(chunk.text for chunk in own) == choice.text
        assert tuple(logprob for chunk in own for logprob in chunk.logprobs or ()) == choice.logprobs
        assert [chunk.finish_reason for chunk in own if chunk.finish_reason] == ["stop"]
    assert [chunk.usage for chunk in chunks if chunk.usage] == [whole.usage]
    assert chunks[-1].served is not None
