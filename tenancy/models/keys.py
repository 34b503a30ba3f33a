"""Credentials, and the log of what became of them."""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address

from sqlalchemy import BigInteger, CheckConstraint, ForeignKeyConstraint, Identity, Index, String, func, text
from sqlalchemy.dialects.postgresql import INET
from sqlalchemy.orm import Mapped, mapped_column

from agentvoicebox.tenancy.models.base import Base, TenantOwned, Timestamped, choice, one_of, project_key, tenant_key


class RateClass(StrEnum):
    """How much one key may ask for."""

    STANDARD = "standard"
    ELEVATED = "elevated"
    UNLIMITED = "unlimited"


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
    rate_limit_tier: Mapped[RateClass] = mapped_column(choice(RateClass), server_default=RateClass.STANDARD)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    revoked_by: Mapped[uuid.UUID | None]
    created_by: Mapped[uuid.UUID | None]
    last_used_at: Mapped[datetime | None]
    last_used_ip: Mapped[IPv4Address | IPv6Address | None] = mapped_column(INET)
    usage_count: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    rotated_from: Mapped[uuid.UUID | None]
    replaced_by: Mapped[uuid.UUID | None]

    __table_args__ = (
        project_key(),
        tenant_key(),
        one_of("rate_limit_tier", RateClass),
        CheckConstraint("rotated_from <> id", name="rotated_from"),
        Index(None, "tenant_id", "revoked_at"),
        Index(None, "tenant_id", "project_id"),
    )


class ChangeKind(StrEnum):
    """What a line of the log of changes is about."""

    REVOKED = "revoked"
    """The key opens nothing any more."""
    CHANGED = "changed"
    """What the key opens, or for how long, is different now."""
    TENANT = "tenant"
    """Something about the tenant that its keys carry with them: settings, tier, limits."""
    RELATIONS = "relations"
    """Somebody's roles in the tenant."""
    VOICE = "voice"
    """How the tenant's assistant sounds, listens and answers: what its devices go by."""


class KeyRevocation(TenantOwned, Base):
    """What has changed since nodes cached it: a key, or, without one, something that concerns the whole tenant.

    `xid` makes the log free of gaps for its readers: ids are handed out before their transactions commit, in any order.
    """

    __tablename__ = "key_revocations"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    key_id: Mapped[uuid.UUID | None]
    xid: Mapped[int] = mapped_column(BigInteger, server_default=text("pg_current_xact_id()::text::bigint"), index=True)
    at: Mapped[datetime] = mapped_column(server_default=func.now())
    kind: Mapped[ChangeKind] = mapped_column(choice(ChangeKind), server_default=ChangeKind.REVOKED)

    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "key_id"], ["api_keys.tenant_id", "api_keys.id"]),
        one_of("kind", ChangeKind),
    )
