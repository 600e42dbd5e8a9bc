"""Which saved prefixes there are. Pure accounting: no torch, no clock, no I/O.

A finished sequence leaves the KV of its tokens, so that the next turn of a chat computes only what is new.
An entry belongs to one scope and is found by nobody else: who asks can't learn from the time to the first
token what others have asked (PROMPTPEEK, NDSS 2025).
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

MIN_MATCH = 16  # tokens; loading less isn't worth it
MAX_ENTRIES = 8  # of a scope
_TOKEN_BYTES = array("i").itemsize


class Scope(NamedTuple):
    """Whose KV it is; the same tokens have other KV in another version."""

    tenant: str
    user_id: str | None
    digest: str | None  # None: the base


class Match(NamedTuple):
    entry: int
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class _Prefix:
    scope: Scope
    tokens: bytes  # as C ints: slices of them compare at memory speed

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // _TOKEN_BYTES


class PrefixTable:
    """Saved prefixes of one engine, least recently used first."""

    def __init__(self) -> None:
        self.num_tokens = 0  # over all entries
        self._entries: OrderedDict[int, _Prefix] = OrderedDict()
        self._scopes: dict[Scope, list[int]] = {}
        self._num_saved = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, entry: int) -> bool:
        return entry in self._entries

    def lookup(self, scope: Scope, tokens: Sequence[int]) -> Match | None:
        """The entry that shares most with ``tokens``; one token at least is left to compute."""
        if scope not in self._scopes:
            return None
        wanted = _pack(tokens[:-1])
        best = max(
            (Match(entry, _num_common(prefix.tokens, wanted)) for entry, prefix in self._of(scope)),
            key=lambda match: match.num_tokens,
        )
        return best if best.num_tokens >= MIN_MATCH else None

    def touch(self, entry: int) -> None:
        """It was used."""
        self._entries.move_to_end(entry)

    def covers(self, scope: Scope, tokens: Sequence[int]) -> bool:
        """Whether an entry holds all of ``tokens`` already; it counts as used then."""
        wanted = _pack(tokens)
        found = next((entry for entry, prefix in self._of(scope) if prefix.tokens.startswith(wanted)), None)
        if found is not None:
            self.touch(found)
        return found is not None

    def drop_superseded(self, scope: Scope, tokens: Sequence[int]) -> list[int]:
        """Drops what an entry of ``tokens`` makes useless, or one too many; the entries that are gone."""
        wanted = _pack(tokens)
        dropped = self._drop_where(scope, lambda prefix: wanted.startswith(prefix.tokens))
        of_scope = {*self._scopes.get(scope, ())}
        if len(of_scope) == MAX_ENTRIES:
            oldest = next(entry for entry in self._entries if entry in of_scope)
            self._drop(oldest)
            dropped.append(oldest)
        return dropped

    def save(self, scope: Scope, tokens: Sequence[int]) -> int:
        """A new entry; the caller has made room for it and its scope."""
        entry = self._num_saved
        self._num_saved += 1
        self._entries[entry] = _Prefix(scope, _pack(tokens))
        self._scopes.setdefault(scope, []).append(entry)
        self.num_tokens += len(tokens)
        return entry

    def drop_oldest(self) -> int:
        entry = next(iter(self._entries))
        self._drop(entry)
        return entry

    def forget(self, digest: str) -> list[int]:
        """Drops all that an adapter left; the entries that are gone."""
        scopes = [scope for scope in self._scopes if scope.digest == digest]
        return [entry for scope in scopes for entry in self._drop_where(scope, lambda _: True)]

    def forget_user(self, tenant: str, user_id: str | None) -> list[int]:
        """Drops all that a user left; the entries that are gone."""
        scopes = [scope for scope in self._scopes if scope[:2] == (tenant, user_id)]
        return [entry for scope in scopes for entry in self._drop_where(scope, lambda _: True)]

    def check(self) -> None:
        """Asserts that sums and scopes agree with the entries."""
        assert self.num_tokens == sum(prefix.num_tokens for prefix in self._entries.values())
        assert sorted(self._entries) == sorted(entry for of in self._scopes.values() for entry in of)
        for scope, entries in self._scopes.items():
            assert 0 < len(entries) <= MAX_ENTRIES, "a scope has too many entries"
            assert all(self._entries[entry].scope == scope for entry in entries), "an entry of another scope"

    def _of(self, scope: Scope) -> Iterator[tuple[int, _Prefix]]:
        return ((entry, self._entries[entry]) for entry in self._scopes.get(scope, ()))

    def _drop_where(self, scope: Scope, useless: Callable[[_Prefix], bool]) -> list[int]:
        dropped = [entry for entry, prefix in self._of(scope) if useless(prefix)]
        for entry in dropped:
            self._drop(entry)
        return dropped

    def _drop(self, entry: int) -> None:
        prefix = self._entries.pop(entry)
        self.num_tokens -= prefix.num_tokens
        self._scopes[prefix.scope].remove(entry)
        if not self._scopes[prefix.scope]:
            del self._scopes[prefix.scope]


def _pack(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def _num_common(left: bytes, right: bytes) -> int:
    """Tokens up to the first difference: bisection, each comparison one memcmp of what is still open."""
    low, high = 0, min(len(left), len(right)) // _TOKEN_BYTES  # below low all is equal
    while low < high:
        middle = (low + high + 1) // 2
        part = slice(low * _TOKEN_BYTES, middle * _TOKEN_BYTES)
        if left[part] == right[part]:
            low = middle
        else:
            high = middle - 1
    return low
