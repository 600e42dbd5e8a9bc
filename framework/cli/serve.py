"""``tunefleet serve``: one router process over one machine."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer

from tunefleet import config
from tunefleet.auth import Authenticate, admin_key, anyone, check_exposure
from tunefleet.errors import ConfigError
from tunefleet.fleet import Fleet, needs_serve_extra

if TYPE_CHECKING:
    import uvicorn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CLOSE_TIMEOUT_S = 10.0  # for the fleet, once all requests are answered

_log = logging.getLogger("tunefleet")


def with_option_flags(command: Callable[[Mapping[str, object]], None]) -> Callable[..., None]:
    """A command with one flag per field of ``config.Options``, each None unless given."""

    def flagged(**flags: object) -> None:
        command(flags)

    parameters = [_flag(field) for field in dataclasses.fields(config.Options)]
    flagged.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flagged.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    flagged.__doc__ = command.__doc__
    return flagged


def serve(flags: Mapping[str, object]) -> None:
    """Serve the HTTP API. Every option can also be set as TUNEFLEET_<OPTION>."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for library in ("alembic", "uvicorn"):
        logging.getLogger(library).setLevel(logging.WARNING)
    options = config.resolve(flags=flags)
    key = config.setting("admin_key")
    check_exposure(options.host, key)
    with needs_serve_extra():
        import uvicorn as uvicorn
    fleet = Fleet(**dataclasses.asdict(options))
    with (
        _bound(options.host, options.port) as listener,
        asyncio.Runner(loop_factory=_loop_factory()) as runner,
    ):
        runner.run(_serve(fleet, admin_key(key) if key else anyone, listener))


async def _serve(fleet: Fleet, authenticate: Authenticate, listener: socket.socket) -> None:
    async with fleet:
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        _log.info("serving %s: OpenAI's base_url is http://%s:%s/v1", fleet.manifest.name, shown, port)
        if authenticate is anyone:
            _log.warning("no keys: any program on this machine may do anything; set TUNEFLEET_ADMIN_KEY")
        await _server(fleet, authenticate).serve(sockets=[listener])
        _end_within(CLOSE_TIMEOUT_S)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where there is one: a router's time is mostly its loop's."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _server(fleet: Fleet, authenticate: Authenticate) -> uvicorn.Server:
    import uvicorn

    from tunefleet.http.app import create_app

    class Server(uvicorn.Server):
        """Drains at the first signal; the second one ends the process, whatever it is doing.

        Doesn't repeat signals to itself, as uvicorn does: the fleet still has to close.
        """

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            loop = asyncio.get_running_loop()
            for number in SIGNALS:
                loop.add_signal_handler(number, self._drain)
            yield

        def _drain(self) -> None:
            if num_open := len(fleet.generations.open_requests):
                _log.info("finishing %d requests, for %g s at most", num_open, drain_timeout_s)
            for number in SIGNALS:
                asyncio.get_running_loop().remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)
            self.should_exit = True

    drain_timeout_s = fleet.options.drain_timeout_s
    return Server(
        uvicorn.Config(
            create_app(fleet, authenticate),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=math.ceil(drain_timeout_s),
        )
    )


def _end_within(seconds: float) -> None:
    """The process ends then at the latest: a store that hangs must not keep a router that serves nobody."""

    def end() -> None:
        _log.error("closing took longer than %g s; leaving what is left", seconds)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _bound(host: str, port: int) -> socket.socket:
    """Bound before anything is started: a taken port costs no time."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise ConfigError(f"can't listen on {host}:{port}: {error.strerror}", param="port") from error


def _flag(field: dataclasses.Field[object]) -> inspect.Parameter:
    hint = get_type_hints(config.Options)[field.name]
    dashed = field.name.replace("_", "-")
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    told = (
        f"{field.metadata['doc']} [default: {default}]"
        if default not in {"", None}
        else field.metadata["doc"]
    )
    if hint is bool:
        option = typer.Option(f"--{dashed}/--no-{dashed}", help=told, show_default=False)
        annotation: object = Annotated[bool | None, option]
    else:
        option = typer.Option(f"--{dashed}", help=told, show_default=False, metavar=_metavar(hint))
        annotation = Annotated[str | None, option]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(hint: object) -> str:
    return {int: "N", float: "SECONDS"}.get(hint, "TEXT") if isinstance(hint, type) else "TEXT"
