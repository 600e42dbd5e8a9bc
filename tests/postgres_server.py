"""A real Postgres for tests: started at first use, a fresh database for each test."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from tunefleet.adapters_store.catalog import Catalog

MISSING = "needs the programs of Postgres: apt-get install postgresql"
MEMORY_BYTES = 2 * 1024**3
_SETTINGS = {"fsync": "off", "shared_buffers": "16MB", "max_connections": "80", "autovacuum": "off"}


class PostgresServer:
    """One cluster in a folder of its own. ``running`` starts and ends it."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._names = (f"test_{number}" for number in itertools.count())
        self._template: str | None = None
        self._log = f"{folder}/log"
        self.port = 0

    def prepare(self) -> None:
        if os.geteuid() == 0:
            shutil.chown(self._folder, "postgres", "postgres")
        cluster = str(self._folder / "cluster")
        self._run("initdb", "-D", cluster, "-A", "trust", "-U", "app", "-E", "UTF8", "--no-sync")
        self._trust_nobody_called("locked")

    def start(self) -> None:
        """On a port that was free just now; on another one if it isn't any more."""
        for _ in range(3):
            self.port = self.port or _free_port()
            settings = {**_SETTINGS, "listen_addresses": "127.0.0.1", "port": self.port}
            options = " ".join(f"-c {name}={value}" for name, value in settings.items())
            try:
                return self._ctl(
                    "-w", "-o", f"{options} -k {self._folder}", "-l", f"{self._folder}/log", "start"
                )
            except subprocess.CalledProcessError:
                self.port = 0
        raise RuntimeError(Path(self._log).read_text())

    def stop(self, mode: str = "immediate") -> None:
        """``immediate``: as a crash."""
        self._ctl("stop", "-w", "-m", mode)

    def url(self, database: str, user: str = "app") -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def empty(self) -> str:
        """The URL of a database without tables. Its own order of text is not by bytes."""
        return self._create("TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C'")

    def fresh(self) -> str:
        """The URL of a database with an empty catalog."""
        if self._template is None:
            url = self.empty()
            Catalog(url).close()
            self._template = url.rpartition("/")[2]
        return self._create(f"TEMPLATE {self._template} STRATEGY FILE_COPY")

    def drop(self, url: str) -> None:
        self.execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def copy_of(self, url: str) -> str:
        """The URL of a copy of a database that nobody is connected to."""
        return self._create(f"TEMPLATE {url.rpartition('/')[2]}")

    def execute(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def _create(self, clause: str) -> str:
        name = next(self._names)
        self.execute(f"CREATE DATABASE {name} {clause}")
        return self.url(name)

    def _trust_nobody_called(self, user: str) -> None:
        path = self._folder / "cluster" / "pg_hba.conf"
        path.write_text(f"host all {user} 127.0.0.1/32 scram-sha-256\n{path.read_text()}")

    def _ctl(self, *arguments: str) -> None:
        self._run("pg_ctl", *arguments, "-D", str(self._folder / "cluster"))

    def _run(self, program: str, *arguments: str) -> None:
        """As somebody who isn't root: Postgres refuses to serve as root."""
        as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        command = [*as_user, str(self._programs / program), *arguments]
        with (self._folder / "output").open("wb") as output:
            subprocess.run(command, check=True, stdout=output, stderr=output, cwd=self._folder)


def programs() -> Path | None:
    """The newest installed Postgres."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return found[-1].parent if found else None


@contextmanager
def running(binaries: Path) -> Iterator[PostgresServer]:
    with tempfile.TemporaryDirectory(prefix="tunefleet-postgres-", dir=_fast_folder()) as name:
        server = PostgresServer(binaries, Path(name))
        server.prepare()
        server.start()
        try:
            yield server
        finally:
            server.stop("fast")  # a crash would leave shared memory


def _fast_folder() -> Path | None:
    """In memory where there is room: copying a database takes a tenth of the time."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > MEMORY_BYTES
    return memory if has_room and os.access(memory, os.W_OK) else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
