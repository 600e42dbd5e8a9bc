"""The catalog: who has which adapters, which version is live. SQL decides; objects are dumb.

Synchronous; safe to call from several threads, processes and machines. Each method is one transaction, and
none keeps anything between calls: what one router commits, every router sees on its next request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from msgspec import UNSET, UnsetType
from sqlalchemy import Connection

from tunefleet.adapters_store import (
    adapter_rows,
    canaries,
    deletions,
    live_history,
    lookups,
    pins,
    routers,
    upload_commits,
    upload_intents,
    user_rows,
    version_rows,
)
from tunefleet.adapters_store.database import BUSY_TIMEOUT_S, Database
from tunefleet.adapters_store.records import (
    AdapterName,
    AdapterRecord,
    Added,
    DeletionRecord,
    LiveAdapter,
    NewVersion,
    PinnedAdapter,
    UploadRecord,
    UserRecord,
    VersionRecord,
)
from tunefleet.adapters_store.repeats import KEEP, UploadKey
from tunefleet.adapters_store.times import timestamp
from tunefleet.adapters_store.upload_commits import Upload
from tunefleet.core import Pin

__all__ = [
    "AdapterName",
    "AdapterRecord",
    "Added",
    "Catalog",
    "DeletionRecord",
    "LiveAdapter",
    "NewVersion",
    "PinnedAdapter",
    "UploadRecord",
    "UserRecord",
    "VersionRecord",
]


class Catalog:
    """Lives as long as its process serves; ``close`` gives the connections back.

    Every method raises StoreError: ``catalog_busy``, try again, or ``catalog_unavailable``.

    Attributes:
        catalog_id: made once with the database and kept in it.
    """

    def __init__(
        self,
        database_url: str,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        busy_timeout_s: float = BUSY_TIMEOUT_S,
    ) -> None:
        self._database = Database(database_url, busy_timeout_s=busy_timeout_s)
        self._now = now
        self.catalog_id = self._database.catalog_id

    def close(self) -> None:
        self._database.close()

    def timestamp(self, after_s: float = 0.0) -> str:
        """The catalog's time, ``after_s`` from now, as its records have it."""
        return timestamp(self._now(), timedelta(seconds=after_s))

    # Requests

    def live(self, adapter: AdapterName, *, session: str | None = None) -> LiveAdapter:
        """What answers: the live version or, for a canary's share of sessions, the canary's.

        Raises:
            AdapterNotFound: ``fallback`` holds the user's own setting, if there is such a user.
        """
        return self._database.look(lambda connection: lookups.live(connection, adapter, session))

    def numbered(self, adapter: AdapterName, version: int) -> LiveAdapter:
        """As ``live``, for a version asked for by number."""
        return self._database.look(lambda connection: lookups.numbered(connection, adapter, version))

    # Versions

    def add_version(
        self,
        adapter: AdapterName,
        new: NewVersion,
        *,
        promote: bool,
        key: UploadKey | None = None,
        upload_id: str | None = None,
    ) -> Added:
        """Records an upload as the next version, unless the newest version has the same digest.

        Either way the begun upload ``upload_id`` is over.

        Raises:
            AdapterConflict: ``key`` was another upload's, or the begun upload is gone (``upload_expired``).
        """
        upload = Upload(adapter, new, promote=promote, key=key, upload_id=upload_id)
        now, since = self.timestamp(), self._since()
        return self._database.write(
            lambda connection: upload_commits.commit(connection, upload, now=now, since=since)
        )

    def answered(self, adapter: AdapterName, digest: str, key: UploadKey | None = None) -> Added | None:
        """The answer to an upload that changes nothing, where that is known before it is stored.

        Raises:
            AdapterConflict: ``key`` was another upload's.
        """
        since = self._since()
        return self._database.read(
            lambda connection: upload_commits.answered(connection, adapter, digest, key, since=since)
        )

    def version(self, adapter: AdapterName, version: int) -> VersionRecord:
        return self._database.look(lambda connection: version_rows.named(connection, adapter, version))

    def versions(self, adapter: AdapterName, *, after: int | None, limit: int) -> list[VersionRecord]:
        """Newest first; ``after`` is the last number of the page before."""
        return self._database.look(
            lambda connection: version_rows.page(connection, adapter, after=after, limit=limit)
        )

    def known_digests(self, digests: Sequence[str]) -> set[str]:
        """Those that a version has, of whatever user and tenant."""
        return self._database.read(lambda connection: version_rows.known_digests(connection, digests))

    def referenced(self, prefixes: Sequence[str]) -> set[str]:
        """Those prefixes of object keys that a version, or an upload that isn't over, refers to."""
        now = self.timestamp()
        return self._database.read(lambda connection: version_rows.referenced(connection, prefixes, now=now))

    # What answers

    def adapter(self, adapter: AdapterName) -> AdapterRecord:
        """Raises AdapterNotFound where nothing is live."""
        now = self.timestamp()
        return self._database.read(lambda connection: adapter_rows.whole(connection, adapter, now=now))

    def promote(self, adapter: AdapterName, version: int, *, if_live: int | None = None) -> VersionRecord:
        """Makes a version live, in one commit with its history. A canary that becomes live is one no more.

        Raises:
            AdapterNotFound: no such version.
            AdapterConflict: ``if_live`` was given and another version is live.
        """
        now = self.timestamp()
        return self._database.write(
            lambda connection: live_history.promote(connection, adapter, version, if_live=if_live, now=now)
        )

    def rollback(
        self, adapter: AdapterName, *, to: int | None = None, if_live: int | None = None
    ) -> VersionRecord:
        """Makes live what was live before, again one further; or ``to``, which was live once.

        Raises:
            AdapterNotFound: no such adapter or version.
            AdapterConflict: ``no_earlier_version``, ``never_live`` or ``live_version_changed``.
        """
        now = self.timestamp()
        return self._database.write(
            lambda connection: live_history.rollback(connection, adapter, to, if_live=if_live, now=now)
        )

    def set_canary(self, adapter: AdapterName, version: int, percent: float) -> AdapterRecord:
        """Lets a version answer ``percent`` of the sessions: a session stays where it is as percent grows.

        Raises:
            AdapterConflict: the version is live (``version_is_live``).
        """
        return self._decide(adapter, lambda connection: canaries.put(connection, adapter, version, percent))

    def clear_canary(self, adapter: AdapterName) -> AdapterRecord:
        return self._decide(adapter, lambda connection: canaries.clear(connection, adapter))

    def set_pin(self, adapter: AdapterName, pin: Pin) -> AdapterRecord:
        now = self.timestamp()
        return self._decide(adapter, lambda connection: pins.put(connection, adapter, pin, now=now))

    def clear_pin(self, adapter: AdapterName) -> AdapterRecord:
        return self._decide(adapter, lambda connection: pins.clear(connection, adapter))

    def pinned(self, base: str, limit: int = 10_000) -> list[PinnedAdapter]:
        """Live and canary versions of the adapters that are pinned now."""
        now = self.timestamp()
        return self._database.look(lambda connection: pins.pinned(connection, base, limit=limit, now=now))

    # Users

    def users(self, tenant: str, *, after: str | None, limit: int) -> list[UserRecord]:
        """By user id; ``after`` is the last id of the page before."""
        return self._database.look(
            lambda connection: user_rows.page(connection, tenant, after=after, limit=limit)
        )

    def user(self, tenant: str, user_id: str) -> UserRecord:
        """Raises AdapterNotFound (``user_not_found``)."""
        return self._database.look(lambda connection: user_rows.find(connection, tenant, user_id))

    def update_user(
        self,
        tenant: str,
        user_id: str,
        *,
        fallback: str | UnsetType | None = UNSET,
        limits: dict[str, object] | UnsetType = UNSET,
        metadata: dict[str, object] | UnsetType = UNSET,
    ) -> UserRecord:
        """Changes what is given; makes the user if there is none."""
        changes = {"fallback": fallback, "limits": limits, "metadata": metadata}
        now = self.timestamp()
        return self._database.write(
            lambda connection: user_rows.update(connection, tenant, user_id, changes, now=now)
        )

    # Uploads that have begun

    def begin_upload(self, adapter: AdapterName, upload: UploadRecord) -> None:
        self._database.write(lambda connection: upload_intents.begin(connection, adapter, upload))

    def extend_upload(self, upload_id: str, expires_at: str) -> bool:
        """False: it is gone, or over already, and can't be committed any more."""
        now = self.timestamp()
        return self._database.write(
            lambda connection: upload_intents.extend(connection, upload_id, expires_at, now=now)
        )

    def upload(self, adapter: AdapterName, upload_id: str) -> UploadRecord:
        """Raises AdapterNotFound (``upload_not_found``), also when it has expired."""
        now = self.timestamp()
        return self._database.look(
            lambda connection: upload_intents.find(connection, adapter, upload_id, now=now)
        )

    def end_upload(self, upload_id: str) -> None:
        """From here on it can't be committed; its objects may be removed."""
        self._database.write(lambda connection: upload_intents.end(connection, upload_id))

    def expired_uploads(self, limit: int) -> list[UploadRecord]:
        """Longest expired first. End one before its objects are removed."""
        now = self.timestamp()
        return self._database.look(
            lambda connection: upload_intents.expired(connection, limit=limit, now=now)
        )

    # Deletions

    def delete_version(self, adapter: AdapterName, version: int) -> DeletionRecord:
        """Raises AdapterConflict: ``version_is_live`` or ``version_is_canary``."""
        now = self.timestamp()
        return self._database.write(
            lambda connection: deletions.delete_version(connection, adapter, version, now=now)
        )

    def delete_user(self, tenant: str, user_id: str) -> DeletionRecord:
        """Raises AdapterNotFound (``user_not_found``) if there is neither a user nor an upload for one."""
        now = self.timestamp()
        return self._database.write(
            lambda connection: deletions.delete_user(connection, tenant, user_id, now=now)
        )

    def deletion(self, tenant: str, deletion_id: str) -> DeletionRecord:
        """Raises AdapterNotFound (``deletion_not_found``)."""
        return self._database.read(lambda connection: deletions.find(connection, tenant, deletion_id))

    def pending_deletions(self, limit: int) -> list[DeletionRecord]:
        """Oldest first; those that nobody works on."""
        now = self.timestamp()
        return self._database.read(lambda connection: deletions.pending(connection, limit=limit, now=now))

    def claim_deletion(self, deletion_id: str, router_id: str, lease_s: float) -> bool:
        now = self._now()
        return self._database.write(
            lambda connection: deletions.claim(connection, deletion_id, router_id, lease_s, now=now)
        )

    def note_objects(self, deletion_id: str, prefix: str, num_objects: int, kept: Sequence[str]) -> None:
        """The objects under this prefix are gone, but for what ``kept`` says."""
        self._database.write(
            lambda connection: deletions.note_objects(connection, deletion_id, prefix, num_objects, kept)
        )

    def ack_deletion(
        self, deletion_id: str, router_id: str, copies: Mapping[str, int], kept: Sequence[str]
    ) -> None:
        """This router's machine has dropped its copies and ended the streams."""
        self._database.write(
            lambda connection: deletions.ack(connection, deletion_id, router_id, copies, kept)
        )

    def unacked(self, router_id: str, limit: int) -> list[DeletionRecord]:
        """Deletions that wait for this router's word, oldest first."""
        return self._database.read(lambda connection: deletions.unacked(connection, router_id, limit=limit))

    def finish_deletion(self, deletion_id: str) -> DeletionRecord | None:
        """Closes the receipt, which then names no user; None while an item or a living router is missing."""
        now = self.timestamp()
        return self._database.write(lambda connection: deletions.finish(connection, deletion_id, now=now))

    # Routers

    def beat(self, router_id: str, lease_s: float) -> None:
        """This router is alive, for ``lease_s`` from now."""
        now = self._now()
        self._database.write(lambda connection: routers.beat(connection, router_id, lease_s, now=now))

    def leave(self, router_id: str) -> None:
        """Nobody waits for this router any more; what it held is free."""
        self._database.write(lambda connection: routers.leave(connection, router_id))

    def claim(self, name: str, holder: str, lease_s: float) -> bool:
        """Takes or renews a named lease; False while another holder has it."""
        now = self._now()
        return self._database.write(
            lambda connection: routers.claim(connection, name, holder, lease_s, now=now)
        )

    def _decide(self, adapter: AdapterName, change: Callable[[Connection], None]) -> AdapterRecord:
        """Changes an adapter and tells how it is then, in one transaction."""
        now = self.timestamp()

        def decide(connection: Connection) -> AdapterRecord:
            change(connection)
            return adapter_rows.whole(connection, adapter, now=now)

        return self._database.write(decide)

    def _since(self) -> str:
        """Keys of uploads that are older are forgotten."""
        return timestamp(self._now(), -KEEP)
