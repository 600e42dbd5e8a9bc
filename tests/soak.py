"""A deployment's life with all that goes wrong at once: load, uploads, deletions, zero, and kill -9.

Everybody greedily continues a prompt of token ids with the adapter that is live for them; the tokenizer gives
each token one character, so that the text of an answer is its tokens.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import tokenizers

from engine_kit import VOCAB, Stage
from lone_router import options_for
from tunefleet import Fleet
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import runtime_dir, state_dir
from tunefleet.fleet import FleetParts
from tunefleet.runtime.machine import Machine
from tunefleet.text import Tokenizer

FIRST_CHARACTER = 0x4E00  # of token 0; one character each from there on
NUM_USERS = 200
NUM_CLIENTS = 8
NUM_REPLICAS = 3
MAX_TOKENS = 40
OPTIONS = {
    "max_replicas": NUM_REPLICAS,
    "max_num_seqs": 4,
    "target_concurrency": 2,
    "max_active_adapters": 4,
    "idle_timeout_s": 0.5,
    "scale_down_delay_s": 1.0,
    "host_cache_bytes": 2**20,
}


@dataclasses.dataclass(eq=False)
class User:
    """Somebody who uploads, asks and leaves."""

    user_id: str
    digests: list[str] = dataclasses.field(default_factory=list)  # of all uploads, the last maybe under way
    num_live: int = 0  # place of the live one; what comes behind it may be live by now
    is_there: bool = False
    is_uploading: bool = False
    num_asking: int = 0


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a deployment holds besides what is stored."""

    num_processes: int
    num_open_files: int  # of router and host process
    router_bytes: int
    host_bytes: int
    num_sockets: int  # files in the folder of sockets


class Soak:
    """One router's fleet of three replicas on a tiny base, and the people who use it."""

    def __init__(self, root: Path, stage: Stage, seed: int) -> None:
        options = options_for(root, **OPTIONS)
        self.tally: Counter[str] = Counter()
        self._state = state_dir(options, stage.folder)
        self._machine = Machine(options, stage.manifest, stage.folder)
        self.fleet = Fleet.from_parts(
            FleetParts(
                manifest=stage.manifest,
                tokenizer=Tokenizer(write_characters(root / "tokenizer")),
                store=AdapterStore.open(options, stage.manifest),
                dispatcher=self._machine,
            ),
            cache_dir=options.cache_dir,
            max_model_len=options.max_model_len,
        )
        self._adapters = stage.adapters
        self._oracle = stage.oracle
        self._random = random.Random(seed)
        self._users = [User(f"user-{number}") for number in range(NUM_USERS)]
        self._said: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}

    async def begin(self) -> None:
        """Every second one has an adapter; one request has been through all that there is."""
        for user in self._users[::2]:
            await self._upload(user)
        await self._ask(self._users[0])

    async def live(self, seconds: float) -> None:
        """Rounds of everything at once, each followed by zero."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            round_until = min(until, time.monotonic() + self._random.uniform(5, 10))
            async with asyncio.TaskGroup() as tasks:
                for act, least, most in (
                    *[(self._ask_somebody, 0.0, 0.05)] * NUM_CLIENTS,
                    (self._upload_something, 0.02, 0.2),
                    (self._delete_somebody, 0.1, 0.5),
                    (self._kill_something, 1.0, 3.0),
                ):
                    tasks.create_task(self._repeat(act, least, most, round_until))
            await self.zero()

    async def zero(self) -> None:
        """Until no replica is left."""
        async with asyncio.timeout(60):
            while self._machine.replicas:
                await self._machine.changed()
        self.tally["zeros"] += 1

    def verify(self) -> None:
        """Every token that anybody got is their adapter's."""
        for (digest, prompt), answer in self._said.items():
            self._oracle.check(digest, list(prompt), list(answer))

    async def footprint(self) -> Footprint:
        """At zero, once everything that was killed has come back."""
        async with asyncio.timeout(60):
            while not (status := await self.fleet.status()).parked_pid:
                await asyncio.sleep(0.05)  # nobody tells of it
        router, host = psutil.Process(), psutil.Process(status.host_pid)
        return Footprint(
            num_processes=len(host.children(recursive=True)),
            num_open_files=router.num_fds() + host.num_fds(),
            router_bytes=router.memory_info().rss,
            host_bytes=host.memory_info().rss,
            num_sockets=len(list(runtime_dir(self._state).iterdir())),
        )

    async def _repeat(
        self, act: Callable[[], Awaitable[None]], least: float, most: float, until: float
    ) -> None:
        while time.monotonic() < until:
            await act()
            await asyncio.sleep(self._random.uniform(least, most))

    async def _ask_somebody(self) -> None:
        there = [user for user in self._users if user.is_there]
        await self._ask(self._random.choice(there[:20] if self._random.random() < 0.5 else there))

    async def _ask(self, user: User) -> None:
        """Keeps what was said; any failure is the test's."""
        prompt = tuple(self._random.randrange(2, VOCAB) for _ in range(self._random.randint(1, 30)))
        num_tokens = self._random.randint(1, MAX_TOKENS)
        first = user.num_live
        user.num_asking += 1
        answer = await self.fleet.complete(
            user.user_id, prompt, temperature=0, max_tokens=num_tokens, ignore_eos=True
        )
        user.num_asking -= 1
        tokens = tuple(ord(character) - FIRST_CHARACTER for character in answer.text)
        assert answer.adapter_digest in user.digests[first:], user.user_id
        assert len(tokens) == num_tokens == answer.usage.completion_tokens
        self._said[answer.adapter_digest, prompt] = tokens
        self.tally["requests"] += 1
        self.tally[f"cold start: {answer.served.cold_start}"] += 1

    async def _upload_something(self) -> None:
        user = self._random.choice(self._users)
        if not user.is_uploading and (user.is_there or not user.digests):
            await self._upload(user)

    async def _upload(self, user: User) -> None:
        adapter = self._random.choice(self._adapters)
        user.is_uploading = True
        user.digests.append(adapter.ref.digest)
        await self.fleet.adapters.push(user.user_id, adapter.folder)
        user.num_live = len(user.digests) - 1
        user.is_there, user.is_uploading = True, False
        self.tally["uploads"] += 1

    async def _delete_somebody(self) -> None:
        """Whose streams would end; so somebody who isn't asking. They may come again."""
        there = [user for user in self._users if user.is_there]
        user = self._random.choice([user for user in there if not user.num_asking and not user.is_uploading])
        user.is_there = False
        await self.fleet.delete_user(user.user_id)
        user.digests.clear()
        self.tally["deletions"] += 1

    async def _kill_something(self) -> None:
        """Mostly a replica; after a host process everything has to be imported again, so that seldom."""
        status = await self.fleet.status()
        named = [(f"{replica.state} replica", replica.pid) for replica in status.replicas]
        if self._random.random() < 0.1:
            named = [("parked process", status.parked_pid), ("host process", status.host_pid)]
        killable = [(name, pid) for name, pid in named if pid and psutil.pid_exists(pid)]
        if killable:
            name, pid = self._random.choice(killable)
            os.kill(pid, signal.SIGKILL)
            self.tally[f"killed: {name}"] += 1


def write_characters(folder: Path) -> Path:
    """A tokenizer with one character per token id of the tiny models."""
    folder.mkdir(parents=True)
    vocab = {chr(FIRST_CHARACTER + number): number for number in range(VOCAB)}
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=chr(FIRST_CHARACTER)))
    built.decoder = tokenizers.decoders.Fuse()
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder
