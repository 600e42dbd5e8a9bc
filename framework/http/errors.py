"""One table from errors to HTTP: status, OpenAI's error type, and the body every failure has."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tunefleet.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterLoadFailed,
    AdapterNotFound,
    AuthError,
    BaseModelError,
    CapacityError,
    ReplicaError,
    RequestInvalid,
    StoreError,
    TunefleetError,
)

_log = logging.getLogger("tunefleet.http")

_STATUS_OF_CLASS: dict[type[TunefleetError], int] = {
    RequestInvalid: 400,
    AuthError: 401,
    AdapterNotFound: 404,
    AdapterInvalid: 422,
    AdapterConflict: 409,
    AdapterLoadFailed: 503,
    BaseModelError: 503,
    StoreError: 503,
    CapacityError: 503,
    ReplicaError: 500,
    TunefleetError: 500,
}
_STATUS_OF_CODE = {
    "adapter_deleted": 410,
    "adapter_invalid": 422,
    "adapter_too_large": 413,
    "body_too_large": 413,
    "body_too_slow": 408,
    "forbidden": 403,
    "invalid_adapter_name": 422,
    "invalid_tenant": 422,
    "invalid_user_id": 422,
    "queue_full": 429,
    "replica_lost": 503,
    "unsupported_media_type": 415,
    "user_deleted": 410,
}
_TYPE_OF_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    410: "not_found_error",
    429: "rate_limit_error",
}
_CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed"}


def status_of(error: TunefleetError) -> int:
    by_class = next(_STATUS_OF_CLASS[kind] for kind in type(error).__mro__ if kind in _STATUS_OF_CLASS)
    return _STATUS_OF_CODE.get(error.code, by_class)


def error_body(error: TunefleetError) -> dict[str, object]:
    return _body(status_of(error), error.message, error.code, error.param)


def error_response(error: TunefleetError) -> Response:
    status = status_of(error)
    headers = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if status in {429, 503}:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s or 1)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return _response(status, error_body(error), headers)


def unexpected_body(request_id: str) -> dict[str, object]:
    """What a failure of ours shows: nothing but the id that the log has too."""
    return _body(
        500, f"internal error; the log knows more about request {request_id}", "internal_error", None
    )


def unexpected_response(request_id: str) -> Response:
    return _response(500, unexpected_body(request_id), {})


async def on_tunefleet_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TunefleetError)
    response = error_response(error)
    if response.status_code >= 500:
        _log.warning("%s %s: %s", request.method, request.url.path, error, exc_info=error)
    return response


async def on_http_exception(request: Request, error: Exception) -> Response:
    """The router's own refusals: no such route, no such method."""
    assert isinstance(error, HTTPException)
    code = _CODE_OF_STATUS.get(error.status_code, "invalid_request")
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _response(error.status_code, _body(error.status_code, message, code, None), error.headers or {})


def _body(status: int, message: str, code: str, param: str | None) -> dict[str, object]:
    kind = "server_error" if status >= 500 else _TYPE_OF_STATUS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _response(status: int, body: Mapping[str, object], headers: Mapping[str, str]) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")
