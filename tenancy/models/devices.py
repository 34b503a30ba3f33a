"""What stands in people's homes: devices, what wakes them, and what they tell of their day."""

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
    String,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from agentvoicebox.tenancy.models.base import Base, TenantOwned, Timestamped, choice, one_of, project_key, tenant_key


class Device(TenantOwned, Timestamped, Base):
    """Something that listens and speaks for a tenant, by a key of its own. `last_seen_at` is a minute late at most."""

    __tablename__ = "devices"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    name: Mapped[str] = mapped_column(String(100))
    project_id: Mapped[uuid.UUID | None]
    api_key_id: Mapped[uuid.UUID]
    version: Mapped[str] = mapped_column(String(50), server_default="")
    """Of AgentVoiceBox on it, as it says."""
    last_seen_at: Mapped[datetime | None]
    """None for one that was paired and has not connected yet."""

    __table_args__ = (
        tenant_key(),
        project_key(),
        ForeignKeyConstraint(["tenant_id", "api_key_id"], ["api_keys.tenant_id", "api_keys.id"]),
        UniqueConstraint("tenant_id", "api_key_id"),
        Index(None, "tenant_id", "project_id"),
    )


class DeviceEventKind(StrEnum):
    """What a device tells of."""

    WAKE = "wake"
    """A wake word was heard, or should have been."""
    STT = "stt"
    """Speech was understood by the device's own engine, since the platform's was not to be had; so are the next two."""
    TTS = "tts"
    PERSONA = "persona"


class Outcome(StrEnum):
    """What came of a wake word."""

    DETECTED = "detected"
    FALSE_POSITIVE = "false_positive"
    """It was heard, and then nobody said anything."""
    MISSED = "missed"
    """It was said, and not heard."""


class DeviceEventRow(TenantOwned, Base):
    """One thing that a device told of. It names device and wake word without foreign keys: what was counted stays
    counted when they go."""

    __tablename__ = "device_events"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    """The device's own number of it: told twice, it is there once."""
    device_id: Mapped[uuid.UUID]
    at: Mapped[datetime]
    kind: Mapped[DeviceEventKind] = mapped_column(choice(DeviceEventKind))
    phrase: Mapped[str] = mapped_column(String(64), server_default="")
    wake_word_id: Mapped[uuid.UUID | None]
    outcome: Mapped[str] = mapped_column(String(20), server_default="")
    """An `Outcome` for a wake word, empty for the rest."""
    confidence: Mapped[float | None] = mapped_column(Double)
    engine: Mapped[str] = mapped_column(String(100), server_default="")
    seconds: Mapped[float] = mapped_column(Double, server_default=text("0"))
    """Of audio."""
    reason: Mapped[str] = mapped_column(String(100), server_default="")
    received_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (
        tenant_key(),
        one_of("kind", DeviceEventKind),
        CheckConstraint("(kind = 'wake') = (outcome IN ('detected', 'false_positive', 'missed'))", name="outcome"),
        CheckConstraint("confidence BETWEEN 0 AND 1", name="confidence"),
        CheckConstraint("seconds >= 0", name="seconds"),
        Index(None, "tenant_id", "device_id", "at"),
        Index("device_events_wake_idx", "tenant_id", "at", postgresql_where=text("kind = 'wake'")),
        Index("device_events_at_idx", "at", postgresql_using="brin"),
    )


class Pairing(Base):
    """A device that waits for somebody to type in its code; of no tenant before that. The system's own."""

    __tablename__ = "pairings"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    code: Mapped[str] = mapped_column(String(8))
    key_hash: Mapped[str] = mapped_column(String(64))
    key_prefix: Mapped[str] = mapped_column(String(12))
    name: Mapped[str] = mapped_column(String(100))
    network: Mapped[str] = mapped_column(String(50))
    """Where it asked from, as `tenancy.limits` counts addresses."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime] = mapped_column(index=True)
    claimed_by: Mapped[uuid.UUID | None]
    """The tenant that the device is paired with now."""

    __table_args__ = (
        ForeignKeyConstraint(["claimed_by"], ["tenants.id"]),
        Index("pairings_code_key", "code", unique=True, postgresql_where=text("claimed_by IS NULL")),
        Index("pairings_key_hash_key", "key_hash", unique=True, postgresql_where=text("claimed_by IS NULL")),
    )


class WakeWord(TenantOwned, Timestamped, Base):
    """A phrase that wakes the tenant's devices; a disabled one keeps what was chosen for it."""

    __tablename__ = "wake_words"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    phrase: Mapped[str] = mapped_column(String(64))
    sensitivity: Mapped[float] = mapped_column(Double, server_default=text("0.5"))
    """0 (hardly ever) to 1 (at anything similar)."""
    enabled: Mapped[bool] = mapped_column(Boolean, server_default=text("true"))
    model_ref: Mapped[str] = mapped_column(String(100), server_default="")
    """Which engine and model hear it; empty for whatever finds itself for the phrase."""

    __table_args__ = (
        tenant_key(),
        CheckConstraint("sensitivity BETWEEN 0 AND 1", name="sensitivity"),
        Index("wake_words_phrase_key", "tenant_id", func.lower(text("phrase")), unique=True),
    )


class SkillSettings(TenantOwned, Timestamped, Base):
    """What a tenant has set for one skill."""

    __tablename__ = "skill_settings"

    skill_id: Mapped[str] = mapped_column(String(100), primary_key=True)
    settings: Mapped[dict[str, Any]]

    __table_args__ = (tenant_key(),)
