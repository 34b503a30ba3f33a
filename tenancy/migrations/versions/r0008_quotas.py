"""A tenant's limits, held by the database itself: no way of making something can forget them."""

from __future__ import annotations

from alembic import op

from agentvoicebox.tenancy.migrations.protection import grant, protect

revision = "0008"
down_revision = "0007"

TABLES = """
CREATE TABLE session_months (
    tenant_id uuid NOT NULL REFERENCES tenants,
    month date NOT NULL,
    sessions bigint NOT NULL,
    PRIMARY KEY (tenant_id, month)
);
"""

# One creator at a time per tenant and kind, until its transaction ends: the count that follows sees all before it.
TRIGGERS = """
CREATE FUNCTION quota_refuse(kind text, most bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%', kind USING ERRCODE = 'AV003', DETAIL = most;
END $$;

CREATE FUNCTION quota_lock(tenant uuid, kind text) RETURNS void LANGUAGE sql AS $$
    SELECT pg_advisory_xact_lock(hashtextextended(tenant::text || kind, 0))
$$;

CREATE FUNCTION quota_projects() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    most bigint;
BEGIN
    PERFORM quota_lock(NEW.tenant_id, 'projects');
    SELECT max_projects INTO most FROM tenants WHERE id = NEW.tenant_id;
    IF (SELECT count(*) FROM projects WHERE tenant_id = NEW.tenant_id) >= most THEN
        PERFORM quota_refuse('projects', most);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER quota BEFORE INSERT ON projects FOR EACH ROW EXECUTE FUNCTION quota_projects();

-- A key that replaces another takes its place, although both are good for a while.
CREATE FUNCTION quota_api_keys() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    most bigint;
BEGIN
    IF NEW.rotated_from IS NOT NULL THEN
        RETURN NEW;
    END IF;
    PERFORM quota_lock(NEW.tenant_id, 'api_keys');
    SELECT max_api_keys INTO most FROM tenants WHERE id = NEW.tenant_id;
    IF (SELECT count(*) FROM api_keys k
        WHERE k.tenant_id = NEW.tenant_id AND k.revoked_at IS NULL
          AND (k.expires_at IS NULL OR k.expires_at > now())
          AND NOT EXISTS (SELECT FROM api_keys r WHERE r.tenant_id = k.tenant_id AND r.rotated_from = k.id)) >= most
    THEN
        PERFORM quota_refuse('api_keys', most);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER quota BEFORE INSERT ON api_keys FOR EACH ROW EXECUTE FUNCTION quota_api_keys();

CREATE FUNCTION quota_users() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    most bigint;
BEGIN
    PERFORM quota_lock(NEW.tenant_id, 'users');
    SELECT max_users INTO most FROM tenants WHERE id = NEW.tenant_id;
    IF (SELECT count(*) FROM members WHERE tenant_id = NEW.tenant_id AND status = 'active')
        + (SELECT count(*) FROM invitations
           WHERE tenant_id = NEW.tenant_id AND status = 'pending' AND expires_at > now()) >= most
    THEN
        PERFORM quota_refuse('users', most);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER quota BEFORE INSERT ON invitations FOR EACH ROW EXECUTE FUNCTION quota_users();
CREATE TRIGGER quota BEFORE INSERT ON members FOR EACH ROW EXECUTE FUNCTION quota_users();

CREATE FUNCTION quota_sessions() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    most bigint;
    this_month date := date_trunc('month', now() AT TIME ZONE 'UTC');
BEGIN
    SELECT max_sessions_per_month INTO most FROM tenants WHERE id = NEW.tenant_id;
    INSERT INTO session_months AS counted VALUES (NEW.tenant_id, this_month, 0) ON CONFLICT DO NOTHING;
    UPDATE session_months SET sessions = sessions + 1
        WHERE tenant_id = NEW.tenant_id AND month = this_month AND sessions < most;
    IF NOT FOUND THEN
        PERFORM quota_refuse('sessions', most);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER quota BEFORE INSERT ON sessions FOR EACH ROW EXECUTE FUNCTION quota_sessions();
"""


def upgrade() -> None:
    op.execute(TABLES)
    protect("session_months")
    grant("session_months", avb_app="SELECT, INSERT, UPDATE", avb_system="SELECT, INSERT, UPDATE")
    grant("session_months", avb_keeper="SELECT, DELETE")
    op.execute(TRIGGERS)


def downgrade() -> None:
    for table in ("projects", "api_keys", "invitations", "members", "sessions"):
        op.execute(f"DROP TRIGGER quota ON {table}")
    op.execute(
        "DROP FUNCTION quota_projects(), quota_api_keys(), quota_users(), quota_sessions(), "
        "quota_lock(uuid, text), quota_refuse(text, bigint)"
    )
    op.execute("DROP TABLE session_months")
