"""Runs migrations on the connection, and in the transaction, of whoever asked for them."""

from __future__ import annotations

from alembic import context

from tunefleet.adapters_store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,  # SQLite too: BEGIN IMMEDIATE is ours
    render_as_batch=True,
)
context.run_migrations()
