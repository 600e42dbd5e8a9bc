"""From a request to its text: the digest is the live one, the text is whole, the sequence is always freed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from router_kit import HELLO, Kit, run_async
from tunefleet.choices import TextDelta
from tunefleet.core import ColdStart, FinishReason
from tunefleet.errors import AdapterNotFound, CapacityError, ReplicaError, RequestInvalid
from tunefleet.generation import Generation
from tunefleet.generations import Generations
from tunefleet.messages import Progress, Submit, Timing
from tunefleet.openai_api import ChatRequest, CompletionRequest, parse_request
from tunefleet.runtime.fakes import FakeDispatcher, FakeRun
from tunefleet.target import Target

BASE = Target(None)


def chat(**fields: Any) -> ChatRequest:
    return parse_request(ChatRequest, {"messages": HELLO, **fields})


def answering(kit: Kit, text: str) -> None:
    kit.dispatcher.answer = lambda work: kit.tokenizer.encode(text)


@run_async
async def test_the_live_versions_digest_goes_to_the_machine_and_into_the_answer(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        first = await fleet.adapters.push("alice", kit.adapter(1))
        second = await fleet.adapters.push("alice", kit.adapter(2))
        answer = await (await fleet.generations.start(Target("alice"), chat())).answer()
        assert answer.text == f"I am {second.digest[:8]}."
        assert (answer.adapter_digest, answer.version) == (second.digest, 2)
        old = await (await fleet.generations.start(Target("alice", version=1), chat())).answer()
        assert (old.text, old.version) == (f"I am {first.digest[:8]}.", 1)
        refs = [work.adapter.digest for work in kit.dispatcher.submitted if work.adapter]
        assert refs == [second.digest, first.digest]


@run_async
async def test_a_promotion_changes_the_next_request_not_the_running_one(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    kit.dispatcher.gate = asyncio.Semaphore(1)
    async with kit.fleet() as fleet:
        for seed in (1, 2):
            await fleet.adapters.push("alice", kit.adapter(seed))
        running = await fleet.generations.start(Target("alice"), chat())
        await anext(aiter(running))
        promoted = await fleet.adapters.promote("alice", 1)
        kit.dispatcher.gate = None
        kit.dispatcher.gate = asyncio.Semaphore(1000)
        later = await (await fleet.generations.start(Target("alice"), chat())).answer()
        assert later.adapter_digest == promoted.digest
        assert running.accepted.adapter_version == 2
        await running.aclose()


@run_async
async def test_a_user_without_adapter_gets_none_unless_a_fallback_is_set(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        with pytest.raises(AdapterNotFound):
            await fleet.generations.start(Target("bob"), chat())
        answer = await (await fleet.generations.start(Target("bob", fallback="base"), chat())).answer()
        assert (answer.text, answer.adapter_digest, answer.version) == ("I am the base.", "base", 0)
        assert answer.served.user_id == "bob"  # metered on them all the same
        with pytest.raises(AdapterNotFound):
            await fleet.generations.start(Target("bob", version=3, fallback="base"), chat())


@run_async
async def test_the_fallback_option_counts_unless_a_request_says_none(tmp_path: Path) -> None:
    kit = Kit(tmp_path, fallback="base")
    async with kit.fleet() as fleet:
        answer = await (await fleet.generations.start(Target("bob"), chat())).answer()
        assert answer.adapter_digest == "base"
        with pytest.raises(AdapterNotFound):
            await fleet.generations.start(Target("bob", fallback="none"), chat())


@run_async
async def test_tenants_do_not_see_each_others_adapters(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        await fleet.adapters.push("alice", kit.adapter())
        with pytest.raises(AdapterNotFound):
            await fleet.generations.start(Target("alice", tenant="other"), chat())


@run_async
async def test_sampling_is_what_was_asked_with_openais_defaults(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        await (await fleet.generations.start(BASE, chat())).answer()
        await (
            await fleet.generations.start(
                BASE, chat(max_tokens=5, temperature=0, top_p=0.5, top_k=-1, seed=-7, ignore_eos=True)
            )
        ).answer()
    default, asked = (work.sampling for work in kit.dispatcher.submitted)
    prompt = len(kit.dispatcher.submitted[0].prompt)
    assert (default.temperature, default.top_p, default.max_tokens) == (1.0, 1.0, 512 - prompt)
    assert (asked.temperature, asked.top_p, asked.top_k, asked.max_tokens) == (0.0, 0.5, 0, 5)
    assert asked.ignore_eos
    assert asked.seed == 2**63 - 7


@run_async
async def test_without_a_seed_two_requests_differ_in_it(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        for _ in range(2):
            await (await fleet.generations.start(BASE, chat())).answer()
    first, second = (work.sampling.seed for work in kit.dispatcher.submitted)
    assert first != second


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 505}, {"messages": [{"role": "user", "content": "x " * 600}]}]
)
def test_what_does_not_fit_the_context_is_refused_with_numbers(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    kit = Kit(tmp_path)

    @run_async
    async def check() -> None:
        async with kit.fleet() as fleet:
            with pytest.raises(RequestInvalid, match="512 tokens") as caught:
                await fleet.generations.start(BASE, chat(**fields))
            assert caught.value.code == "context_length_exceeded"

    check()
    assert kit.dispatcher.submitted == []


@run_async
async def test_a_huge_text_is_refused_without_tokenising_it(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        with pytest.raises(RequestInvalid, match="at least"):
            await fleet.generations.start(BASE, chat(messages=[{"role": "user", "content": "x" * 4_000_000}]))


@run_async
async def test_an_option_narrows_the_context(tmp_path: Path) -> None:
    async with Kit(tmp_path, max_model_len=20).fleet() as fleet:
        with pytest.raises(RequestInvalid, match="20 tokens"):
            await fleet.generations.start(BASE, chat(max_tokens=15))


@run_async
async def test_completions_take_text_and_ids(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        for prompt in ("hello", [5, 6]):
            request = parse_request(CompletionRequest, {"prompt": prompt})
            await (await fleet.generations.start(BASE, request)).answer()
        assert kit.dispatcher.submitted[0].prompt == tuple(kit.tokenizer.encode("hello"))
        assert kit.dispatcher.submitted[1].prompt == (5, 6)
        for bad in ("", [], [1000], [-1]):
            with pytest.raises(RequestInvalid):
                await fleet.generations.start(BASE, parse_request(CompletionRequest, {"prompt": bad}))


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


@run_async
async def test_ids_that_clients_choose_never_reach_the_machine(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        for _ in range(2):
            answer = await (await fleet.generations.start(BASE, chat(), request_id="same")).answer()
            assert answer.request_id == "same"
    first, second = (work.request_id for work in kit.dispatcher.submitted)
    assert "same" not in {first, second}
    assert first != second


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
