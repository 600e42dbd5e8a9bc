"""From a request to its text: the digest is the live one, the text is whole, the sequence is always freed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from router_kit import HELLO, Kit, run_async
from tunefleet.choices import TextDelta
from tunefleet.core import ColdStart, FinishReason
from tunefleet.errors import AdapterNotFound, CapacityError, ReplicaError
from tunefleet.generation import Generation
from tunefleet.generations import Generations
from tunefleet.messages import Progress, Submit, Timing
from tunefleet.openai_api import ChatRequest, parse_request
from tunefleet.runtime.fakes import FakeDispatcher, FakeRun
from tunefleet.target import Target

BASE = Target(None)


def chat(**fields: Any) -> ChatRequest:
    return parse_request(ChatRequest, {"messages": HELLO, **fields})


def answering(kit: Kit, text: str) -> None:
    kit.dispatcher.answer = lambda work: kit.tokenizer.encode(text)


@run_async
async def test_a_stop_string_cuts_the_text_and_cancels_the_sequence(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    answering(kit, "one two. three four")
    async with kit.fleet() as fleet:
        answer = await (await fleet.generations.start(BASE, chat(stop=[". three", "zzz"]))).answer()
    assert (answer.text, answer.finish_reason) == ("one two", FinishReason.STOP)
    assert answer.usage.completion_tokens < len(kit.tokenizer.encode("one two. three four"))
    assert kit.dispatcher.cancelled == [kit.dispatcher.submitted[0].request_id]


@run_async
async def test_text_held_for_a_stop_string_comes_at_the_end(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    answering(kit, "one two.")
    async with kit.fleet() as fleet:
        answer = await (await fleet.generations.start(BASE, chat(stop=". three"))).answer()
    assert answer.text == "one two."


@run_async
async def test_the_first_delta_comes_with_the_first_token_though_it_makes_no_text(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    answering(kit, "🎉")
    kit.dispatcher.gate = asyncio.Semaphore(1)
    async with kit.fleet() as fleet, await fleet.generations.start(BASE, chat()) as generation:
        assert await anext(aiter(generation)) == TextDelta("", None)
        assert generation.timing["first_token"] > 0


@run_async
async def test_length_ends_an_answer(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    answering(kit, "many words without an end")
    async with kit.fleet() as fleet:
        answer = await (await fleet.generations.start(BASE, chat(max_tokens=3))).answer()
    assert (answer.finish_reason, answer.usage.completion_tokens) == (FinishReason.LENGTH, 3)


@run_async
async def test_closing_early_cancels_and_a_second_time_changes_nothing(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        generation = await fleet.generations.start(BASE, chat())
        async for _ in generation:
            break
        assert kit.dispatcher.running
        await generation.aclose()
        await generation.aclose()
    assert kit.dispatcher.cancelled == [kit.dispatcher.submitted[0].request_id]
    assert kit.dispatcher.running == set()


@run_async
async def test_an_answer_that_ended_is_not_cancelled(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        await (await fleet.generations.start(BASE, chat())).answer()
    assert kit.dispatcher.cancelled == []


@run_async
async def test_cancelling_the_task_cancels_the_sequence(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher.gate = asyncio.Semaphore(0)
    async with kit.fleet() as fleet:
        task = asyncio.ensure_future(fleet.chat(None, HELLO))
        while not kit.dispatcher.running:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert kit.dispatcher.cancelled == [kit.dispatcher.submitted[0].request_id]


@run_async
async def test_errors_of_the_machine_come_out_as_they_are(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher.error = CapacityError("full", retry_after_s=3, code="queue_full")
    async with kit.fleet() as fleet:
        with pytest.raises(CapacityError, match="full"):
            await (await fleet.generations.start(BASE, chat())).answer()


class ScriptedRun(FakeRun):
    """A run whose progress is given."""

    script: tuple[Progress, ...] = ()

    async def __aiter__(self) -> Any:
        for progress in self.script:
            yield progress


def scripted(kit: Kit, *script: Progress, **facts: Any) -> None:
    class Scripted(FakeDispatcher):
        def submit(self, work: Submit) -> FakeRun:
            run = ScriptedRun(self, work)
            run.script = script
            for name, value in facts.items():
                setattr(run, name, value)
            return run

    kit.dispatcher = Scripted(kit.dispatcher.answer)


async def run_script(kit: Kit) -> Generation:
    async with kit.fleet() as fleet:
        generations: Generations = fleet.generations
        generation = await generations.start(BASE, chat())
        await generation.answer()
        return generation


@run_async
async def test_timing_and_company_are_taken_from_the_machine(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    timing = Timing(queue_s=1, download_s=2, load_s=3, activate_s=4, prefill_s=5, adapter_cold=True)
    scripted(
        kit,
        Progress(request_id="x", tokens=(10,), timing=timing, batch_size=3, num_adapters=2),
        Progress(request_id="x", tokens=(11, 12), batch_size=8, num_adapters=5),
        Progress(request_id="x", finish_reason=FinishReason.STOP, batch_size=1),
        wake_s=0.5,
    )
    generation = await run_script(kit)
    stages = ("queue", "wake", "download", "load", "activate", "prefill")
    assert [generation.timing[stage] for stage in stages] == [1, 0.5, 2, 3, 4, 5]
    assert (generation.batch_size, generation.num_adapters) == (8, 5)
    assert generation.cold_start is ColdStart.ADAPTER
    assert generation.usage.completion_tokens == 3


@run_async
async def test_a_woken_replica_is_a_cold_base(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    done = Progress(
        request_id="x", tokens=(10,), timing=Timing(adapter_cold=True), finish_reason=FinishReason.STOP
    )
    scripted(kit, done, cold_base=True)
    assert (await run_script(kit)).cold_start is ColdStart.BASE


@run_async
async def test_a_sequence_that_failed_or_broke_off_is_an_error(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    failed = Progress(request_id="x", finish_reason=FinishReason.ERROR, error="nan", error_code="nan_logits")
    scripted(kit, failed)
    with pytest.raises(ReplicaError, match="nan") as caught:
        await run_script(kit)
    assert caught.value.code == "nan_logits"
    scripted(kit, Progress(request_id="x", tokens=(10,)))
    with pytest.raises(ReplicaError, match="before it was complete"):
        await run_script(kit)


def seeded(kit: Kit) -> None:
    """Answers that show their sequence's seed."""
    kit.dispatcher.answer = lambda work: kit.tokenizer.encode(f"seed {work.sampling.seed}")


@run_async
async def test_usage_counts_the_prompt_once_and_all_completions(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    seeded(kit)
    async with kit.fleet() as fleet:
        answer = await (await fleet.generations.start(BASE, chat(seed=1, n=3, max_tokens=4))).answer()
    assert answer.usage.prompt_tokens == len(kit.dispatcher.submitted[0].prompt)
    assert answer.usage.completion_tokens == 12
    assert {choice.finish_reason for choice in answer.choices} == {FinishReason.LENGTH}


@run_async
async def test_choices_come_as_they_are_made_and_each_ends_by_itself(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    lengths = iter((1, 6, 3))
    kit.dispatcher.answer = lambda work: kit.tokenizer.encode("abcdef")[: next(lengths)]
    async with kit.fleet() as fleet:
        chunks = [chunk async for chunk in fleet.stream(None, HELLO, n=3)]
    ends = [chunk.index for chunk in chunks if chunk.finish_reason is not None]
    assert (ends[0], sorted(ends)) == (0, [0, 1, 2])
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].served is not None
    texts = ["".join(chunk.text for chunk in chunks if chunk.index == index) for index in range(3)]
    assert sorted(map(len, texts)) == [1, 3, 6]


@run_async
async def test_a_stop_string_ends_its_own_choice_only(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    texts = iter(("one two three", "four two! five"))
    kit.dispatcher.answer = lambda work: kit.tokenizer.encode(next(texts))
    async with kit.fleet() as fleet:
        answer = await (await fleet.generations.start(BASE, chat(n=2, stop="two!"))).answer()
    assert [choice.text for choice in answer.choices] == ["one two three", "four "]
    assert len(kit.dispatcher.cancelled) == 1


@run_async
async def test_leaving_a_stream_cancels_all_choices(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        generation = await fleet.generations.start(BASE, chat(n=4))
        await anext(aiter(generation))
        await generation.aclose()
        await generation.aclose()
        assert len(fleet.generations.open_requests) == 0
    ids = [work.request_id for work in kit.dispatcher.submitted]
    assert kit.dispatcher.cancelled == ids
    assert kit.dispatcher.running == set()


@run_async
async def test_a_deleted_users_choices_all_end(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        await fleet.adapters.push("alice", kit.adapter())
        kit.dispatcher.gate = asyncio.Semaphore(2)
        generation = await fleet.generations.start(Target("alice"), chat(n=3))
        deltas = aiter(generation)
        await anext(deltas)
        waiting = asyncio.ensure_future(_rest(deltas))
        await asyncio.sleep(0)
        await fleet.delete_user("alice")
        with pytest.raises(AdapterNotFound, match="deleted"):
            await waiting
        await generation.aclose()
    assert sorted(kit.dispatcher.cancelled) == sorted(work.request_id for work in kit.dispatcher.submitted)
    assert kit.dispatcher.running == set()


async def _rest(deltas: AsyncIterator[TextDelta]) -> list[TextDelta]:
    return [delta async for delta in deltas]


@run_async
async def test_a_choice_that_fails_fails_the_request_and_ends_the_others(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    failed = Progress(request_id="x", finish_reason=FinishReason.ERROR, error="nan", error_code="nan_logits")

    class OneFails(FakeDispatcher):
        def submit(self, work: Submit) -> FakeRun:
            if len(self.submitted) != 1:
                return super().submit(work)
            self.submitted.append(work)
            run = ScriptedRun(self, work)
            run.script = (failed,)
            return run

    kit.dispatcher = OneFails(kit.dispatcher.answer)
    async with kit.fleet() as fleet:
        with pytest.raises(ReplicaError, match="nan"):
            await (await fleet.generations.start(BASE, chat(n=3))).answer()
        assert len(fleet.generations.open_requests) == 0
    assert kit.dispatcher.running == set()


@run_async
async def test_cached_tokens_are_the_first_choices(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    numbers = iter((5, 7))

    class Cached(FakeDispatcher):
        def submit(self, work: Submit) -> FakeRun:
            run = ScriptedRun(self, work)
            timing = Timing(cached_tokens=next(numbers))
            run.script = (
                Progress(request_id="x", tokens=(10,), timing=timing),
                Progress(request_id="x", tokens=(11,), finish_reason=FinishReason.STOP),
            )
            return run

    kit.dispatcher = Cached(kit.dispatcher.answer)
    async with kit.fleet() as fleet:
        answer = await (await fleet.generations.start(BASE, chat(n=2))).answer()
    assert (answer.usage.cached_tokens, answer.usage.completion_tokens) == (5, 4)


@run_async
async def test_logprobs_reach_the_machine_and_come_back_with_the_text(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    answering(kit, "é!")
    async with kit.fleet() as fleet:
        asked = chat(logprobs=True, top_logprobs=2, min_p=0.25)
        answer = await (await fleet.generations.start(BASE, asked)).answer()
        plain = await (await fleet.generations.start(BASE, chat())).answer()
    assert (plain.logprobs, plain.choices[0].logprobs) == (None, None)
    sampling = kit.dispatcher.submitted[0].sampling
    assert (sampling.logprobs, sampling.min_p) == (2, 0.25)
    assert answer.logprobs is not None
    assert b"".join(bytes(logprob.bytes or ()) for logprob in answer.logprobs).decode() == answer.text
    assert [logprob.text_offset for logprob in answer.logprobs] == [0, 0, 1]
    assert {len(logprob.top_logprobs) for logprob in answer.logprobs} == {2}
    assert all(logprob.top_logprobs[0].token == logprob.token for logprob in answer.logprobs)
