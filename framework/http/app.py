"""The HTTP API: every route with its scope, the only place where both are listed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tunefleet.auth import Authenticate, Caller
from tunefleet.errors import AuthError, TunefleetError
from tunefleet.http import adapters, inference, metrics, pins, releases, status, uploads, users
from tunefleet.http.bodies import IDLE_S
from tunefleet.http.boundary import Boundary
from tunefleet.http.errors import on_http_exception, on_tunefleet_error

if TYPE_CHECKING:
    from tunefleet.fleet import Fleet

Endpoint = Callable[["Fleet", Caller, Request], Awaitable[Response]]


class Method(NamedTuple):
    name: str
    endpoint: Endpoint
    scope: str


_ADAPTER = "/v1/users/{user_id}/{adapter}"  # {adapter}: "adapter", or "adapters/{name}"

_ROUTES: dict[str, tuple[Method, ...]] = {
    "/v1/chat/completions": (Method("POST", inference.chat, "infer"),),
    "/v1/completions": (Method("POST", inference.complete, "infer"),),
    "/v1/warmup": (Method("POST", status.warmup, "infer"),),
    "/v1/models": (Method("GET", status.models, "infer"),),
    "/v1/models/{model:path}": (Method("GET", status.show_model, "infer"),),
    "/v1/status": (Method("GET", status.status, "tenant"),),
    "/v1/replicas": (Method("GET", status.replicas, "tenant"),),
    "/v1/adapters": (Method("GET", status.adapters, "tenant"),),
    "/v1/users": (Method("GET", users.list_users, "tenant"),),
    "/v1/users/{user_id}": (
        Method("GET", users.show_user, "infer"),
        Method("PATCH", users.change_user, "tenant"),
        Method("DELETE", users.delete_user, "tenant"),
    ),
    "/v1/deletions/{deletion_id}": (Method("GET", users.show_deletion, "tenant"),),
    _ADAPTER: (Method("PUT", adapters.upload, "upload"), Method("GET", adapters.show, "infer")),
    f"{_ADAPTER}/promote": (Method("POST", releases.promote, "upload"),),
    f"{_ADAPTER}/rollback": (Method("POST", releases.rollback, "upload"),),
    f"{_ADAPTER}/canary": (
        Method("PUT", releases.set_canary, "upload"),
        Method("DELETE", releases.end_canary, "upload"),
    ),
    f"{_ADAPTER}/pin": (Method("PUT", pins.pin, "upload"), Method("DELETE", pins.unpin, "upload")),
    f"{_ADAPTER}/uploads": (Method("POST", uploads.begin, "upload"),),
    f"{_ADAPTER}/uploads/{{upload_id}}/complete": (Method("POST", uploads.complete, "upload"),),
    f"{_ADAPTER}/uploads/{{upload_id}}/{{file}}": (Method("PUT", uploads.put_file, "upload"),),
    f"{_ADAPTER}/versions": (Method("GET", adapters.list_versions, "infer"),),
    f"{_ADAPTER}/versions/{{version}}": (
        Method("GET", adapters.show_version, "infer"),
        Method("DELETE", adapters.delete_version, "upload"),
    ),
    f"{_ADAPTER}/versions/{{version}}/files/{{file}}": (Method("GET", adapters.download, "upload"),),
}


def create_app(
    fleet: Fleet,
    authenticate: Authenticate,
    *,
    with_lifespan: bool = False,
    patience_s: float = inference.PATIENCE_S,
    idle_s: float = IDLE_S,
) -> Starlette:
    """The app over a fleet. Mounted, the app around it opens the fleet; standalone, its own lifespan.

    Args:
        patience_s: longest time that a stream's client sees nothing before the first token.
        idle_s: longest time that a client may send nothing of a body it has begun.
    """
    app = Starlette(
        routes=_routes(fleet, authenticate),
        middleware=_middleware(fleet),
        exception_handlers={TunefleetError: on_tunefleet_error, HTTPException: on_http_exception},
        lifespan=fleet.lifespan if with_lifespan else None,
    )
    app.router.redirect_slashes = False
    app.state.patience_s = patience_s
    app.state.idle_s = idle_s
    return app


def _middleware(fleet: Fleet) -> list[Middleware]:
    options = fleet.options
    boundary = Middleware(Boundary, access_log=options.access_log)
    if not options.cors_origins:
        return [boundary]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=options.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=inference.HEADERS,
    )
    return [cors, boundary]


def _routes(fleet: Fleet, authenticate: Authenticate) -> list[Route]:
    routes = [
        Route("/healthz", _open_to_all(fleet, status.healthz)),
        Route("/readyz", _open_to_all(fleet, status.readyz)),
        Route("/metrics", _open_to_all(fleet, metrics.metrics)),
    ]
    for template, methods in _ROUTES.items():
        for adapter in ("adapter", "adapters/{name}") if "{adapter}" in template else ("",):
            path = template.replace("{adapter}", adapter)
            endpoint = _guarded(fleet, authenticate, {method.name: method for method in methods})
            routes.append(Route(path, endpoint, methods=[method.name for method in methods]))
    return routes


def _guarded(
    fleet: Fleet, authenticate: Authenticate, methods: dict[str, Method]
) -> Callable[[Request], Awaitable[Response]]:
    """Checks the caller, the scope and the user in the path; nothing gets past it."""

    async def endpoint(request: Request) -> Response:
        caller = await authenticate(request)
        if caller is None:
            raise AuthError("send a key as `Authorization: Bearer <key>`")
        method = methods["GET" if request.method == "HEAD" else request.method]
        caller.require(method.scope)
        if "user_id" in request.path_params:
            caller.reach(request.path_params["user_id"])
        return await method.endpoint(fleet, caller, request)

    return endpoint


def _open_to_all(
    fleet: Fleet, endpoint: Callable[[Fleet, Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    async def opened(request: Request) -> Response:
        return await endpoint(fleet, request)

    return opened
