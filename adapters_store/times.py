"""Times as the catalog keeps them: RFC 3339 in UTC with microseconds, which sorts as text."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


def timestamp(at: datetime, after: timedelta = timedelta()) -> str:
    """``at`` plus ``after``, e.g. ``2026-11-24T12:00:00.000005Z``."""
    return (at + after).astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def normalized(text: str) -> str:
    """Any RFC 3339 time as the catalog keeps it; ValueError for what is none, or says no time zone."""
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"{text!r} says no time zone")
    return timestamp(at)
