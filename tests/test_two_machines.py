"""Two machines over one bucket and one Postgres: what one of them decides holds on the other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from adapter_factory import adapter_files
from router_kit import HELLO, Kit, says
from s3_servers import S3Server
from store_kit import Clock, NotedMachine, adapter, keys, opened
from tunefleet import Fleet
from tunefleet.adapters_store.deleting import CLAIM_S
from tunefleet.adapters_store.objects import open_store
from tunefleet.adapters_store.watching import LEASE_S
from tunefleet.errors import AdapterConflict, AdapterNotFound
from tunefleet.messages import Forgotten
from tunefleet.runtime.fakes import FakeDispatcher

pytestmark = [pytest.mark.anyio, pytest.mark.s3, pytest.mark.postgres]


class Slow(FakeDispatcher):
    """Forgets an adapter when it may."""

    def __init__(self, kit: Kit) -> None:
        super().__init__(says(kit.tokenizer))
        self.may_forget = asyncio.Event()
        self.was_told = asyncio.Event()

    async def forget(self, digest: str, keys: Sequence[str] = ()) -> Forgotten:
        self.was_told.set()
        await self.may_forget.wait()
        return await super().forget(digest, keys)


@pytest.fixture
def store_url(request: pytest.FixtureRequest) -> str:
    """A bucket of the test's: on JuiceFS, unless it is parametrized."""
    server: S3Server = request.getfixturevalue(getattr(request, "param", "juicefs"))
    return server.url(server.make_bucket(), "prod")


@pytest.fixture
def kits(tmp_path: Path, store_url: str, postgres_url: str) -> tuple[Kit, Kit]:
    """Two machines that share nothing but the bucket and the database."""
    first, second = (
        Kit(tmp_path / name, store_url=store_url, database_url=postgres_url) for name in ("one", "two")
    )
    return first, second


@contextlib.asynccontextmanager
async def both(kits: tuple[Kit, Kit]) -> AsyncIterator[tuple[Fleet, Fleet]]:
    async with kits[0].fleet() as one, kits[1].fleet() as two:
        yield one, two


async def version_of(fleet: Fleet) -> int | None:
    return (await fleet.chat("alice", HELLO)).version


@pytest.mark.parametrize("store_url", ["juicefs", "seaweedfs"], indirect=True)
async def test_what_one_machine_stores_the_next_request_of_the_other_has(
    tmp_path: Path, kits: tuple[Kit, Kit]
) -> None:
    async with both(kits) as (one, two):
        for seed, (here, there) in enumerate([(one, two), (two, one)]):
            with pytest.raises(AdapterNotFound):
                await there.chat(f"user{seed}", HELLO)
            folder = kits[0].adapter(seed)
            pushed = await here.adapters.push(f"user{seed}", folder)
            answer = await there.chat(f"user{seed}", HELLO)
            assert (pushed.digest, 1) == (answer.adapter_digest, answer.version)
            await there.adapters.download(f"user{seed}", None, tmp_path / f"copy{seed}")
            assert adapter_files(folder) == adapter_files(tmp_path / f"copy{seed}")


async def test_what_is_live_holds_everywhere_from_the_answer_on(kits: tuple[Kit, Kit]) -> None:
    async with both(kits) as (one, two):
        for seed in (1, 2, 3):
            await one.adapters.push("alice", kits[0].adapter(seed))
        for number in (1, 3, 2):
            await one.adapters.promote("alice", number)
            assert [number] * 4 == await asyncio.gather(*(version_of(two) for _ in range(4)))
        for here, there, before in ((one, two, 3), (two, one, 1)):
            await here.adapters.rollback("alice")
            assert [before, before] == [await version_of(there), await version_of(here)]
        with pytest.raises(AdapterConflict) as refusal:
            await two.adapters.promote("alice", 2, if_live=3)
        assert refusal.value.code == "live_version_changed"


async def test_requests_under_way_see_the_old_version_or_the_new_one_and_never_go_back(
    kits: tuple[Kit, Kit],
) -> None:
    async with both(kits) as (one, two):
        for seed in (1, 2):
            await one.adapters.push("alice", kits[0].adapter(seed), promote=seed == 1)
        promoting = asyncio.create_task(one.adapters.promote("alice", 2))
        seen = [await version_of(two)]
        while not promoting.done():
            seen.append(await version_of(two))
        assert (await promoting).live
        seen.append(await version_of(two))
        assert sorted(seen, key=str) == seen
        assert seen[-1] == 2


async def test_a_receipt_waits_for_the_other_machine_and_counts_its_copies(kits: tuple[Kit, Kit]) -> None:
    slow = kits[1].dispatcher = Slow(kits[1])
    slow.may_forget.set()  # at its start there may be copies that nobody knows
    async with both(kits) as (one, two):
        digest = (await one.adapters.push("alice", kits[0].adapter())).digest
        kits[0].dispatcher.copies[digest] = Forgotten(digest, disk=1, host=1, device=1)
        slow.copies[digest] = Forgotten(digest, disk=1, host=1)
        slow.may_forget.clear()
        async with asyncio.timeout(20):
            deletion = asyncio.create_task(one.delete_user("alice"))
            await slow.was_told.wait()
            with pytest.raises(AdapterNotFound):
                await two.chat("alice", HELLO)
            assert not deletion.done()
            slow.may_forget.set()
            receipt = await deletion
        assert (receipt.status, receipt.user_id, receipt.kept) == ("done", None, ())
        counts = {
            place: receipt.removed[place] for place in ("versions", "objects", "disk", "host", "device")
        }
        assert counts == {"versions": 1, "objects": 2, "disk": 2, "host": 2, "device": 1}
        assert receipt == await two.deletion(receipt.deletion_id)
        assert slow.copies == {}
        assert keys(two.store) == []


async def test_an_answer_that_the_other_machine_gives_ends(kits: tuple[Kit, Kit]) -> None:
    kits[1].dispatcher.gate = gate = asyncio.Semaphore(2)
    async with both(kits) as (one, two):
        await one.adapters.push("alice", kits[0].adapter())
        began, texts = asyncio.Event(), []

        async def stream() -> None:
            async for chunk in two.stream("alice", HELLO):
                texts.append(chunk.text)
                began.set()

        streaming = asyncio.create_task(stream())
        async with asyncio.timeout(20):
            await began.wait()
            receipt = await one.delete_user("alice")
            with pytest.raises(AdapterNotFound) as ended:
                await streaming
        assert (receipt.status, receipt.removed["streams"]) == ("done", 1)
        assert ended.value.code == "user_deleted"
        gate.release()


BEAT = """
import asyncio, sys
from store_kit import MANIFEST, NotedMachine
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import Options
async def main():
    options = Options(store_url=sys.argv[1], database_url=sys.argv[2], cache_dir=sys.argv[3])
    async with AdapterStore.open(options, MANIFEST).watch(NotedMachine()):
        print("beating", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@contextlib.contextmanager
def beating(store_url: str, database_url: str, cache: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A router in a process of its own, once others know of it."""
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", BEAT, store_url, database_url, str(cache)]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"beating\n"
            yield process
        finally:
            process.kill()


async def test_a_router_that_was_killed_holds_a_receipt_for_its_lease_and_is_named_in_it(
    tmp_path: Path, juicefs: S3Server, postgres_url: str
) -> None:
    store_url = juicefs.url(juicefs.make_bucket())
    clock = Clock()
    clock.at = datetime.now(UTC)
    async with opened(
        tmp_path, open_store(store_url), database_url=postgres_url, clock=clock, deletion_wait_s=0.01
    ) as store:
        digest = (await store.push("alice", adapter(tmp_path))).version.digest
        watch = store.watcher(NotedMachine(digest))
        await watch.round()
        with beating(store_url, postgres_url, tmp_path / "two") as router:
            os.kill(router.pid, signal.SIGKILL)
            assert router.wait() == -signal.SIGKILL
        pending = await store.delete_user("alice")
        async with asyncio.timeout(20):
            while "disk" not in pending.removed:
                await watch.round()
                pending = await store.deletion(pending.deletion_id)
        await watch.round()
        assert (await store.deletion(pending.deletion_id)) == pending
        assert (pending.status, pending.kept, pending.removed["disk"]) == ("pending", (), 1)
        clock.turn(max(LEASE_S, CLAIM_S) + 1)
        await watch.round()
        finished = await store.deletion(pending.deletion_id)
        assert (finished.status, finished.removed["objects"], finished.removed["disk"]) == ("done", 2, 1)
        assert ["died before it told" in sentence for sentence in finished.kept] == [True]
        assert keys(store) == []
        back = NotedMachine(digest)
        await store.watcher(back).round()  # the killed one's machine, when it starts again
        assert (back.forgotten, back.copies) == ([digest], set())
