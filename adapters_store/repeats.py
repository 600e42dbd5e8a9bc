"""Uploads sent twice under one ``Idempotency-Key``: the first answer, kept in the catalog for a day."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import timedelta
from typing import NamedTuple

from sqlalchemy import Connection, delete, insert, select

from tunefleet.adapters_store.schema import upload_keys
from tunefleet.errors import AdapterConflict, RequestInvalid

KEEP = timedelta(hours=24)
_KEY = re.compile(r"[!-~]{1,255}")


class UploadKey(NamedTuple):
    """A client's key for one adapter of one user, and what it was sent with."""

    key: str
    request_sha256: str


class FirstAnswer(NamedTuple):
    version: int
    was_new: bool
    was_live: bool


def check_idempotency_key(key: str) -> str:
    """Returns ``key`` unchanged, or raises RequestInvalid (code ``invalid_idempotency_key``)."""
    if _KEY.fullmatch(key):
        return key
    raise RequestInvalid(
        "Idempotency-Key must be 1 to 255 printable ASCII characters without spaces",
        code="invalid_idempotency_key",
        param="Idempotency-Key",
    )


def upload_key(key: str, *request: object) -> UploadKey:
    """``request``: all that makes another upload of it, as JSON values."""
    return UploadKey(key, hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest())


def first_answer(connection: Connection, adapter_id: int, key: UploadKey, since: str) -> FirstAnswer | None:
    """What the key's first upload after ``since`` was answered.

    Raises:
        AdapterConflict: that was another upload (code ``idempotency_key_reused``).
    """
    query = select(upload_keys).where(
        upload_keys.c.adapter_id == adapter_id, upload_keys.c.key == key.key, upload_keys.c.created_at > since
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    if row.request_sha256 != key.request_sha256:
        raise AdapterConflict(
            f"this Idempotency-Key came with another upload before, which is version {row.version}: "
            "use a new key for other bytes, metadata or promote",
            code="idempotency_key_reused",
            param="Idempotency-Key",
        )
    return FirstAnswer(row.version, row.was_new, row.was_live)


def remember(
    connection: Connection, adapter_id: int, key: UploadKey, answer: FirstAnswer, *, now: str, since: str
) -> None:
    """Notes an answer, and forgets all that are older than ``since``."""
    connection.execute(delete(upload_keys).where(upload_keys.c.created_at <= since))
    connection.execute(
        insert(upload_keys).values(adapter_id=adapter_id, created_at=now, **key._asdict(), **answer._asdict())
    )
