"""From a request to its sequences: the live digest, a text that fits, the sampling that was asked for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from router_kit import HELLO, Kit, run_async
from tunefleet.errors import AdapterNotFound, RequestInvalid
from tunefleet.openai_api import ChatRequest, CompletionRequest, parse_request
from tunefleet.target import Target

BASE = Target(None)


def chat(**fields: Any) -> ChatRequest:
    return parse_request(ChatRequest, {"messages": HELLO, **fields})


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
async def test_ids_that_clients_choose_never_reach_the_machine(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        for _ in range(2):
            answer = await (await fleet.generations.start(BASE, chat(), request_id="same")).answer()
            assert answer.request_id == "same"
    first, second = (work.request_id for work in kit.dispatcher.submitted)
    assert "same" not in {first, second}
    assert first != second


def seeded(kit: Kit) -> None:
    """Answers that show their sequence's seed."""
    kit.dispatcher.answer = lambda work: kit.tokenizer.encode(f"seed {work.sampling.seed}")


@run_async
async def test_choices_have_seeds_of_their_own_the_first_the_requests(
    tmp_path: Path,
) -> None:
    kit = Kit(tmp_path)
    seeded(kit)
    async with kit.fleet() as fleet:
        alone = await (await fleet.generations.start(BASE, chat(seed=-7))).answer()
        answer = await (await fleet.generations.start(BASE, chat(seed=-7, n=16))).answer()
        again = await (await fleet.generations.start(BASE, chat(seed=-7, n=3))).answer()
    assert [choice.index for choice in answer.choices] == list(range(16))
    assert answer.text == answer.choices[0].text == alone.text
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 16
    assert [choice.text for choice in again.choices] == texts[:3]
    assert len({work.request_id for work in kit.dispatcher.submitted}) == 20
    assert all(0 <= work.sampling.seed < 2**63 for work in kit.dispatcher.submitted)
