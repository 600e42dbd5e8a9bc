"""Fixtures and settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from catalog_kit import Clock
    from postgres_server import PostgresServer
    from router_kit import Kit, Server
    from s3_servers import S3Server
    from tunefleet.adapters_store.catalog import Catalog

# Tiny tensors on many threads cost more in waking threads than in work; before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def pytest_configure(config: pytest.Config) -> None:
    """At the end of a run: which bad inputs and faults it withstood."""
    from hazards import Withstood

    config.pluginmanager.register(Withstood(), "hazards")


@pytest.fixture
def anyio_backend() -> str:
    """Tests that are coroutines run on asyncio, which is all that we run on."""
    return "asyncio"


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    """A router's parts, with a dispatcher that answers without an engine."""
    from router_kit import Kit

    return Kit(tmp_path)


@pytest.fixture
def client(kit: Kit) -> Iterator[TestClient]:
    """Of the kit's API, in this process."""
    from router_kit import api

    with api(kit) as client:
        yield client


@pytest.fixture
def server(kit: Kit) -> Iterator[Server]:
    """The kit's API on a port; everybody is let in."""
    from router_kit import Server, serving
    from tunefleet.auth import anyone
    from tunefleet.http.app import create_app

    with serving(create_app(kit.fleet(), anyone, with_lifespan=True)) as url:
        yield Server(kit, url)


@pytest.fixture(scope="session")
def s3_credentials() -> Iterator[None]:
    """The test servers' keys where everybody looks for them, subprocesses too."""
    from s3_servers import CREDENTIALS

    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        yield


@pytest.fixture(scope="session")
def juicefs(tmp_path_factory: pytest.TempPathFactory, s3_credentials: None) -> Iterator[S3Server]:
    """A JuiceFS gateway that starts at first use; make a bucket of your own."""
    from s3_servers import JuiceFS, running

    with running(JuiceFS, tmp_path_factory.mktemp("juicefs")) as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory, s3_credentials: None) -> Iterator[S3Server]:
    """A SeaweedFS server that starts at first use; make a bucket of your own."""
    from s3_servers import SeaweedFS, running

    with running(SeaweedFS, tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A Postgres that starts at first use; make a database of your own."""
    from postgres_server import MISSING, programs, running

    found = programs()
    if found is None:
        pytest.skip(MISSING)
    with running(found) as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """An empty catalog on Postgres."""
    url = postgres.fresh()
    yield url
    postgres.drop(url)


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty catalog, on each database that we support."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/catalog.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def empty_database_url(database_url: str, request: pytest.FixtureRequest) -> str:
    """A database without tables, on each that we support."""
    if database_url.startswith("sqlite"):
        return database_url
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.empty()


@pytest.fixture
def clock() -> Clock:
    """The time of ``catalog``."""
    from catalog_kit import Clock

    return Clock()


@pytest.fixture
def catalog(database_url: str, clock: Clock) -> Iterator[Catalog]:
    """An open catalog, on each database that we support. Modules fill theirs by a fixture of that name."""
    from tunefleet.adapters_store.catalog import Catalog

    opened = Catalog(database_url, now=clock)
    yield opened
    opened.close()
