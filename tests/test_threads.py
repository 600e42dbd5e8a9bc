from __future__ import annotations

import asyncio
import threading

import pytest

from tunefleet.adapters_store.threads import Runner

pytestmark = pytest.mark.anyio


async def test_work_runs_in_other_threads_no_more_than_allowed_at_once() -> None:
    lock, inside, most = threading.Lock(), 0, 0
    both_in = threading.Barrier(2)

    def work() -> int:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        both_in.wait(20)
        with lock:
            inside -= 1
        return threading.get_ident()

    run = Runner(2)
    threads = await asyncio.gather(*(run(work) for _ in range(6)))
    assert most == 2
    assert threading.get_ident() not in threads


async def test_an_error_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        await Runner(1).to_the_end(lambda: 1 // 0)


@pytest.mark.parametrize("fails", [False, True])
async def test_to_the_end_a_cancelled_caller_waits_for_the_work(fails: bool) -> None:
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        assert may_end.wait(20)
        ended.set()
        if fails:
            raise ValueError("nobody is left to tell")

    caller = asyncio.ensure_future(Runner(1).to_the_end(work))
    await asyncio.to_thread(began.wait, 20)
    caller.cancel()
    await asyncio.sleep(0)
    assert not caller.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended.is_set()
