"""A random life of an engine: whatever people and a host process may do to it, in any order.

Every choice comes from one seeded generator, so that a life can be lived again.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from asking import Asked, Asking, User, most_that_may_be_cached
from engine_kit import Adapter, Driver, Oracle, digest_of
from tunefleet.adapters_store.slot_layout import SMALLEST_RANK_CLASS
from tunefleet.core import FinishReason, Manifest
from tunefleet.messages import Progress, Submit
from tunefleet.runtime.engine import Engine
from tunefleet.runtime.sequence import Sequence, SequenceState
from tunefleet.runtime.slots import Slot

MAX_IDLE_STEPS = 300  # without any news: somebody would wait for ever
MIN_MIXED = 3  # adapters in a step that counts as mixed
SEASON = 30  # acts; some seasons are quiet, so that what ended sequences left isn't pushed out at once

COMMON_EVENTS = (
    "chunked prompts",
    "preemptions",
    "prefix hits",
    "evictions",
    "rewrites",
    "mixed steps",
)  # that even a short life meets
EVENTS = (
    "requests",
    "requests beside their twins",
    "requests resumed",
    "second turns",
    "chunked prompts",
    "preemptions",
    "prefix hits",
    "evictions",
    "failed loads",
    "uploads while the old version answers",
    "deletions",
    "deleted adapters evicted",
    "rewrites",
    "mixed steps",
    "steps that sample beside greedy ones",
    "cancelled while its adapter was missing",
    "cancelled while a place was missing",
    "cancelled after preemption",
    "cancelled in prefill",
    "cancelled in decode",
)


class _Standing(NamedTuple):
    """What the engine holds between two steps."""

    resident: frozenset[str]
    running: frozenset[str]

    @classmethod
    def of(cls, engine: Engine) -> _Standing:
        running = frozenset(sequence.request_id for sequence in engine.scheduler.running)
        return cls(frozenset(engine.slots.digests), running)


class Life(Driver):
    """Acts at random and steps; looks at every invariant after every step.

    Args:
        kv_cache_bytes: as the engine has it.
        failing_loads: which part of all.
        max_open: requests at once; nobody asks when there are as many.
        max_open_quiet: in a quiet season.
        max_prompt: tokens of the longest prompt.
        max_tokens: of the longest answer.
        asking: what is asked.
    """

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        users: list[User],
        adapters: list[Adapter],
        *,
        seed: int,
        kv_cache_bytes: int,
        failing_loads: float = 0.02,
        max_open: int = 20,
        max_open_quiet: int = 3,
        max_prompt: int = 180,
        max_tokens: int = 32,
        asking: type[Asking] = Asking,
    ) -> None:
        super().__init__(engine, adapters, load_steps=self._load_time)
        self.tally: Counter[str] = Counter()
        self.asked: list[Asked] = []
        self.users = users
        self._adapters = adapters
        self._eos = manifest.eos_token_ids[0]
        self._random = random.Random(seed)
        self._asking = asking(
            self._random, self.tally, vocab=manifest.vocab_size, max_prompt=max_prompt, max_tokens=max_tokens
        )
        self._open: dict[str, Asked] = {}
        self._deleting: dict[str, None] = {}
        self._kv_cache_bytes = kv_cache_bytes
        self._arena = _arena_of(engine)
        self._failing_loads = failing_loads
        self._seasons = [max_open_quiet, max_open]
        self._max_open = max_open
        self._num_acts = 0
        self._num_idle = 0
        self._acts = {
            self._ask_something: 60,
            self._cancel_something: 7,
            self._upload: 4,
            self._delete: 1,
            self._improve: 2,
            self._rest: 40,
        }

    def live(self, num_requests: int) -> None:
        """Until so many requests were asked, and answered or cancelled."""
        while len(self.asked) < num_requests:
            self.tick()
        self.finish()

    def tick(self) -> None:
        """One act, and a step."""
        self._num_acts += 1
        if self._num_acts % SEASON == 0:
            self._max_open = self._random.choice(self._seasons)
        (act,) = self._random.choices(list(self._acts), list(self._acts.values()))
        act()
        self.step()

    def finish(self) -> None:
        """Until nothing is left to do, and then nothing may be left over."""
        while self._open or self._deleting:
            self.step()
        assert len(self.engine.scheduler) == 0
        assert self.engine.rows.used_tokens == 0
        assert not any(self.engine.slots.is_pinned(digest) for digest in self.engine.slots.digests)

    def ask(self, work: Submit, user: User) -> Asked:
        asked = Asked(work, user, self.submit(work))
        self.asked.append(asked)
        user.asked.append(asked)
        if work.adapter is not None:
            user.digests[work.adapter.digest] = None
        self._open[work.request_id] = asked
        self.tally["requests"] += 1
        return asked

    def step(self) -> list[Progress]:
        before = _Standing.of(self.engine)
        news = super().step()
        self.tally["steps"] += 1
        self._look(before)
        for progress in news:
            self._take(progress)
        self._evict_deleted()
        self._num_idle = 0 if news or not self._open else self._num_idle + 1
        assert self._num_idle < MAX_IDLE_STEPS, f"nothing happens, and {sorted(self._open)} wait"
        return news

    def deliver(self, digest: str) -> None:
        if self._random.random() < self._failing_loads:
            self.tally["failed loads"] += 1
            self.engine.adapter_failed(digest, "the disk is gone", "adapter_load_failed")
        else:
            super().deliver(digest)

    def verify(self, oracle: Oracle) -> None:
        """Checks every token of everybody, also those before a cancel."""
        for asked in sorted(self.asked, key=lambda asked: digest_of(asked.work) or ""):
            tokens = asked.answer.tokens
            if asked.answer.finish_reason is FinishReason.STOP:
                tokens = [*tokens, self._eos]  # it is not part of the answer, but was chosen
            oracle.check_answer(asked.work, tokens)
            if asked.answer.tokens:
                oracle.check_logprobs(asked.work, asked.answer)
            if not asked.cancelled:
                _check_end(asked)

    def check_met(self, events: Iterable[str]) -> None:
        """Asserts that each of these happened."""
        assert [event for event in events if not self.tally[event]] == []

    def told(self) -> str:
        """How often what happened, a line each."""
        return "\n".join(f"{self.tally[event]:8} {event}" for event in sorted(self.tally))

    # What people do

    def _ask_something(self) -> None:
        if len(self._open) < self._max_open:
            user = self._asking.user(self.users)
            for work in self._asking.works(user):
                self.ask(work, user)

    def _cancel_something(self) -> None:
        theirs = [asked for asked in self._open.values() if asked.user in self.users]
        rare = [asked for asked in theirs if asked.preempted]
        if theirs:
            self._cancel(self._random.choice(rare or theirs))

    def _cancel(self, asked: Asked) -> None:
        request_id = asked.work.request_id
        sequence = self.engine.scheduler.get(request_id)
        assert sequence is not None
        self.tally[f"cancelled {self._state(sequence)}"] += 1
        self.engine.cancel(request_id)
        self.engine.check()
        del self._open[request_id]
        asked.cancelled = True

    def _state(self, sequence: Sequence) -> str:
        if sequence.state is SequenceState.RUNNING:
            return "in prefill" if sequence.num_uncomputed > 1 else "in decode"
        if sequence.num_generated > sequence.num_resumed:
            return "after preemption"
        missing = sequence.digest is not None and self.engine.slots.lookup(sequence.digest) is None
        return f"while {'its adapter' if missing else 'a place'} was missing"

    def _upload(self) -> None:
        """A new version of somebody's adapter; who was deleted is there again, often with the same one."""
        user = self._random.choice([user for user in self.users if user.adapter])
        same = user.deleted and self._random.random() < 0.5
        old, user.deleted = user.adapter, False
        user.adapter = old if same else self._random.choice(self._adapters)
        if user.adapter is not old and any(not asked.ended for asked in user.asked):
            self.tally["uploads while the old version answers"] += 1

    def _delete(self) -> None:
        """Somebody with all their versions; their streams end."""
        there = [user for user in self.users if user.user_id and user.asked]
        if not there:
            return
        user = self._random.choice(there)
        for asked in user.asked:
            if not asked.ended:
                self._cancel(asked)
        self.engine.forget_user(user.tenant, user.user_id or "")
        self._deleting.update(user.digests)
        user.deleted, user.asked, user.digests = user.adapter is not None, [], {}
        self.tally["deletions"] += 1

    # What the machine does

    def _improve(self) -> None:
        self.tally["rewrites"] += self.engine.improve()

    def _rest(self) -> None:
        """Nobody does anything."""

    def _evict_deleted(self) -> None:
        """As the host process does until the engine says yes, unless the same adapter is live again."""
        live = {user.adapter.ref.digest for user in self.users if user.adapter and not user.deleted}
        for digest in list(self._deleting):
            if digest in live:
                del self._deleting[digest]
            elif self.engine.evict(digest):
                del self._deleting[digest]
                assert not self.engine.slots.holds(digest)
                self.tally["deleted adapters evicted"] += 1

    def _load_time(self) -> int:
        return self._random.choice([0, 1, 2, 8])

    # What is looked at

    def _take(self, progress: Progress) -> None:
        asked = self._open[progress.request_id]  # nobody hears of a request that has ended
        if progress.timing is not None:
            cached = progress.timing.cached_tokens
            assert cached <= most_that_may_be_cached(asked)
            self.tally["prefix hits"] += cached > 0
            self.tally["cached tokens"] += cached
        if progress.finish_reason is not None:
            del self._open[progress.request_id]
            self.tally["tokens"] += len(asked.answer.tokens)

    def _look(self, before: _Standing) -> None:
        assert self.engine.kv.used_bytes <= self._kv_cache_bytes
        assert _arena_of(self.engine) == self._arena
        now = _Standing.of(self.engine)
        self.tally["evictions"] += len(before.resident - now.resident)
        for sequence in self.engine.scheduler.waiting:
            if sequence.request_id in before.running:
                self.tally["preemptions"] += 1
                self._open[sequence.request_id].preempted = True
        running = list(self.engine.scheduler.running)
        self.tally["chunked prompts"] += sum(
            0 < s.num_computed < s.num_prompt and s.request_id not in before.running for s in running
        )
        self.tally["mixed steps"] += len({s.digest for s in running} - {None}) >= MIN_MIXED
        draws = {s.sampling.temperature > 0 for s in running}
        self.tally["steps that sample beside greedy ones"] += len(draws) == 2


def _arena_of(engine: Engine) -> int:
    """Where the slots' memory is: it is taken once."""
    return engine.banks.values(Slot(SMALLEST_RANK_CLASS, 0)).data_ptr()


def _check_end(asked: Asked) -> None:
    """It came to the end that it asked for, unless its adapter couldn't be loaded."""
    answer, sampling = asked.answer, asked.work.sampling
    if answer.finish_reason is FinishReason.ERROR:
        assert answer.error_code == "adapter_load_failed"
    elif answer.finish_reason is FinishReason.STOP:
        assert not sampling.ignore_eos
    else:
        assert answer.finish_reason is FinishReason.LENGTH
        assert len(answer.tokens) == sampling.max_tokens - len(asked.work.generated)


@contextmanager
def replayable(default: int) -> Iterator[int]:
    """The seed of a life; a failure says how to live it again."""
    seed = int(os.environ.get("TUNEFLEET_CHURN_SEED", default))
    try:
        yield seed
    except BaseException as error:
        error.add_note(f"TUNEFLEET_CHURN_SEED={seed} lives this life again")
        raise
