"""A canary: a version that answers a share of an adapter's sessions beside the live one."""

from __future__ import annotations

from sqlalchemy import Connection

from tunefleet.adapters_store import adapter_names, adapter_rows, version_rows
from tunefleet.adapters_store.records import AdapterName
from tunefleet.errors import AdapterConflict, RequestInvalid


def put(connection: Connection, adapter: AdapterName, version: int, percent: float) -> None:
    if isinstance(percent, bool) or not 0 < percent <= 100:  # also NaN
        raise RequestInvalid(
            "percent must be above 0 and at most 100", code="invalid_percent", param="percent"
        )
    row = adapter_rows.lock(connection, adapter)
    if version_rows.find(connection, row.adapter_id, version) is None:
        raise adapter_names.no_version(adapter, version)
    if row.live_version == version:
        raise AdapterConflict(
            f"version {version} of {adapter.user_id!r} is live already: it answers all sessions",
            code="version_is_live",
            param="version",
        )
    adapter_rows.change(connection, row.adapter_id, canary_version=version, canary_percent=float(percent))


def clear(connection: Connection, adapter: AdapterName) -> None:
    row = adapter_rows.lock(connection, adapter)
    adapter_rows.change(connection, row.adapter_id, canary_version=None, canary_percent=None)
