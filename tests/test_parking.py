"""The parked process, seen from the host process: it comes, forks, refuses, goes, and comes again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from torch import nn

from parked_programs import EXIT_CODE
from starter_kit import MANIFEST, TESTS, Heard, children, fork_message, is_gone
from tunefleet.errors import ReplicaError
from tunefleet.messages import Fork, ForkRefused
from tunefleet.runtime.fresh import FreshStarts
from tunefleet.runtime.parked import ParkedProcess
from tunefleet.runtime.parking import Parking, starter_for
from tunefleet.runtime.wire import BlockingLink, frame


@pytest.fixture(autouse=True)
def _no_process_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After any test; and processes find the modules of tests."""
    monkeypatch.setenv("PYTHONPATH", TESTS)
    before = children()
    yield
    assert children() <= before


def parking(heard: Heard, way: str) -> Parking:
    """With a process that behaves in this way, see parked_programs.py."""
    return Parking(
        Path(way),
        on_forked=heard.on_forked,
        on_reaped=heard.on_reaped,
        on_lost=heard.on_lost,
        module="parked_programs",
    )


def test_a_child_that_begins_and_ends_is_told_with_its_exit_code(tmp_path: Path) -> None:
    async def scenario() -> None:
        heard = Heard()
        starter = parking(heard, "obey")
        assert (starter.pid, starter.stages) == (0, {})
        for replica_id in ("r1", "r2"):
            await starter.fork(fork_message(tmp_path, replica_id=replica_id))
        await heard.until(lambda: len(heard.reaped) == 2)
        assert psutil.Process(starter.pid).parent() == psutil.Process()
        assert starter.stages == {"load": 0.5}
        assert [message.replica_id for message in heard.forked] == ["r1", "r2"]
        assert [message.pid for message in heard.forked] == [message.pid for message in heard.reaped]
        assert {EXIT_CODE} == {message.exit_code for message in heard.reaped}
        await starter.close()

    asyncio.run(scenario())


def test_those_who_ask_at_once_share_one_process() -> None:
    async def scenario() -> None:
        before = children()
        starter = parking(Heard(), "obey")
        await asyncio.gather(*(starter.ensure() for _ in range(5)))
        assert {starter.pid} == children() - before
        await starter.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("way", "reason"), [("fail", "the base is damaged"), ("die", "ended while starting")]
)
def test_a_start_that_fails_says_why_each_time_it_is_tried(way: str, reason: str) -> None:
    async def scenario() -> None:
        heard = Heard()
        starter = parking(heard, way)
        for _ in range(2):
            with pytest.raises(ReplicaError, match=reason) as caught:
                await starter.ensure()
            assert caught.value.code == "replica_start_failed"
        await starter.close()
        assert heard.num_lost == 0

    asyncio.run(scenario())


def test_a_process_that_can_not_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        starter = parking(Heard(), "obey")
        monkeypatch.setenv("TOO_LONG", "x" * (1 << 20))
        with pytest.raises(ReplicaError, match="Argument list too long"):
            await starter.ensure()
        monkeypatch.delenv("TOO_LONG")
        await starter.ensure()
        await starter.close()

    asyncio.run(scenario())


def test_a_closed_one_is_gone_and_comes_back_when_asked(tmp_path: Path) -> None:
    async def scenario() -> None:
        heard = Heard()
        starter = parking(heard, "obey")
        await starter.close()  # nothing is there yet
        await starter.ensure()
        first = starter.pid
        await starter.close()
        assert (starter.pid, psutil.pid_exists(first), heard.num_lost) == (0, False, 0)
        await starter.fork(fork_message(tmp_path))
        await heard.until(lambda: heard.reaped)
        assert starter.pid not in (0, first)
        await starter.close()
        assert heard.num_lost == 0

    asyncio.run(scenario())


def test_one_is_started_while_the_last_one_still_ends() -> None:
    async def scenario() -> None:
        heard = Heard()
        starter = parking(heard, "stay")
        await starter.ensure()
        first = starter.pid
        closing = asyncio.create_task(starter.close())
        await asyncio.sleep(0)
        await starter.ensure()
        assert starter.pid not in (0, first)
        await closing
        await starter.close()
        assert heard.num_lost == 0

    asyncio.run(scenario())


def test_closing_ends_a_start_and_tells_those_who_wait_for_it() -> None:
    async def scenario() -> None:
        heard = Heard()
        starter = parking(heard, "never_get_ready")
        waiting = asyncio.create_task(starter.ensure())
        await asyncio.sleep(0)
        await starter.close()
        with pytest.raises(ReplicaError):
            await waiting
        assert heard.num_lost == 0

    asyncio.run(scenario())


def test_closing_takes_a_moment_however_the_process_is() -> None:
    """SIGTERM doesn't end it."""

    async def scenario() -> None:
        starter = parking(Heard(), "stay")
        await starter.ensure()
        started = time.monotonic()
        await starter.close()
        assert time.monotonic() - started < 5

    asyncio.run(scenario())


def test_a_killed_one_is_told_reaped_and_comes_back_when_asked(tmp_path: Path) -> None:
    async def scenario() -> None:
        heard = Heard()
        starter = parking(heard, "obey")
        await starter.ensure()
        first = starter.pid
        os.kill(first, signal.SIGKILL)
        await heard.until(lambda: heard.num_lost)
        assert starter.pid == 0
        await starter.fork(fork_message(tmp_path))
        await heard.until(lambda: heard.reaped)
        assert starter.pid not in (0, first)
        assert not psutil.pid_exists(first)
        await starter.close()
        assert heard.num_lost == 1

    asyncio.run(scenario())


def test_what_may_not_be_forked_starts_as_a_fresh_process_and_says_so(tmp_path: Path) -> None:
    """No base is there: the fresh process says that, and the parked one stays."""

    async def scenario() -> None:
        heard = Heard()
        starter = parking(heard, "refuse")
        await starter.fork(fork_message(tmp_path))
        await heard.until(lambda: heard.reaped)
        (forked,), (reaped,) = heard.forked, heard.reaped
        assert (forked.replica_id, forked.instead_of_fork) == ("r1", "it has 2 threads")
        assert (reaped.pid, reaped.exit_code) == (forked.pid, 1)
        assert "holds no prepared base" in reaped.reason
        assert starter.pid != 0
        await starter.close()

    asyncio.run(scenario())


def test_which_platforms_fork() -> None:
    starters = {platform: starter_for(platform) for platform in ("linux", "darwin", "win32")}
    assert starters == {"linux": Parking, "darwin": FreshStarts, "win32": FreshStarts}


# --- the parked process itself


@pytest.fixture
def _signals_kept() -> Iterator[None]:
    """A parked process takes SIGCHLD for itself."""
    handler, number = signal.getsignal(signal.SIGCHLD), signal.set_wakeup_fd(-1)
    yield
    signal.signal(signal.SIGCHLD, handler)
    signal.set_wakeup_fd(number)


@pytest.mark.usefixtures("_signals_kept")
def test_a_process_with_a_second_thread_refuses_to_fork(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    with ours, theirs:
        ours.sendall(frame(fork_message(tmp_path)))
        ours.shutdown(socket.SHUT_WR)
        ParkedProcess(BlockingLink[Fork](theirs, Fork), nn.Module(), MANIFEST).serve()
        (message,) = BlockingLink[ForkRefused](ours, ForkRefused).receive() or []
    done.set()
    thread.join()
    assert message.replica_id == "r1"
    assert "threads, and a fork would have locks that nobody opens" in message.reason


HOST = """
    import asyncio
    from pathlib import Path
    from tunefleet.runtime.parking import Parking

    def nothing(*_): ...

    async def main():
        parking = Parking(Path({base!r}), on_forked=nothing, on_reaped=nothing, on_lost=nothing)
        await parking.ensure()

    asyncio.run(main())
"""


def test_none_is_left_when_the_host_process_is_killed_while_it_starts(tmp_path: Path) -> None:
    """It imports torch then: it finds out when it wants to say that it is ready."""
    program = textwrap.dedent(HOST.format(base=str(tmp_path)))
    with subprocess.Popen([sys.executable, "-c", program]) as host:
        while not (parked := psutil.Process(host.pid).children()):
            time.sleep(0.01)
        host.kill()
    assert not is_gone(parked[0].pid)
    deadline = time.monotonic() + 60
    while not is_gone(parked[0].pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(parked[0].pid)
