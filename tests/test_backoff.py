"""When the next replica may be started."""

from __future__ import annotations

from tunefleet.runtime.backoff import DEATHS_WINDOW_S, DELAYS_S, MAX_DEATHS, Backoff


def test_starts_that_fail_in_a_row_wait_longer_and_longer_until_one_is_ready() -> None:
    backoff = Backoff()
    waits = []
    for number in range(len(DELAYS_S) + 2):
        backoff.start_failed(100.0 * number)
        waits.append(backoff.wait_s(100.0 * number))
    assert [*DELAYS_S, DELAYS_S[-1], DELAYS_S[-1]] == waits
    assert backoff.is_failing
    backoff.started()
    assert not backoff.is_failing
    backoff.start_failed(1e6)
    assert backoff.wait_s(1e6) == DELAYS_S[0]
    assert backoff.wait_s(1e6 + DELAYS_S[0]) == 0


def test_a_start_that_is_killed_counts_as_a_failure_from_the_second_on() -> None:
    backoff = Backoff()
    backoff.start_killed(0.0)
    assert (backoff.is_failing, backoff.wait_s(0.0)) == (False, 0.0)
    backoff.start_killed(1.0)
    assert (backoff.is_failing, backoff.wait_s(1.0)) == (True, DELAYS_S[0])
    backoff.started()
    backoff.start_killed(2.0)
    assert not backoff.is_failing


def test_replicas_that_die_are_replaced_at_once_but_only_so_many_in_a_while() -> None:
    backoff = Backoff()
    for number in range(MAX_DEATHS):
        assert backoff.wait_s(0.1 * number) == 0
        backoff.died(0.1 * number)
    assert backoff.wait_s(1.0) == DEATHS_WINDOW_S - 1.0
    assert not backoff.is_failing
    backoff.died(DEATHS_WINDOW_S)
    assert backoff.wait_s(DEATHS_WINDOW_S) > 0
    backoff.died(3 * DEATHS_WINDOW_S)
    assert backoff.wait_s(3 * DEATHS_WINDOW_S) == 0
