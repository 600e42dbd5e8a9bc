"""A random life of users, a store, a machine's tiers and crashes, beside a model of what must be there."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from adapter_factory import adapter_files, make_adapter
from crashes.states import table
from store_kit import MANIFEST, Clock
from store_model import Answer, ModelAdapter, ModelUpload, Refused, Sent, Whose
from tiers_kit import prepared
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.staged_uploads import TTL_S
from tunefleet.adapters_store.store import AdapterStore, Pushed
from tunefleet.adapters_store.tiers import Tiers
from tunefleet.adapters_store.validation import check_adapter
from tunefleet.adapters_store.watching import Intervals
from tunefleet.core import ADAPTER_FILES, WEIGHTS_FILE, PinTier
from tunefleet.errors import AdapterError, StoreError
from tunefleet.messages import Forgotten, HeldAdapter

SHM = Path("/dev/shm")
NUM_BYTES = 4  # different adapters
MAX_DISK, MAX_HOST = 3 * 5000, 2 * 7900  # three adapters as uploaded, two prepared
SESSIONS = ("s1", "s2", "s3")
MINUTE_S = 60.0

ALICE = Whose("default", "alice")
OTHERS = [Whose("default", "bob"), Whose("acme", "alice"), Whose("acme", "bob")]
whose = st.sampled_from([ALICE] * 5 + OTHERS)  # a long history needs somebody to whom much happens
numbers = st.integers(0, NUM_BYTES - 1)
promotes = st.booleans()
staged_files = st.sampled_from([ADAPTER_FILES, ADAPTER_FILES, ADAPTER_FILES[:1], ()])


class RefusingStore(MemoryStore):
    """Takes no weights while it is told not to."""

    refuses = False

    def put(self, key: str, source: Path) -> None:
        if self.refuses and key.endswith(WEIGHTS_FILE):
            raise StoreError("out of order")
        super().put(key, source)


class TiersMachine:
    """A router's machine with tiers and no replicas."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers

    async def forget(self, digest: str, keys: Sequence[str] = ()) -> Forgotten:
        dropped = await self._tiers.forget(digest, keys)
        return Forgotten(digest, disk=dropped.disk, host=dropped.host)

    async def hold(self, adapters: Sequence[HeldAdapter]) -> None:
        self._tiers.hold("router", adapters)

    async def end_streams(self, tenant: str, user_id: str) -> int:
        return 0

    async def known_copies(self) -> set[str]:
        return {*self._tiers.disk_bytes(), *self._tiers.host_bytes()}


class Source:
    """One adapter to upload: its folder, its files, and what a replica must get of it."""

    def __init__(self, number: int) -> None:
        parent = Path(tempfile.mkdtemp(dir=SHM if SHM.is_dir() else None))
        self.folder = make_adapter(parent / str(number), MANIFEST, seed=number)
        self.files = adapter_files(self.folder)
        self.digest = check_adapter(self.folder, MANIFEST, max_rank=64).digest
        self.prepared = prepared(self.folder)


@cache
def source(number: int) -> Source:
    return Source(number)


@pytest.fixture(scope="module", autouse=True)
def _sources() -> Iterator[None]:
    yield
    for number in range(NUM_BYTES):
        shutil.rmtree(source(number).folder.parent)
    source.cache_clear()


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=SHM if SHM.is_dir() else None))
        self.clock = Clock()
        self.objects = RefusingStore(now=self.clock)
        self.runner = asyncio.Runner()
        self.dropped: list[AdapterStore] = []
        self.adapters: dict[Whose, ModelAdapter] = {}
        self.uploads: dict[str, ModelUpload] = {}
        self.held: dict[str, PinTier] = {}  # digests that must stay in the machine's tiers
        self.places: dict[tuple[Whose, str], bool] = {}  # sessions that a canary of 50 % got, or not
        self.open()

    def open(self) -> None:
        self.store = AdapterStore(
            self.objects,
            Catalog(f"sqlite:///{self.folder}/catalog.db", now=self.clock),
            MANIFEST,
            staging=self.folder / "staging",
            max_rank=64,
            max_upload_bytes=10**6,
        )
        self.tiers = Tiers(
            self.objects,
            MANIFEST,
            disk_dir=self.folder / "disk",
            host_dir=self.folder / "host",
            dtype="bfloat16",
            host_cache_bytes=MAX_HOST,
            disk_cache_bytes=MAX_DISK,
        )
        self.machine = TiersMachine(self.tiers)
        self.watch = self.store.watcher(self.machine)

    def teardown(self) -> None:
        try:
            self.run(self._download())
        finally:
            for store in (*self.dropped, self.store):
                self.runner.run(store.close())
            self.runner.run(self.tiers.close())
            self.runner.close()
            shutil.rmtree(self.folder)

    def version(self, data: st.DataObject, owner: Whose) -> int:
        """One that is there, most often."""
        adapter = self.model(owner)
        return data.draw(st.sampled_from([*adapter.versions, *adapter.versions, 1, adapter.last + 1]))

    def model(self, owner: Whose) -> ModelAdapter:
        return self.adapters.get(owner, ModelAdapter())

    def same(self, call: Awaitable[Any], expected: Callable[[], Any]) -> Any:
        """Both do it, or both refuse it with one code; what the store answered."""
        try:
            wanted = expected()
        except Refused as refused:
            code = refused.code
        else:
            return self._done(call, wanted)
        with pytest.raises(AdapterError) as refusal:
            self.run(call)
        assert code in (None, refusal.value.code)
        return None

    def _done(self, call: Awaitable[Any], wanted: Any) -> Any:
        answer = self.run(call)
        if isinstance(answer, Pushed):
            assert wanted == Answer(answer.version.version, answer.version.live, answer.created)
        return answer

    def run(self, call: Awaitable[Any]) -> Any:
        async def called() -> Any:
            return await call

        return self.runner.run(called())

    @contextmanager
    def made(self, owner: Whose) -> Iterator[ModelAdapter]:
        """An adapter that is there from its first version on."""
        adapter = self.model(owner)
        yield adapter
        if adapter.last:
            self.adapters[owner] = adapter

    @initialize(pushed=st.lists(numbers, min_size=3, max_size=6))
    def begin_with_a_history(self, pushed: list[int]) -> None:
        """Lives are short, and what is worth a rollback takes a while."""
        for number in pushed:
            self.push(ALICE, number, promote=True)

    @rule(owner=whose, number=numbers, promote=promotes)
    def push(self, owner: Whose, number: int, promote: bool) -> None:
        with self.made(owner) as adapter:
            call = self.store.push(owner.user_id, source(number).folder, tenant=owner.tenant, promote=promote)
            self.same(call, lambda: adapter.push(Sent(number, promote)))

    @rule(owner=whose, number=numbers, promote=promotes, key=st.sampled_from(["k1", "k2"]))
    def push_with_key(self, owner: Whose, number: int, promote: bool, key: str) -> None:
        sent = Sent(number, promote)
        with self.made(owner) as adapter:
            call = self.store.push(
                owner.user_id,
                source(number).folder,
                tenant=owner.tenant,
                promote=promote,
                idempotency_key=key,
            )
            self.same(call, lambda: adapter.push_once(key, sent, sent, self.clock.at))

    @rule(owner=whose, number=numbers)
    def push_in_vain(self, owner: Whose, number: int) -> None:
        self.objects.refuses = True
        try:
            self.run(self.store.push(owner.user_id, source(number).folder, tenant=owner.tenant))
        except StoreError:
            pass
        else:
            adapter = self.model(owner)  # nothing had to be stored
            assert adapter.versions[max(adapter.versions)] == number
        finally:
            self.objects.refuses = False

    @rule(owner=whose, promote=promotes, number=numbers, files=staged_files)
    def begin(self, owner: Whose, promote: bool, number: int, files: Sequence[str]) -> None:
        ticket = self.run(
            self.store.begin_upload(owner.user_id, tenant=owner.tenant, promote=promote, ttl_s=TTL_S)
        )
        expires_at = self.clock.at + timedelta(seconds=TTL_S)
        self.uploads[ticket.upload_id] = ModelUpload(owner, promote, expires_at)
        self._put(ticket.upload_id, number, files)

    def upload(self, data: st.DataObject) -> tuple[str, ModelUpload]:
        upload_id = data.draw(st.sampled_from(list(self.uploads)))
        return upload_id, self.uploads[upload_id]

    def is_running(self, upload_id: str) -> bool:
        return upload_id in self.uploads and self.uploads[upload_id].expires_at > self.clock.at

    @precondition(lambda self: self.uploads)
    @rule(data=st.data(), number=numbers, files=staged_files)
    def put(self, data: st.DataObject, number: int, files: Sequence[str]) -> None:
        upload_id, _ = self.upload(data)
        self._put(upload_id, number, files)

    def _put(self, upload_id: str, number: int, files: Sequence[str]) -> None:
        upload = self.uploads[upload_id]

        def stage() -> None:
            if not self.is_running(upload_id):
                raise Refused("upload_not_found")
            upload.files[file] = number

        for file in files:
            path = source(number).folder / file
            owner = upload.whose
            call = self.store.put_file(owner.user_id, upload_id, file, path, tenant=owner.tenant)
            self.same(call, stage)

    @precondition(lambda self: self.uploads)
    @rule(data=st.data(), stranger=whose)
    def complete(self, data: st.DataObject, stranger: Whose) -> None:
        """By its user, after another one tried."""
        upload_id, upload = self.upload(data)
        owner = upload.whose

        def completed() -> Answer:
            adapter = self.model(owner)
            if adapter.answered(upload_id, self.clock.at) is None:
                if not self.is_running(upload_id):
                    raise Refused("upload_not_found")
                if len(upload.files) < len(ADAPTER_FILES):
                    raise Refused("missing_file")
            with self.made(owner) as adapter:
                pushed = Sent(upload.files[WEIGHTS_FILE], upload.promote)
                answer = adapter.push_once(upload_id, None, pushed, self.clock.at)
            upload.expires_at = self.clock.at  # from here on its answer counts
            upload.is_collected = True
            return answer

        if stranger != owner:
            with pytest.raises(AdapterError):
                self.run(self.store.complete_upload(stranger.user_id, upload_id, tenant=stranger.tenant))
        self.same(self.store.complete_upload(owner.user_id, upload_id, tenant=owner.tenant), completed)

    @rule(owner=whose, data=st.data())
    def promote(self, owner: Whose, data: st.DataObject) -> None:
        version = self.version(data, owner)
        call = self.store.promote(owner.user_id, version, tenant=owner.tenant)
        self.same(call, lambda: self.model(owner).promote(version))

    @rule(owner=whose, times=st.integers(1, 3))
    def rollback(self, owner: Whose, times: int) -> None:
        for _ in range(times):
            call = self.store.rollback(owner.user_id, tenant=owner.tenant)
            self.same(call, lambda: self.model(owner).rollback(None))

    @rule(owner=whose, data=st.data())
    def rollback_to(self, owner: Whose, data: st.DataObject) -> None:
        version = self.version(data, owner)
        call = self.store.rollback(owner.user_id, to=version, tenant=owner.tenant)
        self.same(call, lambda: self.model(owner).rollback(version))

    @rule(owner=whose, data=st.data(), percent=st.sampled_from([1e-9, 50.0, 100.0]))
    def set_canary(self, owner: Whose, data: st.DataObject, percent: float) -> None:
        version = self.version(data, owner)
        call = self.store.set_canary(owner.user_id, version, percent, tenant=owner.tenant)
        self.same(call, lambda: self.model(owner).set_canary(version, percent))

    @rule(owner=whose)
    def clear_canary(self, owner: Whose) -> None:
        adapter = self.model(owner)
        self.same(self.store.clear_canary(owner.user_id, tenant=owner.tenant), adapter.check_live)
        adapter.canary = None

    @rule(owner=whose, tier=st.sampled_from(["disk", "host"]), minutes=st.sampled_from([None, 10, 100]))
    def set_pin(self, owner: Whose, tier: PinTier, minutes: int | None) -> None:
        adapter = self.model(owner)
        until = None if minutes is None else self.clock.at + timedelta(minutes=minutes)
        call = self.store.set_pin(owner.user_id, tier, until=until and until.isoformat(), tenant=owner.tenant)
        if self.same(call, adapter.check_live):
            adapter.pin = tier, until

    @rule(owner=whose)
    def clear_pin(self, owner: Whose) -> None:
        adapter = self.model(owner)
        self.same(self.store.clear_pin(owner.user_id, tenant=owner.tenant), adapter.check_live)
        adapter.pin = None

    @rule(seconds=st.sampled_from([1.0, 11 * MINUTE_S, 20 * MINUTE_S, 25 * 60 * MINUTE_S]))
    def wait(self, seconds: float) -> None:
        self.clock.turn(seconds)

    @rule(owner=whose, data=st.data())
    def delete_version(self, owner: Whose, data: st.DataObject) -> None:
        version = self.version(data, owner)
        call = self.store.delete_version(owner.user_id, version, tenant=owner.tenant)
        self.delete(call, lambda: self.model(owner).delete(version))

    @rule(owner=whose, is_sure=st.sampled_from([False, False, True]))
    def delete_user(self, owner: Whose, is_sure: bool) -> None:
        if not is_sure:  # or nobody would live long
            return

        def deleted() -> None:
            begun = [each for each in self.uploads.values() if each.whose == owner and not each.is_collected]
            if owner not in self.adapters and not begun:
                raise Refused("user_not_found")
            self.adapters.pop(owner, None)
            self.uploads = {key: each for key, each in self.uploads.items() if each.whose != owner}
            for session in SESSIONS:
                self.places.pop((owner, session), None)

        self.delete(self.store.delete_user(owner.user_id, tenant=owner.tenant), deleted)

    def delete(self, call: Awaitable[Any], expected: Callable[[], Any]) -> None:
        """While this router serves: its machine is asked, and answers."""

        async def serving() -> Any:
            async with self.store.watch(self.machine, Intervals(tell_s=0.01)):
                return await call

        receipt = self.same(serving(), expected)
        self.held.clear()  # the watch holds what is pinned now
        if receipt is not None:
            assert (receipt.status, receipt.user_id is None) == ("done", True)
            assert not set(receipt.digests) & {*self.tiers.disk_bytes(), *self.tiers.host_bytes()}

    @rule(owner=whose, session=st.none() | st.sampled_from(SESSIONS))
    def fetch(self, owner: Whose, session: str | None) -> None:
        """What a replica gets are the values of the version that answers."""
        if self.model(owner).live is None:
            return
        found = self.run(self.store.resolve(owner.user_id, tenant=owner.tenant, session=session))
        fetched = self.run(self.tiers.fetch(found.ref))
        number = self.model(owner).versions[found.version]
        assert source(number).prepared == fetched.path.read_bytes()

    @rule(number=numbers)
    def forget(self, number: int) -> None:
        self.run(self.tiers.forget(source(number).digest))
        self.held.pop(source(number).digest, None)

    @rule()
    def hold(self) -> None:
        """What is pinned comes to its tier, as far as there is room, and stays."""
        self.watch = self.store.watcher(self.machine)
        self.run(self.machine.hold(()))
        self.run(self.watch.hold())
        for held in self.tiers.missing_held():
            self.run(self.tiers.prefetch(held.adapter, held.tier))
        assert self.tiers.missing_held() == []
        pinned = {
            source(adapter.versions[version]).digest
            for adapter in self.adapters.values()
            for version in (adapter.answers() if adapter.pinned(self.clock.at) else ())
        }
        self.held = {held.adapter.digest: held.tier for held in self.tiers._holds.granted()}
        assert set(self.held) <= pinned
        assert bool(self.held) == bool(pinned)

    @rule()
    def collect(self) -> None:
        self.run(self.store.collect(min_age_s=-1))
        for upload in self.uploads.values():
            upload.is_collected |= upload.expires_at <= self.clock.at
        staged = sum(len(upload.files) for key, upload in self.uploads.items() if self.is_running(key))
        stored = sum(len(adapter.versions) for adapter in self.adapters.values())
        keys = [found.key for found in self.objects.list("") if not found.key.startswith("catalogs/")]
        assert 2 * stored + staged == len(keys)

    @rule()
    def crash(self) -> None:
        """Everything of this process is gone, without a word; another one starts."""
        self.dropped.append(self.store)
        self.held.clear()
        self.open()
        self.run(self._download())
        self.run(self.watch.tell())  # which drops what the catalog doesn't know
        known = {
            source(number).digest for each in self.adapters.values() for number in each.versions.values()
        }
        assert set(self.tiers.disk_bytes()) <= known

    @invariant()
    def the_store_says_what_the_model_says(self) -> None:
        self.run(self._compare())

    async def _compare(self) -> None:
        for tenant in ("default", "acme"):
            users = sorted(owner.user_id for owner in self.adapters if owner.tenant == tenant)
            assert users == [user.user_id for user in await self.store.users(tenant)]
        for owner, adapter in self.adapters.items():
            await self._compare_versions(owner, adapter)
            if adapter.live is not None:
                await self._compare_answers(owner, adapter)

    async def _compare_versions(self, owner: Whose, adapter: ModelAdapter) -> None:
        listed: list[tuple[int, str, bool]] = []
        while page := await self.store.versions(
            owner.user_id, tenant=owner.tenant, after=listed[-1][0] if listed else None, limit=3
        ):
            listed += [(each.version, each.digest, each.live) for each in page]
        expected = [
            (version, source(number).digest, version == adapter.live)
            for version, number in sorted(adapter.versions.items(), reverse=True)
        ]
        assert expected == listed

    async def _download(self) -> None:
        for owner, adapter in self.adapters.items():
            for version, number in adapter.versions.items():
                for file in ADAPTER_FILES:
                    stored = await self.store.open_file(owner.user_id, version, file, tenant=owner.tenant)
                    assert source(number).files[file] == b"".join([chunk async for chunk in stored])

    async def _compare_answers(self, owner: Whose, adapter: ModelAdapter) -> None:
        assert adapter.live is not None
        found = await self.store.resolve(owner.user_id, tenant=owner.tenant)
        digest = source(adapter.versions[adapter.live]).digest
        assert (adapter.live, digest, owner.tenant) == (found.version, found.ref.digest, found.ref.tenant)
        seen = await self.store.adapter(owner.user_id, tenant=owner.tenant)
        assert adapter.canary == (seen.canary and (seen.canary.version, seen.canary.percent))
        assert adapter.pinned(self.clock.at) == (seen.pin and seen.pin.tier)
        for session in SESSIONS if adapter.canary else ():
            found = await self.store.resolve(owner.user_id, tenant=owner.tenant, session=session)
            assert self._is_right(owner, adapter, session, found.version)
            assert source(adapter.versions[found.version]).digest == found.ref.digest

    def _is_right(self, owner: Whose, adapter: ModelAdapter, session: str, version: int) -> bool:
        """Sessions stay on their side of one percentage, whatever happens between."""
        assert adapter.canary is not None
        number, percent = adapter.canary
        if percent == 50:
            return self.places.setdefault((owner, session), version == number) == (version == number)
        return version == (number if percent == 100 else adapter.live)

    @invariant()
    def history_and_objects_are_what_rollbacks_and_downloads_need(self) -> None:
        """Looked up where they are: asking for each would change the one and takes long for the others."""
        catalog = self.store._catalog
        names = {}
        for row in table(catalog, "adapters"):
            names[row["adapter_id"]] = Whose(row["tenant"], row["user_id"])
        entries = [(names[row["adapter_id"]], row) for row in table(catalog, "live_history")]
        for owner, adapter in self.adapters.items():
            own = [row for whose, row in entries if whose == owner]
            assert adapter.stack == [row["version"] for row in own if row["undone_at"] is None]
            assert adapter.ever == {row["version"] for row in own}
        for row in table(catalog, "versions"):
            number = self.adapters[names[row["adapter_id"]]].versions[row["version"]]
            for file, content in source(number).files.items():
                assert content == self.objects.open(f"{row['object_key']}/{file}").stream.read()

    @invariant()
    def the_machine_has_what_its_books_say_and_what_is_held(self) -> None:
        self.tiers.check()
        assert set(self.held) <= set(self.tiers.disk_bytes())
        on_host = {digest for digest, tier in self.held.items() if tier == "host"}
        assert on_host <= set(self.tiers.host_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("num_lives", [25, 250])
@pytest.mark.timeout(900)
def test_whatever_happens_in_whatever_order_the_store_says_what_the_model_says(num_lives: int) -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=num_lives,
            stateful_step_count=40,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
