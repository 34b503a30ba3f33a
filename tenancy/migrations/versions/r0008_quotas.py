"""A tenant's limits, held by the database itself: no way of making something can forget them."""

from __future__ import annotations

from alembic import op

from agentvoicebox.tenancy.migrations.protection import grant, protect

revision = "0008"
down_revision = "0007"

# Every session that begins changes its tenant's row: room on the page keeps its index out of that.
TABLES = """
CREATE TABLE session_months (
    tenant_id uuid NOT NULL REFERENCES tenants,
    month date NOT NULL,
    sessions bigint NOT NULL CHECK (sessions >= 1),
    PRIMARY KEY (tenant_id, month)
) WITH (fillfactor = 50);
"""

# What began under the release before counts too.
BACKFILL = """
INSERT INTO session_months
SELECT tenant_id, date_trunc('month', created_at AT TIME ZONE 'UTC')::date, count(*) FROM sessions GROUP BY 1, 2
"""

# What takes a place, said once for those who refuse and for those who tell.
TAKEN = """
CREATE FUNCTION quota_projects_taken(tenant uuid) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT count(*) FROM projects WHERE tenant_id = tenant
$$;

-- A key that replaces another takes its place, although both are good for a while.
CREATE FUNCTION quota_api_keys_taken(tenant uuid) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT count(*) FROM api_keys k
    WHERE k.tenant_id = tenant AND k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > now())
      AND NOT EXISTS (SELECT FROM api_keys next
                      WHERE next.tenant_id = tenant AND next.id = k.replaced_by AND next.rotated_from = k.id
                        AND next.revoked_at IS NULL
                        AND (next.expires_at IS NULL OR next.expires_at > now()))
$$;

-- Who has been asked takes a place until the answer, or accepting could fail.
CREATE FUNCTION quota_users_taken(tenant uuid) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT (SELECT count(*) FROM members WHERE tenant_id = tenant AND status = 'active')
         + (SELECT count(*) FROM invitations WHERE tenant_id = tenant AND status = 'pending' AND expires_at > now())
$$;
"""

# One creator at a time per tenant, until its transaction ends: the count that follows sees all before it. It is one
# lock for all kinds, so that no two creators can wait for each other; whoever writes an audit line does so after it.
TRIGGERS = """
CREATE FUNCTION quota_refuse(kind text, most bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%', kind USING ERRCODE = 'AV003', DETAIL = most;
END $$;

CREATE FUNCTION quota_lock(tenant uuid) RETURNS void LANGUAGE sql AS $$
    SELECT pg_advisory_xact_lock(hashtextextended('quota ' || tenant::text, 0))
$$;

CREATE FUNCTION quota_projects() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    most bigint;
BEGIN
    PERFORM quota_lock(NEW.tenant_id);
    SELECT max_projects INTO most FROM tenants WHERE id = NEW.tenant_id;
    IF quota_projects_taken(NEW.tenant_id) >= most THEN
        PERFORM quota_refuse('projects', most);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER quota BEFORE INSERT ON projects FOR EACH ROW EXECUTE FUNCTION quota_projects();

CREATE FUNCTION quota_api_keys() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    most bigint;
BEGIN
    IF NEW.revoked_at IS NOT NULL OR NEW.expires_at <= now() THEN
        RETURN NEW;
    END IF;
    PERFORM quota_lock(NEW.tenant_id);
    IF NEW.rotated_from IS NOT NULL
        AND EXISTS (SELECT FROM api_keys k
                    WHERE k.tenant_id = NEW.tenant_id AND k.id = NEW.rotated_from AND k.revoked_at IS NULL
                      AND (k.expires_at IS NULL OR k.expires_at > now()))
        AND NOT EXISTS (SELECT FROM api_keys next
                        WHERE next.tenant_id = NEW.tenant_id AND next.rotated_from = NEW.rotated_from
                          AND next.revoked_at IS NULL AND (next.expires_at IS NULL OR next.expires_at > now()))
    THEN
        RETURN NEW;
    END IF;
    SELECT max_api_keys INTO most FROM tenants WHERE id = NEW.tenant_id;
    IF quota_api_keys_taken(NEW.tenant_id) >= most THEN
        PERFORM quota_refuse('api_keys', most);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER quota BEFORE INSERT ON api_keys FOR EACH ROW EXECUTE FUNCTION quota_api_keys();
CREATE TRIGGER quota_revived BEFORE UPDATE OF expires_at, revoked_at ON api_keys FOR EACH ROW
    WHEN ((OLD.revoked_at IS NOT NULL OR OLD.expires_at <= now())
          AND NEW.revoked_at IS NULL AND (NEW.expires_at IS NULL OR NEW.expires_at > now()))
    EXECUTE FUNCTION quota_api_keys();

CREATE FUNCTION quota_users() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    most bigint;
BEGIN
    PERFORM quota_lock(NEW.tenant_id);
    SELECT max_users INTO most FROM tenants WHERE id = NEW.tenant_id;
    IF quota_users_taken(NEW.tenant_id) >= most THEN
        PERFORM quota_refuse('users', most);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER quota BEFORE INSERT ON members FOR EACH ROW WHEN (NEW.status = 'active') EXECUTE FUNCTION quota_users();
CREATE TRIGGER quota_revived BEFORE UPDATE OF status ON members FOR EACH ROW
    WHEN (OLD.status <> 'active' AND NEW.status = 'active') EXECUTE FUNCTION quota_users();
CREATE TRIGGER quota BEFORE INSERT ON invitations FOR EACH ROW
    WHEN (NEW.status = 'pending' AND NEW.expires_at > now()) EXECUTE FUNCTION quota_users();
CREATE TRIGGER quota_revived BEFORE UPDATE OF status, expires_at ON invitations FOR EACH ROW
    WHEN ((OLD.status <> 'pending' OR OLD.expires_at <= now()) AND NEW.status = 'pending' AND NEW.expires_at > now())
    EXECUTE FUNCTION quota_users();

-- On the path of every session: one row read, one changed. Whoever begins sessions of one tenant at once waits for the
-- row of its month, and holds no other lock then.
CREATE FUNCTION quota_sessions() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    most bigint;
BEGIN
    SELECT max_sessions_per_month INTO most FROM tenants WHERE id = NEW.tenant_id;
    IF most IS NULL THEN
        RETURN NEW;  -- no such tenant, as the foreign key will say
    END IF;
    INSERT INTO session_months AS counted (tenant_id, month, sessions)
        SELECT NEW.tenant_id, date_trunc('month', now() AT TIME ZONE 'UTC')::date, 1 WHERE most > 0
        ON CONFLICT (tenant_id, month) DO UPDATE SET sessions = counted.sessions + 1 WHERE counted.sessions < most;
    IF NOT FOUND THEN
        PERFORM quota_refuse('sessions', most);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER quota BEFORE INSERT ON sessions FOR EACH ROW EXECUTE FUNCTION quota_sessions();

-- Requests may count up, since the trigger above is theirs, but not down.
CREATE FUNCTION quota_keep() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'what a month has counted only grows' USING ERRCODE = 'check_violation';
END $$;
CREATE TRIGGER kept BEFORE UPDATE ON session_months FOR EACH ROW
    WHEN (NEW.tenant_id <> OLD.tenant_id OR NEW.month <> OLD.month OR NEW.sessions <= OLD.sessions)
    EXECUTE FUNCTION quota_keep();
"""

VIEW = """
CREATE VIEW tenant_overview WITH (security_invoker = true) AS
SELECT t.id AS tenant_id,
       (SELECT count(*) FROM members m WHERE m.tenant_id = t.id AND m.status = 'active') AS members,
       quota_users_taken(t.id) AS users,
       quota_projects_taken(t.id) AS projects,
       quota_api_keys_taken(t.id) AS api_keys,
       (SELECT coalesce(sum(m.sessions), 0)::bigint FROM session_months m WHERE m.tenant_id = t.id) AS sessions,
       (SELECT coalesce(sum(m.sessions), 0)::bigint FROM session_months m
        WHERE m.tenant_id = t.id AND m.month = date_trunc('month', now() AT TIME ZONE 'UTC')::date
       ) AS sessions_this_month
FROM tenants t;
"""

REVIVED = ("api_keys", "members", "invitations")


def upgrade() -> None:
    op.execute(TABLES)
    protect("session_months")
    grant("session_months", avb_app="SELECT, INSERT, UPDATE", avb_system="SELECT, INSERT, UPDATE")
    grant("session_months", avb_keeper="SELECT, DELETE")
    # The owner sees no rows of tenants.
    op.execute("SET LOCAL ROLE avb_system")
    op.execute(BACKFILL)
    op.execute("SET LOCAL ROLE avb_owner")
    op.execute(TAKEN)
    op.execute(TRIGGERS)
    op.execute(VIEW)
    grant("tenant_overview", avb_app="SELECT", avb_system="SELECT")


def downgrade() -> None:
    op.execute("DROP VIEW tenant_overview")
    for table in ("projects", "api_keys", "invitations", "members", "sessions"):
        op.execute(f"DROP TRIGGER quota ON {table}")
    for table in REVIVED:
        op.execute(f"DROP TRIGGER quota_revived ON {table}")
    op.execute("DROP TABLE session_months")
    op.execute(
        "DROP FUNCTION quota_projects(), quota_api_keys(), quota_users(), quota_sessions(), quota_keep(), "
        "quota_projects_taken(uuid), quota_api_keys_taken(uuid), quota_users_taken(uuid), "
        "quota_lock(uuid), quota_refuse(text, bigint)"
    )
