"""No method of the catalog scans a table: each statement that it sends goes by an index."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, event, text

from catalog_kit import ALICE, BASE, begun, push, upload
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.repeats import upload_key
from tunefleet.core import Pin

BOB = ALICE._replace(user_id="bob")


class Sent(NamedTuple):
    method: str
    statement: str
    parameters: object


class Recorder:
    """Every statement that the catalog sends, with the method that sent it."""

    def __init__(self, catalog: Catalog) -> None:
        self.sent: list[Sent] = []
        self.methods: set[str] = set()
        self._catalog = catalog
        self._method = ""
        event.listen(catalog._database.engine, "before_cursor_execute", self._record)

    def call(self, method: str, *arguments: object, **keywords: object) -> object:
        self._method = method
        self.methods.add(method)
        return getattr(self._catalog, method)(*arguments, **keywords)

    def _record(self, _c: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE", "WITH")):
            self.sent.append(Sent(self._method, statement, parameters))


def use_everything(catalog: Catalog) -> Recorder:
    for number in range(1, 4):
        push(catalog, ALICE, number)
        push(catalog, BOB, number)
    recorder = Recorder(catalog)
    call, key = recorder.call, upload_key("k", "1")
    call("timestamp")
    call("begin_upload", ALICE, begun(catalog, "u1"))
    call("extend_upload", "u1", catalog.timestamp(90))
    call("upload", ALICE, "u1")
    call("expired_uploads", 10)
    call("add_version", ALICE, upload(4), promote=True, key=key, upload_id="u1")
    call("add_version", ALICE, upload(4), promote=True, key=key, upload_id="u1")
    call("end_upload", "u1")
    call("answered", ALICE, upload(4).digest, key)
    call("answered", ALICE, upload(4).digest)
    call("live", ALICE)
    call("live", ALICE, session="s")
    call("numbered", ALICE, 2)
    call("version", ALICE, 2)
    call("versions", ALICE, after=None, limit=2)
    call("versions", ALICE, after=3, limit=2)
    call("known_digests", [upload(1).digest, "x"])
    call("referenced", ["default/1", "x"])
    call("promote", ALICE, 1)
    call("rollback", ALICE)
    call("rollback", ALICE, to=2)
    call("set_canary", ALICE, 1, 10)
    call("set_pin", ALICE, Pin("host"))
    call("pinned", BASE)
    call("adapter", ALICE)
    call("clear_canary", ALICE)
    call("clear_pin", ALICE)
    call("users", "default", after=None, limit=2)
    call("users", "default", after="alice", limit=2)
    call("user", "default", "alice")
    call("update_user", "default", "alice", fallback="base")
    call("beat", "r1", 10)
    call("beat", "r1", 10)
    call("claim", "collector", "r1", 10)
    call("claim", "collector", "r1", 10)
    call("delete_version", ALICE, 1)
    deletion_id = catalog.delete_user("default", "bob").deletion_id
    call("delete_user", "default", "alice")
    call("pending_deletions", 10)
    call("unacked", "r1", 10)
    call("claim_deletion", deletion_id, "r1", 10)
    call("note_objects", deletion_id, "default/1", 2, [])
    call("ack_deletion", deletion_id, "r1", {}, [])
    for prefix in catalog.deletion("default", deletion_id).prefixes:
        catalog.note_objects(deletion_id, prefix, 1, [])
    call("finish_deletion", deletion_id)
    call("deletion", "default", deletion_id)
    call("leave", "r1")
    return recorder


def public_methods() -> set[str]:
    return {name for name in vars(Catalog) if not name.startswith("_")} - {"close"}


def test_every_method_is_looked_at_and_sends_no_scan(catalog: Catalog) -> None:
    recorder = use_everything(catalog)
    assert recorder.methods == public_methods()
    with explaining(catalog) as connection:
        scans = [(sent, plan) for sent in recorder.sent if is_scan(plan := plan_of(connection, sent))]
    assert scans == []


def test_what_a_request_asks_is_one_statement(catalog: Catalog) -> None:
    recorder = use_everything(catalog)
    for method in ("live", "numbered", "version", "versions", "user", "users", "upload", "pinned"):
        calls = {"live": 2, "versions": 2, "users": 2}.get(method, 1)
        assert len([sent for sent in recorder.sent if sent.method == method]) == calls, method


def test_a_lookup_searches_unique_indexes_only(tmp_path: Path) -> None:
    catalog = Catalog(f"sqlite:///{tmp_path}/catalog.db")
    push(catalog, ALICE, 1)
    recorder = Recorder(catalog)
    recorder.call("live", ALICE)
    recorder.call("live", ALICE, session="s")
    with explaining(catalog) as connection:
        plans = [plan_of(connection, sent) for sent in recorder.sent]
    catalog.close()
    assert [len(plan) for plan in plans] == [3, 4]
    for step in (step for plan in plans for step in plan):
        assert re.match(r"SEARCH \w+ USING INDEX sqlite_autoindex_\w+", step), step


@contextmanager
def explaining(catalog: Catalog) -> Iterator[Connection]:
    """A connection whose planner scans only where it has to."""
    with catalog._database.engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL enable_seqscan = off"))
        yield connection


def plan_of(connection: Connection, sent: Sent) -> list[str]:
    explain = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
    rows = connection.exec_driver_sql(f"{explain} {sent.statement}", sent.parameters).all()  # type: ignore[arg-type]
    return [str(row[-1]) for row in rows]


def is_scan(plan: list[str]) -> bool:
    """SQLite says SCAN, Postgres Seq Scan; SQLite sorts a page in a B-tree where no index has its order.

    The index of pending deletions holds nothing else, so that it is read from its start is right.
    """
    steps = [step for step in plan if step != "SCAN deletions USING INDEX ix_deletions_pending"]
    return any(re.search(r"SCAN (?!CONSTANT)|Seq Scan|TEMP B-TREE", step) for step in steps)
