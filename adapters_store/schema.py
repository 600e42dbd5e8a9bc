"""The catalog's tables, as its newest revision makes them. Times are RFC 3339 text in UTC, which sorts.

Text is compared byte by byte on every database: ids that differ stay apart, and pages come in one order.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeEngine

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def ascii_text(length: int) -> TypeEngine[str]:
    """Text in byte order, which is SQLite's own and Postgres' collation C."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


tenants = Table(
    "tenants",
    metadata,
    Column("tenant", ascii_text(128), primary_key=True),
    Column("created_at", ascii_text(32), nullable=False),
)

users = Table(
    "users",
    metadata,
    Column("tenant", ascii_text(128), ForeignKey("tenants.tenant"), primary_key=True),
    Column("user_id", ascii_text(128), primary_key=True),
    Column("fallback", ascii_text(16)),  # none or base; NULL: the deployment's option
    Column("limits", JSON, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("created_at", ascii_text(32), nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("adapter_id", Integer, primary_key=True),
    Column("tenant", ascii_text(128), nullable=False),
    Column("user_id", ascii_text(128), nullable=False),
    Column("name", ascii_text(64), nullable=False),
    Column("base", ascii_text(255), nullable=False),
    Column(
        "last_version", Integer, nullable=False
    ),  # highest number ever given; numbers are never used again
    Column("live_version", Integer),  # NULL: nothing was promoted yet
    Column("created_at", ascii_text(32), nullable=False),
    Column("canary_version", Integer),
    Column("canary_percent", Float),  # of sessions; NULL: no canary
    Column("pin_tier", ascii_text(16)),  # disk or host; NULL: not pinned
    Column("pin_until", ascii_text(32)),  # NULL: until it is taken away
    UniqueConstraint("tenant", "user_id", "name", "base"),
    ForeignKeyConstraint(["tenant", "user_id"], ["users.tenant", "users.user_id"]),
    Index(
        "ix_adapters_pinned",
        "base",
        "adapter_id",
        sqlite_where=text("pin_tier IS NOT NULL"),
        postgresql_where=text("pin_tier IS NOT NULL"),
    ),
)

versions = Table(
    "versions",
    metadata,
    Column("adapter_id", Integer, ForeignKey("adapters.adapter_id"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("digest", ascii_text(64), nullable=False),
    Column("object_key", ascii_text(512), nullable=False, unique=True),  # prefix of its two objects
    Column("config_sha256", ascii_text(64), nullable=False),
    Column("weights_sha256", ascii_text(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("target_modules", JSON, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("created_at", ascii_text(32), nullable=False),
    Index(None, "digest"),
)

live_history = Table(
    "live_history",
    metadata,
    Column("entry_id", Integer, primary_key=True),
    Column("adapter_id", Integer, ForeignKey("adapters.adapter_id"), nullable=False),
    Column("version", Integer, nullable=False),  # live from created_at on
    Column("created_at", ascii_text(32), nullable=False),
    Column("undone_at", ascii_text(32)),  # a rollback went back before this entry
    Index(None, "adapter_id", "entry_id"),
)

upload_keys = Table(
    "upload_keys",
    metadata,
    Column("adapter_id", Integer, primary_key=True),
    Column("key", ascii_text(255), primary_key=True),  # the client's Idempotency-Key
    Column("request_sha256", ascii_text(64), nullable=False),
    Column("version", Integer, nullable=False),
    Column("was_new", Boolean, nullable=False),
    Column("was_live", Boolean, nullable=False),
    Column("created_at", ascii_text(32), nullable=False),
    ForeignKeyConstraint(
        ["adapter_id", "version"], ["versions.adapter_id", "versions.version"], ondelete="CASCADE"
    ),
    Index(None, "adapter_id", "version"),
    Index(None, "created_at"),
)

identity = Table(  # one row
    "identity",
    metadata,
    Column("catalog_id", ascii_text(36), primary_key=True),
)

uploads = Table(  # begun and not committed; the user may not exist yet
    "uploads",
    metadata,
    Column("upload_id", ascii_text(64), primary_key=True),
    Column("tenant", ascii_text(128), nullable=False),
    Column("user_id", ascii_text(128), nullable=False),
    Column("name", ascii_text(64), nullable=False),
    Column("base", ascii_text(255), nullable=False),
    Column("object_key", ascii_text(512), nullable=False, unique=True),  # prefix of what it writes
    Column("kind", ascii_text(16), nullable=False),  # push or staged
    Column("promote", Boolean, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("created_at", ascii_text(32), nullable=False),
    Column("expires_at", ascii_text(32), nullable=False),
    Index(None, "tenant", "user_id"),
    Index(None, "expires_at"),
)

deletions = Table(
    "deletions",
    metadata,
    Column("deletion_id", ascii_text(36), primary_key=True),
    Column("tenant", ascii_text(128), nullable=False),
    Column("user_id", ascii_text(128)),  # NULL once it is done
    Column("name", ascii_text(64)),  # NULL: all of the user
    Column("version", Integer),
    Column("removed", JSON, nullable=False),  # rows of the catalog itself: kind -> number
    Column("kept", JSON, nullable=False),  # sentences about routers that never answered
    Column("holder", ascii_text(64)),  # the router that works on it
    Column("held_until", ascii_text(32)),
    Column("requested_at", ascii_text(32), nullable=False),
    Column("finished_at", ascii_text(32)),
    Index(
        "ix_deletions_pending",
        "requested_at",
        "deletion_id",
        sqlite_where=text("finished_at IS NULL"),
        postgresql_where=text("finished_at IS NULL"),
    ),
)

deletion_items = Table(
    "deletion_items",
    metadata,
    Column("deletion_id", ascii_text(36), ForeignKey("deletions.deletion_id"), primary_key=True),
    Column("prefix", ascii_text(512), primary_key=True),  # of object keys
    Column("digest", ascii_text(64)),  # NULL: an upload that had none yet
    Column("num_objects", Integer),  # NULL: its objects may still be there
    Column("kept", JSON, nullable=False),
)

deletion_acks = Table(
    "deletion_acks",
    metadata,
    Column("deletion_id", ascii_text(36), ForeignKey("deletions.deletion_id"), primary_key=True),
    Column("router_id", ascii_text(64), primary_key=True),
    Column("copies", JSON, nullable=False),  # place -> copies that this router's machine dropped
    Column("kept", JSON, nullable=False),
)

routers = Table(
    "routers",
    metadata,
    Column("router_id", ascii_text(64), primary_key=True),
    Column("leased_until", ascii_text(32), nullable=False),
    Index(None, "leased_until"),
)

claims = Table(  # work that one router does at a time
    "claims",
    metadata,
    Column("name", ascii_text(64), primary_key=True),
    Column("holder", ascii_text(64), nullable=False),
    Column("held_until", ascii_text(32), nullable=False),
    Index(None, "holder"),
)
