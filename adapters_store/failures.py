"""What could not be fetched, remembered for a while: a crowd asks the store once."""

from __future__ import annotations

from collections.abc import Callable

from tunefleet.core import AdapterRef
from tunefleet.errors import AdapterLoadFailed

RETRY_AFTER_S = 1.0
CORRUPT_S = 60.0  # wrong bytes stay wrong; only an operator or another upload changes that
LOST_S = 10.0  # an object that isn't there, though the catalog says so

_REMEMBERED_S = {"adapter_corrupt": CORRUPT_S, "adapter_lost": LOST_S}


def load_failed(message: str, code: str, *, for_good: bool = False) -> AdapterLoadFailed:
    """An adapter that can't be had now, or ``for_good``, when there is no use in asking again."""
    retry_after_s = None if for_good else _REMEMBERED_S.get(code, RETRY_AFTER_S)
    return AdapterLoadFailed(message, code=code, param="adapter", retry_after_s=retry_after_s)


class Failures:
    """Failures by adapter and objects: another user's objects of the same adapter may be sound.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: dict[tuple[str, str], tuple[float, AdapterLoadFailed]] = {}

    def note(self, ref: AdapterRef, error: AdapterLoadFailed) -> None:
        now = self._clock()
        self._failures = {key: found for key, found in self._failures.items() if found[0] > now}
        until = now + _REMEMBERED_S.get(error.code, RETRY_AFTER_S)
        self._failures[ref.digest, ref.key] = (until, error)

    def raise_recent(self, ref: AdapterRef) -> None:
        """Raises what was noted of these objects, with the time that is left."""
        until, error = self._failures.get((ref.digest, ref.key), (0.0, None))
        left = until - self._clock()
        if error is not None and left > 0:
            raise AdapterLoadFailed(
                error.message,
                code=error.code,
                param=error.param,
                retry_after_s=None if error.retry_after_s is None else left,
            ) from error
