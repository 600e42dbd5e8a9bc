"""A router's background work, mostly round by round."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from postgres_server import PostgresServer
from store_kit import Clock, NotedMachine, adapter, keys, opened
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.objects import new_upload_id, object_prefix
from tunefleet.adapters_store.watching import COLLECT_AGE_S, LEASE_S, Intervals
from tunefleet.core import ADAPTER_FILES
from tunefleet.errors import ReplicaError
from tunefleet.messages import Forgotten, HeldAdapter

pytestmark = pytest.mark.anyio

NEVER = Intervals(*[3600.0] * 5)
ALWAYS = Intervals(*[0.001] * 5)


class EventMachine(NotedMachine):
    """Tells the test when it is told something."""

    def __init__(self, *copies: str) -> None:
        super().__init__(*copies)
        self.has_forgotten = asyncio.Event()
        self.holds = asyncio.Event()
        self.failed = asyncio.Event()
        self.num_failures = 0

    def _fail(self) -> None:
        if self.error is not None:
            self.num_failures += 1
            self.failed.set()
        super()._fail()

    async def forget(self, digest: str, keys: Sequence[str] = ()) -> Forgotten:
        forgotten = await super().forget(digest, keys)
        self.has_forgotten.set()
        return forgotten

    async def hold(self, adapters: Sequence[HeldAdapter]) -> None:
        await super().hold(adapters)
        self.holds.set()


async def test_what_is_pinned_is_held_and_said_again_only_when_it_changes(tmp_path: Path) -> None:
    machine = NotedMachine()
    async with opened(tmp_path) as store:
        first = (await store.push("alice", adapter(tmp_path, 1))).version
        watch = store.watcher(machine)
        await watch.round()
        assert machine.held == []
        await store.set_pin("alice", "host")
        for _ in range(3):
            await watch.round()
        ref = (await store.resolve("alice")).ref
        assert [(HeldAdapter(ref, "host"),)] == machine.held
        second = (await store.push("alice", adapter(tmp_path, 2))).version
        await store.set_canary("alice", first.version, 10)
        await watch.round()
        assert {first.digest, second.digest} == {held.adapter.digest for held in machine.held[-1]}
        await store.clear_canary("alice")
        await store.clear_pin("alice")
        await watch.round()
        assert machine.held[-1] == ()


async def test_a_pin_ends_when_its_time_is_over(tmp_path: Path) -> None:
    machine, clock = NotedMachine(), Clock()
    async with opened(tmp_path, clock=clock) as store:
        await store.push("alice", adapter(tmp_path))
        pinned = await store.set_pin("alice", "disk", until="2026-01-01T00:01:00Z")
        assert pinned.pin is not None
        watch = store.watcher(machine)
        await watch.hold()
        clock.turn(60)
        await watch.hold()
        assert [len(held) for held in machine.held] == [1, 0]
        assert (await store.adapter("alice")).pin is None


async def test_copies_that_the_catalog_does_not_know_are_forgotten_at_start(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        known = (await store.push("alice", adapter(tmp_path))).version.digest
        machine = NotedMachine(known, "d" * 64, "e" * 64)
        watch = store.watcher(machine)
        await watch.round()
        assert machine.forgotten == ["d" * 64, "e" * 64]
        assert {known} == machine.copies
        machine.copies.add("f" * 64)
        await watch.round()
        assert "f" * 64 in machine.copies  # once: later ones are told by deletions


async def test_a_router_that_was_cut_off_for_too_long_looks_at_its_copies_again(tmp_path: Path) -> None:
    now = [0.0]
    async with opened(tmp_path) as store:
        machine = NotedMachine()
        watch = store.watcher(machine, clock=lambda: now[0])
        await watch.round()
        machine.copies.add("f" * 64)
        now[0] += LEASE_S
        await watch.round()
        assert machine.forgotten == []
        now[0] += LEASE_S + 1
        await watch.round()
        assert machine.forgotten == ["f" * 64]


async def test_a_copy_in_use_keeps_the_receipt_open_until_its_sequence_ends(tmp_path: Path) -> None:
    async with opened(tmp_path, deletion_wait_s=0.01) as store:
        digest = (await store.push("alice", adapter(tmp_path))).version.digest
        machine = NotedMachine(digest)
        machine.in_use.add(digest)
        watch = store.watcher(machine)
        await watch.round()
        receipt = await store.delete_user("alice")
        for _ in range(2):
            await watch.round()
            assert (await store.deletion(receipt.deletion_id)).status == "pending"
        machine.in_use.clear()
        await watch.round()
        finished = await store.deletion(receipt.deletion_id)
        counts = {place: finished.removed[place] for place in ("disk", "host", "device")}
        assert counts == {"disk": 1, "host": 1, "device": 1}
        assert finished.status == "done"


async def test_somebody_elses_sequence_with_the_same_bytes_keeps_no_receipt_open(tmp_path: Path) -> None:
    async with opened(tmp_path, deletion_wait_s=0.01) as store:
        for user in ("alice", "bob"):
            digest = (await store.push(user, adapter(tmp_path))).version.digest
        machine = NotedMachine(digest)
        machine.in_use.add(digest)
        watch = store.watcher(machine)
        await watch.round()
        receipt = await store.delete_user("alice")
        await watch.round()
        assert (await store.deletion(receipt.deletion_id)).status == "done"


async def test_the_deletion_of_a_version_ends_no_streams(tmp_path: Path) -> None:
    async with opened(tmp_path, deletion_wait_s=0.01) as store:
        for seed in (1, 2):
            await store.push("alice", adapter(tmp_path, seed))
        machine = NotedMachine()
        machine.streams["default", "alice"] = 1
        watch = store.watcher(machine)
        await watch.round()
        receipt = await store.delete_version("alice", 1)
        await watch.round()
        assert (await store.deletion(receipt.deletion_id)).status == "done"
        assert machine.streams == {("default", "alice"): 1}


async def test_one_router_collects_at_a_time(tmp_path: Path) -> None:
    clock, folder = Clock(), adapter(tmp_path)
    objects = MemoryStore(now=clock)

    def garbage() -> None:
        key = object_prefix("default", "ab" + "0" * 62, new_upload_id())
        objects.put(f"{key}/{ADAPTER_FILES[0]}", folder / ADAPTER_FILES[0])

    async with opened(tmp_path, objects, clock=clock) as one, opened(tmp_path, objects, clock=clock) as two:
        watches = [store.watcher(NotedMachine(), NEVER) for store in (one, two)]
        garbage()
        clock.turn(COLLECT_AGE_S + 1)
        await watches[0].collect()
        assert keys(one) == []
        garbage()
        clock.turn(COLLECT_AGE_S + 1)
        await watches[0].collect()  # renews its claim
        garbage()
        clock.turn(NEVER.collect_s - 1)
        await watches[1].collect()
        assert len(keys(one)) == 1
        clock.turn(COLLECT_AGE_S)
        await watches[1].collect()
        assert keys(one) == []


async def test_a_watch_goes_on_by_itself_and_at_once_after_what_its_own_router_does(tmp_path: Path) -> None:
    machine = EventMachine()
    async with opened(tmp_path) as store, store.watch(machine, NEVER):
        digest = (await store.push("alice", adapter(tmp_path))).version.digest
        await store.set_pin("alice", "disk")
        async with asyncio.timeout(10):
            await machine.holds.wait()
        machine.copies.add(digest)
        machine.streams["default", "alice"] = 2
        receipt = await store.delete_user("alice")
        assert receipt.status == "done"
        counts = {place: receipt.removed[place] for place in ("objects", "disk", "streams")}
        assert counts == {"objects": 2, "disk": 1, "streams": 2}
        async with asyncio.timeout(10):
            while machine.held[-1]:
                machine.holds.clear()
                await machine.holds.wait()


async def test_a_router_that_stopped_is_waited_for_no_more(tmp_path: Path) -> None:
    objects = MemoryStore()
    async with opened(tmp_path, objects) as store:
        await store.push("alice", adapter(tmp_path))
        async with opened(tmp_path, objects) as other, other.watch(NotedMachine(), NEVER):
            pass
        receipt = await store.delete_user("alice")
        assert (receipt.status, receipt.kept) == ("done", ())


async def test_a_router_tells_of_deletions_before_it_stops(tmp_path: Path) -> None:
    objects = MemoryStore()
    async with opened(tmp_path, objects, deletion_wait_s=0) as store:
        digest = (await store.push("alice", adapter(tmp_path))).version.digest
        machine = EventMachine(digest, "d" * 64)
        async with opened(tmp_path, objects) as other, other.watch(machine, NEVER):
            await machine.has_forgotten.wait()  # what was left over: its first look is over
            receipt = await store.delete_user("alice")
        told = await store.deletion(receipt.deletion_id)
        assert (told.removed["disk"], told.kept, machine.copies) == (1, (), set())


class Lines(logging.Handler):
    """What the watch logs; wakes the test when a line has come."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.come = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.come.set()

    async def until(self, part: str) -> None:
        async with asyncio.timeout(20):
            while not any(part in line for line in self.lines):
                self.come.clear()
                await self.come.wait()


@contextmanager
def logged() -> Iterator[Lines]:
    lines, logger = Lines(), logging.getLogger("tunefleet.adapters_store.watching")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        yield lines
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)


@pytest.mark.parametrize("error", [ReplicaError("host lost"), ConnectionError("gone"), RuntimeError("bug")])
async def test_a_machine_that_fails_is_asked_again_and_logged_once(tmp_path: Path, error: Exception) -> None:
    machine = EventMachine("d" * 64)
    machine.error = error
    async with opened(tmp_path) as store:
        with logged() as log:
            async with store.watch(machine, ALWAYS), asyncio.timeout(20):
                while machine.num_failures < 3:
                    machine.failed.clear()
                    await machine.failed.wait()
                machine.error = None
                await machine.has_forgotten.wait()
                await log.until("can forget")
    failure = f"can't forget what was deleted, trying again: {error}"
    assert [failure, "can forget what was deleted again"] == log.lines


@pytest.mark.postgres
async def test_a_database_that_restarts_is_asked_again(
    tmp_path: Path, postgres: PostgresServer, postgres_url: str
) -> None:
    machine = EventMachine()
    async with opened(tmp_path, database_url=postgres_url) as store:
        await store.push("alice", adapter(tmp_path))
        with logged() as log:
            async with store.watch(machine, ALWAYS):
                await asyncio.to_thread(postgres.stop)
                try:
                    for job in (
                        "say that this router lives",
                        "forget what was deleted",
                        "hold what is pinned",
                    ):
                        await log.until(f"can't {job}")
                finally:
                    await asyncio.to_thread(postgres.start)
                await log.until("can hold what is pinned again")
                await store.set_pin("alice", "disk")
                async with asyncio.timeout(20):
                    await machine.holds.wait()
        num_warnings = sum("can't" in line for line in log.lines)
        assert num_warnings <= len(Intervals._fields)  # one per job, however often it was tried
