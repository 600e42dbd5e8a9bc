"""An adapter's name in SQL and in words."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Row

from tunefleet.adapters_store.records import AdapterName
from tunefleet.adapters_store.schema import adapters
from tunefleet.errors import AdapterNotFound


def is_named(adapter: AdapterName) -> ColumnElement[bool]:
    return (
        (adapters.c.tenant == adapter.tenant)
        & (adapters.c.user_id == adapter.user_id)
        & (adapters.c.name == adapter.name)
        & (adapters.c.base == adapter.base)
    )


def no_version(adapter: AdapterName, version: int, fallback: str | None = None) -> AdapterNotFound:
    problem = f"{_whose(adapter)} has no version {version} for base {adapter.base}"
    return AdapterNotFound(problem, param="user_id", fallback=fallback)


def not_found(
    adapter: AdapterName, row: Row[Any] | None = None, fallback: str | None = None
) -> AdapterNotFound:
    """``row``: the adapter's, if there is one."""
    whose = _whose(adapter)
    if row is not None and row.last_version:
        problem = f"{whose} has uploads but none is live: promote one with `tunefleet adapters promote`"
    else:
        problem = (
            f"{whose} has no adapter for base {adapter.base}: upload one with "
            f"`tunefleet adapters push {adapter.user_id} DIR` or PUT /v1/users/{adapter.user_id}/adapter"
        )
    return AdapterNotFound(problem, param="user_id", fallback=fallback)


def _whose(adapter: AdapterName) -> str:
    named = f" (adapter {adapter.name!r})" if adapter.name != "default" else ""
    return f"user {adapter.user_id!r}{named}"
