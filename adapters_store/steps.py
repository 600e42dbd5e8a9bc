"""Named steps of what changes the store, at which a process can be made to die: a seam for tests of crashes.

``TUNEFLEET_CRASH_AT=upload:weights-put`` ends the process by SIGKILL, as a crash would, when it gets to that
step for the first time; ``upload:weights-put#3`` for the third. Without it a step costs a comparison.
"""

from __future__ import annotations

import itertools
import os
import signal

from tunefleet.config import setting
from tunefleet.errors import InvalidState

STEPS = (
    "catalog:committing",  # all of a transaction is written, nothing is committed; once per transaction
    "file:written",  # an object's file is whole and has no name yet; once per object in a folder
    "upload:intent",  # noted in the catalog, no object yet
    "upload:config-put",
    "upload:weights-put",
    "upload:verified",  # the stored copy was read back; presigned uploads only
    "upload:committed",  # it exists
    "discard:intent-ended",  # an upload that failed or lost: nothing may commit it any more
    "discard:object-gone",  # once per object
    "begin:noted",  # a presigned upload is in the catalog, its URLs were not given yet
    "stage:put",  # a file of it came through this server
    "complete:fetched",  # a private copy of the staged files is here
    "complete:committed",
    "complete:object-gone",  # once per staged file
    "complete:ended",
    "promote:committed",
    "rollback:committed",
    "canary:committed",
    "pin:committed",
    "delete:marked",  # out of the catalog; objects and copies are still there
    "delete:object-gone",  # once per object
    "delete:noted",  # once per upload: all its objects are gone and the receipt says so
    "delete:told",  # this machine's copies are gone and the receipt says so
    "delete:finished",
    "collect:expired",  # once per upload that nobody may commit any more
    "collect:object-gone",  # once per object
)

_NAMES = frozenset(STEPS)


class CrashPoint:
    """Ends the process at a step.

    Args:
        at: ``name`` or ``name#n``; None: never.

    Raises:
        InvalidState: there is no such step.
    """

    def __init__(self, at: str | None) -> None:
        name, _, nth = (at or "").partition("#")
        self._name = _known(name) if at else None
        self._nth = int(nth or 1)
        self._times = itertools.count(1)  # safe to advance from several threads

    def reached(self, name: str) -> None:
        if _known(name) == self._name and next(self._times) == self._nth:
            os.kill(os.getpid(), signal.SIGKILL)


def reached(name: str) -> None:
    """Says that a step is done; most often nothing happens.

    Raises:
        InvalidState: there is no such step.
    """
    _FROM_ENVIRONMENT.reached(name)


def _known(name: str) -> str:
    if name not in _NAMES:
        raise InvalidState(f"{name!r} is no step: add it to adapters_store/steps.py, or name one of STEPS")
    return name


_FROM_ENVIRONMENT = CrashPoint(setting("crash_at"))
