"""Uploads that have begun: a row exists before the first object is written, and goes with the commit.

So objects that no row refers to are garbage. Whoever removes an expired upload's objects ends the upload
first: then its commit fails, and can't refer to what is being removed.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, select

from tunefleet.adapters_store.records import AdapterName, UploadRecord
from tunefleet.adapters_store.schema import uploads
from tunefleet.adapters_store.times import normalized
from tunefleet.errors import AdapterConflict, AdapterNotFound


def begin(connection: Connection, adapter: AdapterName, upload: UploadRecord) -> None:
    fields = {
        "upload_id": upload.upload_id,
        "object_key": upload.object_key,
        "kind": upload.kind,
        "promote": upload.promote,
        "metadata": upload.metadata,
        "created_at": normalized(upload.created_at),
        "expires_at": normalized(upload.expires_at),
    }
    connection.execute(uploads.insert().values(**adapter._asdict(), **fields))


def extend(connection: Connection, upload_id: str, expires_at: str, *, now: str) -> bool:
    """False: it is gone, or over already."""
    query = uploads.update().where(_is_running(upload_id, now)).values(expires_at=normalized(expires_at))
    return connection.execute(query).rowcount == 1


def find(connection: Connection, adapter: AdapterName, upload_id: str, *, now: str) -> UploadRecord:
    query = select(uploads).where(_is_running(upload_id, now), *_is_of(adapter))
    row = connection.execute(query).one_or_none()
    if row is None:
        raise AdapterNotFound(
            f"there is no upload {upload_id!r} of {adapter.user_id!r}, or it has expired: begin a new one",
            code="upload_not_found",
            param="upload_id",
        )
    return _record(row)


def end(connection: Connection, upload_id: str) -> None:
    connection.execute(uploads.delete().where(uploads.c.upload_id == upload_id))


def commit(connection: Connection, adapter: AdapterName, upload_id: str, *, now: str) -> None:
    """Takes the row away, in the transaction that adds its version.

    Raises:
        AdapterConflict: it is gone or over, and so may its objects be.
    """
    query = uploads.delete().where(_is_running(upload_id, now), *_is_of(adapter))
    if connection.execute(query).rowcount != 1:
        raise AdapterConflict(
            f"upload {upload_id!r} has expired, or its user was deleted: upload again",
            code="upload_expired",
            param="upload_id",
        )


def expired(connection: Connection, *, limit: int, now: str) -> list[UploadRecord]:
    query = select(uploads).where(uploads.c.expires_at <= now).order_by(uploads.c.expires_at).limit(limit)
    return [_record(row) for row in connection.execute(query)]


def take(connection: Connection, tenant: str, user_id: str) -> list[str]:
    """Ends all uploads of a user; their prefixes of object keys."""
    own = (uploads.c.tenant == tenant) & (uploads.c.user_id == user_id)
    return list(connection.execute(uploads.delete().where(own).returning(uploads.c.object_key)).scalars())


def _is_running(upload_id: str, now: str) -> ColumnElement[bool]:
    return (uploads.c.upload_id == upload_id) & (uploads.c.expires_at > now)


def _is_of(adapter: AdapterName) -> list[ColumnElement[bool]]:
    return [uploads.c[column] == value for column, value in adapter._asdict().items()]


def _record(row: Row[Any]) -> UploadRecord:
    return UploadRecord(
        upload_id=row.upload_id,
        object_key=row.object_key,
        kind=row.kind,
        promote=row.promote,
        metadata=row.metadata,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )
