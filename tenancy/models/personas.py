"""Who answers: the characters of a tenant's assistant."""

from __future__ import annotations

import uuid
from enum import StrEnum

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Double, Index, String, func, text
from sqlalchemy.orm import Mapped, mapped_column

from agentvoicebox.tenancy.models.base import Base, TenantOwned, Timestamped, choice, one_of, tenant_key


class PersonaStatus(StrEnum):
    """A disabled persona keeps its configuration and answers nobody."""

    ACTIVE = "active"
    DISABLED = "disabled"


class Persona(TenantOwned, Timestamped, Base):
    """A character that answers what no skill answers. Empty voice, speed and language are the tenant's."""

    __tablename__ = "personas"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    name: Mapped[str] = mapped_column(String(100))
    description: Mapped[str] = mapped_column(server_default="")
    status: Mapped[PersonaStatus] = mapped_column(choice(PersonaStatus), server_default=PersonaStatus.ACTIVE)
    system_prompt: Mapped[str] = mapped_column(server_default="")
    knowledge: Mapped[str] = mapped_column(server_default="")
    """What it knows beyond its model, given to the model with every question."""
    voice: Mapped[str] = mapped_column(String(64), server_default="")
    speed: Mapped[float | None] = mapped_column(Double)
    language: Mapped[str] = mapped_column(String(35), server_default="")
    solvers: Mapped[list[str]] = mapped_column(server_default=text("'{llm}'"))
    """Who is asked, in this order, until one answers: `llm` is the language model, the others are solver plugins."""
    is_default: Mapped[bool] = mapped_column(Boolean, server_default=text("false"))
    usage_count: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    """Sessions that it began."""
    owner_id: Mapped[uuid.UUID | None]

    __table_args__ = (
        tenant_key(),
        one_of("status", PersonaStatus),
        CheckConstraint("speed BETWEEN 0.5 AND 2.0", name="speed"),
        CheckConstraint("status = 'active' OR NOT is_default", name="default"),
        Index("personas_name_key", "tenant_id", func.lower(text("name")), unique=True),
        Index("personas_default_key", "tenant_id", unique=True, postgresql_where=text("is_default")),
    )
