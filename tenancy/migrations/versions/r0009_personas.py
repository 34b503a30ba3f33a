"""Personas, and which speech and language engines a tenant has chosen."""

from __future__ import annotations

from alembic import op

from agentvoicebox.tenancy.migrations.protection import grant, protect

revision = "0009"
down_revision = "0008"

PERSONAS = """
CREATE TABLE personas (
    tenant_id uuid NOT NULL REFERENCES tenants,
    id uuid NOT NULL,
    name varchar(100) NOT NULL,
    description text NOT NULL DEFAULT '',
    status varchar(20) NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'disabled')),
    system_prompt text NOT NULL DEFAULT '',
    knowledge text NOT NULL DEFAULT '',
    voice varchar(64) NOT NULL DEFAULT '',
    speed double precision CHECK (speed BETWEEN 0.5 AND 2.0),
    language varchar(35) NOT NULL DEFAULT '',
    solvers text[] NOT NULL DEFAULT '{llm}',
    is_default boolean NOT NULL DEFAULT false,
    usage_count bigint NOT NULL DEFAULT 0,
    owner_id uuid,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id),
    CONSTRAINT personas_default_check CHECK (status = 'active' OR NOT is_default)
);
CREATE UNIQUE INDEX personas_name_key ON personas (tenant_id, lower(name));
CREATE UNIQUE INDEX personas_default_key ON personas (tenant_id) WHERE is_default;

ALTER TABLE projects ADD COLUMN default_persona_id uuid;
-- Checking that all rows keep to it reads them as the owner, to whom they are shown for that long.
ALTER TABLE projects NO FORCE ROW LEVEL SECURITY;
ALTER TABLE projects ADD FOREIGN KEY (tenant_id, default_persona_id) REFERENCES personas (tenant_id, id)
    ON DELETE SET NULL (default_persona_id);
ALTER TABLE projects FORCE ROW LEVEL SECURITY;
"""

# Defaults that are constants rewrite no row.
ENGINES = """
ALTER TABLE voice_configs
    ADD COLUMN stt_model varchar(50) NOT NULL DEFAULT 'auto',
    ADD COLUMN stt_language varchar(35) NOT NULL DEFAULT '',
    ADD COLUMN stt_vad boolean NOT NULL DEFAULT true,
    ADD COLUMN stt_fallbacks text[] NOT NULL DEFAULT '{}',
    ADD COLUMN tts_fallbacks text[] NOT NULL DEFAULT '{}',
    ADD COLUMN llm_provider varchar(50) NOT NULL DEFAULT 'auto',
    ADD COLUMN llm_model varchar(100) NOT NULL DEFAULT 'auto',
    ADD COLUMN llm_fallbacks text[] NOT NULL DEFAULT '{}',
    ADD COLUMN llm_url text NOT NULL DEFAULT '',
    ADD COLUMN llm_temperature double precision NOT NULL DEFAULT 0.7,
    ADD COLUMN llm_max_tokens integer NOT NULL DEFAULT 1024;
ALTER TABLE voice_configs ADD CHECK (llm_temperature BETWEEN 0 AND 2);
ALTER TABLE voice_configs ADD CHECK (llm_max_tokens BETWEEN 256 AND 4096);
"""


def upgrade() -> None:
    op.execute(ENGINES)
    op.execute(PERSONAS)
    protect("personas")
    grant("personas", avb_app="SELECT, INSERT, UPDATE, DELETE", avb_system="SELECT", avb_keeper="SELECT, DELETE")
    op.execute("GRANT UPDATE (usage_count) ON personas TO avb_system")


def downgrade() -> None:
    op.execute("ALTER TABLE projects DROP COLUMN default_persona_id")
    op.execute("DROP TABLE personas")
    for column in (
        *("stt_model", "stt_language", "stt_vad", "stt_fallbacks", "tts_fallbacks"),
        *("llm_provider", "llm_model", "llm_fallbacks", "llm_url", "llm_temperature", "llm_max_tokens"),
    ):
        op.execute(f"ALTER TABLE voice_configs DROP COLUMN {column}")
