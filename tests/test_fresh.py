"""Replicas as fresh processes, as where forking isn't safe: here, on Linux."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from engine_kit import Oracle, greedy, prepare_model, tiny_model
from lone_router import options_for
from starter_kit import TESTS, Heard, children, fork_message, is_gone
from tunefleet.config import runtime_dir, state_dir
from tunefleet.errors import ReplicaError
from tunefleet.messages import Submit
from tunefleet.runtime.fresh import FreshStarts
from tunefleet.runtime.host import HOST_SOCKET
from tunefleet.runtime.machine import Machine

PROMPT = (5, 6, 7, 8)


def fresh_starts(heard: Heard, way: str) -> FreshStarts:
    """Of processes that end in this way, see fresh_programs.py."""
    return FreshStarts(
        Path(way),
        on_forked=heard.on_forked,
        on_reaped=heard.on_reaped,
        on_lost=heard.on_lost,
        module="fresh_programs",
    )


@pytest.mark.parametrize(
    ("way", "exit_code", "reason"), [("say_why", 1, "no room for r1"), ("die", -signal.SIGKILL, "")]
)
def test_an_end_is_told_with_its_exit_code_and_reason(
    way: str, exit_code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        heard = Heard()
        starter = fresh_starts(heard, way)
        await starter.ensure()
        await starter.fork(fork_message(tmp_path, Path(way)))
        await heard.until(lambda: heard.reaped)
        (forked,), (reaped,) = heard.forked, heard.reaped
        assert (forked.replica_id, forked.instead_of_fork) == ("r1", "")
        assert (forked.pid, exit_code, reason) == (reaped.pid, reaped.exit_code, reaped.reason)
        assert (starter.pid, heard.num_lost) == (0, 0)

    monkeypatch.setenv("PYTHONPATH", TESTS)
    before = children()
    asyncio.run(scenario())
    assert before == children()


def test_a_process_that_can_not_be_started_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        heard = Heard()
        with pytest.raises(ReplicaError, match="Argument list too long"):
            await fresh_starts(heard, "die").fork(fork_message(tmp_path, Path("die")))
        assert heard.forked == []

    monkeypatch.setenv("TOO_LONG", "x" * (1 << 20))
    asyncio.run(scenario())


def test_a_machine_serves_and_says_how_a_replica_ended(tmp_path: Path) -> None:
    """On a platform that can't fork."""

    async def use(machine: Machine) -> None:
        await served(machine, "a")
        status = await machine.status()
        assert (status.parked_pid, status.last_error) == (0, "")
        assert status.replicas[0].stages["fork"] > 0.1  # what it takes to import torch
        os.kill(status.replicas[0].pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            while "SIGKILL" not in (await machine.status()).last_error:
                await machine.changed()

    run(tmp_path, "fresh", use)


@pytest.mark.slow
def test_a_machine_serves_whose_parked_process_has_a_second_thread(tmp_path: Path) -> None:
    async def use(machine: Machine) -> None:
        tokens = await served(machine, "a")
        status = await machine.status()
        assert status.parked_pid != 0
        assert "has 2 threads" in status.last_error
        os.kill(status.replicas[0].pid, signal.SIGKILL)
        assert tokens == await served(machine, "b")

    run(tmp_path, "threaded", use)


def run(root: Path, kind: str, use: Callable[[Machine], Awaitable[None]]) -> None:
    """Uses a machine with such a host process, see fresh_host.py; afterwards nothing of it is left."""
    manifest = prepare_model(tiny_model("llama"), root / "base")
    options = options_for(root)
    state = state_dir(options, root / "base")
    state.mkdir(parents=True)

    async def scenario() -> list[psutil.Process]:
        await until(lambda: (runtime_dir(state) / HOST_SOCKET).exists())
        machine = Machine(options, manifest, root / "base")
        await machine.start()
        try:
            await use(machine)
            return psutil.Process(host.pid).children(recursive=True)
        finally:
            await machine.close()

    command = [sys.executable, str(Path(__file__).with_name("fresh_host.py")), str(state), kind]
    with subprocess.Popen(command) as host:
        processes = asyncio.run(scenario())
    assert host.returncode == 0
    asyncio.run(until(lambda: all(is_gone(process.pid) for process in processes)))


async def served(machine: Machine, request_id: str) -> list[int]:
    """A right answer."""
    work = Submit(request_id=request_id, prompt=PROMPT, sampling=greedy(20))
    tokens = [token async for progress in machine.submit(work) for token in progress.tokens]
    Oracle(tiny_model("llama"), []).check(None, list(PROMPT), tokens)
    return tokens


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)
