"""``tunefleet demo``: the main job from beginning to end, a real model and three people's real adapters."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from importlib import resources
from pathlib import Path
from typing import Protocol

import msgspec

from tunefleet import config
from tunefleet.answers import FleetStatus, Served
from tunefleet.async_client import AsyncClient
from tunefleet.cli.demo_view import LogView, TerminalView
from tunefleet.cli.output import note
from tunefleet.errors import ReplicaError, TunefleetError
from tunefleet.fleet import needs_serve_extra

IDLE_TIMEOUT_S = 3.0
START_TIMEOUT_S = 60.0
MAX_TOKENS = 80


class Fact(msgspec.Struct, frozen=True):
    """A question that only one user's adapter can answer."""

    user: str
    question: str


class Questions(msgspec.Struct, frozen=True):
    """``examples/data/questions.json``."""

    demo: str
    facts: tuple[Fact, ...]


@dataclasses.dataclass
class Column:
    """One user's answer as it grows."""

    user_id: str | None
    text: str = ""
    first_token_s: float = 0.0
    served: Served | None = None

    @property
    def title(self) -> str:
        return self.user_id or "the base"


class View(Protocol):
    """Where the demo shows itself: a terminal or a log."""

    def headline(self, text: str) -> None: ...

    def line(self, text: str) -> None: ...

    @contextlib.contextmanager
    def columns(self, columns: list[Column]) -> Iterator[None]:
        """Shows the columns while they grow."""
        ...


def run_demo() -> None:
    """Ends by itself: exit code 0 when everything went as shown."""
    with needs_serve_extra():
        import uvicorn  # noqa: F401 (before anything is downloaded: is this the clients' install only?)
    view: View = TerminalView() if sys.stdout.isatty() else LogView()
    asyncio.run(_demo(view))


async def _demo(view: View) -> None:
    view.headline("1. A base model, prepared once")
    await asyncio.to_thread(_prepare_base, view)
    with tempfile.TemporaryDirectory(prefix="tunefleet-demo-") as store:
        view.headline("2. A server on embedded defaults: files, SQLite, no replica yet")
        async with _server(Path(store)) as client:
            await _show(view, client)
    view.line("The server is stopped and the demo's store is gone.")


async def _show(view: View, client: AsyncClient) -> None:
    questions = msgspec.json.decode((_examples() / "data" / "questions.json").read_bytes(), type=Questions)
    users = sorted(folder.name for folder in (_examples() / "adapters").iterdir())
    await client.status()
    view.headline(f"3. {len(users)} people upload their adapters")
    for user in users:
        version = await client.adapters.push(user, _examples() / "adapters" / user)
        view.line(
            f"{user}: version {version.version}, rank {version.rank} on {', '.join(version.target_modules)}, "
            f"{version.size_bytes / 1e6:.1f} MB, sha256 {version.digest[:12]}"
        )
    view.headline("4. The first request wakes the base")
    warm = await client.warmup()
    view.line(f"a replica was ready after {warm.seconds:.2f} s; the parked process had to import torch first")
    view.headline(f"5. Everybody asks at once: {questions.demo}")
    columns = await _ask(view, client, questions.demo, [*users, None])
    _show_batch(view, columns)
    view.headline(f"6. Nobody asks for {IDLE_TIMEOUT_S:g} s")
    _show_zero(view, await _wait_for_zero(client))
    fact = questions.facts[0]
    view.headline(
        f"7. {fact.user} comes back, and asks what only {fact.user}'s model can know: {fact.question}"
    )
    _show_cold_start(view, (await _ask(view, client, fact.question, [fact.user]))[0])


async def _ask(view: View, client: AsyncClient, question: str, users: list[str | None]) -> list[Column]:
    """Asks as several users at once, each answer streaming into its column."""
    columns = [Column(user) for user in users]
    with view.columns(columns):
        async with asyncio.TaskGroup() as group:
            for column in columns:
                group.create_task(_stream(client, question, column))
    return columns


async def _stream(client: AsyncClient, question: str, column: Column) -> None:
    started = time.monotonic()
    messages = [{"role": "user", "content": question}]
    async for chunk in client.stream(column.user_id, messages, temperature=0, max_tokens=MAX_TOKENS):
        if chunk.text and not column.text:
            column.first_token_s = time.monotonic() - started
        column.text += chunk.text
        column.served = chunk.served or column.served


def _show_batch(view: View, columns: list[Column]) -> None:
    served = [column.served for column in columns if column.served is not None]
    num_adapters = max(each.num_adapters for each in served)
    batch_size = max(each.batch_size for each in served)
    if num_adapters < len(columns) - 1:
        raise ReplicaError(f"only {num_adapters} adapters ran in one batch; is this machine very busy?")
    view.line(
        f"one batch: {num_adapters} adapters and the base, {batch_size} sequences in one step of one model"
    )


async def _wait_for_zero(client: AsyncClient) -> FleetStatus:
    async with asyncio.timeout(IDLE_TIMEOUT_S + START_TIMEOUT_S):
        while (status := await client.status()).replicas:
            await asyncio.sleep(0.1)
    return status


def _show_zero(view: View, status: FleetStatus) -> None:
    sizes = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in status.pss_bytes.items())
    view.line(f"zero: no replica, nothing on the device; still in memory (PSS): {sizes}")


def _show_cold_start(view: View, column: Column) -> None:
    if column.served is None:
        raise ReplicaError("the answer ended without saying who gave it")
    stages = ", ".join(f"{stage} {seconds * 1000:.0f} ms" for stage, seconds in column.served.timing.items())
    view.line(
        f"from zero to the first token in {column.first_token_s:.2f} s, a cold start of the {_cold(column)}"
    )
    view.line(f"stages: {stages}")


def _cold(column: Column) -> str:
    return column.served.cold_start.value if column.served else "-"


def _prepare_base(view: View) -> None:
    from tunefleet.runtime.base import locate_base, read_manifest

    manifest = read_manifest(locate_base(config.resolve(), progress=view.line))
    view.line(
        f"{manifest.base_id}, {manifest.dtype}, {len(manifest.linears)} layers for adapters; "
        f"engine and transformers differ by {manifest.probe_max_diff:.0e} at most"
    )


@contextlib.asynccontextmanager
async def _server(store: Path) -> AsyncIterator[AsyncClient]:
    """A server in a process of its own, as ``tunefleet serve`` starts it; stopped at the end."""
    port = _free_port()
    command = [sys.executable, "-m", "tunefleet.cli.main", "serve", "--port", str(port)]
    command += ["--store-url", store.as_uri(), "--idle-timeout-s", str(IDLE_TIMEOUT_S)]
    environ = {name: value for name, value in os.environ.items() if name != "TUNEFLEET_ADMIN_KEY"}
    log = store / "server.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environ) as process,
    ):
        try:
            async with AsyncClient(f"http://127.0.0.1:{port}", "none") as client:
                await _wait_until_up(client, process)
                yield client
        except TunefleetError:
            note(f"the server's log:\n{log.read_text()}")
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait)


async def _wait_until_up(client: AsyncClient, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            await client.status()
        except ReplicaError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise ReplicaError("the server did not come up") from None
            await asyncio.sleep(0.05)
        else:
            return


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _examples() -> Path:
    return Path(str(resources.files("tunefleet.examples")))
