"""What is live, and what was: a stack per adapter. Promote pushes; rollback pops, and marks what it took."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, select

from tunefleet.adapters_store import adapter_names, adapter_rows, version_rows
from tunefleet.adapters_store.records import AdapterName, VersionRecord
from tunefleet.adapters_store.schema import live_history
from tunefleet.errors import AdapterConflict


def promote(
    connection: Connection, adapter: AdapterName, version: int, *, if_live: int | None, now: str
) -> VersionRecord:
    """Makes a version live; nothing happens where it is."""
    row = adapter_rows.lock(connection, adapter)
    found = version_rows.find(connection, row.adapter_id, version)
    if found is None:
        raise adapter_names.no_version(adapter, version)
    adapter_rows.check_live(adapter, row.live_version, if_live)
    if row.live_version != version:
        push(connection, row, version, now=now)
    return version_rows.record(found, version)


def rollback(
    connection: Connection, adapter: AdapterName, to: int | None, *, if_live: int | None, now: str
) -> VersionRecord:
    """Makes live what was live before, or the version ``to``, which must have been live once."""
    row = adapter_rows.lock(connection, adapter)
    adapter_rows.check_live(adapter, row.live_version, if_live)
    version = to if to is not None else _version_before(connection, adapter, row)
    found = version_rows.find(connection, row.adapter_id, version)
    if found is None:
        raise adapter_names.no_version(adapter, version)
    if version != row.live_version:
        _go_back(connection, adapter, row, version, now=now)
    return version_rows.record(found, version)


def push(connection: Connection, row: Row[Any], version: int, *, now: str) -> None:
    """``row``: the adapter's, locked."""
    _set_live(connection, row, version)
    connection.execute(
        live_history.insert().values(adapter_id=row.adapter_id, version=version, created_at=now)
    )


def forget(connection: Connection, adapter_id: int, version: int | None = None) -> None:
    """Takes a version, or all of an adapter, out of its history."""
    gone = live_history.c.adapter_id == adapter_id
    if version is not None:
        gone &= live_history.c.version == version
    connection.execute(live_history.delete().where(gone))


def _version_before(connection: Connection, adapter: AdapterName, row: Row[Any]) -> int:
    entry = _latest(connection, row.adapter_id, (live_history.c.version != row.live_version) & _STANDS)
    if entry is None:
        raise AdapterConflict(
            f"nothing of {adapter.user_id!r} was live before: promote a version instead",
            code="no_earlier_version",
        )
    return int(entry.version)


def _go_back(connection: Connection, adapter: AdapterName, row: Row[Any], version: int, *, now: str) -> None:
    """Down the stack; a version that was taken from it comes on top again."""
    its = live_history.c.version == version
    entry = _latest(connection, row.adapter_id, its & _STANDS)
    if entry is not None:
        _pop(connection, row, entry, now=now)
    elif _latest(connection, row.adapter_id, its) is not None:
        push(connection, row, version, now=now)
    else:
        raise AdapterConflict(
            f"version {version} of {adapter.user_id!r} was never live: promote it instead",
            code="never_live",
            param="to",
        )


def _pop(connection: Connection, row: Row[Any], entry: Row[Any], *, now: str) -> None:
    """Makes an entry the top of the stack."""
    above = (
        (live_history.c.adapter_id == row.adapter_id) & (live_history.c.entry_id > entry.entry_id) & _STANDS
    )
    connection.execute(live_history.update().where(above).values(undone_at=now))
    _set_live(connection, row, entry.version)


def _set_live(connection: Connection, row: Row[Any], version: int) -> None:
    """A canary that becomes live is one no more."""
    values: dict[str, object] = {"live_version": version}
    if row.canary_version == version:
        values |= {"canary_version": None, "canary_percent": None}
    adapter_rows.change(connection, row.adapter_id, **values)


def _latest(connection: Connection, adapter_id: int, which: ColumnElement[bool]) -> Row[Any] | None:
    query = (
        select(live_history)
        .where(live_history.c.adapter_id == adapter_id, which)
        .order_by(live_history.c.entry_id.desc())
        .limit(1)
    )
    return connection.execute(query).one_or_none()


_STANDS = live_history.c.undone_at.is_(None)
