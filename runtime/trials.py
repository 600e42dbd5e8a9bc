"""Whose turn a step is. Pure: no torch, no clock, no I/O.

A replica that dies in a shared step leaves all who were in it suspect, and they go on at another one. There
each is computed alone until it has a token, so that a second death has exactly one suspect; what it takes
from the others is every second step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

from tunefleet.runtime.sequence import Sequence

TrialOf = Callable[[str], AbstractContextManager[object]]
"""By request id: what is done inside is done for that suspect alone, and may end the process."""


class Trials:
    """Steps are a suspect's, the oldest's, or all others'; by turns where there are both."""

    def __init__(self) -> None:
        self._was_trial = False  # the step before

    def turn(self, running: Iterable[Sequence]) -> list[Sequence]:
        """Who may run in the next step."""
        suspects = [sequence for sequence in running if sequence.suspect]
        others = [sequence for sequence in running if not sequence.suspect]
        if not suspects or (others and self._was_trial):
            return others
        return [min(suspects, key=lambda sequence: sequence.arrival)]

    def begin(self, scheduled: Iterable[Sequence]) -> Sequence | None:
        """A step begins, and these run; who is on trial, if it is one."""
        suspect = next((sequence for sequence in scheduled if sequence.suspect), None)
        self._was_trial = suspect is not None
        return suspect


def trial_of(suspect: Sequence | None, trial: TrialOf) -> AbstractContextManager[object]:
    """To be entered for what is done for a suspect alone; nothing to enter where there is none."""
    return nullcontext() if suspect is None else trial(suspect.request_id)
