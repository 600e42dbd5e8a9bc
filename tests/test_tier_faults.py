"""Every way in which a real S3 server can fail a machine: who is hurt, what they are told, what it costs.

Each fault hurts only those who ask for what isn't cached, and a crowd of them costs the store a few requests;
once it is over, the same fetch succeeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fault_server import Fault, FaultServer
from s3_servers import CREDENTIALS, JuiceFS, S3Server, SeaweedFS, running
from tiers_kit import WEIGHTS, Setup, flipped, put_adapter, refusal_of
from tunefleet.adapters_store.failures import CORRUPT_S, LOST_S, RETRY_AFTER_S
from tunefleet.adapters_store.objects import ObjectStore, StoredObject
from tunefleet.adapters_store.s3_client import Patience
from tunefleet.adapters_store.s3_store import S3Store
from tunefleet.adapters_store.s3_url import parse_s3_url
from tunefleet.adapters_store.tiers import SLOW_RETRY_S, Tiers
from tunefleet.core import AdapterRef
from tunefleet.errors import AdapterLoadFailed

pytestmark = [pytest.mark.anyio, pytest.mark.s3]

QUICK = Patience(connect_s=0.5, read_s=0.3)
NUM_TRIES = 1 + QUICK.num_retries  # of one request
CROWD = 20


@pytest.fixture(scope="module", params=[JuiceFS, pytest.param(SeaweedFS, marks=pytest.mark.slow)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running(request.param, tmp_path_factory.mktemp(request.param.name)) as started:
        yield started


class Scene(NamedTuple):
    """Two adapters on a real server; one of them is cached, the other one is wanted."""

    setup: Setup
    tiers: Tiers
    faults: FaultServer
    store: S3Store  # to the server, past the faults
    cached: AdapterRef
    wanted: AdapterRef

    async def refusals(self) -> AdapterLoadFailed:
        """What all of a crowd are told; somebody with a cached adapter, who comes with them, is served."""
        answers = await asyncio.gather(
            *(self.tiers.fetch(self.wanted) for _ in range(CROWD)),
            self.tiers.fetch(self.cached),
            return_exceptions=True,
        )
        served, refused = answers.pop(), {type(answer) for answer in answers}
        assert not isinstance(served, BaseException)
        assert (served.download_s, served.load_s) == (0.0, 0.0)
        assert refused == {AdapterLoadFailed}
        assert isinstance(answers[0], AdapterLoadFailed)
        return answers[0]

    async def recovers(self, after_s: float) -> None:
        self.faults.heal()
        self.setup.clock.now_s += after_s
        assert (await self.tiers.fetch(self.wanted)).path.read_bytes() == self.setup.reference(2)

    def num_requests(self) -> int:
        return sum("GET" in request and self.wanted.digest in request for request in self.faults.requests)


@contextlib.asynccontextmanager
async def scene(
    server: S3Server, folder: Path, *, fetch_wait_s: float = 20.0, meddling: type[Meddling] | None = None
) -> AsyncIterator[Scene]:
    prefix = folder.name
    direct = S3Store(parse_s3_url(server.url(server.shared_bucket, prefix)))
    with FaultServer(upstream=server.endpoint) as faults:
        url = server.url(server.shared_bucket, prefix, endpoint=faults.endpoint)
        store: ObjectStore = S3Store(parse_s3_url(url), patience=QUICK)
        if meddling is not None:
            store = meddling(store, direct, folder)
        setup = Setup(folder)
        cached, wanted = (put_adapter(direct, folder / f"adapter-{seed}", seed) for seed in (1, 2))
        async with setup.tiers(objects=store, fetch_wait_s=fetch_wait_s) as tiers:
            await tiers.fetch(cached)
            yield Scene(setup, tiers, faults, direct, cached, wanted)
        store.close()
        direct.close()


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


class Case(NamedTuple):
    fault: Fault
    path: str  # part of those requests' paths
    code: str
    retry_after_s: float
    max_requests: int
    at: float = 0.5
    times: int | None = None


CASES = {
    "500 five times": Case(Fault.ERROR, "", "adapter_unavailable", RETRY_AFTER_S, NUM_TRIES, times=5),
    "503 SlowDown": Case(Fault.SLOW_DOWN, "", "adapter_unavailable", RETRY_AFTER_S, NUM_TRIES),
    "hang": Case(Fault.HANG, WEIGHTS, "adapter_unavailable", RETRY_AFTER_S, 1 + NUM_TRIES),
    "cut at 1 %": Case(Fault.CUT, WEIGHTS, "adapter_unavailable", RETRY_AFTER_S, 5, at=0.01),
    "cut at 50 %": Case(Fault.CUT, WEIGHTS, "adapter_unavailable", RETRY_AFTER_S, 5, at=0.5),
    "cut at 99 %": Case(Fault.CUT, WEIGHTS, "adapter_unavailable", RETRY_AFTER_S, 5, at=0.99),
    "one wrong byte": Case(Fault.FLIP, WEIGHTS, "adapter_corrupt", CORRUPT_S, 2),
    "a length that is none": Case(Fault.SHORT, WEIGHTS, "adapter_unavailable", RETRY_AFTER_S, 5),
    "404": Case(Fault.MISSING, "", "adapter_lost", LOST_S, 1),
    "403": Case(Fault.FORBIDDEN, "", "adapter_unavailable", RETRY_AFTER_S, 1),
    "expired credentials": Case(Fault.EXPIRED, "", "adapter_unavailable", RETRY_AFTER_S, 1),
    "clock skew": Case(Fault.SKEWED, "", "adapter_unavailable", RETRY_AFTER_S, 1),
    "a web page": Case(Fault.NOT_S3, "", "adapter_unavailable", RETRY_AFTER_S, 1),
    "a redirect": Case(Fault.REDIRECT, "", "adapter_unavailable", RETRY_AFTER_S, 1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
async def test_a_fault_hurts_only_who_asks_for_what_is_not_cached(
    server: S3Server, tmp_path: Path, case: Case
) -> None:
    async with scene(server, tmp_path) as at:
        at.faults.set(case.fault, path=case.path, at=case.at, times=case.times, method="GET")
        for _ in range(2):  # and it is remembered: those who come later cost nothing
            refusal = await at.refusals()
            assert (refusal.code, refusal.retry_after_s) == (case.code, case.retry_after_s)
            assert 0 < at.num_requests() <= case.max_requests
        await at.recovers(case.retry_after_s)


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.SLOW_DOWN, Fault.CUT])
async def test_a_fault_that_is_over_at_once_hurts_nobody(
    server: S3Server, tmp_path: Path, fault: Fault
) -> None:
    async with scene(server, tmp_path) as at:
        at.faults.set(fault, times=1, method="GET", path=WEIGHTS)
        await at.recovers(0.0)


async def test_a_crowd_for_one_cold_adapter_costs_one_download(server: S3Server, tmp_path: Path) -> None:
    async with scene(server, tmp_path) as at:
        fetched = await asyncio.gather(*(at.tiers.fetch(at.wanted) for _ in range(100)))
        assert len(set(fetched)) == 1
        assert at.num_requests() == 2  # a GET per file


async def test_a_store_that_hangs_holds_nobody_longer_than_agreed(server: S3Server, tmp_path: Path) -> None:
    async with scene(server, tmp_path, fetch_wait_s=0.05) as at:
        at.faults.set(Fault.HANG, method="GET")
        refusal = await at.refusals()
        assert (refusal.code, refusal.retry_after_s) == ("adapter_slow", SLOW_RETRY_S)
        at.faults.heal()
        await asyncio.wait(list(at.tiers._tasks.values()))  # the next try of the same flight
        assert (await at.tiers.fetch(at.wanted)).path.read_bytes() == at.setup.reference(2)


@pytest.mark.parametrize(
    "change", [flipped, lambda content: content[:-1], lambda content: content + b"\0" * 9999]
)
async def test_other_bytes_under_a_key_are_never_served(
    server: S3Server, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    async with scene(server, tmp_path) as at:
        key, file = f"{at.wanted.key}/{WEIGHTS}", tmp_path / "adapter-2" / WEIGHTS
        (tmp_path / "changed").write_bytes(change(file.read_bytes()))
        at.store.put(key, tmp_path / "changed")
        for _ in range(2):
            refusal = await at.refusals()
            assert (refusal.code, refusal.retry_after_s) == ("adapter_corrupt", CORRUPT_S)
        assert at.num_requests() == 2
        at.store.put(key, file)
        await at.recovers(CORRUPT_S)


async def test_an_object_that_is_replaced_in_the_middle_of_a_download_is_not_mixed(
    server: S3Server, tmp_path: Path
) -> None:
    async with scene(server, tmp_path, meddling=Meddling) as at:
        at.faults.set(Fault.CUT, times=1, method="GET", path=WEIGHTS)
        refusal = await at.refusals()
        assert (refusal.code, refusal.retry_after_s) == ("adapter_unavailable", RETRY_AFTER_S)
        assert "something else writes to the store" in refusal.message
        at.setup.clock.now_s += RETRY_AFTER_S
        assert (await at.refusals()).code == "adapter_corrupt"
        at.store.put(f"{at.wanted.key}/{WEIGHTS}", tmp_path / "adapter-2" / WEIGHTS)
        await at.recovers(CORRUPT_S)


async def test_a_store_that_was_killed_is_used_again_once_it_is_back(
    server: S3Server, tmp_path: Path
) -> None:
    setup = Setup(tmp_path)
    url = server.url(server.shared_bucket, tmp_path.name)
    store = S3Store(parse_s3_url(url))
    cached, wanted = (put_adapter(store, tmp_path / f"adapter-{seed}", seed) for seed in (1, 2))
    async with setup.tiers(objects=store) as tiers:
        await tiers.fetch(cached)
        await asyncio.to_thread(server.kill)
        try:
            answers = await asyncio.gather(
                *(tiers.fetch(wanted) for _ in range(CROWD)), tiers.fetch(cached), return_exceptions=True
            )
            assert {type(answer) for answer in answers[:-1]} == {AdapterLoadFailed}
            assert not isinstance(answers[-1], BaseException)
            refusal = await refusal_of(tiers, wanted)
            assert (refusal.code, refusal.retry_after_s) == ("adapter_unavailable", RETRY_AFTER_S)
        finally:
            await asyncio.to_thread(server.start)
        async with asyncio.timeout(30):  # SeaweedFS answers 500 for some seconds yet
            await coming_back(tiers, wanted, setup)
        assert (await tiers.fetch(wanted)).path.read_bytes() == setup.reference(2)
    store.close()


async def coming_back(tiers: Tiers, ref: AdapterRef, setup: Setup) -> None:
    """Asks again as often as it is told to."""
    while True:
        setup.clock.now_s += RETRY_AFTER_S
        with contextlib.suppress(AdapterLoadFailed):
            await tiers.fetch(ref)
            return


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
async def test_a_full_disk_hurts_only_what_is_not_cached(server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", num_pages=6):
        async with scene(server, tmp_path) as at:
            filler = tmp_path / "disk" / ".filler"
            with contextlib.suppress(OSError), filler.open("wb") as file:
                file.write(b"x" * 100_000)
            refusal = await at.refusals()
            assert (refusal.code, refusal.retry_after_s) == ("adapter_no_room", RETRY_AFTER_S)
            assert "make room on this machine's disk" in refusal.message
            filler.unlink()
            await at.recovers(RETRY_AFTER_S)


@contextlib.contextmanager
def small_disk(folder: Path, *, num_pages: int) -> Iterator[None]:
    options = f"size={num_pages * os.sysconf('SC_PAGE_SIZE')}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Meddling:
    """A store in which somebody replaces the weights once they are being read."""

    def __init__(self, store: ObjectStore, direct: ObjectStore, folder: Path) -> None:
        self._store = store
        self._direct = direct
        self._weights = folder / "adapter-2" / WEIGHTS
        self._is_done = False

    def open(
        self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> StoredObject:
        stored = self._store.open(key, start=start, length=length, etag=etag)
        if key.endswith(WEIGHTS) and self._weights.exists() and not self._is_done and etag is None:
            self._meddle(key)
        return stored

    def close(self) -> None:
        self._store.close()

    def _meddle(self, key: str) -> None:
        content = self._weights.read_bytes()
        stored = self._direct.open(key)
        with stored.stream:
            is_wanted = stored.stream.read() == content
        if is_wanted:
            self._is_done = True
            other = self._weights.with_name("other")
            other.write_bytes(flipped(content))
            self._direct.put(key, other)
