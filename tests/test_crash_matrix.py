"""kill -9 at every step of everything that changes the store, then a restart: nothing is lost or half.

Each operation of a scenario takes the catalog from one state to the next. Whatever the step at which a
process dies, the state is the one after the operations that were acknowledged, or one further.
"""

from __future__ import annotations

import itertools
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from crashes.oracle import before, check_crashed, check_restarted
from crashes.places import Place, copied, in_folder, make_adapters
from crashes.processes import Outcome, Processes, Run, running
from crashes.scenarios import HOUR_S, SCENARIOS
from postgres_server import PostgresServer
from s3_servers import S3Server
from tunefleet.adapters_store.file_store import FileStore
from tunefleet.adapters_store.objects import open_store
from tunefleet.adapters_store.steps import STEPS

pytestmark = pytest.mark.slow

SHM = Path("/dev/shm")


class Worlds:
    """A world in files, and copies of it to destroy.

    Args:
        every_point: kill at each time that a step is reached, not only the first and the last.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        database_url: str | None = None,
        *,
        every_point: bool = True,
    ) -> None:
        self.every_point = every_point
        self.processes = processes
        self.killed: Counter[str] = Counter()
        self.killed_again: Counter[str] = Counter()
        self._folder = folder
        self._numbers = itertools.count()
        self._world = in_folder(folder / "world", make_adapters(folder / "adapters"), database_url)
        assert processes.run(Run("world", self._world)).status == 0
        self.before = before(self._world)

    def copy(self) -> Place:
        return copied(self._world, self._folder / str(next(self._numbers)))

    def remove(self, place: Place) -> None:
        shutil.rmtree(place.folder)


class BucketWorlds(Worlds):
    """Objects in a bucket, under a prefix for each copy."""

    def __init__(
        self, folder: Path, processes: Processes, server: S3Server, bucket: str, **more: Any
    ) -> None:
        super().__init__(folder, processes, **more)
        self._server = server
        self._bucket = bucket

    def copy(self) -> Place:
        place = super().copy()
        url = self._server.url(self._bucket, Path(place.folder).name)
        in_bucket, files = open_store(url), Path(place.folder) / "store" / "objects"
        for found in FileStore(files).list(""):
            in_bucket.put(found.key, files / found.key)
        in_bucket.close()
        return msgspec.structs.replace(place, store_url=url)


class PostgresWorlds(BucketWorlds):
    """The catalog in a database for each copy."""

    def __init__(self, folder: Path, processes: Processes, postgres: PostgresServer, **more: Any) -> None:
        super().__init__(folder, processes, database_url=postgres.fresh(), **more)
        self._postgres = postgres

    def copy(self) -> Place:
        url = self._postgres.copy_of(self._world.database_url)
        return msgspec.structs.replace(super().copy(), database_url=url)

    def remove(self, place: Place) -> None:
        super().remove(place)
        self._postgres.drop(place.database_url)


SERVERS = [pytest.mark.s3, pytest.mark.postgres]


@pytest.fixture(
    scope="module",
    params=[
        "files",
        pytest.param("seaweedfs", marks=SERVERS[:1]),
        pytest.param("postgres+juicefs", marks=SERVERS),
    ],
)
def worlds(request: pytest.FixtureRequest) -> Iterator[Worlds]:
    where = SHM if SHM.is_dir() else None  # where a sync costs nothing; a killed process loses no page anyway
    server = None if request.param == "files" else request.getfixturevalue(request.param.rpartition("+")[2])
    with tempfile.TemporaryDirectory(prefix="tunefleet-crash-", dir=where) as name, running() as processes:
        folder = Path(name)
        if request.param == "files":
            yield Worlds(folder, processes)
        elif request.param == "seaweedfs":
            bucket = server.make_bucket(versioned=True)
            yield BucketWorlds(folder, processes, server=server, bucket=bucket, every_point=False)
        else:
            bucket, postgres = server.make_bucket(), request.getfixturevalue("postgres")
            yield PostgresWorlds(folder, processes, postgres=postgres, server=server, bucket=bucket)


def points(steps: Sequence[str], *, every: bool) -> list[str]:
    """A step that is reached again has a number: ``name#2``. Not every: its first and last time."""
    total, times = Counter(steps), Counter[str]()
    named = []
    for step in steps:
        times[step] += 1
        if every or times[step] in (1, total[step]):
            named.append(f"{step}#{times[step]}")
    return named


class Crash(NamedTuple):
    """A process that died, the world it left, and what may be there."""

    place: Place
    possible: list[Any]


def crashed(worlds: Worlds, scenario: str, at: str, states: Sequence[Any]) -> Crash:
    place = worlds.copy()
    outcome = worlds.processes.run(Run(scenario, place, at))
    assert (at, -signal.SIGKILL) == (at, outcome.status)
    done = outcome.num_acknowledged
    crash = Crash(place, list(states[done : done + 2]))
    check_crashed(place, 0.0, crash.possible)
    return crash


def restarted(worlds: Worlds, crash: Crash, offset_s: float = 2 * HOUR_S, at: str | None = None) -> None:
    outcome = worlds.processes.run(Run("restart", crash.place, at, offset_s))
    assert (at, -signal.SIGKILL if at else 0) == (at, outcome.status)
    if at is None:
        check_restarted(crash.place, offset_s, crash.possible, worlds.before)
        worlds.remove(crash.place)
    else:
        check_crashed(crash.place, offset_s, crash.possible)


def unharmed(worlds: Worlds, scenario: str) -> Outcome:
    """The scenario to its end: its steps, and the states it goes through."""
    place = worlds.copy()
    traced = worlds.processes.run(Run(scenario, place, traced=True))
    assert (0, len(traced.states) - 1) == (traced.status, traced.num_acknowledged)
    restarted(worlds, Crash(place, traced.states[-1:]))
    return traced


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_process_killed_at_any_step_loses_nothing_and_leaves_nothing_half(
    worlds: Worlds, scenario: str
) -> None:
    traced = unharmed(worlds, scenario)
    for at in points(traced.steps, every=worlds.every_point):
        restarted(worlds, crashed(worlds, scenario, at, traced.states))
        worlds.killed[at.partition("#")[0]] += 1


TWICE = {
    "upload": "upload:weights-put#1",
    "upload_in_steps": "complete:object-gone#1",
    "delete_user": "delete:noted#2",
    "collect": "collect:object-gone#3",
}


@pytest.mark.parametrize("scenario", TWICE)
def test_a_restart_killed_at_any_step_is_made_good_by_the_next_one(worlds: Worlds, scenario: str) -> None:
    states = unharmed(worlds, scenario).states
    first = crashed(worlds, scenario, TWICE[scenario], states)
    traced = worlds.processes.run(Run("restart", first.place, offset_s=2 * HOUR_S, traced=True))
    assert traced.status == 0
    for at in points(traced.steps, every=worlds.every_point):
        crash = crashed(worlds, scenario, TWICE[scenario], states)
        restarted(worlds, crash, at=at)
        restarted(worlds, crash, offset_s=4 * HOUR_S)
        worlds.killed_again[at.partition("#")[0]] += 1


def test_every_step_was_met_and_many_times(worlds: Worlds) -> None:
    """After the others, so that the matrix can't become empty unseen."""
    in_files = type(worlds) is Worlds
    assert set(STEPS) - (set() if in_files else {"file:written", "stage:put"}) == set(worlds.killed)
    assert worlds.killed.total() >= 100
    assert worlds.killed_again.total() >= 20
