"""People, the tenants they work for, and who may do what there."""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Boolean, CheckConstraint, ForeignKeyConstraint, Index, String, func, text
from sqlalchemy.orm import Mapped, mapped_column

from agentvoicebox.tenancy.models.base import Base, TenantOwned, Timestamped, choice, one_of, tenant_key


class Role(StrEnum):
    """What somebody is to a tenant; the permissions of each are in the schema of `permissions`."""

    SYSADMIN = "sysadmin"
    ADMIN = "admin"
    DEVELOPER = "developer"
    OPERATOR = "operator"
    VIEWER = "viewer"
    BILLING = "billing"


class MemberStatus(StrEnum):
    """Whether somebody still belongs to a tenant; the row stays as evidence."""

    ACTIVE = "active"
    REMOVED = "removed"


class InvitationStatus(StrEnum):
    """What became of an invitation."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    EXPIRED = "expired"
    REVOKED = "revoked"


class User(Timestamped, Base):
    """A person, who may work for several tenants. A tenant's transactions see its own members only."""

    __tablename__ = "users"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    keycloak_id: Mapped[str | None] = mapped_column(String(255), unique=True)
    email: Mapped[str] = mapped_column(String(320))
    first_name: Mapped[str] = mapped_column(String(150), server_default="")
    last_name: Mapped[str] = mapped_column(String(150), server_default="")
    is_active: Mapped[bool] = mapped_column(Boolean, server_default=text("true"))
    is_staff: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    date_joined: Mapped[datetime] = mapped_column(server_default=func.now())
    last_login: Mapped[datetime | None]
    preferences: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    avatar_url: Mapped[str] = mapped_column(server_default="")
    timezone: Mapped[str] = mapped_column(String(50), server_default="UTC")
    locale: Mapped[str] = mapped_column(String(10), server_default="en")
    email_notifications: Mapped[bool] = mapped_column(Boolean, server_default=text("true"))
    push_notifications: Mapped[bool] = mapped_column(Boolean, server_default=text("true"))
    theme_id: Mapped[uuid.UUID | None]

    __table_args__ = (Index("users_email_key", func.lower(text("email")), unique=True),)

    @property
    def full_name(self) -> str:
        """First and last name; the e-mail address where there is neither."""
        return " ".join(part for part in (self.first_name, self.last_name) if part) or self.email


class Member(TenantOwned, Timestamped, Base):
    """A person's belonging to a tenant; the roles are in `Relation`."""

    __tablename__ = "members"

    user_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    status: Mapped[MemberStatus] = mapped_column(choice(MemberStatus), server_default=MemberStatus.ACTIVE)
    invited_by: Mapped[uuid.UUID | None]

    __table_args__ = (
        tenant_key(),
        ForeignKeyConstraint(["user_id"], ["users.id"]),
        one_of("status", MemberStatus),
        Index(None, "user_id"),
    )


class Invitation(TenantOwned, Timestamped, Base):
    """Somebody who was asked to join. Of the token only its digest is here."""

    __tablename__ = "invitations"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    email: Mapped[str] = mapped_column(String(320))
    role: Mapped[Role] = mapped_column(choice(Role))
    status: Mapped[InvitationStatus] = mapped_column(choice(InvitationStatus), server_default=InvitationStatus.PENDING)
    token_hash: Mapped[str] = mapped_column(String(64), unique=True)
    expires_at: Mapped[datetime]
    invited_by: Mapped[uuid.UUID | None]

    __table_args__ = (
        tenant_key(),
        one_of("role", Role),
        one_of("status", InvitationStatus),
        CheckConstraint("role <> 'sysadmin'", name="no_sysadmin"),
        Index(
            "invitations_pending_key",
            "tenant_id",
            func.lower(text("email")),
            unique=True,
            postgresql_where=text("status = 'pending'"),
        ),
    )


class Relation(TenantOwned, Base):
    """One relation tuple, `resource#relation@subject`; `subject_relation` is empty unless the subject is a group."""

    __tablename__ = "relations"

    resource_type: Mapped[str] = mapped_column(String(30), primary_key=True)
    resource_id: Mapped[str] = mapped_column(String(100), primary_key=True)
    relation: Mapped[str] = mapped_column(String(30), primary_key=True)
    subject_type: Mapped[str] = mapped_column(String(30), primary_key=True)
    subject_id: Mapped[str] = mapped_column(String(100), primary_key=True)
    subject_relation: Mapped[str] = mapped_column(String(30), primary_key=True, server_default="")

    __table_args__ = (Index(None, "tenant_id", "subject_type", "subject_id"),)
