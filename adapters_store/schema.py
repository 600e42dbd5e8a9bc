"""The catalog's tables. Times are RFC 3339 text in UTC, which sorts."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

tenants = Table(
    "tenants",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("created_at", String(32), nullable=False),
)

users = Table(
    "users",
    metadata,
    Column("tenant", String(128), ForeignKey("tenants.tenant"), primary_key=True),
    Column("user_id", String(128), primary_key=True),
    Column("fallback", String(16)),  # none or base; NULL: the deployment's option
    Column("limits", JSON, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("created_at", String(32), nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("adapter_id", Integer, primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("user_id", String(128), nullable=False),
    Column("name", String(64), nullable=False),
    Column("base", String(255), nullable=False),
    Column(
        "last_version", Integer, nullable=False
    ),  # highest number ever given; numbers are never used again
    Column("live_version", Integer),  # NULL: nothing was promoted yet
    Column("created_at", String(32), nullable=False),
    UniqueConstraint("tenant", "user_id", "name", "base"),
    ForeignKeyConstraint(["tenant", "user_id"], ["users.tenant", "users.user_id"]),
)

versions = Table(
    "versions",
    metadata,
    Column("adapter_id", Integer, ForeignKey("adapters.adapter_id"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(64), nullable=False),
    Column("object_key", String(512), nullable=False, unique=True),  # prefix of its two objects
    Column("config_sha256", String(64), nullable=False),
    Column("weights_sha256", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("target_modules", JSON, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("created_at", String(32), nullable=False),
    Index(None, "digest"),
)

live_history = Table(
    "live_history",
    metadata,
    Column("entry_id", Integer, primary_key=True),
    Column("adapter_id", Integer, ForeignKey("adapters.adapter_id"), nullable=False),
    Column("version", Integer, nullable=False),  # live from created_at on
    Column("created_at", String(32), nullable=False),
    Index(None, "adapter_id", "entry_id"),
)

upload_keys = Table(
    "upload_keys",
    metadata,
    Column("adapter_id", Integer, primary_key=True),
    Column("key", String(255), primary_key=True),  # the client's Idempotency-Key
    Column("request_sha256", String(64), nullable=False),
    Column("version", Integer, nullable=False),
    Column("was_new", Boolean, nullable=False),
    Column("was_live", Boolean, nullable=False),
    Column("created_at", String(32), nullable=False),
    ForeignKeyConstraint(
        ["adapter_id", "version"], ["versions.adapter_id", "versions.version"], ondelete="CASCADE"
    ),
    Index(None, "adapter_id", "version"),
    Index(None, "created_at"),
)
