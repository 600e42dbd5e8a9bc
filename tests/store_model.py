"""What the store must say, worked out from plain lists and dicts: the oracle of a random life."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from datetime import datetime, timedelta
from typing import NamedTuple

from tunefleet.core import PinTier

KEEP = timedelta(hours=24)


class Refused(Exception):
    """With the code of the error that the store must raise; None: AdapterNotFound without one."""

    def __init__(self, code: str | None = None) -> None:
        super().__init__(code)
        self.code = code


class Whose(NamedTuple):
    tenant: str
    user_id: str


class Sent(NamedTuple):
    """An upload: which bytes, and what was said with them."""

    number: int
    promote: bool = True


class Answer(NamedTuple):
    version: int
    live: bool
    created: bool


@dataclasses.dataclass
class Remembered:
    sent: Sent | None  # None: an upload in steps, which is its own key
    answer: Answer
    at: datetime


@dataclasses.dataclass
class ModelAdapter:
    versions: dict[int, int] = dataclasses.field(default_factory=dict)  # number -> bytes
    last: int = 0
    live: int | None = None
    stack: list[int] = dataclasses.field(default_factory=list)  # what was live, without what was undone
    ever: set[int] = dataclasses.field(default_factory=set)
    canary: tuple[int, float] | None = None
    pin: tuple[PinTier, datetime | None] | None = None
    keys: dict[Hashable, Remembered] = dataclasses.field(default_factory=dict)

    def push(self, sent: Sent) -> Answer:
        newest = max(self.versions, default=0)
        if newest and self.versions[newest] == sent.number:
            return Answer(newest, newest == self.live, created=False)
        self.last += 1
        self.versions[self.last] = sent.number
        if sent.promote:
            self._make_live(self.last)
        return Answer(self.last, sent.promote, created=True)

    def push_once(self, key: Hashable, sent: Sent | None, pushed: Sent, now: datetime) -> Answer:
        """The first answer again, for a day."""
        known = self.answered(key, now)
        if known is None:
            answer = self.push(pushed)
            self.keys[key] = Remembered(sent, answer, now)
            return answer
        if known.sent != sent:
            raise Refused("idempotency_key_reused")
        return known.answer

    def answered(self, key: Hashable, now: datetime) -> Remembered | None:
        known = self.keys.get(key)
        return known if known is not None and known.at > now - KEEP else None

    def promote(self, version: int) -> None:
        self._check(version)
        if version != self.live:
            self._make_live(version)

    def rollback(self, to: int | None) -> int:
        if not self.last:
            raise Refused
        version = self._version_before() if to is None else to
        self._check(version)
        if version == self.live:
            return version
        if version in self.stack:
            while self.stack[-1] != version:
                self.stack.pop()
            self._end_canary(version)
            self.live = version
        elif version in self.ever:
            self._make_live(version)
        else:
            raise Refused("never_live")
        return version

    def set_canary(self, version: int, percent: float) -> None:
        self._check(version)
        if version == self.live:
            raise Refused("version_is_live")
        self.check_live()
        self.canary = version, percent

    def delete(self, version: int) -> None:
        if self.live == version and version in self.versions:
            raise Refused("version_is_live")
        if self.canary is not None and self.canary[0] == version:
            raise Refused("version_is_canary")
        self._check(version)
        del self.versions[version]
        self.stack = [each for each in self.stack if each != version]
        self.ever.discard(version)
        self.keys = {key: known for key, known in self.keys.items() if known.answer.version != version}

    def check_live(self) -> None:
        if self.live is None:
            raise Refused

    def answers(self) -> set[int]:
        """Versions that requests get."""
        self.check_live()
        assert self.live is not None
        return {self.live} | ({self.canary[0]} if self.canary else set())

    def pinned(self, now: datetime) -> PinTier | None:
        if self.pin is None or (self.pin[1] is not None and self.pin[1] <= now):
            return None
        return self.pin[0]

    def _check(self, version: int) -> None:
        if version not in self.versions:
            raise Refused

    def _version_before(self) -> int:
        for version in reversed(self.stack):
            if version != self.live:
                return version
        raise Refused("no_earlier_version")

    def _make_live(self, version: int) -> None:
        self.stack.append(version)
        self.ever.add(version)
        self._end_canary(version)
        self.live = version

    def _end_canary(self, version: int) -> None:
        if self.canary is not None and self.canary[0] == version:
            self.canary = None


@dataclasses.dataclass
class ModelUpload:
    """An upload in steps that was begun and is not over."""

    whose: Whose
    promote: bool
    expires_at: datetime
    files: dict[str, int] = dataclasses.field(default_factory=dict)  # file -> bytes
    is_collected: bool = False
