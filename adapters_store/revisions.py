"""The schema's revisions: is a database up to date, and if not, bring it there.

Alembic is imported only for the latter: a process that opens an up-to-date catalog asks for one row.
"""

from __future__ import annotations

import importlib.resources

from sqlalchemy import Connection, inspect, select, text

from tunefleet.adapters_store.schema import identity
from tunefleet.errors import ConfigError

REVISIONS = ("0001", "0002")  # oldest first
NEWEST = REVISIONS[-1]

_LOCK = 7308604897285  # any number that nobody else uses: Postgres' advisory lock of migrations


def is_newest(connection: Connection) -> bool:
    """Whether the schema is this code's.

    Raises:
        ConfigError: it is of a newer one, which this code can't know.
    """
    revision = _current(connection)
    if revision is not None and revision not in REVISIONS:
        raise ConfigError(
            f"the database was made by a newer tunefleet (its revision is {revision}, the newest known here "
            f"is {NEWEST}): upgrade tunefleet, or use another database",
            param="database_url",
        )
    return revision == NEWEST


def upgrade(connection: Connection) -> None:
    """Runs what is missing, in the caller's transaction; one process at a time, the others find it done."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
    if is_newest(connection):
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    scripts = importlib.resources.files("tunefleet.adapters_store") / "migrations"
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def catalog_id(connection: Connection) -> str:
    return str(connection.execute(select(identity.c.catalog_id)).scalar_one())


def _current(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()
