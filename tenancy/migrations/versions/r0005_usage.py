"""The ledger's lines are numbered, and an outbox tells the billing system of them."""

from __future__ import annotations

from alembic import op

from agentvoicebox.tenancy.migrations.protection import grant, protect

revision = "0005"
down_revision = "0004"

# The default is set apart from the column: together they would rewrite the whole ledger. Older lines have no number.
TABLES = """
CREATE SEQUENCE usage_events_seq AS bigint;
ALTER TABLE usage_events ADD COLUMN seq bigint;
ALTER TABLE usage_events ALTER COLUMN seq SET DEFAULT nextval('usage_events_seq');
ALTER SEQUENCE usage_events_seq OWNED BY usage_events.seq;

CREATE TABLE usage_outbox (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    transaction_id varchar(200) NOT NULL,
    metric varchar(50) NOT NULL,
    window_start timestamptz NOT NULL,
    window_seconds integer NOT NULL,
    quantity numeric(24, 6) NOT NULL,
    events bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    attempts integer NOT NULL DEFAULT 0,
    available_at timestamptz NOT NULL DEFAULT now(),
    sent_at timestamptz,
    error varchar(200) NOT NULL DEFAULT '',
    PRIMARY KEY (tenant_id, id),
    UNIQUE (tenant_id, transaction_id)
);
CREATE INDEX usage_outbox_unsent_idx ON usage_outbox (available_at) WHERE sent_at IS NULL;

CREATE TABLE usage_marks (
    name varchar(50) PRIMARY KEY,
    seq bigint NOT NULL
);
"""


def upgrade() -> None:
    op.execute(TABLES)
    protect("usage_outbox")
    op.execute("GRANT USAGE, SELECT ON SEQUENCE usage_events_seq TO avb_ledger, avb_system")
    grant("usage_outbox", avb_app="SELECT", avb_system="SELECT, INSERT, UPDATE, DELETE")
    grant("usage_marks", avb_system="SELECT, INSERT, UPDATE")


def downgrade() -> None:
    op.execute("DROP TABLE usage_outbox, usage_marks")
    op.execute("ALTER TABLE usage_events DROP COLUMN seq")
