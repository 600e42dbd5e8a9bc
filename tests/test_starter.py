"""The parked process's time to live."""

from __future__ import annotations

import asyncio
from pathlib import Path

from host_kit import host_options
from tunefleet.messages import Fork
from tunefleet.runtime.starter import Standby


class SlowStarter:
    """Takes its time to close, and notes what happens in which order."""

    pid = 7

    def __init__(self) -> None:
        self.events: list[str] = []
        self.closing = asyncio.Event()
        self.may_close = asyncio.Event()

    async def ensure(self) -> None:
        self.events.append("ensure")

    async def fork(self, message: Fork) -> None:
        self.events.append(f"fork {message.replica_id}")

    async def close(self) -> None:
        self.closing.set()
        await self.may_close.wait()
        self.events.append("closed")


def fork_message(root: Path) -> Fork:
    return Fork(replica_id="r1", device="cpu", address="/a", host_socket="/h", options=host_options(root))


def test_a_start_waits_for_a_parked_process_that_is_being_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        starter = SlowStarter()
        standby = Standby(starter, 0.01)
        standby.set_at_zero(True)
        standby.set_at_zero(True)
        await asyncio.wait_for(starter.closing.wait(), 5)
        fork = asyncio.create_task(standby.fork(fork_message(tmp_path)))
        await asyncio.sleep(0)
        starter.may_close.set()
        await fork
        assert starter.events == ["closed", "fork r1"]

    asyncio.run(scenario())


def test_it_stays_while_there_is_a_replica_or_for_ever(tmp_path: Path) -> None:
    async def scenario() -> None:
        starter = SlowStarter()
        for_ever, for_a_moment = Standby(starter, 0.0), Standby(starter, 0.05)
        for_ever.set_at_zero(True)
        for_a_moment.set_at_zero(True)
        for_a_moment.set_at_zero(False)
        await asyncio.sleep(0.1)
        assert not starter.closing.is_set()
        assert (for_ever.pid, starter.events) == (7, [])

    asyncio.run(scenario())
