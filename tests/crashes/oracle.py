"""What must be there after a crash, and after the restart that follows."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import msgspec

from crashes.places import Place
from crashes.scenarios import ACME, ALICE
from crashes.states import Row, state, table
from tunefleet.adapters_store import schema
from tunefleet.adapters_store.catalog import AdapterName, Catalog
from tunefleet.adapters_store.objects import ObjectStore, open_store
from tunefleet.core import CONFIG_FILE, WEIGHTS_FILE


class Before(NamedTuple):
    """The world, to compare with."""

    acme: dict[str, list[Row]]
    acme_objects: dict[str, str]  # key -> sha256


def before(place: Place) -> Before:
    catalog, objects = place.catalog(), open_store(place.store_url)
    try:
        return Before(_rows_of_acme(catalog), _hashed(objects, f"{ACME}/"))
    finally:
        catalog.close()
        objects.close()


class Aftermath:
    """Looks at a place without changing it, but for ``rolls_back``. Close it."""

    def __init__(self, place: Place, offset_s: float) -> None:
        self._catalog = place.catalog(offset_s)
        self._objects = open_store(place.store_url)
        self._place = place

    def close(self) -> None:
        self._catalog.close()
        self._objects.close()

    def state(self) -> Any:
        return msgspec.json.decode(msgspec.json.encode(state(self._catalog)))

    def versions_are_whole(self) -> set[str]:
        """Each version's objects are those bytes that were uploaded; their keys."""
        keys: set[str] = set()
        for row in table(self._catalog, "versions"):
            hashed = _hashed(self._objects, f"{row['object_key']}/")
            files = {CONFIG_FILE: row["config_sha256"], WEIGHTS_FILE: row["weights_sha256"]}
            assert {f"{row['object_key']}/{file}": sha256 for file, sha256 in files.items()} == hashed
            keys |= set(hashed)
        return keys

    def nothing_else_is_stored(self, keys: set[str]) -> None:
        marked = {f"catalogs/{self._catalog.catalog_id}"}
        assert keys | marked == {found.key for found in self._objects.list("")}
        assert table(self._catalog, "uploads") == []

    def another_tenant_is_untouched(self, world: Before) -> None:
        assert world == Before(_rows_of_acme(self._catalog), _hashed(self._objects, f"{ACME}/"))

    def deletions_are_done(self) -> None:
        """Receipts can be read, name no user, and no copy of what only they had is anywhere."""
        for row in table(self._catalog, "deletions"):
            receipt = self._catalog.deletion(row["tenant"], row["deletion_id"])
            assert (receipt.status, receipt.user_id, receipt.unnoted) == ("done", None, ())
        known = {row["digest"] for row in table(self._catalog, "versions")}
        assert self._place.machine.copies() <= known

    def what_is_said_to_be_gone_is(self) -> None:
        """A receipt counts a version's objects only after they went; an upload under way may put more."""
        for row in table(self._catalog, "deletion_items"):
            if row["num_objects"] is not None and row["digest"] is not None:
                assert list(self._objects.list(f"{row['prefix']}/")) == []

    def has(self, user_id: str) -> bool:
        users = table(self._catalog, "users")
        return any((user["tenant"], user["user_id"]) == ("default", user_id) for user in users)

    def has_no_word_of(self, user_id: str) -> None:
        """In no row of any table, but for the other tenant's user of that name."""
        for name in schema.metadata.tables:
            for row in table(self._catalog, name):
                assert row.get("tenant") == ACME or user_id not in str(row)

    def rolls_back(self) -> None:
        """To what was live before, as the history tells it."""
        adapters = [row for row in table(self._catalog, "adapters") if row["tenant"] == "default"]
        for row in adapters:
            stands = [
                entry["version"]
                for entry in table(self._catalog, "live_history")
                if entry["adapter_id"] == row["adapter_id"] and entry["undone_at"] is None
            ]
            earlier = [version for version in stands if version != row["live_version"]]
            assert stands[-1] == row["live_version"]
            if earlier:
                adapter = AdapterName(*(row[name] for name in AdapterName._fields))
                assert earlier[-1] == self._catalog.rollback(adapter).version


def check_crashed(place: Place, offset_s: float, possible: list[Any]) -> None:
    """Before anybody cleaned up: an operation happened or it didn't, and no version lacks an object."""
    aftermath = Aftermath(place, offset_s)
    try:
        assert aftermath.state() in possible
        aftermath.versions_are_whole()
        aftermath.what_is_said_to_be_gone_is()
    finally:
        aftermath.close()


def check_restarted(place: Place, offset_s: float, possible: list[Any], world: Before) -> None:
    aftermath = Aftermath(place, offset_s)
    try:
        assert aftermath.state() in possible
        aftermath.nothing_else_is_stored(aftermath.versions_are_whole())
        aftermath.another_tenant_is_untouched(world)
        aftermath.deletions_are_done()
        if not aftermath.has(ALICE):
            aftermath.has_no_word_of(ALICE)
        aftermath.rolls_back()
    finally:
        aftermath.close()


def _rows_of_acme(catalog: Catalog) -> dict[str, list[Row]]:
    """As they are, with times and keys."""
    adapters = [row["adapter_id"] for row in table(catalog, "adapters") if row["tenant"] == ACME]
    return {
        name: [
            row
            for row in table(catalog, name)
            if row.get("tenant") == ACME or row.get("adapter_id") in adapters
        ]
        for name in schema.metadata.tables
    }


def _hashed(objects: ObjectStore, prefix: str) -> dict[str, str]:
    hashed: dict[str, str] = {}
    for found in objects.list(prefix):
        with objects.open(found.key).stream as stream:
            hashed[found.key] = hashlib.sha256(stream.read()).hexdigest()
    return hashed
