"""What S3 servers and the ways to them answer, as StoreErrors that say what to do.

Messages name the file of an object only; the cause that is chained has its whole key.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import NamedTuple
from xml.etree.ElementTree import ParseError

import urllib3.exceptions
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from tunefleet.adapters_store.objects import changed, not_found
from tunefleet.errors import StoreError

DENIED = "store_denied"
UNAVAILABLE = "store_unavailable"
ANSWERS = (MinioException, urllib3.exceptions.HTTPError, ParseError, ValueError)
_log = logging.getLogger(__name__)

_DENIALS = {
    "InvalidAccessKeyId": "the store doesn't know the access key: check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret isn't the access key's: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired: renew them (AWS_SESSION_TOKEN)",
    "InvalidToken": "the session token isn't valid: renew it (AWS_SESSION_TOKEN)",
    "RequestTimeTooSkewed": "the clock of this machine and the store's differ: set it right (NTP)",
    "AuthorizationHeaderMalformed": "the bucket is in another region: give region= in store_url",
    "PermanentRedirect": "the bucket is in another region: give region= and endpoint= in store_url",
}
_ANY_DENIAL = "check its keys (AWS_ACCESS_KEY_ID), this machine's clock and the bucket's policy"
_DENIED_STATUSES = {301, 307, 401, 403}
_BUSY_STATUSES = {408, 429, 500, 502, 503, 504}


class _Answer(NamedTuple):
    status: int  # 0: none came
    code: str


# To a HEAD, which is answered without a body: expired credentials, or another region.
_NAMELESS = {_Answer(400, ""), _Answer(400, "BadRequest")}


@contextlib.contextmanager
def explained(what: str, key: str | None = None) -> Iterator[None]:
    """Turns what goes wrong in the block into a StoreError; ``what``: "x can't be read"."""
    try:
        yield
    except ANSWERS as error:
        _log.info("%s: %s", what, error)
        raise store_error(what, error, key) from error


def store_error(what: str, error: Exception, key: str | None = None) -> StoreError:
    answer = answer_of(error)
    if key is not None:
        if answer.code in {"NoSuchKey", "NoSuchVersion"}:
            return not_found(key)
        if answer.code == "PreconditionFailed" or answer.status == 412:
            return changed(key)
        if answer.code == "InvalidRange" or answer.status == 416:
            return StoreError(f"{what}: it ends before that", code="invalid_range", param="start")
    if answer.code == "NoSuchBucket":
        text = "there is no such bucket: make it, or correct store_url"
        return StoreError(f"{what}: {text}", code="bucket_not_found", param="store_url")
    if answer.code in _DENIALS or answer.status in _DENIED_STATUSES or answer in _NAMELESS:
        reason = _DENIALS.get(answer.code, f"the store refuses: {_ANY_DENIAL}")
        return StoreError(f"{what}: {reason}", code=DENIED)
    return StoreError(f"{what}: {_trouble(answer, error)}", code=UNAVAILABLE)


def answer_of(error: Exception) -> _Answer:
    if isinstance(error, S3Error):
        return _Answer(error.response.status, error.code or "")
    if isinstance(error, ServerError):
        return _Answer(error.status_code, "")
    if isinstance(error, InvalidResponseError):
        return _Answer(error._code, "NoSuchKey" if error._code == 404 else "")
    return _Answer(0, "")


def _trouble(answer: _Answer, error: Exception) -> str:
    if answer.status in _BUSY_STATUSES:
        return f"the store is busy or out of order ({answer.code or answer.status}); try again later"
    if answer.status:
        return f"the store answers {answer.status} {answer.code}; see its log".rstrip()
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, urllib3.exceptions.SSLError):
        return "the store's certificate isn't trusted: give its CA as ca= in store_url"
    if isinstance(reason, urllib3.exceptions.NameResolutionError):
        return "the store's host has no address: check endpoint= in store_url"
    refused = isinstance(reason, urllib3.exceptions.NewConnectionError)  # urllib3 calls that a timeout too
    if isinstance(reason, urllib3.exceptions.TimeoutError) and not refused:
        return "the store doesn't answer in time; try again later"
    if isinstance(error, (ParseError, ValueError)):
        return "what answers there doesn't speak S3: check endpoint= in store_url"
    if isinstance(reason, urllib3.exceptions.ResponseError):
        return "the store is busy or out of order; try again later"
    return "the store can't be reached, or the connection broke; try again later"
