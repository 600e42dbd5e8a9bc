"""Requests of a deleted user end, wherever they are; nobody else's do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from router_kit import run_async
from tunefleet.errors import AdapterNotFound
from tunefleet.open_requests import OpenRequests, Owner, user_deleted

ALICE = Owner("default", "alice")
OTHERS = (Owner("default", "bob"), Owner("acme", "alice"), Owner("default", None), Owner("default", "alice1"))


async def items(gate: asyncio.Event) -> AsyncIterator[int]:
    yield 1
    await gate.wait()
    yield 2


@run_async
async def test_items_come_as_they_are_and_none_is_the_end() -> None:
    gate = asyncio.Event()
    gate.set()
    request, steps = OpenRequests().enter(ALICE), items(gate)
    assert [await request.next_of(steps) for _ in range(3)] == [1, 2, None]


@run_async
async def test_who_waits_is_woken_with_the_error_and_the_sequence_is_cancelled() -> None:
    requests, gate, cancelled = OpenRequests(), asyncio.Event(), []
    request, steps = requests.enter(ALICE), items(gate)

    async def cancel() -> None:
        cancelled.append(ALICE)

    request.on_end = cancel
    await request.next_of(steps)
    waiting = asyncio.ensure_future(request.next_of(steps))
    await asyncio.sleep(0)
    assert await requests.end(ALICE) == 1
    with pytest.raises(AdapterNotFound, match="alice"):
        await waiting
    assert cancelled == [ALICE]
    assert waiting.cancelling() == 0


@run_async
async def test_who_comes_later_gets_the_error_too_and_the_second_end_is_none() -> None:
    requests, gate = OpenRequests(), asyncio.Event()
    request, steps = requests.enter(ALICE), items(gate)
    await requests.end(ALICE)
    await request.end(user_deleted("bob"))
    for work in (lambda: request.next_of(steps), lambda: request.next_of(steps)):
        with pytest.raises(AdapterNotFound, match="alice"):
            await work()
    with pytest.raises(AdapterNotFound):
        request.check()


@run_async
async def test_others_go_on_and_what_is_closed_is_forgotten() -> None:
    requests, gate = OpenRequests(), asyncio.Event()
    gate.set()
    others = [requests.enter(owner) for owner in OTHERS]
    gone = requests.enter(ALICE)
    gone.close()
    gone.close()
    requests.check()
    assert (len(OTHERS), 0) == (len(requests), await requests.end(ALICE))
    for other in others:
        other.check()
        assert await other.next_of(items(gate)) == 1
        other.close()
    requests.check()
    assert len(requests) == 0


@run_async
async def test_a_timeout_of_the_items_own_is_no_end() -> None:
    async def slow() -> AsyncIterator[int]:
        raise TimeoutError("the machine")
        yield 1

    with pytest.raises(TimeoutError, match="the machine"):
        await OpenRequests().enter(ALICE).next_of(slow())


@run_async
async def test_an_end_while_the_waiter_is_cancelled_stays_a_cancellation() -> None:
    requests, gate = OpenRequests(), asyncio.Event()
    request, steps = requests.enter(ALICE), items(gate)
    await request.next_of(steps)
    waiting = asyncio.ensure_future(request.next_of(steps))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await requests.end(ALICE) == 1
