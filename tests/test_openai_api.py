"""Requests are understood to the last field, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from router_kit import HELLO
from tunefleet.errors import RequestInvalid
from tunefleet.openai_api import ChatRequest, CompletionRequest, parse_json, parse_request


def chat(**fields: Any) -> ChatRequest:
    return parse_request(ChatRequest, {"messages": HELLO, **fields})


def refusal(**fields: Any) -> RequestInvalid:
    with pytest.raises(RequestInvalid) as caught:
        chat(**fields)
    return caught.value


@pytest.mark.parametrize(
    "field",
    [
        {"frequency_penalty": 0.0},
        {"presence_penalty": 0},
        {"n": None},
        {"top_logprobs": None},
        {"logit_bias": {}},
        {"store": False},
        {"metadata": {"run": "1"}},
        {"user": "somebody else"},
        {"parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"tools": None},
        {"service_tier": "auto"},
        {"max_tokens": None},
    ],
)
def test_what_changes_nothing_is_accepted(field: dict[str, Any]) -> None:
    assert chat(**field) == chat()


@pytest.mark.parametrize(
    "field",
    [
        {"frequency_penalty": 0.5},
        {"presence_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {"5": 100}},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
        {"chat_template": "{{ evil }}"},
        {"chat_template_kwargs": {}},
        {"best_of": 3},
        {"unheard_of": 1},
        {"unheard_of": None},
    ],
)
def test_what_would_be_dropped_is_refused_by_name(field: dict[str, Any]) -> None:
    error = refusal(**field)
    assert (error.code, error.param) == ("unsupported_parameter", next(iter(field)))


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": float("nan")}, "min_p"),
        ({"min_p": -1}, "min_p"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 1_000_000}, "n"),
        ({"n": 10**30}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": 2.0}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": "2"}, "max_tokens"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": "true"}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"user": 5}, "user"),
        ({"model": 5}, "model"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "root", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_a_bad_value_is_refused_with_its_place(field: dict[str, Any], param: str) -> None:
    error = refusal(**field)
    assert error.param is not None
    assert error.param.startswith(param)


@pytest.mark.parametrize(
    ("field", "limit"),
    [({"n": 17}, "16"), ({"logprobs": True, "top_logprobs": 21}, "20"), ({"min_p": 2}, "1")],
)
def test_a_number_out_of_range_is_told_the_limit(field: dict[str, Any], limit: str) -> None:
    assert limit in refusal(**field).message


def test_a_chats_logprobs_are_a_switch_and_a_number() -> None:
    assert chat().num_logprobs is None
    assert chat(logprobs=False, top_logprobs=0).num_logprobs is None
    assert chat(logprobs=True).num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).num_logprobs == 20


def test_a_completions_logprobs_are_a_number() -> None:
    for value in (None, 0, 5):
        assert parse_request(CompletionRequest, {"prompt": "x", "logprobs": value}).num_logprobs == value
    for bad in (6, -1, True, "1", 1.5):
        with pytest.raises(RequestInvalid) as caught:
            parse_request(CompletionRequest, {"prompt": "x", "logprobs": bad})
        assert caught.value.param == "logprobs"
    with pytest.raises(RequestInvalid) as caught:
        parse_request(CompletionRequest, {"prompt": "x", "top_logprobs": 3})
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "top_logprobs")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_request(ChatRequest, {})
    assert caught.value.param == "messages"


def test_text_parts_become_lines_and_developers_speak_as_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": parts}])
    assert request.messages[0].plain() == {"role": "system", "content": "a\nb"}


def test_an_answer_handed_back_as_a_message_is_accepted() -> None:
    own: dict[str, Any] = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
    }
    assert chat(messages=[*HELLO, own]).messages[1].plain() == {"role": "assistant", "content": "x"}


def test_either_name_of_max_tokens_counts() -> None:
    assert [chat(max_tokens=3).max_new_tokens, chat(max_completion_tokens=4).max_new_tokens] == [3, 4]


@pytest.mark.parametrize(("prompt", "expected"), [("x", "x"), (["x"], "x"), ([1, 2], [1, 2])])
def test_a_prompt_is_a_text_or_ids(prompt: object, expected: object) -> None:
    assert parse_request(CompletionRequest, {"prompt": prompt}).text_or_ids == expected


@pytest.mark.parametrize("prompt", [["x", "y"], ["x", 1]])
def test_several_prompts_are_refused(prompt: object) -> None:
    with pytest.raises(RequestInvalid, match="one text or one list"):
        _ = parse_request(CompletionRequest, {"prompt": prompt}).text_or_ids


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"x"', b"null", b'{"a": "\xff"}', b'{"a": NaN}', b'{"a":' * 100_000]
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_json(body)
    assert caught.value.code == "invalid_json"
