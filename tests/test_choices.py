"""A choice's text and logprobs agree, however tokens share characters and whatever stop strings take away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_kit import IM_END, run_async, write_tokenizer
from tunefleet.answers import Logprob
from tunefleet.choices import ChoiceText, TextDelta, merged
from tunefleet.core import FinishReason
from tunefleet.errors import ReplicaError
from tunefleet.messages import Progress, TokenLogprob
from tunefleet.text import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("base")))


def deltas(tokenizer: Tokenizer, ids: list[int], *stops: str, per_step: int = 1) -> list[TextDelta]:
    """Of tokens whose logprobs are -1, -2, -3 ..."""
    text = ChoiceText(tokenizer, stops, with_logprobs=True)
    told = []
    for at in range(0, len(ids), per_step):
        step = tuple(ids[at : at + per_step])
        logprobs = tuple(TokenLogprob(-1.0 - at - place) for place in range(len(step)))
        told.append(text.push(Progress(request_id="x", tokens=step, logprobs=logprobs), 0))
        if told[-1].finish_reason is not None:
            return told
    return [*told, text.push(Progress(request_id="x", finish_reason=FinishReason.LENGTH), 0)]


def logprobs_of(told: list[TextDelta]) -> list[Logprob]:
    return [logprob for delta in told for logprob in delta.logprobs or ()]


def text_of(told: list[TextDelta]) -> str:
    return "".join(delta.text for delta in told)


def written(logprobs: list[Logprob]) -> bytes:
    return b"".join(bytes(logprob.bytes or ()) for logprob in logprobs)


@given(st.lists(st.integers(0, 319), max_size=40), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_any_tokens_and_stops(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> None:
    """Every token of the text is there, in order; only the last may write more than is shown."""
    told = deltas(tokenizer, ids, *stops)
    text, logprobs = text_of(told), logprobs_of(told)
    assert [logprob.logprob for logprob in logprobs] == [-1.0 - at for at in range(len(logprobs))]
    shown = written(logprobs).decode(errors="replace")
    assert shown.startswith(text)
    if told[-1].finish_reason is FinishReason.LENGTH:
        assert (len(logprobs), shown) == (len(ids), text)
    offsets = [logprob.text_offset or 0 for logprob in logprobs]
    assert offsets == sorted(offsets)
    assert all(offset <= len(text) for offset in offsets)


@given(st.text(max_size=12), st.integers(1, 4))
def test_each_delta_has_the_tokens_that_begin_in_it(tokenizer: Tokenizer, text: str, per_step: int) -> None:
    ids = tokenizer.encode(text)
    num_chars = 0
    for delta in deltas(tokenizer, ids, per_step=per_step):
        end = num_chars + len(delta.text)
        assert all(num_chars <= (logprob.text_offset or 0) <= end for logprob in delta.logprobs or ())
        num_chars = end


def test_tokens_of_one_character_come_together_with_their_bytes(tokenizer: Tokenizer) -> None:
    told = deltas(tokenizer, tokenizer.encode("a🎉"))
    assert [delta.text for delta in told] == ["a", "", "", "", "🎉", ""]
    assert [len(delta.logprobs or ()) for delta in told] == [1, 0, 0, 0, 4, 0]
    party = logprobs_of(told)[1:]
    assert [logprob.bytes for logprob in party] == [(0xF0,), (0x9F,), (0x8E,), (0x89,)]
    assert [logprob.token for logprob in party] == ["\\xf0", "\\x9f", "\\x8e", "\\x89"]
    assert [logprob.text_offset for logprob in party] == [1, 1, 1, 1]


def test_a_character_that_is_never_whole_keeps_its_tokens(tokenizer: Tokenizer) -> None:
    told = deltas(tokenizer, tokenizer.encode("a🎉")[:-1])
    assert text_of(told) == "a\ufffd"
    assert written(logprobs_of(told)) == b"a\xf0\x9f\x8e"


def test_what_may_be_a_stop_string_holds_its_tokens_back(tokenizer: Tokenizer) -> None:
    ids = [token for character in "abXYc" for token in tokenizer.encode(character)]
    told = deltas(tokenizer, ids, "XYZ")
    assert [delta.text for delta in told] == ["a", "b", "", "", "XYc", ""]
    assert [len(delta.logprobs or ()) for delta in told] == [1, 1, 0, 0, 3, 0]


def test_a_stop_string_takes_its_tokens_along(tokenizer: Tokenizer) -> None:
    ids = [token for character in "abXYZc" for token in tokenizer.encode(character)]
    told = deltas(tokenizer, ids, "XYZ")
    assert (text_of(told), told[-1].finish_reason) == ("ab", FinishReason.STOP)
    assert [logprob.token for logprob in logprobs_of(told)] == ["a", "b"]


def test_a_token_that_a_stop_string_cuts_in_two_stays(tokenizer: Tokenizer) -> None:
    longest = max(range(3, 320), key=lambda token: len(tokenizer.decode([token])))
    word = tokenizer.decode([longest])
    told = deltas(tokenizer, [longest], word[2:])
    assert (text_of(told), [logprob.token for logprob in logprobs_of(told)]) == (word[:2], [word])


def test_a_control_token_has_a_logprob_and_no_bytes(tokenizer: Tokenizer) -> None:
    told = deltas(tokenizer, [*tokenizer.encode("a"), IM_END, *tokenizer.encode("b")])
    assert text_of(told) == "ab"
    assert [(logprob.token, logprob.bytes) for logprob in logprobs_of(told)][1] == ("<|im_end|>", None)
    assert [logprob.text_offset for logprob in logprobs_of(told)] == [0, 1, 1]


def test_without_logprobs_there_are_none(tokenizer: Tokenizer) -> None:
    text = ChoiceText(tokenizer, (), with_logprobs=False)
    assert text.push(Progress(request_id="x", tokens=(5,)), 3).logprobs is None


class ListedRun:
    """A run whose progress is given; an error at its end if there is one."""

    wake_s, cold_base, replica_id = 0.0, False, "listed"

    def __init__(self, *tokens: int, error: Exception | None = None, forever: bool = False) -> None:
        self._tokens, self._error, self._forever = tokens, error, forever
        self.ended = False

    async def __aiter__(self) -> AsyncIterator[Progress]:
        try:
            for token in self._tokens:
                await asyncio.sleep(0)
                yield Progress(request_id="x", tokens=(token,))
            if self._forever:
                await asyncio.Event().wait()
            if self._error is not None:
                raise self._error
        finally:
            self.ended = True

    async def aclose(self) -> None: ...


async def collected(*runs: ListedRun) -> list[Any]:
    return [(news.choice, *news.progress.tokens) async for news in merged(runs)]


@run_async
async def test_runs_are_told_apart_and_each_in_its_order() -> None:
    assert await collected(ListedRun(1, 2)) == [(0, 1), (0, 2)]
    told = await collected(ListedRun(1, 2), ListedRun(), ListedRun(7, 8, 9))
    assert sorted(told) == [(0, 1), (0, 2), (2, 7), (2, 8), (2, 9)]
    assert [item for item in told if item[0] == 2] == [(2, 7), (2, 8), (2, 9)]


@run_async
async def test_the_first_error_ends_them_all() -> None:
    runs = (ListedRun(1, forever=True), ListedRun(2, error=ReplicaError("broken")))
    with pytest.raises(ReplicaError, match="broken"):
        await collected(*runs)
    assert all(run.ended for run in runs)


@run_async
async def test_whoever_leaves_early_leaves_no_task_behind() -> None:
    runs = (ListedRun(1, forever=True), ListedRun(2, forever=True))
    news = merged(runs)
    await anext(news)
    await news.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}
