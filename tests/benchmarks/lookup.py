"""The question of every request: whose adapter is it? Median and p99 by number of users, on SQLite."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import insert
from tests.benchmarks.bench import Bench
from tests.benchmarks.figures import Figure, at_most, figure

from tunefleet.adapters_store import schema
from tunefleet.adapters_store.catalog import AdapterName, Catalog
from tunefleet.adapters_store.database import Database

NUM_LOOKUPS = 3000
MOST_USERS = 100_000
MAX_ROUNDS = 3
BASE = "bench@000000000000"
_AT = "2026-01-01T00:00:00.000000Z"


class Lookup(NamedTuple):
    """Seconds of one lookup."""

    p50: float
    p99: float


def measure(bench: Bench) -> Iterator[Figure]:
    counts = (100,) if bench.quick else (1_000, 10_000, MOST_USERS)
    for num_users in counts:
        found = _lookups(num_users, min(bench.repeats, MAX_ROUNDS))
        bar = at_most(0.3) if num_users == MOST_USERS else None
        name = f"lookup among {num_users:,} users"
        yield figure(f"{name}: p50", "ms", (1000 * lookup.p50 for lookup in found), bar=bar)
        yield figure(f"{name}: p99", "ms", (1000 * lookup.p99 for lookup in found))


def _lookups(num_users: int, rounds: int) -> list[Lookup]:
    """Random users of a catalog that holds one version each."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'catalog.db'}"
        fill(url, num_users)
        catalog = Catalog(url)
        try:
            return [_timed(catalog, num_users) for _ in range(rounds)]
        finally:
            catalog.close()


def fill(database_url: str, num_users: int) -> None:
    """Rows as uploads would leave them, in one transaction."""
    database = Database(database_url)
    try:
        with database.engine.connect() as connection:
            connection.execute(insert(schema.tenants), {"tenant": "default", "created_at": _AT})
            connection.execute(insert(schema.users), [_user(n) for n in range(num_users)])
            connection.execute(insert(schema.adapters), [_adapter(n) for n in range(num_users)])
            connection.execute(insert(schema.versions), [_version(n) for n in range(num_users)])
            connection.commit()
    finally:
        database.close()


def _timed(catalog: Catalog, num_users: int) -> Lookup:
    generator = random.Random(0)
    seconds = []
    for _ in range(NUM_LOOKUPS):
        user = AdapterName("default", _user_id(generator.randrange(num_users)), "default", BASE)
        started = time.perf_counter()
        catalog.live(user, session="a session")
        seconds.append(time.perf_counter() - started)
    return Lookup(statistics.median(seconds), statistics.quantiles(seconds, n=100)[98])


def _user_id(number: int) -> str:
    return f"user-{number * 2654435761 % 2**32:010d}"  # in no order that the tables are filled in


def _user(number: int) -> dict[str, object]:
    return {
        "tenant": "default",
        "user_id": _user_id(number),
        "fallback": None,
        "limits": {},
        "metadata": {},
        "created_at": _AT,
    }


def _adapter(number: int) -> dict[str, object]:
    return {
        "adapter_id": number + 1,
        "tenant": "default",
        "user_id": _user_id(number),
        "name": "default",
        "base": BASE,
        "last_version": 1,
        "live_version": 1,
        "created_at": _AT,
    }


def _version(number: int) -> dict[str, object]:
    digest = f"{number:064x}"
    return {
        "adapter_id": number + 1,
        "version": 1,
        "digest": digest,
        "object_key": f"default/sha256/{digest[:2]}/{digest}/{number:032x}",
        "config_sha256": digest,
        "weights_sha256": digest,
        "size_bytes": 5_000_000,
        "rank": 8,
        "target_modules": ["q_proj", "v_proj"],
        "metadata": {},
        "warnings": [],
        "created_at": _AT,
    }
