"""The organizations, what they have chosen, and the parts of their work."""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from agentvoicebox.tenancy.models.base import Base, TenantOwned, Timestamped, choice, one_of, tenant_key


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


class VoiceProvider(StrEnum):
    """Where a tenant's speech is made and understood; `disabled` opens no voice session."""

    DISABLED = "disabled"
    LOCAL = "local"
    AGENTVOICEBOX = "agentvoicebox"


class Tenant(Timestamped, Base):
    """An organization that uses the platform."""

    __tablename__ = "tenants"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    name: Mapped[str] = mapped_column(String(255))
    slug: Mapped[str] = mapped_column(String(100), unique=True)
    tier: Mapped[Tier] = mapped_column(choice(Tier), server_default=Tier.FREE, index=True)
    status: Mapped[TenantStatus] = mapped_column(choice(TenantStatus), server_default=TenantStatus.PENDING, index=True)
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
    parent_id: Mapped[uuid.UUID | None]
    email: Mapped[str] = mapped_column(String(320), server_default="")
    timezone: Mapped[str] = mapped_column(String(50), server_default="UTC")
    suspension_reason: Mapped[str] = mapped_column(server_default="")
    erased_at: Mapped[datetime | None]
    """Since when its data are being erased; from then on it can't be brought back."""

    __table_args__ = (
        ForeignKeyConstraint(["parent_id"], ["tenants.id"]),
        one_of("tier", Tier),
        one_of("status", TenantStatus),
        CheckConstraint(
            "max_users >= 1 AND max_projects >= 1 AND max_api_keys >= 1 AND max_sessions_per_month >= 0", name="limits"
        ),
    )


class Project(TenantOwned, Timestamped, Base):
    """A part of a tenant's work; keys, sessions and usage are counted to one."""

    __tablename__ = "projects"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    name: Mapped[str] = mapped_column(String(255))
    environment: Mapped[Environment] = mapped_column(choice(Environment), server_default=Environment.DEVELOPMENT)
    config: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    is_default: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    default_persona_id: Mapped[uuid.UUID | None]
    """Who answers in its sessions, unless a session says otherwise; none means the tenant's default."""

    __table_args__ = (
        tenant_key(),
        ForeignKeyConstraint(
            ["tenant_id", "default_persona_id"],
            ["personas.tenant_id", "personas.id"],
            ondelete="SET NULL (default_persona_id)",
        ),
        one_of("environment", Environment),
        Index("projects_default_key", "tenant_id", unique=True, postgresql_where=text("is_default")),
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
    stt_model: Mapped[str] = mapped_column(String(50), server_default="auto")
    stt_language: Mapped[str] = mapped_column(String(35), server_default="")
    stt_vad: Mapped[bool] = mapped_column(Boolean, server_default=text("true"))
    stt_fallbacks: Mapped[list[str]] = mapped_column(server_default=text("'{}'"))
    tts_fallbacks: Mapped[list[str]] = mapped_column(server_default=text("'{}'"))
    llm_provider: Mapped[str] = mapped_column(String(50), server_default="auto")
    llm_model: Mapped[str] = mapped_column(String(100), server_default="auto")
    llm_fallbacks: Mapped[list[str]] = mapped_column(server_default=text("'{}'"))
    llm_url: Mapped[str] = mapped_column(server_default="")
    llm_temperature: Mapped[float] = mapped_column(Double, server_default=text("0.7"))
    llm_max_tokens: Mapped[int] = mapped_column(Integer, server_default=text("1024"))

    __table_args__ = (
        tenant_key(),
        CheckConstraint("speed BETWEEN 0.5 AND 2.0", name="speed"),
        CheckConstraint("llm_temperature BETWEEN 0 AND 2", name="llm_temperature"),
        CheckConstraint("llm_max_tokens BETWEEN 256 AND 4096", name="llm_max_tokens"),
    )


class TenantSettings(TenantOwned, Timestamped, Base):
    """What a tenant's administrators have decided. A tenant without a row has the defaults."""

    __tablename__ = "tenant_settings"

    logo_url: Mapped[str] = mapped_column(server_default="")
    primary_color: Mapped[str] = mapped_column(String(7), server_default="#6366f1")
    default_voice_provider: Mapped[VoiceProvider] = mapped_column(
        choice(VoiceProvider), server_default=VoiceProvider.LOCAL
    )
    default_stt_model: Mapped[str] = mapped_column(String(50), server_default="base")
    default_tts_voice: Mapped[str] = mapped_column(String(50), server_default="am_onyx")
    default_llm_provider: Mapped[str] = mapped_column(String(50), server_default="groq")
    default_llm_model: Mapped[str] = mapped_column(String(100), server_default="llama-3.1-8b-instant")
    email_notifications_enabled: Mapped[bool] = mapped_column(Boolean, server_default=text("true"))
    webhook_url: Mapped[str] = mapped_column(server_default="")
    allowed_ip_ranges: Mapped[list[str]] = mapped_column(server_default=text("'{}'"))
    require_mfa: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    session_timeout_minutes: Mapped[int] = mapped_column(Integer, server_default=text("60"))

    __table_args__ = (
        tenant_key(),
        one_of("default_voice_provider", VoiceProvider),
        CheckConstraint("session_timeout_minutes BETWEEN 5 AND 1440", name="session_timeout_minutes"),
    )


class TenantDomain(TenantOwned, Timestamped, Base):
    """A host name of a tenant's own. Anybody may claim one; only its first proven claim counts."""

    __tablename__ = "tenant_domains"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    domain: Mapped[str] = mapped_column(String(253))
    is_primary: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    token: Mapped[str] = mapped_column(String(64))
    verified_at: Mapped[datetime | None]

    __table_args__ = (
        tenant_key(),
        UniqueConstraint("tenant_id", "domain"),
        Index("tenant_domains_verified_key", "domain", unique=True, postgresql_where=text("verified_at IS NOT NULL")),
        Index("tenant_domains_primary_key", "tenant_id", unique=True, postgresql_where=text("is_primary")),
        CheckConstraint("verified_at IS NOT NULL OR NOT is_primary", name="primary"),
    )


class ProjectEnvironment(TenantOwned, Timestamped, Base):
    """A place where a project runs, with a configuration of its own."""

    __tablename__ = "environments"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    project_id: Mapped[uuid.UUID]
    name: Mapped[str] = mapped_column(String(100))
    config: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))

    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "project_id"], ["projects.tenant_id", "projects.id"], ondelete="CASCADE"),
        UniqueConstraint("tenant_id", "project_id", "name"),
    )


class DeploymentStatus(StrEnum):
    """How far a deployment has come."""

    PENDING = "pending"
    ACTIVE = "active"
    SUPERSEDED = "superseded"
    FAILED = "failed"


class Deployment(TenantOwned, Timestamped, Base):
    """A snapshot of an environment's configuration that was made to count."""

    __tablename__ = "deployments"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    project_id: Mapped[uuid.UUID]
    environment_id: Mapped[uuid.UUID]
    version: Mapped[str] = mapped_column(String(100))
    status: Mapped[DeploymentStatus] = mapped_column(choice(DeploymentStatus), server_default=DeploymentStatus.ACTIVE)
    config: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    deployed_by: Mapped[uuid.UUID | None]

    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "project_id"], ["projects.tenant_id", "projects.id"], ondelete="CASCADE"),
        ForeignKeyConstraint(
            ["tenant_id", "environment_id"], ["environments.tenant_id", "environments.id"], ondelete="CASCADE"
        ),
        one_of("status", DeploymentStatus),
        Index(None, "tenant_id", "project_id", "created_at"),
        Index(
            "deployments_active_key",
            "tenant_id",
            "environment_id",
            unique=True,
            postgresql_where=text("status = 'active'"),
        ),
    )
