"""What tenants have entrusted to us, in envelopes."""

from __future__ import annotations

import uuid
from datetime import datetime

from sqlalchemy import ForeignKeyConstraint, Integer, LargeBinary, String, func
from sqlalchemy.orm import Mapped, mapped_column

from agentvoicebox.tenancy.models.base import Base, TenantOwned, Timestamped, tenant_key


class DataKey(TenantOwned, Base):
    """A tenant's data key, wrapped by the master key `master_id`."""

    __tablename__ = "data_keys"

    version: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    master_id: Mapped[str] = mapped_column(String(64))
    nonce: Mapped[bytes] = mapped_column(LargeBinary)
    wrapped: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    __table_args__ = (tenant_key(),)


class SecretVersion(TenantOwned, Base):
    """The newest version there ever was of a secret; it stays when the secret is deleted."""

    __tablename__ = "secret_versions"

    kind: Mapped[str] = mapped_column(String(50), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    version: Mapped[int] = mapped_column(Integer)

    __table_args__ = (tenant_key(),)


class Secret(TenantOwned, Timestamped, Base):
    """One version of a secret, sealed by the tenant's data key `data_key`."""

    __tablename__ = "secrets"

    kind: Mapped[str] = mapped_column(String(50), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    version: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    data_key: Mapped[int] = mapped_column(Integer)
    nonce: Mapped[bytes] = mapped_column(LargeBinary)
    sealed: Mapped[bytes] = mapped_column(LargeBinary)
    last4: Mapped[str] = mapped_column(String(4), server_default="")
    set_by: Mapped[uuid.UUID | None]

    __table_args__ = (
        tenant_key(),
        ForeignKeyConstraint(["tenant_id", "data_key"], ["data_keys.tenant_id", "data_keys.version"]),
    )
