"""The commit of an upload: what makes a version exist, once, however often it is sent."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import Connection, Row

from tunefleet.adapters_store import adapter_rows, live_history, repeats, upload_intents, version_rows
from tunefleet.adapters_store.records import AdapterName, Added, NewVersion, VersionRecord
from tunefleet.adapters_store.repeats import FirstAnswer, UploadKey
from tunefleet.adapters_store.schema import versions


class Upload(msgspec.Struct, frozen=True):
    """What is to be committed.

    Attributes:
        key: the client's idempotency key.
        upload_id: the begun upload that ends with the commit.
    """

    adapter: AdapterName
    new: NewVersion
    promote: bool
    key: UploadKey | None
    upload_id: str | None


def commit(connection: Connection, upload: Upload, *, now: str, since: str) -> Added:
    """``since``: answers to older keys are forgotten."""
    row = adapter_rows.make(connection, upload.adapter, now=now)
    if upload.key is not None:
        again = _answered(connection, upload.adapter, row, upload.key, since=since)
        if again is not None:
            if upload.upload_id is not None:
                upload_intents.end(connection, upload.upload_id)
            return again
    if upload.upload_id is not None:
        upload_intents.commit(connection, upload.adapter, upload.upload_id, now=now)
    added = _unchanged(connection, row, upload.new.digest) or _add(connection, row, upload, now=now)
    if upload.key is not None:
        answer = FirstAnswer(added.record.version, added.created, added.record.live)
        repeats.remember(connection, row.adapter_id, upload.key, answer, now=now, since=since)
    return added


def answered(
    connection: Connection, adapter: AdapterName, digest: str, key: UploadKey | None, *, since: str
) -> Added | None:
    """What the upload would be answered, where it would change nothing."""
    row = adapter_rows.find(connection, adapter)
    if row is None:
        return None
    if key is not None:
        return _answered(connection, adapter, row, key, since=since)
    return _unchanged(connection, row, digest)


def _answered(
    connection: Connection, adapter: AdapterName, row: Row[Any], key: UploadKey, *, since: str
) -> Added | None:
    """What the first upload with this key was answered, word for word."""
    answer = repeats.first_answer(connection, row.adapter_id, key, since)
    if answer is None:
        return None
    record = version_rows.named(connection, adapter, answer.version)
    return Added(msgspec.structs.replace(record, live=answer.was_live), answer.was_new)


def _unchanged(connection: Connection, row: Row[Any], digest: str) -> Added | None:
    newest = version_rows.newest(connection, row.adapter_id)
    if newest is None or newest.digest != digest:
        return None
    return Added(version_rows.record(newest, row.live_version), created=False)


def _add(connection: Connection, row: Row[Any], upload: Upload, *, now: str) -> Added:
    number = row.last_version + 1
    fields = msgspec.structs.asdict(upload.new)
    connection.execute(
        versions.insert().values(adapter_id=row.adapter_id, version=number, created_at=now, **fields)
    )
    adapter_rows.change(connection, row.adapter_id, last_version=number)
    if upload.promote:
        live_history.push(connection, row, number, now=now)
    record = VersionRecord(version=number, live=upload.promote, created_at=now, **fields)
    return Added(record, created=True)
