"""Devices, how they are paired and what they tell of; wake words, and what tenants set for skills."""

from __future__ import annotations

from alembic import op

from agentvoicebox.tenancy.migrations.protection import grant, protect

revision = "0010"
down_revision = "0009"

# In the order in which nodes take them, and before anything else: else a node that works meanwhile is the one to give
# way. Nobody is kept from reading but of the log, whose check is replaced.
LOCKS = """
LOCK TABLE tenants, projects, personas, voice_configs, api_keys IN SHARE ROW EXCLUSIVE MODE;
LOCK TABLE key_revocations IN ACCESS EXCLUSIVE MODE;
"""

DEVICES = """
CREATE TABLE devices (
    tenant_id uuid NOT NULL REFERENCES tenants,
    id uuid NOT NULL,
    name varchar(100) NOT NULL,
    project_id uuid,
    api_key_id uuid NOT NULL,
    version varchar(50) NOT NULL DEFAULT '',
    last_seen_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id),
    FOREIGN KEY (tenant_id, project_id) REFERENCES projects ON DELETE SET NULL (project_id),
    FOREIGN KEY (tenant_id, api_key_id) REFERENCES api_keys,
    UNIQUE (tenant_id, api_key_id)
) WITH (fillfactor = 85);
CREATE INDEX ON devices (tenant_id, project_id);

CREATE TABLE device_events (
    tenant_id uuid NOT NULL REFERENCES tenants,
    id uuid NOT NULL,
    device_id uuid NOT NULL,
    at timestamptz NOT NULL,
    kind varchar(20) NOT NULL CHECK (kind IN ('wake', 'stt', 'tts', 'persona')),
    phrase varchar(64) NOT NULL DEFAULT '',
    wake_word_id uuid,
    outcome varchar(20) NOT NULL DEFAULT '',
    confidence double precision CHECK (confidence BETWEEN 0 AND 1),
    engine varchar(100) NOT NULL DEFAULT '',
    seconds double precision NOT NULL DEFAULT 0 CHECK (seconds >= 0),
    reason varchar(100) NOT NULL DEFAULT '',
    received_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id),
    CONSTRAINT device_events_outcome_check
        CHECK ((kind = 'wake') = (outcome IN ('detected', 'false_positive', 'missed')))
);
CREATE INDEX ON device_events (tenant_id, device_id, at);
CREATE INDEX device_events_wake_idx ON device_events (tenant_id, at) WHERE kind = 'wake';
CREATE INDEX device_events_at_idx ON device_events USING brin (at) WITH (autosummarize = on);

-- Of no tenant: only the system comes here.
CREATE TABLE pairings (
    id uuid PRIMARY KEY,
    code varchar(8) NOT NULL,
    key_hash varchar(64) NOT NULL,
    key_prefix varchar(12) NOT NULL,
    name varchar(100) NOT NULL,
    network varchar(50) NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    claimed_by uuid REFERENCES tenants
);
CREATE UNIQUE INDEX pairings_code_key ON pairings (code) WHERE claimed_by IS NULL;
CREATE UNIQUE INDEX pairings_key_hash_key ON pairings (key_hash) WHERE claimed_by IS NULL;
CREATE INDEX ON pairings (expires_at);

CREATE TABLE wake_words (
    tenant_id uuid NOT NULL REFERENCES tenants,
    id uuid NOT NULL,
    phrase varchar(64) NOT NULL,
    sensitivity double precision NOT NULL DEFAULT 0.5 CHECK (sensitivity BETWEEN 0 AND 1),
    enabled boolean NOT NULL DEFAULT true,
    model_ref varchar(100) NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id)
);
CREATE UNIQUE INDEX wake_words_phrase_key ON wake_words (tenant_id, lower(phrase));

CREATE TABLE skill_settings (
    tenant_id uuid NOT NULL REFERENCES tenants,
    skill_id varchar(100) NOT NULL,
    settings jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, skill_id)
);
"""

KINDS = "'revoked', 'changed', 'tenant', 'relations'"
KIND = """
ALTER TABLE key_revocations
    DROP CONSTRAINT key_revocations_kind_check,
    ADD CONSTRAINT key_revocations_kind_check CHECK (kind IN ({kinds}));
"""

# What devices are told at once. The keeper erases tenants, of whose devices none is left to be told.
TRIGGERS = """
CREATE FUNCTION note_voice() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO key_revocations (tenant_id, kind)
        VALUES (CASE TG_OP WHEN 'DELETE' THEN OLD.tenant_id ELSE NEW.tenant_id END, 'voice');
    RETURN NULL;
END $$;
CREATE TRIGGER voice AFTER INSERT OR UPDATE ON voice_configs FOR EACH ROW EXECUTE FUNCTION note_voice();
CREATE TRIGGER voice AFTER INSERT OR DELETE OR UPDATE OF
    name, status, system_prompt, knowledge, voice, speed, language, solvers, is_default ON personas FOR EACH ROW
    WHEN (current_user <> 'avb_keeper') EXECUTE FUNCTION note_voice();
CREATE TRIGGER voice AFTER UPDATE OF default_persona_id ON projects FOR EACH ROW
    WHEN (OLD.default_persona_id IS DISTINCT FROM NEW.default_persona_id) EXECUTE FUNCTION note_voice();
CREATE TRIGGER voice AFTER INSERT OR UPDATE OR DELETE ON wake_words FOR EACH ROW
    WHEN (current_user <> 'avb_keeper') EXECUTE FUNCTION note_voice();
CREATE TRIGGER voice AFTER INSERT OR UPDATE OR DELETE ON skill_settings FOR EACH ROW
    WHEN (current_user <> 'avb_keeper') EXECUTE FUNCTION note_voice();
"""

OWNED = ("devices", "device_events", "wake_words", "skill_settings")
CHANGEABLE = "name, project_id, api_key_id, version, last_seen_at, updated_at"


def upgrade() -> None:
    op.execute(LOCKS)
    op.execute(DEVICES)
    op.execute(KIND.format(kinds=f"{KINDS}, 'voice'"))
    op.execute(TRIGGERS)
    for table in OWNED:
        protect(table)
        grant(table, avb_keeper="SELECT, DELETE")
    # A claim makes the device in the transaction that uses up the code, which is the system's.
    grant("devices", avb_app=f"SELECT, INSERT, UPDATE ({CHANGEABLE}), DELETE", avb_system="SELECT, INSERT")
    grant("device_events", avb_app="SELECT, INSERT", avb_system="SELECT, DELETE")
    grant("pairings", avb_system="SELECT, INSERT, UPDATE, DELETE")
    for table in ("wake_words", "skill_settings"):
        grant(table, avb_app="SELECT, INSERT, UPDATE, DELETE", avb_system="SELECT")


def downgrade() -> None:
    op.execute("DROP TABLE devices, device_events, pairings, wake_words, skill_settings")
    for table in ("voice_configs", "personas", "projects"):
        op.execute(f"DROP TRIGGER voice ON {table}")
    op.execute("DROP FUNCTION note_voice()")
    op.execute("SET LOCAL ROLE avb_system")
    op.execute("DELETE FROM key_revocations WHERE kind = 'voice'")
    op.execute("SET LOCAL ROLE avb_owner")
    op.execute(KIND.format(kinds=KINDS))
