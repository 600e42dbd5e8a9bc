from __future__ import annotations

import pytest

from tiers_kit import Clock
from tunefleet.adapters_store.failures import CORRUPT_S, LOST_S, RETRY_AFTER_S, Failures, load_failed
from tunefleet.core import AdapterRef
from tunefleet.errors import AdapterLoadFailed


def ref(digest: str = "d", key: str = "mine") -> AdapterRef:
    return AdapterRef(digest, "t", key, "", 1, 1)


@pytest.mark.parametrize(
    ("code", "lasts_s"),
    [("adapter_unavailable", RETRY_AFTER_S), ("adapter_lost", LOST_S), ("adapter_corrupt", CORRUPT_S)],
)
def test_a_failure_is_remembered_as_long_as_it_is_likely_to_last(code: str, lasts_s: float) -> None:
    clock = Clock()
    failures = Failures(clock)
    failures.note(ref(), load_failed("no", code))
    for passed_s in (0.0, lasts_s / 2):
        clock.now_s = passed_s
        with pytest.raises(AdapterLoadFailed) as caught:
            failures.raise_recent(ref())
        assert (code, lasts_s - passed_s) == (caught.value.code, caught.value.retry_after_s)
    clock.now_s = lasts_s
    failures.raise_recent(ref())


def test_what_fails_for_good_has_no_time_to_ask_again() -> None:
    failures = Failures(Clock())
    failures.note(ref(), load_failed("never", "adapter_too_large", for_good=True))
    with pytest.raises(AdapterLoadFailed) as caught:
        failures.raise_recent(ref())
    assert caught.value.retry_after_s is None


def test_other_objects_of_the_same_adapter_may_be_sound() -> None:
    failures = Failures(Clock())
    failures.note(ref(), load_failed("no", "adapter_lost"))
    failures.raise_recent(ref(key="theirs"))
    failures.raise_recent(ref(digest="other"))


def test_what_is_over_is_not_kept() -> None:
    clock = Clock()
    failures = Failures(clock)
    for number in range(100):
        clock.now_s += RETRY_AFTER_S
        failures.note(ref(key=str(number)), load_failed("no", "adapter_unavailable"))
    assert len(failures._failures) == 1
