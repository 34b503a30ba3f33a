"""The tables. Every row but the tenant itself belongs to a tenant, and every key begins with that tenant's id."""

from __future__ import annotations

import uuid
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    MetaData,
    Numeric,
    String,
    Text,
    func,
    text,
)
from sqlalchemy import Enum as EnumType
from sqlalchemy.dialects.postgresql import ARRAY, INET, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Tier(StrEnum):
    """What a tenant pays for; the limits of each are in `tenants.LIMITS`."""

    FREE = "free"
    STARTER = "starter"
    PRO = "pro"
    ENTERPRISE = "enterprise"


class TenantStatus(StrEnum):
    """Only keys of an active tenant open anything."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    PENDING = "pending"
    DELETED = "deleted"


class Environment(StrEnum):
    """What a project is used for."""

    PRODUCTION = "production"
    STAGING = "staging"
    DEVELOPMENT = "development"


class RateClass(StrEnum):
    """How much one key may ask for."""

    STANDARD = "standard"
    ELEVATED = "elevated"
    UNLIMITED = "unlimited"


class SessionStatus(StrEnum):
    """created → active → completed (by the client), terminated (by us) or error. The last three are final."""

    CREATED = "created"
    ACTIVE = "active"
    COMPLETED = "completed"
    TERMINATED = "terminated"
    ERROR = "error"


class EventType(StrEnum):
    """What a line of a session's history tells."""

    TRANSCRIPT = "transcript"
    RESPONSE = "response"
    TOOL_CALL = "tool_call"
    TOOL_RESULT = "tool_result"
    ERROR = "error"
    SYSTEM = "system"


class Metric(StrEnum):
    """What is counted."""

    STT_AUDIO_SECONDS = "stt_audio_seconds"
    TTS_AUDIO_SECONDS = "tts_audio_seconds"
    TURNS = "turns"


def _choice(choices: type[StrEnum]) -> EnumType:
    return EnumType(choices, native_enum=False, length=20, values_callable=lambda kind: [one.value for one in kind])


def _one_of(column: str, choices: type[StrEnum]) -> CheckConstraint:
    values = ", ".join(f"'{one.value}'" for one in choices)
    return CheckConstraint(f"{column} IN ({values})", name=column)


class Base(DeclarativeBase):
    """All tables."""

    metadata = MetaData(
        naming_convention={
            # PostgreSQL's own names, so that plain SQL and these models agree.
            "pk": "%(table_name)s_pkey",
            "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
            "uq": "%(table_name)s_%(column_0_N_name)s_key",
            "ix": "%(table_name)s_%(column_0_N_name)s_idx",
            "ck": "%(table_name)s_%(constraint_name)s_check",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it from the class
        str: Text,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        list[str]: ARRAY(Text),
    }


class Timestamped:
    """When a row was made and last changed, by the database's clock."""

    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), sort_order=100)
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now(), onupdate=func.now(), sort_order=101)


class TenantOwned:
    """A row of one tenant: row-level security shows it to that tenant's transactions only."""

    tenant_id: Mapped[uuid.UUID] = mapped_column(primary_key=True, sort_order=-100)


def _tenant_key() -> ForeignKeyConstraint:
    return ForeignKeyConstraint(["tenant_id"], ["tenants.id"])


class Tenant(Timestamped, Base):
    """An organization that uses the platform."""

    __tablename__ = "tenants"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    name: Mapped[str] = mapped_column(String(255))
    slug: Mapped[str] = mapped_column(String(100), unique=True)
    tier: Mapped[Tier] = mapped_column(_choice(Tier), server_default=Tier.FREE, index=True)
    status: Mapped[TenantStatus] = mapped_column(_choice(TenantStatus), server_default=TenantStatus.PENDING, index=True)
    billing_id: Mapped[str] = mapped_column(String(255), server_default="", index=True)
    keycloak_group_id: Mapped[str] = mapped_column(String(255), server_default="")
    settings: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    max_users: Mapped[int] = mapped_column(Integer)
    max_projects: Mapped[int] = mapped_column(Integer)
    max_api_keys: Mapped[int] = mapped_column(Integer)
    max_sessions_per_month: Mapped[int] = mapped_column(Integer)
    activated_at: Mapped[datetime | None]
    suspended_at: Mapped[datetime | None]
    deleted_at: Mapped[datetime | None]

    __table_args__ = (
        _one_of("tier", Tier),
        _one_of("status", TenantStatus),
        CheckConstraint(
            "max_users >= 1 AND max_projects >= 1 AND max_api_keys >= 1 AND max_sessions_per_month >= 0", name="limits"
        ),
    )


class Project(TenantOwned, Timestamped, Base):
    """A part of a tenant's work; keys, sessions and usage are counted to one."""

    __tablename__ = "projects"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    name: Mapped[str] = mapped_column(String(255))
    environment: Mapped[Environment] = mapped_column(_choice(Environment), server_default=Environment.DEVELOPMENT)
    config: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    is_default: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))

    __table_args__ = (
        _tenant_key(),
        _one_of("environment", Environment),
        Index("projects_default_key", "tenant_id", unique=True, postgresql_where=text("is_default")),
    )


class ApiKey(TenantOwned, Timestamped, Base):
    """A credential; of the secret itself only the digest and the first twelve characters are here."""

    __tablename__ = "api_keys"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    project_id: Mapped[uuid.UUID | None]
    name: Mapped[str] = mapped_column(String(100))
    description: Mapped[str] = mapped_column(server_default="")
    key_prefix: Mapped[str] = mapped_column(String(12), index=True)
    key_hash: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[list[str]] = mapped_column(server_default=text("'{}'"))
    rate_limit_tier: Mapped[RateClass] = mapped_column(_choice(RateClass), server_default=RateClass.STANDARD)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    revoked_by: Mapped[uuid.UUID | None]
    created_by: Mapped[uuid.UUID | None]
    last_used_at: Mapped[datetime | None]
    last_used_ip: Mapped[IPv4Address | IPv6Address | None] = mapped_column(INET)
    usage_count: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))

    __table_args__ = (
        ForeignKeyConstraint(
            ["tenant_id", "project_id"], ["projects.tenant_id", "projects.id"], ondelete="SET NULL (project_id)"
        ),
        _tenant_key(),
        _one_of("rate_limit_tier", RateClass),
        Index(None, "tenant_id", "revoked_at"),
        Index(None, "tenant_id", "project_id"),
    )


class KeyRevocation(TenantOwned, Base):
    """A key that stopped being good, for the nodes that have it cached.

    `xid` makes the log free of gaps for its readers: ids are handed out before their transactions commit, in any order.
    """

    __tablename__ = "key_revocations"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    key_id: Mapped[uuid.UUID]
    xid: Mapped[int] = mapped_column(BigInteger, server_default=text("pg_current_xact_id()::text::bigint"), index=True)
    at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (ForeignKeyConstraint(["tenant_id", "key_id"], ["api_keys.tenant_id", "api_keys.id"]),)


class Session(TenantOwned, Timestamped, Base):
    """A conversation of one client."""

    __tablename__ = "sessions"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    project_id: Mapped[uuid.UUID | None]
    api_key_id: Mapped[uuid.UUID | None]
    status: Mapped[SessionStatus] = mapped_column(_choice(SessionStatus), server_default=SessionStatus.CREATED)
    config: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    duration_seconds: Mapped[float | None] = mapped_column(Double)
    input_tokens: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    output_tokens: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    audio_duration_seconds: Mapped[float] = mapped_column(Double, server_default=text("0"))
    termination_reason: Mapped[str] = mapped_column(String(50), server_default="")
    error_code: Mapped[str] = mapped_column(String(50), server_default="")
    error_message: Mapped[str] = mapped_column(server_default="")
    client_ip: Mapped[IPv4Address | IPv6Address | None] = mapped_column(INET)
    user_agent: Mapped[str] = mapped_column(server_default="")

    __table_args__ = (
        ForeignKeyConstraint(
            ["tenant_id", "project_id"], ["projects.tenant_id", "projects.id"], ondelete="SET NULL (project_id)"
        ),
        ForeignKeyConstraint(
            ["tenant_id", "api_key_id"], ["api_keys.tenant_id", "api_keys.id"], ondelete="SET NULL (api_key_id)"
        ),
        _tenant_key(),
        _one_of("status", SessionStatus),
        Index(None, "tenant_id", "status"),
        Index(None, "tenant_id", "created_at"),
        Index(None, "tenant_id", "project_id"),
        Index(None, "tenant_id", "api_key_id"),
    )


class SessionEvent(TenantOwned, Base):
    """One line of a session's history."""

    __tablename__ = "session_events"

    session_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    event_type: Mapped[EventType] = mapped_column(_choice(EventType))
    content: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    timestamp: Mapped[datetime] = mapped_column(server_default=func.now())
    duration_ms: Mapped[int | None] = mapped_column(Integer)

    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "session_id"], ["sessions.tenant_id", "sessions.id"]),
        _one_of("event_type", EventType),
        CheckConstraint("sequence >= 0", name="sequence"),
        Index(None, "tenant_id", "session_id", "event_type"),
        Index(None, "tenant_id", "session_id", "timestamp"),
    )


class VoiceConfig(TenantOwned, Timestamped, Base):
    """How a tenant's assistant sounds and listens."""

    __tablename__ = "voice_configs"

    voice: Mapped[str] = mapped_column(String(64))
    speed: Mapped[float] = mapped_column(Double)
    language: Mapped[str] = mapped_column(String(35))
    wake_word: Mapped[str] = mapped_column(String(64))
    persona_name: Mapped[str] = mapped_column(String(100))
    disabled_skills: Mapped[list[str]]
    stt: Mapped[str] = mapped_column(String(64))
    tts: Mapped[str] = mapped_column(String(64))

    __table_args__ = (_tenant_key(), CheckConstraint("speed BETWEEN 0.5 AND 2.0", name="speed"))


class UsageEvent(TenantOwned, Base):
    """One metered thing. It names tenant, session and project without foreign keys: evidence outlives what it is about,
    and one bad id must not refuse a group of many tenants."""

    __tablename__ = "usage_events"

    event_id: Mapped[str] = mapped_column(String(200), primary_key=True)
    metric: Mapped[str] = mapped_column(String(50))
    quantity: Mapped[Decimal] = mapped_column(Numeric(18, 6))
    at: Mapped[datetime]
    session_id: Mapped[uuid.UUID | None]
    project_id: Mapped[uuid.UUID | None]


class UsageMinute(TenantOwned, Base):
    """What `UsageEvent` rows of one minute add up to. A project id of zeros stands for none."""

    __tablename__ = "usage_minutes"

    metric: Mapped[str] = mapped_column(String(50), primary_key=True)
    minute: Mapped[datetime] = mapped_column(primary_key=True)
    project_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    quantity: Mapped[Decimal] = mapped_column(Numeric(24, 6))
    events: Mapped[int] = mapped_column(BigInteger)
