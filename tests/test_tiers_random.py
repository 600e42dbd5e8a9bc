"""Whatever happens, in whatever order: books and folders agree, and only right bytes are served."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tiers_kit import Setup, flipped
from tunefleet.adapters_store.failures import LOST_S
from tunefleet.adapters_store.flights import Fetched
from tunefleet.adapters_store.tiers import Tiers
from tunefleet.core import AdapterRef, PinTier
from tunefleet.errors import AdapterLoadFailed
from tunefleet.messages import HeldAdapter

NUM_ADAPTERS = 4
ACTIONS = (
    *("fetch", "crowd", "race", "pin", "unpin", "forget", "spoil", "lose", "restore"),
    *("hold disk", "hold host", "release", "prefetch disk", "prefetch host"),
)


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, NUM_ADAPTERS - 1)), max_size=20))
@settings(max_examples=50, deadline=None)
def test_whatever_happens_books_are_right_and_only_right_bytes_are_served(
    actions: list[tuple[str, int]],
) -> None:
    async def scenario(setup: Setup) -> None:
        life = Life(setup)
        async with setup.tiers(2 * life.host_size, 3 * life.disk_size + 50) as tiers:
            for action, number in actions:
                setup.clock.now_s += LOST_S
                await life.act(tiers, action, number)
                tiers.check()
                life.check(tiers)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(scenario(Setup(Path(folder))))


class Life:
    """Two users have each adapter, under keys of their own; what was done, and must be so."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.mine = [setup.store(seed, upload_id=f"mine{seed}") for seed in range(NUM_ADAPTERS)]
        self.theirs = [setup.store(seed, upload_id=f"theirs{seed}") for seed in range(NUM_ADAPTERS)]
        self.expected = [setup.reference(seed) for seed in range(NUM_ADAPTERS)]
        self.host_size, self.disk_size = len(self.expected[0]), self.mine[0].size_bytes
        self.pinned: list[int] = []
        self.held: set[str] = set()  # those that were there when they were held
        self.lost: set[str] = set()  # keys

    async def act(self, tiers: Tiers, action: str, number: int) -> None:
        ref = self.mine[number]
        match action.split():
            case ["fetch"]:
                await self.fetch(tiers, [ref])
            case ["crowd"]:
                await self.fetch(tiers, [*self.mine, *self.theirs])
            case ["race"]:
                await asyncio.gather(
                    self.fetch(tiers, [*self.mine, *self.theirs]), self.forget(tiers, number)
                )
            case ["pin"] if ref.digest in tiers.host_bytes():
                tiers.pin(ref.digest)
                self.pinned.append(number)
            case ["unpin"] if self.pinned:
                tiers.unpin(self.mine[self.pinned.pop()].digest)
            case ["forget"]:
                await self.forget(tiers, number)
            case ["spoil"] if self.setup.disk_file(ref).exists():
                self.setup.disk_file(ref).write_bytes(flipped(self.setup.disk_file(ref).read_bytes()))
            case ["lose"]:
                self.setup.objects.lose(ref)
                self.lost.add(ref.key)
            case ["restore"]:
                self.setup.store(number, upload_id=f"mine{number}")
                self.lost.discard(ref.key)
            case ["hold", "disk" | "host" as tier]:
                self.hold(tiers, ref, tier)
            case ["release"]:
                tiers.hold("router", [])
                self.held.clear()
            case ["prefetch", "disk" | "host" as tier]:
                await self.prefetch(tiers, ref, tier)

    async def fetch(self, tiers: Tiers, refs: list[AdapterRef]) -> None:
        answers = await asyncio.gather(*(tiers.fetch(ref) for ref in refs), return_exceptions=True)
        for ref, answer in zip(refs, answers, strict=True):
            if isinstance(answer, AdapterLoadFailed):
                assert answer.code in {"adapter_lost", "adapter_no_room", "adapter_deleted"}
                assert answer.code != "adapter_lost" or ref.key in self.lost
            else:
                assert isinstance(answer, Fetched)
                number = [each.digest for each in self.mine].index(ref.digest)
                if answer.path.exists():  # else somebody else's fetch or a deletion came between
                    assert answer.path.read_bytes() == self.expected[number]

    async def forget(self, tiers: Tiers, number: int) -> None:
        if number not in self.pinned:
            self.held.discard(self.mine[number].digest)
            await tiers.forget(self.mine[number].digest)

    async def prefetch(self, tiers: Tiers, ref: AdapterRef, tier: PinTier) -> None:
        [answer] = await asyncio.gather(tiers.prefetch(ref, tier), return_exceptions=True)
        if answer is not None:
            assert isinstance(answer, AdapterLoadFailed)
            assert answer.code in {"adapter_lost", "adapter_no_room"}

    def hold(self, tiers: Tiers, ref: AdapterRef, tier: PinTier) -> None:
        tiers.hold("router", [HeldAdapter(ref, tier)])
        copies = tiers.disk_bytes() if tier == "disk" else tiers.host_bytes()
        self.held = {ref.digest} & copies.keys() & tiers.disk_bytes().keys()

    def check(self, tiers: Tiers) -> None:
        assert {self.mine[number].digest for number in self.pinned} <= tiers.host_bytes().keys()
        assert self.held <= tiers.disk_bytes().keys()
