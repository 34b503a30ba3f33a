"""What was used."""

from __future__ import annotations

import uuid
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

from sqlalchemy import BigInteger, Index, Integer, Numeric, String, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from agentvoicebox.tenancy.models.base import Base, TenantOwned


class Metric(StrEnum):
    """What is counted."""

    API_CALLS = "api_calls"
    """Requests answered, through REST or as events of a socket that ask for something."""
    SESSIONS = "sessions"
    """Sessions begun."""
    SESSION_SECONDS = "session_seconds"
    """Seconds that sessions were connected."""
    STT_AUDIO_SECONDS = "stt_audio_seconds"
    """Seconds of speech transcribed."""
    TTS_AUDIO_SECONDS = "tts_audio_seconds"
    """Seconds of speech made."""
    LLM_INPUT_TOKENS = "llm_input_tokens"
    """Tokens a language model read, as its provider counts them."""
    LLM_OUTPUT_TOKENS = "llm_output_tokens"
    """Tokens a language model wrote, as its provider counts them."""
    STORAGE_BYTES = "storage_bytes"
    """Level: bytes of session history held."""
    CONCURRENT_SESSIONS_PEAK = "concurrent_sessions_peak"
    """Level: sessions connected to one node at the same time."""


GAUGES = (Metric.STORAGE_BYTES, Metric.CONCURRENT_SESSIONS_PEAK)
"""Levels, whose greatest value counts; the others are added up."""


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
    seq: Mapped[int | None] = mapped_column(BigInteger, server_default=text("nextval('usage_events_seq')"))
    """Numbers the lines; those of before there were numbers have none."""

    __table_args__ = (Index("usage_events_seq_idx", "seq", postgresql_using="brin"),)


class UsageMinute(TenantOwned, Base):
    """What `UsageEvent` rows of one minute add up to, or for a level its greatest. A project id of zeros is none."""

    __tablename__ = "usage_minutes"

    metric: Mapped[str] = mapped_column(String(50), primary_key=True)
    minute: Mapped[datetime] = mapped_column(primary_key=True)
    project_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    quantity: Mapped[Decimal] = mapped_column(Numeric(24, 6))
    events: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (Index("usage_minutes_minute_idx", "minute", postgresql_using="brin"),)


class UsageWindow(TenantOwned, Base):
    """What is to be told to the billing system: usage of one metric and window that no earlier row has told.

    `transaction_id` names it there for good, so that telling it twice counts once.
    """

    __tablename__ = "usage_outbox"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    transaction_id: Mapped[str] = mapped_column(String(200))
    metric: Mapped[str] = mapped_column(String(50))
    window_start: Mapped[datetime]
    window_seconds: Mapped[int] = mapped_column(Integer)
    quantity: Mapped[Decimal] = mapped_column(Numeric(24, 6))
    events: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    attempts: Mapped[int] = mapped_column(Integer, server_default=text("0"))
    available_at: Mapped[datetime] = mapped_column(server_default=func.now())
    sent_at: Mapped[datetime | None]
    error: Mapped[str] = mapped_column(String(200), server_default="")

    __table_args__ = (
        UniqueConstraint("tenant_id", "transaction_id"),
        Index("usage_outbox_unsent_idx", "available_at", postgresql_where=text("sent_at IS NULL")),
    )


class UsageMark(Base):
    """Up to which ledger line the outbox has been filled; -1 before the first time."""

    __tablename__ = "usage_marks"

    name: Mapped[str] = mapped_column(String(50), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger)
