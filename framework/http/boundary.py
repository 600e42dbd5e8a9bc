"""The outermost layer of the API: request ids, the access log, and the last net under every request."""

from __future__ import annotations

import logging
import re
import time
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunefleet.errors import RequestInvalid
from tunefleet.generations import new_request_id
from tunefleet.http.errors import error_response, unexpected_response

_log = logging.getLogger("tunefleet.http")
_access_log = logging.getLogger("tunefleet.access")
_SANE_ID = re.compile(r"[!-~]{1,128}")
_KEY = "tunefleet.request_id"


def request_id_of(request: Request) -> str:
    """The id that this request's answer carries as X-Request-Id: the client's own, or a new one."""
    request_id: str = request.scope[_KEY]
    return request_id


class Boundary:
    """ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, *, access_log: bool) -> None:
        self._app = app
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        scope[_KEY] = given if _SANE_ID.fullmatch(given) else new_request_id()
        answer = _Answer(send, scope[_KEY])
        try:
            await self._answer(scope, receive, answer)
        finally:
            if self._access_log:
                answer.log(scope)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            if _hides_a_slash(scope):
                refusal = RequestInvalid(
                    "a path segment can't hold a slash", code="invalid_user_id", param="user_id"
                )
                await error_response(refusal)(scope, receive, answer.send)
            else:
                await self._app(scope, receive, answer.send)
        except ClientDisconnect:
            return  # nobody is left to answer
        except Exception:  # the boundary of a request: one failure must not end others
            _log.exception("request %s failed", scope[_KEY])
            if answer.status == 0:
                await unexpected_response(scope[_KEY])(scope, receive, answer.send)


class _Answer:
    """Sees one response pass."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.status = 0  # 0: nothing sent yet
        self._send = send
        self._request_id = request_id
        self._started_at = time.perf_counter()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message).setdefault("x-request-id", self._request_id)
        await self._send(message)

    def log(self, scope: Scope) -> None:
        elapsed_ms = (time.perf_counter() - self._started_at) * 1000
        _access_log.info(
            "%s %s %s %.0f ms %s",
            scope["method"],
            quote(scope["path"], safe="/:@+=|~"),  # decoded, it may hold line ends
            self.status or "disconnected",
            elapsed_ms,
            self._request_id,
        )


def _hides_a_slash(scope: Scope) -> bool:
    """Servers decode paths: ``/v1/users/a%2Fadapter`` would arrive as user ``a``'s."""
    _, found, rest = (scope.get("raw_path") or b"").partition(b"/v1/users/")
    return bool(found) and b"%2f" in rest.lower()
