"""The fake dispatcher keeps the dispatcher's contract."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from tunefleet.core import AdapterRef, FinishReason, SamplingParams
from tunefleet.errors import AdapterLoadFailed
from tunefleet.messages import Forgotten, HeldAdapter, Progress, Submit
from tunefleet.runtime.dispatch import Dispatcher, Run
from tunefleet.runtime.fakes import FakeDispatcher


def work(request_id: str = "r", max_tokens: int = 5) -> Submit:
    return Submit(request_id=request_id, prompt=(10, 20, 30), sampling=SamplingParams(max_tokens=max_tokens))


def backwards(work: Submit) -> Sequence[int]:
    return work.prompt[::-1]


async def collect(run: Run) -> list[Progress]:
    return [progress async for progress in run]


def test_the_fake_fits_the_protocol() -> None:
    dispatcher: Dispatcher = FakeDispatcher(backwards)
    run: Run = dispatcher.submit(work())
    assert (run.wake_s, run.cold_base, run.replica_id) == (0.0, False, "fake")


def test_an_answer_comes_a_token_at_a_time_and_ends_with_a_reason() -> None:
    dispatcher = FakeDispatcher(backwards)
    news = asyncio.run(collect(dispatcher.submit(work())))
    assert [progress.tokens for progress in news] == [(30,), (20,), (10,), ()]
    assert [progress.finish_reason for progress in news] == [None, None, None, FinishReason.STOP]
    assert [progress.timing is not None for progress in news] == [True, False, False, False]
    assert set() == dispatcher.running
    assert [work()] == dispatcher.submitted


def test_an_answer_is_cut_at_max_tokens() -> None:
    news = asyncio.run(collect(FakeDispatcher(backwards).submit(work(max_tokens=2))))
    assert [progress.tokens for progress in news] == [(30,), (20,), ()]
    assert FinishReason.LENGTH is news[-1].finish_reason


def test_an_error_is_raised_instead_of_an_answer() -> None:
    dispatcher = FakeDispatcher(backwards)
    dispatcher.error = AdapterLoadFailed("gone", retry_after_s=1.0)
    with pytest.raises(AdapterLoadFailed, match="gone"):
        asyncio.run(collect(dispatcher.submit(work())))
    assert set() == dispatcher.running


def test_a_gate_lets_tokens_through_one_by_one() -> None:
    async def scenario() -> None:
        dispatcher = FakeDispatcher(backwards)
        dispatcher.gate = asyncio.Semaphore(0)
        progress = aiter(dispatcher.submit(work()))
        for token in (30, 20):
            waiting = asyncio.ensure_future(anext(progress))
            done, _ = await asyncio.wait([waiting], timeout=0)
            assert set() == done
            dispatcher.gate.release()
            assert (token,) == (await waiting).tokens
            assert {"r"} == dispatcher.running
        await progress.aclose()
        assert set() == dispatcher.running

    asyncio.run(scenario())


def test_closing_a_run_is_noted_as_a_cancel() -> None:
    async def scenario() -> None:
        dispatcher = FakeDispatcher(backwards)
        run = dispatcher.submit(work())
        await run.aclose()
        assert dispatcher.cancelled == ["r"]

    asyncio.run(scenario())


def test_the_rest_of_the_contract_answers_too() -> None:
    async def scenario() -> None:
        dispatcher = FakeDispatcher(backwards)
        await dispatcher.start()
        digest = "d" * 64
        dispatcher.copies[digest] = Forgotten(digest=digest, disk=1, host=1)
        assert await dispatcher.forget(digest) == Forgotten(digest=digest, disk=1, host=1)
        assert await dispatcher.forget(digest) == Forgotten(digest=digest)
        ref = AdapterRef(digest, "t", "t/key", digest, 1, 1)
        dispatcher.hold([HeldAdapter(ref, "disk")])
        await dispatcher.prefetch(ref, "host")
        assert await dispatcher.warmup() == 0.0
        assert (await dispatcher.status()).replicas == ()
        assert dispatcher.forgotten == [digest, digest]
        assert dispatcher.held == (HeldAdapter(ref, "disk"),)
        assert dispatcher.prefetched == [(ref, "host")]
        await dispatcher.close()

    asyncio.run(scenario())
