"""Envelopes for what tenants entrust to us."""

from __future__ import annotations

from alembic import op

from agentvoicebox.tenancy.migrations.protection import grant, protect

revision = "0007"
down_revision = "0006"

TABLES = """
CREATE TABLE data_keys (
    tenant_id uuid NOT NULL REFERENCES tenants,
    version integer NOT NULL,
    master_id varchar(64) NOT NULL,
    nonce bytea NOT NULL CHECK (octet_length(nonce) = 12),
    wrapped bytea NOT NULL CHECK (octet_length(wrapped) = 48),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, version)
);
-- The newest version there ever was, also of what is deleted: no version is given twice.
CREATE TABLE secret_versions (
    tenant_id uuid NOT NULL REFERENCES tenants,
    kind varchar(50) NOT NULL,
    name varchar(100) NOT NULL,
    version integer NOT NULL,
    PRIMARY KEY (tenant_id, kind, name)
);
CREATE TABLE secrets (
    tenant_id uuid NOT NULL REFERENCES tenants,
    kind varchar(50) NOT NULL,
    name varchar(100) NOT NULL,
    version integer NOT NULL,
    data_key integer NOT NULL,
    nonce bytea NOT NULL CHECK (octet_length(nonce) = 12),
    sealed bytea NOT NULL CHECK (octet_length(sealed) BETWEEN 17 AND 65552),
    last4 varchar(4) NOT NULL DEFAULT '',
    set_by uuid,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, kind, name, version),
    FOREIGN KEY (tenant_id, data_key) REFERENCES data_keys
);
"""


def upgrade() -> None:
    op.execute(TABLES)
    for table in ("data_keys", "secret_versions", "secrets"):
        protect(table)
    grant("data_keys", avb_app="SELECT, INSERT, DELETE", avb_system="SELECT", avb_keeper="SELECT, DELETE")
    grant("secrets", avb_app="SELECT, INSERT, DELETE", avb_system="SELECT", avb_keeper="SELECT, DELETE")
    grant("secret_versions", avb_app="SELECT, INSERT, UPDATE (version)", avb_system="SELECT")
    grant("secret_versions", avb_keeper="SELECT, DELETE")
    # An envelope may be renewed; what it belongs to stays.
    op.execute("GRANT UPDATE (master_id, nonce, wrapped) ON data_keys TO avb_system")
    op.execute("GRANT UPDATE (data_key, nonce, sealed, updated_at) ON secrets TO avb_app")


def downgrade() -> None:
    op.execute("DROP TABLE secrets, secret_versions, data_keys")
