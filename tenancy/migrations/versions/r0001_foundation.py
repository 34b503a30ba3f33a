"""Tenants, projects, keys, sessions, voices and the usage ledger, protected from the first row on."""

from __future__ import annotations

from alembic import op

from agentvoicebox.tenancy.migrations.protection import grant, protect

revision = "0001"
down_revision = None

FUNCTIONS = """
-- Stands for "the tenant of this transaction" in every policy. Without one it raises: never an empty answer that looks
-- like an answer.
CREATE FUNCTION app_tenant() RETURNS uuid LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
DECLARE
    bound text := NULLIF(current_setting('app.tenant_id', true), '');
BEGIN
    IF bound IS NULL THEN
        RAISE EXCEPTION 'no tenant is bound to this transaction' USING ERRCODE = 'AV001';
    END IF;
    RETURN bound::uuid;
END $$;
"""

TABLES = """
CREATE TABLE tenants (
    id uuid PRIMARY KEY,
    name varchar(255) NOT NULL,
    slug varchar(100) NOT NULL UNIQUE,
    tier varchar(20) NOT NULL DEFAULT 'free' CHECK (tier IN ('free', 'starter', 'pro', 'enterprise')),
    status varchar(20) NOT NULL DEFAULT 'pending' CHECK (status IN ('active', 'suspended', 'pending', 'deleted')),
    billing_id varchar(255) NOT NULL DEFAULT '',
    keycloak_group_id varchar(255) NOT NULL DEFAULT '',
    settings jsonb NOT NULL DEFAULT '{}',
    max_users integer NOT NULL,
    max_projects integer NOT NULL,
    max_api_keys integer NOT NULL,
    max_sessions_per_month integer NOT NULL,
    activated_at timestamptz,
    suspended_at timestamptz,
    deleted_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT tenants_limits_check
        CHECK (max_users >= 1 AND max_projects >= 1 AND max_api_keys >= 1 AND max_sessions_per_month >= 0)
);
CREATE INDEX ON tenants (tier);
CREATE INDEX ON tenants (status);
CREATE INDEX ON tenants (billing_id);

CREATE TABLE projects (
    tenant_id uuid NOT NULL REFERENCES tenants,
    id uuid NOT NULL,
    name varchar(255) NOT NULL,
    environment varchar(20) NOT NULL DEFAULT 'development'
        CHECK (environment IN ('production', 'staging', 'development')),
    config jsonb NOT NULL DEFAULT '{}',
    is_default boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id)
);
CREATE UNIQUE INDEX projects_default_key ON projects (tenant_id) WHERE is_default;

CREATE TABLE api_keys (
    tenant_id uuid NOT NULL REFERENCES tenants,
    id uuid NOT NULL,
    project_id uuid,
    name varchar(100) NOT NULL,
    description text NOT NULL DEFAULT '',
    key_prefix varchar(12) NOT NULL,
    key_hash varchar(64) NOT NULL UNIQUE,
    scopes text[] NOT NULL DEFAULT '{}',
    rate_limit_tier varchar(20) NOT NULL DEFAULT 'standard'
        CHECK (rate_limit_tier IN ('standard', 'elevated', 'unlimited')),
    expires_at timestamptz,
    revoked_at timestamptz,
    revoked_by uuid,
    created_by uuid,
    last_used_at timestamptz,
    last_used_ip inet,
    usage_count bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id),
    FOREIGN KEY (tenant_id, project_id) REFERENCES projects ON DELETE SET NULL (project_id)
);
CREATE INDEX ON api_keys (key_prefix);
CREATE INDEX ON api_keys (tenant_id, revoked_at);
CREATE INDEX ON api_keys (tenant_id, project_id);

CREATE TABLE key_revocations (
    tenant_id uuid NOT NULL,
    id bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
    key_id uuid NOT NULL,
    xid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id),
    FOREIGN KEY (tenant_id, key_id) REFERENCES api_keys
);
CREATE INDEX ON key_revocations (xid);

CREATE TABLE sessions (
    tenant_id uuid NOT NULL REFERENCES tenants,
    id uuid NOT NULL,
    project_id uuid,
    api_key_id uuid,
    status varchar(20) NOT NULL DEFAULT 'created'
        CHECK (status IN ('created', 'active', 'completed', 'terminated', 'error')),
    config jsonb NOT NULL DEFAULT '{}',
    started_at timestamptz,
    ended_at timestamptz,
    duration_seconds double precision,
    input_tokens integer NOT NULL DEFAULT 0,
    output_tokens integer NOT NULL DEFAULT 0,
    audio_duration_seconds double precision NOT NULL DEFAULT 0,
    termination_reason varchar(50) NOT NULL DEFAULT '',
    error_code varchar(50) NOT NULL DEFAULT '',
    error_message text NOT NULL DEFAULT '',
    client_ip inet,
    user_agent text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id),
    FOREIGN KEY (tenant_id, project_id) REFERENCES projects ON DELETE SET NULL (project_id),
    FOREIGN KEY (tenant_id, api_key_id) REFERENCES api_keys ON DELETE SET NULL (api_key_id)
);
CREATE INDEX ON sessions (tenant_id, status);
CREATE INDEX ON sessions (tenant_id, created_at);
CREATE INDEX ON sessions (tenant_id, project_id);
CREATE INDEX ON sessions (tenant_id, api_key_id);

CREATE TABLE session_events (
    tenant_id uuid NOT NULL,
    session_id uuid NOT NULL,
    sequence integer NOT NULL CHECK (sequence >= 0),
    event_type varchar(20) NOT NULL
        CHECK (event_type IN ('transcript', 'response', 'tool_call', 'tool_result', 'error', 'system')),
    content jsonb NOT NULL DEFAULT '{}',
    timestamp timestamptz NOT NULL DEFAULT now(),
    duration_ms integer,
    PRIMARY KEY (tenant_id, session_id, sequence),
    FOREIGN KEY (tenant_id, session_id) REFERENCES sessions
);
CREATE INDEX ON session_events (tenant_id, session_id, event_type);
CREATE INDEX ON session_events (tenant_id, session_id, timestamp);

CREATE TABLE voice_configs (
    tenant_id uuid PRIMARY KEY REFERENCES tenants,
    voice varchar(64) NOT NULL,
    speed double precision NOT NULL CHECK (speed BETWEEN 0.5 AND 2.0),
    language varchar(35) NOT NULL,
    wake_word varchar(64) NOT NULL,
    persona_name varchar(100) NOT NULL,
    disabled_skills text[] NOT NULL,
    stt varchar(64) NOT NULL,
    tts varchar(64) NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE usage_events (
    tenant_id uuid NOT NULL,
    event_id varchar(200) NOT NULL,
    metric varchar(50) NOT NULL,
    quantity numeric(18, 6) NOT NULL,
    at timestamptz NOT NULL,
    session_id uuid,
    project_id uuid,
    PRIMARY KEY (tenant_id, event_id)
);

CREATE TABLE usage_minutes (
    tenant_id uuid NOT NULL,
    metric varchar(50) NOT NULL,
    minute timestamptz NOT NULL,
    project_id uuid NOT NULL,
    quantity numeric(24, 6) NOT NULL,
    events bigint NOT NULL,
    PRIMARY KEY (tenant_id, metric, minute, project_id)
);
"""

TRIGGERS = """
CREATE FUNCTION note_revocation() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO key_revocations (tenant_id, key_id) VALUES (NEW.tenant_id, NEW.id);
    RETURN NULL;
END $$;
CREATE TRIGGER revoked AFTER UPDATE OF revoked_at ON api_keys FOR EACH ROW
    WHEN (OLD.revoked_at IS NULL AND NEW.revoked_at IS NOT NULL) EXECUTE FUNCTION note_revocation();

-- Keys are good while their tenant is active, and nodes have them cached.
CREATE FUNCTION note_suspension() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO key_revocations (tenant_id, key_id)
        SELECT tenant_id, id FROM api_keys WHERE tenant_id = NEW.id AND revoked_at IS NULL;
    RETURN NULL;
END $$;
CREATE TRIGGER suspended AFTER UPDATE OF status ON tenants FOR EACH ROW
    WHEN (OLD.status = 'active' AND NEW.status <> 'active') EXECUTE FUNCTION note_suspension();

-- Only a hint to look at the table now: it carries nothing, and may get lost.
CREATE FUNCTION announce_revocation() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('avb_key_revoked', '');
    RETURN NULL;
END $$;
CREATE TRIGGER announced AFTER INSERT ON key_revocations FOR EACH STATEMENT EXECUTE FUNCTION announce_revocation();

CREATE FUNCTION refuse_revival() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the session is already %', OLD.status USING ERRCODE = 'AV002';
END $$;
CREATE TRIGGER final BEFORE UPDATE OF status ON sessions FOR EACH ROW
    WHEN (OLD.status IN ('completed', 'terminated', 'error') AND NEW.status <> OLD.status)
    EXECUTE FUNCTION refuse_revival();
"""

LEDGER = """
-- A group of usage is of many tenants; see the module roles.
CREATE POLICY ledger_writes ON usage_events FOR INSERT TO avb_ledger WITH CHECK (true);
CREATE POLICY ledger_sees ON usage_events FOR SELECT TO avb_ledger USING (true);
CREATE POLICY ledger ON usage_minutes TO avb_ledger USING (true) WITH CHECK (true);
"""

OWNED = (
    "projects",
    "api_keys",
    "key_revocations",
    "sessions",
    "session_events",
    "voice_configs",
    "usage_events",
    "usage_minutes",
)


def upgrade() -> None:
    for script in (FUNCTIONS, TABLES, TRIGGERS):
        op.execute(script)
    op.execute("GRANT USAGE ON SCHEMA public TO avb_app, avb_system, avb_ledger")

    protect("tenants", column="id", roles="avb_app, avb_owner")
    for table in OWNED:
        protect(table, roles="avb_app, avb_owner")
    op.execute(LEDGER)

    grant("tenants", avb_app="SELECT", avb_system="SELECT, INSERT, UPDATE")
    grant("projects", avb_app="SELECT, INSERT, UPDATE, DELETE", avb_system="SELECT, INSERT, UPDATE, DELETE")
    for table in ("api_keys", "sessions", "voice_configs"):
        grant(table, avb_app="SELECT, INSERT, UPDATE", avb_system="SELECT, INSERT, UPDATE")
    grant("key_revocations", avb_app="INSERT", avb_system="SELECT, INSERT")
    grant("session_events", avb_app="SELECT, INSERT", avb_system="SELECT, INSERT")
    grant("usage_events", avb_app="SELECT", avb_system="SELECT", avb_ledger="SELECT, INSERT")
    grant("usage_minutes", avb_app="SELECT", avb_system="SELECT", avb_ledger="SELECT, INSERT, UPDATE")


def downgrade() -> None:
    for table in ("session_events", *(name for name in reversed(OWNED) if name != "session_events"), "tenants"):
        op.execute(f"DROP TABLE {table}")
    functions = ("note_revocation", "note_suspension", "announce_revocation", "refuse_revival", "app_tenant")
    for function in functions:
        op.execute(f"DROP FUNCTION {function}()")
