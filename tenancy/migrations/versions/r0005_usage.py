"""The ledger's lines are numbered, and an outbox tells the billing system of them."""

from __future__ import annotations

from alembic import op

from agentvoicebox.tenancy.migrations.protection import grant, protect

revision = "0005"
down_revision = "0004"

# The default is set apart from the column: together they would rewrite the whole ledger. Older lines have no number.
# The sequence must not cache: numbers that a connection has put by would be given out below a mark that passed them.
TABLES = """
CREATE SEQUENCE usage_events_seq AS bigint CACHE 1;
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
INSERT INTO usage_marks VALUES ('outbox', -1);
"""

# Who writes lines holds this lock, shared, from before the first number is taken until the commit can be seen. Who gets
# it alone therefore knows that no number up to the sequence's last is still on its way. A trigger, and not the ledger's
# statement, so that nobody who writes can forget it, the nodes of the release before included.
LOCK = """
CREATE FUNCTION hold_usage_numbers() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(x'41564205'::bigint);
    RETURN NULL;
END $$;
CREATE TRIGGER numbered BEFORE INSERT ON usage_events FOR EACH STATEMENT EXECUTE FUNCTION hold_usage_numbers();
"""

# Numbers and minutes grow with the table, so block ranges find them, and cost next to nothing to keep. Building an
# index keeps writers waiting while the table is read once, under a second for this size; a larger ledger is sealed
# without it, more slowly, until somebody runs the same statements with CONCURRENTLY, which no transaction may hold.
INDEXES = """
DO $$
BEGIN
    IF pg_relation_size('usage_events') + pg_relation_size('usage_minutes') < 512 * 1024 * 1024 THEN
        CREATE INDEX usage_events_seq_idx ON usage_events USING brin (seq) WITH (autosummarize = on);
        CREATE INDEX usage_minutes_minute_idx ON usage_minutes USING brin (minute) WITH (autosummarize = on);
    END IF;
END $$;
"""


def upgrade() -> None:
    for script in (TABLES, LOCK, INDEXES):
        op.execute(script)
    protect("usage_outbox")
    op.execute("GRANT USAGE, SELECT ON SEQUENCE usage_events_seq TO avb_ledger, avb_system")
    grant("usage_outbox", avb_app="SELECT", avb_system="SELECT, INSERT, UPDATE, DELETE")
    grant("usage_marks", avb_system="SELECT, UPDATE")


def downgrade() -> None:
    op.execute("DROP TABLE usage_outbox, usage_marks")
    op.execute("DROP INDEX IF EXISTS usage_events_seq_idx, usage_minutes_minute_idx")
    op.execute("DROP TRIGGER numbered ON usage_events")
    op.execute("DROP FUNCTION hold_usage_numbers()")
    op.execute("ALTER TABLE usage_events DROP COLUMN seq")
