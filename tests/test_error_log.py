"""Of a machine's errors, the latest are at hand."""

from __future__ import annotations

import logging

import pytest

from tunefleet.core import LoggedError
from tunefleet.runtime.error_log import MAX_ERRORS, ErrorLog


def test_errors_have_their_time_and_are_in_the_log_too(caplog: pytest.LogCaptureFixture) -> None:
    times = iter((5.0, 6.0))
    errors = ErrorLog(lambda: next(times))
    assert errors.last == ""
    with caplog.at_level(logging.ERROR, "tunefleet.host"):
        errors.note("one")
        errors.note("two")
    assert list(errors) == [LoggedError(at=5.0, message="one"), LoggedError(at=6.0, message="two")]
    assert errors.last == "two"
    assert caplog.messages == ["one", "two"]


def test_old_ones_are_forgotten() -> None:
    errors = ErrorLog()
    for number in range(MAX_ERRORS + 3):
        errors.note(f"error {number}")
    assert [error.message for error in errors] == [f"error {number}" for number in range(3, MAX_ERRORS + 3)]
