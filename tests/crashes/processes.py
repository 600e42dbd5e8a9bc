"""Processes that die at a step: forked from one that has imported all that they need and holds nothing.

``python -m crashes.processes`` reads a ``Run`` a line, forks a process for it, and passes on what that says.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from crashes.places import Place, in_folder, make_adapters


class Run(msgspec.Struct, frozen=True):
    scenario: str
    place: Place
    at: str | None = None  # where to die
    offset_s: float = 0.0  # how far the catalog's clock is ahead
    traced: bool = False  # names the steps, and the state after each operation


class Said(msgspec.Struct, omit_defaults=True):
    """A line of a process, or of the one that saw it end."""

    acknowledged: bool = False
    state: Any = None  # with the acknowledgement of a traced run
    step: str | None = None
    error: str | None = None
    status: int | None = None  # the last line: minus the signal, or the exit status


class Outcome(msgspec.Struct):
    num_acknowledged: int
    steps: list[str]
    states: list[Any]
    status: int


class Processes:
    """Where runs happen, one at a time. ``running`` starts and ends it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def run(self, run: Run) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(run) + b"\n")
        self._process.stdin.flush()
        outcome = Outcome(0, [], [], 0)
        for line in self._process.stdout:
            said = msgspec.json.decode(line, type=Said)
            assert said.error is None, said.error
            if said.status is not None:
                outcome.status = said.status
                return outcome
            if said.step is not None:
                outcome.steps.append(said.step)
            if said.acknowledged:
                outcome.num_acknowledged += 1
            if said.state is not None:
                outcome.states.append(said.state)
        raise AssertionError("the process that forks has died")


@contextmanager
def running() -> Iterator[Processes]:
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "crashes.processes"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environ, **pipes) as process:
        try:
            yield Processes(process)
        finally:
            process.stdin.close()
            process.wait()


def _serve() -> None:
    _warm_up()
    assert threading.active_count() == 1  # a fork takes no other thread along, but the locks it holds
    gc.freeze()  # a collection in a fork would copy all that is shared with it
    for line in sys.stdin.buffer:
        pid = os.fork()
        if not pid:
            _child(msgspec.json.decode(line, type=Run))
        _, status = os.waitpid(pid, 0)
        _say(Said(status=os.waitstatus_to_exitcode(status)))


def _warm_up() -> None:
    """Imports and fills caches by doing once what every fork does."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(Path(folder) / "adapters")
        run = Run("world", in_folder(Path(folder) / "world", adapters))
        asyncio.run(_until_it_dies(run))


def _child(run: Run) -> None:
    """Never returns: an ordinary end would flush and close what is the parent's."""
    try:
        asyncio.run(_until_it_dies(run))
    except BaseException:
        _say(Said(error=f"{run}\n{traceback.format_exc()}"))
    finally:
        os._exit(0)


async def _until_it_dies(run: Run) -> None:
    from crashes.scenarios import OTHERS, SCENARIOS
    from crashes.states import state
    from tunefleet.adapters_store import steps

    catalog = run.place.catalog() if run.traced else None

    async def acknowledge() -> None:
        _say(Said(acknowledged=True, state=catalog and state(catalog)))

    if catalog is not None:
        _say(Said(state=state(catalog)))
    steps._FROM_ENVIRONMENT = _Trace() if run.traced else steps.CrashPoint(run.at)
    await {**SCENARIOS, **OTHERS}[run.scenario](run.place, acknowledge, run.offset_s)


class _Trace:
    """Says each step instead of dying at one."""

    def reached(self, name: str) -> None:
        _say(Said(step=name))


def _say(said: Said) -> None:
    """In one write, before anything else happens: a process that is killed keeps nothing back."""
    line = msgspec.json.encode(said) + b"\n"
    while line:
        line = line[os.write(1, line) :]


if __name__ == "__main__":
    _serve()
