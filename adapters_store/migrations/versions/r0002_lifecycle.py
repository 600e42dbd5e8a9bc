"""Canaries, pins, rollbacks, begun uploads, deletions, routers, and the catalog's own id."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

from tunefleet.adapters_store.schema import ascii_text

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    _adapters()
    _identity()
    _uploads()
    _deletions()
    _routers()


def _adapters() -> None:
    op.add_column("adapters", sa.Column("canary_version", sa.Integer))
    op.add_column("adapters", sa.Column("canary_percent", sa.Float))
    op.add_column("adapters", sa.Column("pin_tier", ascii_text(16)))
    op.add_column("adapters", sa.Column("pin_until", ascii_text(32)))
    op.add_column("live_history", sa.Column("undone_at", ascii_text(32)))
    _partial_index("ix_adapters_pinned", "adapters", ["base", "adapter_id"], "pin_tier IS NOT NULL")


def _identity() -> None:
    table = op.create_table("identity", sa.Column("catalog_id", ascii_text(36), primary_key=True))
    op.bulk_insert(table, [{"catalog_id": str(uuid.uuid4())}])


def _uploads() -> None:
    op.create_table(
        "uploads",
        sa.Column("upload_id", ascii_text(64), primary_key=True),
        sa.Column("tenant", ascii_text(128), nullable=False),
        sa.Column("user_id", ascii_text(128), nullable=False),
        sa.Column("name", ascii_text(64), nullable=False),
        sa.Column("base", ascii_text(255), nullable=False),
        sa.Column("object_key", ascii_text(512), nullable=False, unique=True),
        sa.Column("kind", ascii_text(16), nullable=False),
        sa.Column("promote", sa.Boolean, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("created_at", ascii_text(32), nullable=False),
        sa.Column("expires_at", ascii_text(32), nullable=False),
    )
    op.create_index("ix_uploads_tenant_user_id", "uploads", ["tenant", "user_id"])
    op.create_index("ix_uploads_expires_at", "uploads", ["expires_at"])


def _deletions() -> None:
    op.create_table(
        "deletions",
        sa.Column("deletion_id", ascii_text(36), primary_key=True),
        sa.Column("tenant", ascii_text(128), nullable=False),
        sa.Column("user_id", ascii_text(128)),
        sa.Column("name", ascii_text(64)),
        sa.Column("version", sa.Integer),
        sa.Column("removed", sa.JSON, nullable=False),
        sa.Column("kept", sa.JSON, nullable=False),
        sa.Column("holder", ascii_text(64)),
        sa.Column("held_until", ascii_text(32)),
        sa.Column("requested_at", ascii_text(32), nullable=False),
        sa.Column("finished_at", ascii_text(32)),
    )
    _partial_index(
        "ix_deletions_pending", "deletions", ["requested_at", "deletion_id"], "finished_at IS NULL"
    )
    op.create_table(
        "deletion_items",
        sa.Column("deletion_id", ascii_text(36), sa.ForeignKey("deletions.deletion_id"), primary_key=True),
        sa.Column("prefix", ascii_text(512), primary_key=True),
        sa.Column("digest", ascii_text(64)),
        sa.Column("num_objects", sa.Integer),
        sa.Column("kept", sa.JSON, nullable=False),
    )
    op.create_table(
        "deletion_acks",
        sa.Column("deletion_id", ascii_text(36), sa.ForeignKey("deletions.deletion_id"), primary_key=True),
        sa.Column("router_id", ascii_text(64), primary_key=True),
        sa.Column("copies", sa.JSON, nullable=False),
        sa.Column("kept", sa.JSON, nullable=False),
    )


def _routers() -> None:
    op.create_table(
        "routers",
        sa.Column("router_id", ascii_text(64), primary_key=True),
        sa.Column("leased_until", ascii_text(32), nullable=False),
    )
    op.create_index("ix_routers_leased_until", "routers", ["leased_until"])
    op.create_table(
        "claims",
        sa.Column("name", ascii_text(64), primary_key=True),
        sa.Column("holder", ascii_text(64), nullable=False),
        sa.Column("held_until", ascii_text(32), nullable=False),
    )
    op.create_index("ix_claims_holder", "claims", ["holder"])


def _partial_index(name: str, table: str, columns: list[str], condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)
