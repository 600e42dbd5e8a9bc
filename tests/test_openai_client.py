"""The official client of OpenAI against a real server: each understands the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from router_kit import Kit, run_async, serving
from tunefleet import Client
from tunefleet.auth import admin_key
from tunefleet.core import Version
from tunefleet.errors import CapacityError
from tunefleet.http.app import create_app

KEY = "k1"
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


class Server(NamedTuple):
    kit: Kit
    url: str
    alice: Version  # the live one of two


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    kit = Kit(tmp_path_factory.mktemp("openai"))
    with serving(create_app(kit.fleet(), admin_key(KEY), with_lifespan=True)) as url:
        with Client(url, KEY) as client:
            client.adapters.push("alice", kit.adapter(1))
            alice = client.adapters.push("alice", kit.adapter(2))
        yield Server(kit, url, alice)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_chat(server: Server, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="user:alice",
        messages=MESSAGES,
        max_tokens=50,
        temperature=0.1,
        seed=1,
        stop=["x"],
        user="bob",
        n=1,
    )
    assert answer.choices[0].message.content == f"I am {server.alice.digest[:8]}."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.model_extra is not None
    assert answer.model_extra["tunefleet"]["adapter_version"] == 2


def test_the_user_by_header_with_the_bases_name(server: Server, client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=MESSAGES, extra_headers={"X-User-Id": "alice"}
    )
    assert raw.headers["x-adapter-digest"] == server.alice.digest
    assert raw.parse().choices[0].message.content == f"I am {server.alice.digest[:8]}."


def test_a_stream_with_usage(server: Server, client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="user:alice", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == f"I am {server.alice.digest[:8]}."
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens > 0


def test_the_stream_helper_puts_the_answer_together(server: Server, client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="user:alice", messages=MESSAGES) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == f"I am {server.alice.digest[:8]}."


def test_an_answer_can_be_handed_back_as_a_turn(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
    again = client.chat.completions.create(
        model="tiny",
        messages=[*MESSAGES, answer.choices[0].message, *MESSAGES],  # type: ignore[list-item]
    )
    assert again.choices[0].message.content == "I am the base."


def test_completions(client: openai.OpenAI) -> None:
    assert client.completions.create(model="tiny", prompt="hello").choices[0].text == "I am the base."
    chunks = client.completions.create(model="tiny", prompt=[5, 6, 7], stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "I am the base."


def test_chats_logprobs_and_choices(server: Server, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="user:alice", messages=MESSAGES, n=3, logprobs=True, top_logprobs=4
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        assert b"".join(bytes(token.bytes or ()) for token in content).decode() == choice.message.content
        assert {len(token.top_logprobs) for token in content} == {4}
        assert all(token.logprob < 0 for token in content)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(
        len(choice.logprobs.content or ()) for choice in answer.choices if choice.logprobs
    )


def test_the_stream_helper_puts_choices_and_logprobs_together(server: Server, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "user:alice", "messages": MESSAGES, "n": 2, "logprobs": True}
    with client.chat.completions.stream(**asked, top_logprobs=1) as stream:
        final = stream.get_final_completion()
    plain = client.chat.completions.create(**asked, top_logprobs=1)
    for streamed, whole in zip(final.choices, plain.choices, strict=True):
        assert (streamed.index, streamed.finish_reason) == (whole.index, whole.finish_reason)
        assert streamed.message.content == whole.message.content
        assert streamed.logprobs is not None
        assert whole.logprobs is not None
        assert streamed.logprobs.content == whole.logprobs.content


def test_completions_logprobs_and_choices(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hello", n=2, logprobs=5)
    assert [choice.text for choice in answer.choices] == ["I am the base."] * 2
    for choice in answer.choices:
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert "".join(logprobs.tokens) == choice.text
        assert logprobs.text_offset is not None
        assert [choice.text[at:][:1] for at in logprobs.text_offset] == [
            token[:1] for token in logprobs.tokens
        ]
        assert {len(top) for top in logprobs.top_logprobs or ()} == {5}
    chunks = list(client.completions.create(model="tiny", prompt="hello", n=2, logprobs=0, stream=True))
    for index in range(2):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        tokens = [token for choice in own if choice.logprobs for token in choice.logprobs.tokens or ()]
        assert "".join(choice.text for choice in own) == "".join(tokens) == "I am the base."


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "user:alice"]
    assert client.models.retrieve("user:alice").id == "user:alice"


def test_refusals_are_the_clients_own_errors(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="user:bob", messages=MESSAGES)
    assert missing.value.code == "adapter_not_found"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model="tiny", messages=MESSAGES, presence_penalty=1)
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "presence_penalty")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body={"adapter_id": "x"})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()


def test_the_client_retries_after_the_time_we_say(server: Server, client: openai.OpenAI) -> None:
    server.kit.dispatcher.error = CapacityError("full", retry_after_s=1, code="queue_full")
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="tiny", messages=MESSAGES)
    finally:
        server.kit.dispatcher.error = None
    assert caught.value.response.headers["retry-after"] == "1"


@run_async
async def _async_client(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        answer = await client.chat.completions.create(model="user:alice", messages=MESSAGES)
        assert answer.choices[0].message.content == f"I am {server.alice.digest[:8]}."
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(texts) == "I am the base."


def test_the_async_client(server: Server) -> None:
    _async_client(server)
