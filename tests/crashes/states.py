"""What a catalog says, without what differs between two runs: times, ids, places of objects."""

from __future__ import annotations

from typing import Any

from catalog_kit import rows
from tunefleet.adapters_store import schema
from tunefleet.adapters_store.catalog import Catalog

State = dict[str, list[list[Any]]]
Row = dict[str, Any]

_DECIDED = ("users", "adapters", "versions", "live_history", "upload_keys")
_UNEQUAL = {"adapter_id", "entry_id", "created_at", "object_key", "request_sha256"}


def state(catalog: Catalog) -> State:
    """Users, adapters, versions, what was live when, answered uploads, what was deleted.

    The same for the same operations; none of what goes on behind them is in it.
    """
    adapters = {row["adapter_id"]: row for row in table(catalog, "adapters")}
    decided = {name: [_equal(row, adapters) for row in table(catalog, name)] for name in _DECIDED}
    deleted = [[row["tenant"], row["name"], row["version"]] for row in table(catalog, "deletions")]
    return {**decided, "deletions": sorted(deleted, key=str)}


def table(catalog: Catalog, name: str) -> list[Row]:
    columns = [f"{column.name}" for column in schema.metadata.tables[name].columns]
    return [dict(zip(columns, row, strict=True)) for row in rows(catalog, name)]


def _equal(row: Row, adapters: dict[int, Row]) -> list[Any]:
    whose = adapters.get(row.get("adapter_id", 0), {})
    equal = {"of": [whose.get(column) for column in ("tenant", "user_id", "name")], **row}
    if "undone_at" in row:
        equal["undone_at"] = row["undone_at"] is not None
    if row.get("key", "").startswith("upload "):
        equal["key"] = "upload"
    return [[key, value] for key, value in equal.items() if key not in _UNEQUAL]
