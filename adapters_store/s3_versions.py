"""What a bucket with versions keeps of its objects, and how all of it goes."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator

from minio import Minio
from minio.datatypes import Object
from minio.error import S3Error, ServerError

from tunefleet.adapters_store.objects import Deleted
from tunefleet.adapters_store.s3_errors import answer_of

_KNOWN_FOR_S = 60.0  # an operator may turn versions on
_DENIED = 403
_REFUSED = {_DENIED, 400, 405, 409, 501}


class Versions(enum.Enum):
    """Whether a bucket keeps old versions of its objects."""

    KEPT = "it does, or did once"
    NONE = "it doesn't, or its server has no versions at all"
    UNKNOWN = "our credentials may not ask"


class Versioning:
    """Asks a bucket now and then whether it keeps versions; deletes and lists accordingly."""

    def __init__(self, bucket: str, clock: Callable[[], float]) -> None:
        self._bucket = bucket
        self._clock = clock
        self._versions = Versions.UNKNOWN
        self._asked_s: float | None = None

    def delete(self, client: Minio, name: str, shown: str) -> Deleted:
        """All versions of one object, delete markers too. ``kept`` says what stayed."""
        versions = self._ask(client)
        if versions is Versions.NONE:
            return self._delete_plain(client, name)
        try:
            found = [item for item in self._list(client, name, versions=True) if item.object_name == name]
        except (S3Error, ServerError) as error:
            if answer_of(error).status not in _REFUSED:
                raise
            unseen = f"older versions of {shown}, if there are any: the bucket doesn't let us list them"
            return self._delete_plain(client, name)._replace(kept=(unseen,))
        return self._delete_each(client, found, shown)

    def objects(self, client: Minio, prefix: str) -> Iterator[Object]:
        """Objects by name; where versions are kept, each version, newest first."""
        if self._ask(client) is not Versions.NONE:
            try:
                found = self._list(client, prefix, versions=True)
                yield from (item for item in found if not item.is_delete_marker)  # those come unsorted
                return
            except (S3Error, ServerError) as error:
                if self._versions is Versions.KEPT or answer_of(error).status not in _REFUSED:
                    raise
        yield from self._list(client, prefix, versions=False)

    def _list(self, client: Minio, prefix: str, *, versions: bool) -> Iterator[Object]:
        found: Iterator[Object] = client.list_objects(
            self._bucket, prefix, recursive=True, include_version=versions
        )
        return found

    def _delete_plain(self, client: Minio, name: str) -> Deleted:
        try:
            client.stat_object(self._bucket, name)
        except S3Error as error:
            if error.code == "NoSuchKey":
                return Deleted(0)
            raise
        client.remove_object(self._bucket, name)
        return Deleted(1)

    def _delete_each(self, client: Minio, found: list[Object], shown: str) -> Deleted:
        num_versions = 0
        kept = []
        for item in found:
            try:
                client.remove_object(self._bucket, item.object_name or "", version_id=item.version_id)
                num_versions += not item.is_delete_marker
            except (S3Error, ServerError) as error:
                if answer_of(error).status not in _REFUSED:
                    raise
                kept.append(f"version {item.version_id} of {shown}: {_why(error)}")
        return Deleted(num_versions, tuple(kept))

    def _ask(self, client: Minio) -> Versions:
        now_s = self._clock()
        fresh = self._asked_s is not None and now_s - self._asked_s < _KNOWN_FOR_S
        if not fresh and self._versions is not Versions.KEPT:
            self._versions = _versions(client, self._bucket)
            self._asked_s = now_s
        return self._versions


def _versions(client: Minio, bucket: str) -> Versions:
    try:
        status = client.get_bucket_versioning(bucket).status
    except (S3Error, ServerError) as error:
        answer = answer_of(error)
        if answer.code == "NoSuchBucket" or answer.status not in _REFUSED:
            raise
        return Versions.UNKNOWN if answer.status == _DENIED else Versions.NONE
    return Versions.KEPT if status else Versions.NONE


def _why(error: S3Error | ServerError) -> str:
    reason = getattr(error, "message", None) or str(error)
    return f"the store refuses to delete it ({reason.rstrip('.')}): an object lock, a legal hold or a policy"
