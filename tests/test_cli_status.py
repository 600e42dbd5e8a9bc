"""``tunefleet status`` and ``warmup``, against a real server."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from cli_kit import run_main
from router_kit import Kit, Server
from tunefleet.answers import FleetStatus
from tunefleet.cli import main
from tunefleet.cli.status_view import Rates
from tunefleet.core import LoggedError, ReplicaInfo, ReplicaState
from tunefleet.messages import Status
from tunefleet.runtime.fakes import FakeDispatcher

REPLICA = ReplicaInfo(
    replica_id="r1",
    state=ReplicaState.READY,
    address="/s",
    device="cpu",
    num_running=2,
    num_waiting=5,
    digests=("a",),
    num_adapters=1,
    num_slots=4,
    kv_tokens=256,
    max_kv_tokens=1024,
    started_at=1.0,
    stages={"start": 0.25},
)


class Busy(FakeDispatcher):
    """Generates 1000 tokens between any two looks."""

    num_looks = 0

    async def status(self) -> Status:
        self.num_looks += 1
        since = time.time() - 3600 * 5
        replica = msgspec.structs.replace(REPLICA, since=since, num_tokens=1000 * self.num_looks)
        return Status(
            pid=1,
            parked_pid=2,
            replicas=(replica,),
            pss_bytes={"host": 1000},
            host_tier={"b": 20},
            num_held=3,
            errors=(LoggedError(at=1.0, message="replica r0: ended by SIGKILL"),),
        )


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    kit = Kit(tmp_path)
    kit.dispatcher = Busy(kit.dispatcher.answer)
    return kit


@pytest.fixture
def server(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Where commands look for it."""
    monkeypatch.setenv("TUNEFLEET_URL", server.url)
    return server


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(main.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@contextlib.contextmanager
def on_a_terminal(server: Server, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command that runs, and what reads its terminal."""
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "tunefleet.cli.main", *arguments]
    environ = {**os.environ, "TUNEFLEET_URL": server.url, "TERM": "xterm", "COLUMNS": "160", "LINES": "50"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        try:
            yield process, mine
        finally:
            process.kill()
            os.close(mine)


def read_until(terminal: int, pattern: str, shown: str = "") -> str:
    while not re.search(pattern, shown):
        shown += os.read(terminal, 65536).decode()
    return shown


def read_all(terminal: int) -> str:
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody holds its other end
        while chunk := os.read(terminal, 65536):
            shown += chunk
    return shown.decode()


def test_elsewhere_the_status_is_plain_lines(server: Server) -> None:
    shown = invoke("status")
    for line in (
        r"base +tiny@0123456789ab",
        r"replicas +1",
        r"queue +3 held for a replica, 5 waiting in replicas",
        r"device tier +1 adapters, 0 of [\d,]+ bytes",
        r"host tier +1 adapters, 20 of [\d,]+ bytes",
        r"disk tier +0 adapters, 0 of [\d,]+ bytes",
        r"standby +host 1,000 bytes",
        r"error +[\d-]+ [\d:]+ replica r0: ended by SIGKILL",
        r"r1\tready\tcpu\t5 h\t2\t5\t1/4\t25%\t0\.25 s",
    ):
        assert re.search(f"^{line}$", shown, re.MULTILINE), (line, shown)


def test_as_json_it_is_what_the_server_says(server: Server) -> None:
    told = msgspec.json.decode(invoke("status", "--json"), type=FleetStatus)
    assert (told.num_held, told.at_zero, told.replicas[0].num_slots) == (3, False, 4)


def test_on_a_terminal_it_stays_and_shows_how_fast_replicas_are(server: Server) -> None:
    with on_a_terminal(server, "status", "--interval", "0.1") as (process, terminal):
        shown = read_until(terminal, r"ready.* 0\.25 s +\d{3,}\s")
        process.send_signal(signal.SIGINT)
        shown += read_all(terminal)
        assert (process.wait(10), "tokens/s" in shown, "Traceback" in shown) == (0, True, False)
    assert isinstance(server.kit.dispatcher, Busy)
    assert server.kit.dispatcher.num_looks >= 2


def test_once_it_ends_on_a_terminal_too(server: Server) -> None:
    with on_a_terminal(server, "status", "--once") as (process, terminal):
        shown = read_all(terminal)
        assert (process.wait(10), "r1" in shown) == (0, True)


def test_warmup_says_what_is_ready(server: Server) -> None:
    assert re.fullmatch(r"ready after \d+\.\d\d s: base\n", invoke("warmup"))
    digest = json.loads(invoke("adapters", "push", "alice", str(server.kit.adapter()), "--json"))["digest"]
    assert invoke("warmup", "alice").endswith(f" s: {digest}\n")
    assert json.loads(invoke("warmup", "alice", "--json"))["adapter_digest"] == digest


def test_a_warmup_of_nobody_is_an_error(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "warmup", "nobody") == 1
    assert "nobody" in capsys.readouterr().err


def looked(**num_tokens: int) -> FleetStatus:
    replicas = tuple(
        msgspec.structs.replace(REPLICA, replica_id=name, num_tokens=number)
        for name, number in num_tokens.items()
    )
    return FleetStatus(
        version="0",
        versions={},
        base="b",
        base_id="b@0",
        max_model_len=1,
        at_zero=False,
        replicas=replicas,
        num_held=0,
        tiers={},
        host_pid=0,
        parked_pid=0,
        pss_bytes={},
    )


def test_a_rate_needs_two_looks_at_the_same_replica() -> None:
    rates = Rates()
    assert rates.look(looked(r1=100), 10.0) == {}
    assert rates.look(looked(r1=150, r2=70), 12.0) == {"r1": 25.0}
    assert rates.look(looked(r2=70), 13.0) == {"r2": 0.0}
    assert rates.look(looked(r1=10, r2=75), 14.0) == {"r2": 5.0}
