"""Who asks an engine, and what, in a random life: two tenants' users, chats, shared texts, every sampling."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import msgspec

from engine_kit import Adapter, Answer, digest_of, random_prompt
from tunefleet.core import SamplingParams
from tunefleet.messages import Submit


@dataclasses.dataclass(eq=False)
class Asked:
    """One request and what came of it."""

    work: Submit
    user: User
    answer: Answer
    cancelled: bool = False
    preempted: bool = False

    @property
    def ended(self) -> bool:
        return self.cancelled or self.answer.finish_reason is not None

    @property
    def tokens(self) -> tuple[int, ...]:
        """All that was said."""
        return (*self.work.prompt, *self.work.generated, *self.answer.tokens)


@dataclasses.dataclass(eq=False)
class User:
    """Somebody with the base, or with the live version of an adapter of theirs."""

    tenant: str
    user_id: str | None
    adapter: Adapter | None
    deleted: bool = False
    asked: list[Asked] = dataclasses.field(default_factory=list)  # since they were last deleted
    digests: dict[str, None] = dataclasses.field(default_factory=dict)  # of the versions that were asked

    @property
    def answered(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.ended and asked.answer.tokens]


def make_users(adapters: list[Adapter]) -> list[User]:
    """One per adapter, some of the base, and two who uploaded what the first one did; of two tenants."""
    own = [User(f"tenant-{n % 2}", f"user-{n}", adapter) for n, adapter in enumerate(adapters)]
    base = [User(f"tenant-{n % 2}", f"base-{n}" if n > 1 else None, None) for n in range(4)]
    twins = [User(f"tenant-{n % 2}", f"twin-{n}", adapters[0]) for n in range(2)]
    return [*own[:6], *twins, *base, *own[6:]]


class Asking:
    """Makes requests from a generator's choices, and counts what kinds there were.

    Args:
        max_prompt: tokens of the longest prompt.
        max_tokens: of the longest answer.
    """

    def __init__(
        self, generator: random.Random, tally: Counter[str], *, vocab: int, max_prompt: int, max_tokens: int
    ) -> None:
        self._random = generator
        self._tally = tally
        self._vocab = vocab
        self._max_prompt = max_prompt
        self._max_tokens = max_tokens
        self._texts = [self._new_tokens(40), self._new_tokens(70)]  # that everybody's prompts may begin with
        self._num_asked = 0
        self._last: User | None = None

    def user(self, users: list[User]) -> User:
        """Some ask often, most seldom; who has asked asks again soon."""
        there = [user for user in users if not user.deleted]
        if self._last in there and self._random.random() < 0.4:
            return self._last
        (self._last,) = self._random.choices(there, [1 / (place + 4) for place in range(len(there))])
        return self._last

    def works(self, user: User) -> list[Submit]:
        """One request, or several that have a prompt in common as those of one with ``n`` do."""
        answered = user.answered
        if answered and self._random.random() < 0.06:
            return [self._resumed(self._random.choice(answered))]
        work = self._work(user, self._prompt(answered))
        twins = 2 * (self._random.random() < 0.06)
        self._tally["requests beside their twins"] += twins
        return [work, *(self._twin(work) for _ in range(twins))]

    def _work(self, user: User, prompt: tuple[int, ...]) -> Submit:
        ref = user.adapter.ref if user.adapter else None
        return Submit(
            request_id=self._new_id(),
            prompt=prompt,
            sampling=self._sampling(),
            adapter=msgspec.structs.replace(ref, tenant=user.tenant) if ref else None,
            tenant=user.tenant,
            user_id=user.user_id,
        )

    def _twin(self, work: Submit) -> Submit:
        sampling = msgspec.structs.replace(work.sampling, temperature=1.0, seed=self._seed())
        return msgspec.structs.replace(work, request_id=self._new_id(), sampling=sampling)

    def _resumed(self, asked: Asked) -> Submit:
        """As if a replica had died in the middle of the answer."""
        self._tally["requests resumed"] += 1
        said = (*asked.work.generated, *asked.answer.tokens)
        most = min(len(said), asked.work.sampling.max_tokens - 1)
        sent = said[: self._random.randint(0, most)]
        return msgspec.structs.replace(asked.work, request_id=self._new_id(), generated=sent)

    def _prompt(self, answered: list[Asked]) -> tuple[int, ...]:
        kind = self._random.random()
        if kind < 0.4 and answered:
            self._tally["second turns"] += 1
            said = self._random.choice(answered[-2:]).tokens
            return (*said[: self._max_prompt - 8], *self._new_tokens(self._random.randint(1, 8)))
        if kind < 0.6:
            return (*self._random.choice(self._texts), *self._new_tokens(self._random.randint(1, 12)))
        if kind < 0.75:
            return self._new_tokens(self._random.randint(3 * self._max_prompt // 4, self._max_prompt))
        return self._new_tokens(self._random.randint(1, 30))

    def _sampling(self) -> SamplingParams:
        max_tokens, draws = self._random.randint(1, self._max_tokens), self._random.random() < 0.3
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self._random.choice([0.3, 0.8, 1.5]) if draws else 0.0,
            top_p=self._random.choice([1.0, 0.9]),
            top_k=self._random.choice([0, 20]),
            min_p=self._random.choice([0.0, 0.05]),
            logprobs=self._random.choice([None, 2]),
            seed=self._seed(),
            ignore_eos=self._random.random() < 0.8,
        )

    def _new_tokens(self, length: int) -> tuple[int, ...]:
        return random_prompt(self._random, length, self._vocab)

    def _new_id(self) -> str:
        self._num_asked += 1
        return f"request-{self._num_asked}"

    def _seed(self) -> int:
        return self._random.getrandbits(32)


def most_that_may_be_cached(asked: Asked) -> int:
    """The longest beginning that this user said to, or heard from, this very version."""
    digest = digest_of(asked.work)
    theirs = [other for other in asked.user.asked if digest_of(other.work) == digest]
    kept = [other for other in theirs if other.ended or other.preempted]
    return max((_num_common(asked.tokens, other.tokens) for other in kept), default=0)


def _num_common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return place
    return min(len(left), len(right))
