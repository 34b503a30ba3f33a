"""The audit log: appended to only, chained per tenant, by months."""

from __future__ import annotations

from alembic import op

from agentvoicebox.tenancy.migrations.protection import grant, protect

revision = "0006"
down_revision = "0005"

TABLES = """
-- No foreign keys: evidence outlives what it is about.
CREATE TABLE audit_log (
    tenant_id uuid NOT NULL,
    seq bigint NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    actor_type varchar(20) NOT NULL DEFAULT 'user' CHECK (actor_type IN ('user', 'api_key', 'system')),
    actor_id uuid,
    actor_email varchar(320) NOT NULL DEFAULT '',
    ip_address inet,
    user_agent varchar(500) NOT NULL DEFAULT '',
    action varchar(20) NOT NULL CHECK (action IN (
        'create', 'update', 'delete', 'login', 'logout', 'api_call', 'permission_change', 'settings_change',
        'billing_event')),
    resource_type varchar(50) NOT NULL,
    resource_id varchar(255) NOT NULL DEFAULT '',
    description text NOT NULL DEFAULT '',
    old_values jsonb,
    new_values jsonb,
    metadata jsonb NOT NULL DEFAULT '{}',
    request_id varchar(100) NOT NULL DEFAULT '',
    prev bytea NOT NULL,
    hash bytea NOT NULL,
    words tsvector GENERATED ALWAYS AS
        (to_tsvector('simple', description || ' ' || resource_type || ' ' || resource_id)) STORED,
    PRIMARY KEY (tenant_id, seq, at)
) PARTITION BY RANGE (at);
CREATE INDEX ON audit_log (tenant_id, at);
CREATE INDEX ON audit_log (actor_id, at);
CREATE INDEX ON audit_log (resource_type, resource_id);
CREATE INDEX ON audit_log USING gin (words);

CREATE TABLE audit_heads (
    tenant_id uuid PRIMARY KEY,
    seq bigint NOT NULL,
    hash bytea NOT NULL
);
CREATE TABLE audit_anchors (
    tenant_id uuid PRIMARY KEY,
    seq bigint NOT NULL,
    hash bytea NOT NULL,
    month timestamptz NOT NULL,
    archived_at timestamptz NOT NULL DEFAULT now()
);
"""

FUNCTIONS = """
CREATE FUNCTION audit_hash(entry audit_log) RETURNS bytea LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT sha256(entry.prev || convert_to(jsonb_build_array(
        entry.tenant_id, entry.seq, extract(epoch FROM entry.at)::text, entry.id, entry.actor_type, entry.actor_id,
        entry.actor_email, host(entry.ip_address), entry.user_agent, entry.action, entry.resource_type,
        entry.resource_id, entry.description, entry.old_values, entry.new_values, entry.metadata, entry.request_id
    )::text, 'UTF8'))
$$;

-- The owner's rights, for the heads, which nobody else may write: whoever can could cut the chain.
CREATE FUNCTION audit_chain() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    head audit_heads;
BEGIN
    INSERT INTO audit_heads VALUES (NEW.tenant_id, 0, '\\x00') ON CONFLICT DO NOTHING;
    SELECT * INTO head FROM audit_heads WHERE tenant_id = NEW.tenant_id FOR UPDATE;
    NEW.seq := head.seq + 1;
    NEW.prev := head.hash;
    NEW.hash := audit_hash(NEW);
    UPDATE audit_heads SET seq = NEW.seq, hash = NEW.hash WHERE tenant_id = NEW.tenant_id;
    RETURN NEW;
END $$;
CREATE TRIGGER chained BEFORE INSERT ON audit_log FOR EACH ROW EXECUTE FUNCTION audit_chain();

CREATE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the audit log is append-only' USING ERRCODE = 'AV004';
END $$;
CREATE TRIGGER kept BEFORE UPDATE OR DELETE ON audit_log FOR EACH ROW EXECUTE FUNCTION audit_refuse();
CREATE TRIGGER kept_whole BEFORE TRUNCATE ON audit_log FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse();

-- Makes the partitions of this and the coming months; there must be one for a line to be written.
CREATE FUNCTION audit_months(ahead integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    month timestamptz;
    name text;
    made integer := 0;
BEGIN
    FOR n IN 0..ahead LOOP
        month := date_trunc('month', now()) + make_interval(months => n);
        name := 'audit_log_' || to_char(month, 'YYYY_MM');
        CONTINUE WHEN to_regclass('public.' || name) IS NOT NULL;
        EXECUTE format('CREATE TABLE %I PARTITION OF audit_log FOR VALUES FROM (%L) TO (%L)',
                       name, month, month + interval '1 month');
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format('CREATE TRIGGER kept_whole BEFORE TRUNCATE ON %I FOR EACH STATEMENT '
                       'EXECUTE FUNCTION audit_refuse()', name);
        made := made + 1;
    END LOOP;
    RETURN made;
END $$;
REVOKE ALL ON FUNCTION audit_months(integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION audit_months(integer) TO avb_system, avb_keeper;
SELECT audit_months(12);
"""


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(FUNCTIONS)
    protect("audit_log", roles="avb_app, avb_owner")
    for table in ("audit_heads", "audit_anchors"):
        protect(table, roles="avb_app")
        op.execute(f"CREATE POLICY chain ON {table} TO avb_owner USING (true) WITH CHECK (true)")
    columns = (
        "tenant_id, actor_type, actor_id, actor_email, ip_address, user_agent, action, resource_type, resource_id, "
        "description, old_values, new_values, metadata, request_id"
    )
    op.execute(f"GRANT SELECT, INSERT ({columns}) ON audit_log TO avb_app, avb_system")
    grant("audit_heads", avb_app="SELECT", avb_system="SELECT")
    grant("audit_anchors", avb_app="SELECT", avb_system="SELECT")


def downgrade() -> None:
    op.execute("DROP TABLE audit_log, audit_heads, audit_anchors CASCADE")
    op.execute("DROP FUNCTION audit_months(integer), audit_refuse(), audit_chain()")
    op.execute("DROP FUNCTION IF EXISTS audit_hash")
