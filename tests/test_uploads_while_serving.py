"""Uploads beside answers under way: nobody waits, nobody's answer changes in its middle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapter_factory import write_config
from router_kit import HELLO, Kit, run_async
from tunefleet.answers import Chunk
from tunefleet.errors import AdapterInvalid


async def rest_of(first: Chunk, stream: AsyncIterator[Chunk]) -> tuple[str, str]:
    """The whole text, and the digest that the end of the stream tells."""
    chunks = [first, *[chunk async for chunk in stream]]
    assert chunks[-1].served is not None
    return "".join(chunk.text for chunk in chunks), chunks[-1].served.adapter_digest


@run_async
async def test_answers_under_way_end_with_the_version_they_began_with(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        old = await fleet.adapters.push("alice", kit.adapter(0))
        bobs = await fleet.adapters.push("bob", kit.adapter(1))
        gate = kit.dispatcher.gate = asyncio.Semaphore(2)
        alice, bob = fleet.stream("alice", HELLO), fleet.stream("bob", HELLO)
        begun = [await anext(alice), await anext(bob)]
        new = await fleet.adapters.push("alice", kit.adapter(2))
        for _ in range(200):
            gate.release()
        answers = [await rest_of(begun[0], alice), await rest_of(begun[1], bob)]
        expected = [(f"I am {version.digest[:8]}.", version.digest) for version in (old, bobs)]
        assert expected == answers
        assert (await fleet.chat("alice", HELLO)).adapter_digest == new.digest


@run_async
async def test_an_upload_is_acknowledged_though_answers_hang(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        await fleet.adapters.push("alice", kit.adapter(0))
        kit.dispatcher.gate = asyncio.Semaphore(0)
        waiting = asyncio.ensure_future(fleet.chat("alice", HELLO))
        await fleet.adapters.push("bob", kit.adapter(1))
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


@run_async
async def test_a_refused_upload_leaves_the_live_version_answering(tmp_path: Path) -> None:
    kit = Kit(tmp_path)
    async with kit.fleet() as fleet:
        live = await fleet.adapters.push("alice", kit.adapter(0))
        bad = kit.adapter(1)
        write_config(bad, {"use_dora": True})
        with pytest.raises(AdapterInvalid):
            await fleet.adapters.push("alice", bad)
        assert (await fleet.chat("alice", HELLO)).adapter_digest == live.digest
        assert [version.version for version in await fleet.adapters.list("alice")] == [1]
