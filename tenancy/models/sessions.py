"""Conversations and what happened in them."""

from __future__ import annotations

import uuid
from datetime import date, datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Double, ForeignKeyConstraint, Index, Integer, String, func, text
from sqlalchemy.dialects.postgresql import INET
from sqlalchemy.orm import Mapped, mapped_column

from agentvoicebox.tenancy.models.base import Base, TenantOwned, Timestamped, choice, one_of, project_key, tenant_key


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


class Session(TenantOwned, Timestamped, Base):
    """A conversation of one client."""

    __tablename__ = "sessions"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    project_id: Mapped[uuid.UUID | None]
    api_key_id: Mapped[uuid.UUID | None]
    status: Mapped[SessionStatus] = mapped_column(choice(SessionStatus), server_default=SessionStatus.CREATED)
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
    context: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    """What the conversation has come to, as its client sees it."""

    __table_args__ = (
        project_key(),
        ForeignKeyConstraint(
            ["tenant_id", "api_key_id"], ["api_keys.tenant_id", "api_keys.id"], ondelete="SET NULL (api_key_id)"
        ),
        tenant_key(),
        one_of("status", SessionStatus),
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
    event_type: Mapped[EventType] = mapped_column(choice(EventType))
    content: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    timestamp: Mapped[datetime] = mapped_column(server_default=func.now())
    duration_ms: Mapped[int | None] = mapped_column(Integer)

    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "session_id"], ["sessions.tenant_id", "sessions.id"]),
        one_of("event_type", EventType),
        CheckConstraint("sequence >= 0", name="sequence"),
        Index(None, "tenant_id", "session_id", "event_type"),
        Index(None, "tenant_id", "session_id", "timestamp"),
    )


class SessionMonth(TenantOwned, Base):
    """How many sessions a tenant has begun in a calendar month (UTC); the number only grows."""

    __tablename__ = "session_months"

    month: Mapped[date] = mapped_column(primary_key=True)
    sessions: Mapped[int] = mapped_column(BigInteger)

    __table_args__ = (tenant_key(), CheckConstraint("sessions >= 1", name="sessions"))
