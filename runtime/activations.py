"""Adapters on their way into slots: mapped files, copied between steps a bounded slice at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from tunefleet.core import LinearSpec
from tunefleet.runtime.banks import Banks, Filling, Prepared, map_prepared
from tunefleet.runtime.scheduler import Scheduler
from tunefleet.runtime.sequence import Sequence
from tunefleet.runtime.slots import Activation
from tunefleet.runtime.trials import TrialOf, trial_of

SLICE_BYTES = 8 << 20  # of prepared files per step, while sequences run: milliseconds of their pace
MAX_SLICES = 4  # in one step, where more would run than do


class _Loaded(NamedTuple):
    """A prepared file, mapped: it stays readable even if the host tier drops the file."""

    prepared: Prepared
    download_s: float
    load_s: float


class _Under(NamedTuple):
    """The one activation that is under way."""

    digest: str
    filling: Filling
    loaded: _Loaded
    began_at: float


class Activations:
    """Lives as long as its engine. One adapter at a time: the next step may already use the last one.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        banks: Banks,
        linears: dict[str, LinearSpec],
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._banks = banks
        self._linears = linears
        self._clock = clock
        self._loaded: dict[str, _Loaded] = {}
        self._under: _Under | None = None

    def __contains__(self, digest: str) -> bool:
        """Whether its file is at hand, so that nobody needs to fetch it."""
        return digest in self._loaded or (self._under is not None and self._under.digest == digest)

    def take(self, digest: str, path: Path, download_s: float, load_s: float) -> None:
        """Maps a prepared file.

        Raises:
            FileNotFoundError: it was removed since it was offered.
            AdapterLoadFailed: it can't be read, or is not for this base.
        """
        self._loaded[digest] = _Loaded(map_prepared(path, self._linears), download_s, load_s)

    def drop(self, digest: str) -> bool:
        """Forgets a mapped file; False while it is being copied."""
        self._loaded.pop(digest, None)
        return self._under is None or self._under.digest != digest

    def advance(self, max_bytes: int | None, trial: TrialOf = nullcontext) -> None:
        """Copies on, into one slot after another.

        Args:
            max_bytes: None: until one adapter is in its slot, however large; nobody's pace suffers.
            trial: entered while an adapter is copied for a suspect.
        """
        left = max_bytes
        while (under := self._next()) is not None:
            step = under.loaded.prepared.num_bytes if left is None else left
            before = under.filling.num_bytes_left
            with trial_of(self._suspect_for(under.digest), trial):
                is_done = under.filling.copy(step)
            if not is_done:
                return
            self._done(under)
            if left is None or (left := left - before) <= 0:
                return

    def forget_unwanted(self) -> None:
        """Lets go of files whose sequences were cancelled before they had a slot."""
        if self._loaded:
            wanted = {sequence.digest for sequence in self._scheduler.waiting}
            for digest in self._loaded.keys() - wanted:
                del self._loaded[digest]

    def _next(self) -> _Under | None:
        if self._under is None:
            activation = self._scheduler.next_activation(self._loaded.keys())
            if activation is not None:
                loaded = self._loaded.pop(activation.digest)
                self._clear(activation)
                filling = self._banks.filling(activation.slot, loaded.prepared)
                self._under = _Under(activation.digest, filling, loaded, self._clock())
        return self._under

    def _suspect_for(self, digest: str) -> Sequence | None:
        """The oldest that waits for it: who reads a mapped file that was cut short is ended by the kernel."""
        return next((s for s in self._scheduler.waiting if s.suspect and s.digest == digest), None)

    def _clear(self, activation: Activation) -> None:
        """What the filling won't overwrite: of an evicted adapter nothing stays on the device."""
        kept = activation.slot.pages
        for slot in activation.evicted.values():
            if slot.pages.start < kept.start or slot.pages.stop > kept.stop:
                self._banks.clear(slot)

    def _done(self, under: _Under) -> None:
        self._under = None
        activate_s = self._clock() - under.began_at
        for sequence in self._scheduler.waiting:
            if sequence.digest == under.digest:
                sequence.download_s, sequence.load_s = under.loaded.download_s, under.loaded.load_s
                sequence.activate_s = activate_s
        self._scheduler.activated(under.digest)
