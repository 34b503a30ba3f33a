"""Settings, domains, environments and deployments; the keeper, who may erase a tenant."""

from __future__ import annotations

from alembic import op

from agentvoicebox.tenancy.migrations.protection import grant, protect

revision = "0002"
down_revision = "0001"

# Constant defaults and nullable columns: no table is rewritten, and nodes of the release before go on working.
TABLES = """
ALTER TABLE tenants
    ADD COLUMN parent_id uuid REFERENCES tenants,
    ADD COLUMN email varchar(320) NOT NULL DEFAULT '',
    ADD COLUMN timezone varchar(50) NOT NULL DEFAULT 'UTC',
    ADD COLUMN suspension_reason text NOT NULL DEFAULT '',
    ADD COLUMN erased_at timestamptz;

ALTER TABLE sessions ADD COLUMN context jsonb NOT NULL DEFAULT '{}';

CREATE TABLE tenant_settings (
    tenant_id uuid PRIMARY KEY REFERENCES tenants,
    logo_url text NOT NULL DEFAULT '',
    primary_color varchar(7) NOT NULL DEFAULT '#6366f1',
    default_voice_provider varchar(20) NOT NULL DEFAULT 'local'
        CHECK (default_voice_provider IN ('disabled', 'local', 'agentvoicebox')),
    default_stt_model varchar(50) NOT NULL DEFAULT 'base',
    default_tts_voice varchar(50) NOT NULL DEFAULT 'am_onyx',
    default_llm_provider varchar(50) NOT NULL DEFAULT 'groq',
    default_llm_model varchar(100) NOT NULL DEFAULT 'llama-3.1-8b-instant',
    email_notifications_enabled boolean NOT NULL DEFAULT true,
    webhook_url text NOT NULL DEFAULT '',
    allowed_ip_ranges text[] NOT NULL DEFAULT '{}',
    require_mfa boolean NOT NULL DEFAULT false,
    session_timeout_minutes integer NOT NULL DEFAULT 60 CHECK (session_timeout_minutes BETWEEN 5 AND 1440),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE tenant_domains (
    tenant_id uuid NOT NULL REFERENCES tenants,
    id uuid NOT NULL,
    domain varchar(253) NOT NULL,
    is_primary boolean NOT NULL DEFAULT false,
    token varchar(64) NOT NULL,
    verified_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id),
    UNIQUE (tenant_id, domain),
    CONSTRAINT tenant_domains_primary_check CHECK (verified_at IS NOT NULL OR NOT is_primary)
);
-- Claims tell nobody anything: only one that is proven excludes others.
CREATE UNIQUE INDEX tenant_domains_verified_key ON tenant_domains (domain) WHERE verified_at IS NOT NULL;
CREATE UNIQUE INDEX tenant_domains_primary_key ON tenant_domains (tenant_id) WHERE is_primary;

CREATE TABLE environments (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    project_id uuid NOT NULL,
    name varchar(100) NOT NULL,
    config jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id),
    FOREIGN KEY (tenant_id, project_id) REFERENCES projects ON DELETE CASCADE,
    UNIQUE (tenant_id, project_id, name)
);

CREATE TABLE deployments (
    tenant_id uuid NOT NULL,
    id uuid NOT NULL,
    project_id uuid NOT NULL,
    environment_id uuid NOT NULL,
    version varchar(100) NOT NULL,
    status varchar(20) NOT NULL DEFAULT 'active' CHECK (status IN ('pending', 'active', 'superseded', 'failed')),
    config jsonb NOT NULL DEFAULT '{}',
    deployed_by uuid,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id),
    FOREIGN KEY (tenant_id, project_id) REFERENCES projects ON DELETE CASCADE,
    FOREIGN KEY (tenant_id, environment_id) REFERENCES environments ON DELETE CASCADE
);
CREATE INDEX ON deployments (tenant_id, project_id, created_at);
CREATE UNIQUE INDEX deployments_active_key ON deployments (tenant_id, environment_id) WHERE status = 'active';
"""

BEFORE = (
    "projects",
    "api_keys",
    "key_revocations",
    "sessions",
    "session_events",
    "voice_configs",
    "usage_events",
    "usage_minutes",
)
LOCKED = (
    "key_revocations",
    "api_keys",
    "session_events",
    "sessions",
    "voice_configs",
    "projects",
    "usage_events",
    "usage_minutes",
    "tenants",
)
OWNED = ("tenant_settings", "tenant_domains", "environments", "deployments")
NAMES = "name, slug, email, timezone, settings, suspension_reason, updated_at"
ERASED = ("projects", "api_keys", "key_revocations", "sessions", "session_events", "voice_configs", *OWNED)


def upgrade() -> None:
    # All at once, in the order in which nodes take them: else a node that works meanwhile is the one to give way.
    op.execute(f"LOCK TABLE {', '.join(LOCKED)} IN ACCESS EXCLUSIVE MODE")
    op.execute(TABLES)
    for table in (*BEFORE, "tenants"):
        op.execute(f"ALTER POLICY tenant_isolation ON {table} TO avb_app, avb_owner, avb_keeper")
    for table in OWNED:
        protect(table)
    op.execute("GRANT USAGE ON SCHEMA public TO avb_keeper")
    op.execute("GRANT UPDATE (name, email, timezone, updated_at) ON tenants TO avb_app")
    grant("tenant_settings", avb_app="SELECT, INSERT, UPDATE", avb_system="SELECT, INSERT, UPDATE")
    # Proving a claim is the system's: no tenant can say of itself that a name is its own.
    op.execute("GRANT SELECT, DELETE, INSERT (tenant_id, id, domain, token) ON tenant_domains TO avb_app")
    op.execute("GRANT UPDATE (is_primary, updated_at) ON tenant_domains TO avb_app")
    grant("tenant_domains", avb_system="SELECT, UPDATE")
    for table in ("environments", "deployments"):
        grant(table, avb_app="SELECT, INSERT, UPDATE, DELETE", avb_system="SELECT")
    for table in ERASED:
        grant(table, avb_keeper="SELECT, DELETE")
    # What names somebody, and no more: a tenant's status and limits are not the keeper's.
    op.execute(f"GRANT SELECT, UPDATE ({NAMES}) ON tenants TO avb_keeper")


def downgrade() -> None:
    for table in reversed(OWNED):
        op.execute(f"DROP TABLE {table}")
    for table in (*BEFORE, "tenants"):
        op.execute(f"ALTER POLICY tenant_isolation ON {table} TO avb_app, avb_owner")
        op.execute(f"REVOKE ALL ON {table} FROM avb_keeper")
    op.execute("REVOKE USAGE ON SCHEMA public FROM avb_keeper")
    op.execute("REVOKE UPDATE (name, email, timezone, updated_at) ON tenants FROM avb_app")
    op.execute("ALTER TABLE sessions DROP COLUMN context")
    op.execute(
        "ALTER TABLE tenants DROP COLUMN parent_id, DROP COLUMN email, DROP COLUMN timezone, "
        "DROP COLUMN suspension_reason, DROP COLUMN erased_at"
    )
