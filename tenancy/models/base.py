"""What all tables have in common."""

from __future__ import annotations

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import CheckConstraint, DateTime, ForeignKeyConstraint, MetaData, Text, func
from sqlalchemy import Enum as EnumType
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

PLATFORM = uuid.UUID(int=0)
"""Stands where a tenant's id would for what belongs to the platform itself; no tenant has it, and none can bind it."""


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


def tenant_key() -> ForeignKeyConstraint:
    """The row's tenant exists."""
    return ForeignKeyConstraint(["tenant_id"], ["tenants.id"])


def project_key() -> ForeignKeyConstraint:
    """The row's project, while that exists."""
    return ForeignKeyConstraint(
        ["tenant_id", "project_id"], ["projects.tenant_id", "projects.id"], ondelete="SET NULL (project_id)"
    )


def choice(choices: type[StrEnum]) -> EnumType:
    """The type of a column that holds one of `choices`."""
    return EnumType(choices, native_enum=False, length=20, values_callable=lambda kind: [one.value for one in kind])


def one_of(column: str, choices: type[StrEnum]) -> CheckConstraint:
    """The database refuses anything else."""
    values = ", ".join(f"'{one.value}'" for one in choices)
    return CheckConstraint(f"{column} IN ({values})", name=column)
