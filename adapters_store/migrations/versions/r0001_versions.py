"""Tenants, users, adapters, versions, live history, idempotency keys.

Only what isn't there is made: releases before the first migration made these tables themselves.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from tunefleet.adapters_store.schema import ascii_text

revision = "0001"
down_revision = None


def upgrade() -> None:
    _people()
    _adapters()
    _versions()
    _live_history()
    _upload_keys()


def _people() -> None:
    op.create_table(
        "tenants",
        sa.Column("tenant", ascii_text(128), primary_key=True),
        sa.Column("created_at", ascii_text(32), nullable=False),
        if_not_exists=True,
    )
    op.create_table(
        "users",
        sa.Column("tenant", ascii_text(128), sa.ForeignKey("tenants.tenant"), primary_key=True),
        sa.Column("user_id", ascii_text(128), primary_key=True),
        sa.Column("fallback", ascii_text(16)),
        sa.Column("limits", sa.JSON, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("created_at", ascii_text(32), nullable=False),
        if_not_exists=True,
    )


def _adapters() -> None:
    op.create_table(
        "adapters",
        sa.Column("adapter_id", sa.Integer, primary_key=True),
        sa.Column("tenant", ascii_text(128), nullable=False),
        sa.Column("user_id", ascii_text(128), nullable=False),
        sa.Column("name", ascii_text(64), nullable=False),
        sa.Column("base", ascii_text(255), nullable=False),
        sa.Column("last_version", sa.Integer, nullable=False),
        sa.Column("live_version", sa.Integer),
        sa.Column("created_at", ascii_text(32), nullable=False),
        sa.UniqueConstraint("tenant", "user_id", "name", "base"),
        sa.ForeignKeyConstraint(["tenant", "user_id"], ["users.tenant", "users.user_id"]),
        if_not_exists=True,
    )


def _versions() -> None:
    op.create_table(
        "versions",
        sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.adapter_id"), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("digest", ascii_text(64), nullable=False),
        sa.Column("object_key", ascii_text(512), nullable=False, unique=True),
        sa.Column("config_sha256", ascii_text(64), nullable=False),
        sa.Column("weights_sha256", ascii_text(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("target_modules", sa.JSON, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("warnings", sa.JSON, nullable=False),
        sa.Column("created_at", ascii_text(32), nullable=False),
        if_not_exists=True,
    )
    op.create_index("ix_versions_digest", "versions", ["digest"], if_not_exists=True)


def _live_history() -> None:
    op.create_table(
        "live_history",
        sa.Column("entry_id", sa.Integer, primary_key=True),
        sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.adapter_id"), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("created_at", ascii_text(32), nullable=False),
        if_not_exists=True,
    )
    op.create_index(
        "ix_live_history_adapter_id_entry_id", "live_history", ["adapter_id", "entry_id"], if_not_exists=True
    )


def _upload_keys() -> None:
    op.create_table(
        "upload_keys",
        sa.Column("adapter_id", sa.Integer, primary_key=True),
        sa.Column("key", ascii_text(255), primary_key=True),
        sa.Column("request_sha256", ascii_text(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("was_new", sa.Boolean, nullable=False),
        sa.Column("was_live", sa.Boolean, nullable=False),
        sa.Column("created_at", ascii_text(32), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id", "version"], ["versions.adapter_id", "versions.version"], ondelete="CASCADE"
        ),
        if_not_exists=True,
    )
    op.create_index(
        "ix_upload_keys_adapter_id_version", "upload_keys", ["adapter_id", "version"], if_not_exists=True
    )
    op.create_index("ix_upload_keys_created_at", "upload_keys", ["created_at"], if_not_exists=True)
