"""Who did what, for good."""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from sqlalchemy import BigInteger, Computed, Index, LargeBinary, String, func, text
from sqlalchemy.dialects.postgresql import INET, TSVECTOR
from sqlalchemy.orm import Mapped, mapped_column

from agentvoicebox.tenancy.models.base import Base, TenantOwned, choice, one_of


class Action(StrEnum):
    """What was done."""

    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    LOGIN = "login"
    LOGOUT = "logout"
    API_CALL = "api_call"
    PERMISSION_CHANGE = "permission_change"
    SETTINGS_CHANGE = "settings_change"
    BILLING_EVENT = "billing_event"


class ActorType(StrEnum):
    """Who did it."""

    USER = "user"
    API_KEY = "api_key"
    SYSTEM = "system"


class AuditEntry(TenantOwned, Base):
    """One line of a tenant's chain. The database numbers and chains it; nobody changes or removes it."""

    __tablename__ = "audit_log"

    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(primary_key=True, server_default=func.now())
    id: Mapped[uuid.UUID] = mapped_column(server_default=text("gen_random_uuid()"))
    actor_type: Mapped[ActorType] = mapped_column(choice(ActorType), server_default=ActorType.USER)
    actor_id: Mapped[uuid.UUID | None]
    actor_email: Mapped[str] = mapped_column(String(320), server_default="")
    ip_address: Mapped[IPv4Address | IPv6Address | None] = mapped_column(INET)
    user_agent: Mapped[str] = mapped_column(String(500), server_default="")
    action: Mapped[Action] = mapped_column(choice(Action))
    resource_type: Mapped[str] = mapped_column(String(50))
    resource_id: Mapped[str] = mapped_column(String(255), server_default="")
    description: Mapped[str] = mapped_column(server_default="")
    old_values: Mapped[dict[str, Any] | None]
    new_values: Mapped[dict[str, Any] | None]
    details: Mapped[dict[str, Any]] = mapped_column("metadata", server_default=text("'{}'"))
    request_id: Mapped[str] = mapped_column(String(100), server_default="")
    prev: Mapped[bytes] = mapped_column(LargeBinary)
    hash: Mapped[bytes] = mapped_column(LargeBinary)
    words: Mapped[str] = mapped_column(
        TSVECTOR, Computed("audit_words(description, resource_type, resource_id)", persisted=True), deferred=True
    )

    __table_args__ = (
        one_of("action", Action),
        one_of("actor_type", ActorType),
        Index(None, "tenant_id", "at"),
        Index(None, "id"),
        Index(None, "actor_id", "at"),
        Index(None, "resource_type", "resource_id"),
        Index(None, "words", postgresql_using="gin"),
        {"postgresql_partition_by": "RANGE (at)"},
    )


class AuditHead(TenantOwned, Base):
    """Where a tenant's chain ends now."""

    __tablename__ = "audit_heads"

    seq: Mapped[int] = mapped_column(BigInteger)
    hash: Mapped[bytes] = mapped_column(LargeBinary)


class AuditAnchor(TenantOwned, Base):
    """A piece of a tenant's chain that was archived: lines `first` to `seq`, what they continued and how they end."""

    __tablename__ = "audit_anchors"

    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    first: Mapped[int] = mapped_column(BigInteger)
    prev: Mapped[bytes] = mapped_column(LargeBinary)
    hash: Mapped[bytes] = mapped_column(LargeBinary)
    month: Mapped[datetime]
    digest: Mapped[bytes] = mapped_column(LargeBinary)
    """SHA-256 of the file they are in."""
    archived_at: Mapped[datetime] = mapped_column(server_default=func.now())
