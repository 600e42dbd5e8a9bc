"""Receipts of deletions: a row, its items and the routers' words, added up."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, Table, select

from tunefleet.adapters_store.records import DeletionRecord
from tunefleet.adapters_store.schema import deletion_acks, deletion_items
from tunefleet.adapters_store.version_rows import MAX_PER_QUERY


def records(connection: Connection, query: Select[*tuple[Any, ...]]) -> list[DeletionRecord]:
    """``query``: rows of ``deletions``."""
    rows = connection.execute(query).all()
    ids = [row.deletion_id for row in rows]
    items = _by_deletion(connection, deletion_items, ids)
    acks = _by_deletion(connection, deletion_acks, ids)
    return [_record(row, items[row.deletion_id], acks[row.deletion_id]) for row in rows]


def _record(row: Row[Any], items: Sequence[Row[Any]], acks: Sequence[Row[Any]]) -> DeletionRecord:
    removed = Counter[str](row.removed)
    removed["objects"] = sum(item.num_objects or 0 for item in items)
    for ack in acks:
        removed.update(ack.copies)
    return DeletionRecord(
        deletion_id=row.deletion_id,
        tenant=row.tenant,
        user_id=row.user_id,
        name=row.name,
        version=row.version,
        status="pending" if row.finished_at is None else "done",
        digests=tuple(sorted({item.digest for item in items if item.digest is not None})),
        prefixes=tuple(item.prefix for item in items),
        unnoted=tuple(item.prefix for item in items if item.num_objects is None),
        removed=dict(removed),
        kept=tuple(_sentences([*items, *acks, row])),
        requested_at=row.requested_at,
        finished_at=row.finished_at,
    )


def _sentences(rows: Sequence[Row[Any]]) -> Iterator[str]:
    for row in rows:
        yield from row.kept


def _by_deletion(connection: Connection, table: Table, ids: Sequence[str]) -> dict[str, list[Row[Any]]]:
    found: dict[str, list[Row[Any]]] = defaultdict(list)
    for start in range(0, len(ids), MAX_PER_QUERY):
        chunk = ids[start : start + MAX_PER_QUERY]
        query = select(table).where(table.c.deletion_id.in_(chunk)).order_by(*table.primary_key)
        for row in connection.execute(query):
            found[row.deletion_id].append(row)
    return found
