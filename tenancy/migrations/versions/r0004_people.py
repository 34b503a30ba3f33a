"""People, memberships, invitations, and relation tuples."""

from __future__ import annotations

from alembic import op

from agentvoicebox.tenancy.migrations.protection import MINE, grant, protect

revision = "0004"
down_revision = "0003"

TABLES = """
CREATE TABLE users (
    id uuid PRIMARY KEY,
    keycloak_id varchar(255) UNIQUE,
    email varchar(320) NOT NULL UNIQUE,
    first_name varchar(150) NOT NULL DEFAULT '',
    last_name varchar(150) NOT NULL DEFAULT '',
    is_active boolean NOT NULL DEFAULT true,
    is_staff boolean NOT NULL DEFAULT false,
    date_joined timestamptz NOT NULL DEFAULT now(),
    last_login timestamptz,
    preferences jsonb NOT NULL DEFAULT '{}',
    avatar_url text NOT NULL DEFAULT '',
    timezone varchar(50) NOT NULL DEFAULT 'UTC',
    locale varchar(10) NOT NULL DEFAULT 'en',
    email_notifications boolean NOT NULL DEFAULT true,
    push_notifications boolean NOT NULL DEFAULT true,
    theme_id uuid,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE members (
    tenant_id uuid NOT NULL REFERENCES tenants,
    user_id uuid NOT NULL REFERENCES users,
    status varchar(20) NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'removed')),
    invited_by uuid,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, user_id)
);
CREATE INDEX ON members (user_id);

CREATE TABLE invitations (
    tenant_id uuid NOT NULL REFERENCES tenants,
    id uuid NOT NULL,
    email varchar(320) NOT NULL,
    role varchar(20) NOT NULL CHECK (role IN ('sysadmin', 'admin', 'developer', 'operator', 'viewer', 'billing')),
    status varchar(20) NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'accepted', 'expired', 'revoked')),
    token_hash varchar(64) NOT NULL UNIQUE,
    expires_at timestamptz NOT NULL,
    invited_by uuid,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id)
);
CREATE UNIQUE INDEX invitations_pending_key ON invitations (tenant_id, email) WHERE status = 'pending';

-- No foreign key to tenants: the platform's own tuples carry the id of no tenant.
CREATE TABLE relations (
    tenant_id uuid NOT NULL,
    resource_type varchar(30) NOT NULL,
    resource_id varchar(100) NOT NULL,
    relation varchar(30) NOT NULL,
    subject_type varchar(30) NOT NULL,
    subject_id varchar(100) NOT NULL,
    subject_relation varchar(30) NOT NULL DEFAULT '',
    PRIMARY KEY (tenant_id, resource_type, resource_id, relation, subject_type, subject_id, subject_relation)
);
CREATE INDEX ON relations (tenant_id, subject_type, subject_id);

CREATE FUNCTION note_relation() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO key_revocations (tenant_id, kind) VALUES (coalesce(NEW.tenant_id, OLD.tenant_id), 'relations');
    RETURN NULL;
END $$;
CREATE TRIGGER changed AFTER INSERT OR UPDATE OR DELETE ON relations FOR EACH ROW EXECUTE FUNCTION note_relation();
"""


def upgrade() -> None:
    op.execute(TABLES)
    for table in ("members", "invitations", "relations"):
        protect(table)
    # People are the platform's, who may work for several tenants: each sees those who are its members.
    op.execute("ALTER TABLE users ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE users FORCE ROW LEVEL SECURITY")
    theirs = f"SELECT FROM members WHERE members.tenant_id = {MINE} AND members.user_id = users.id"
    op.execute(f"CREATE POLICY tenant_isolation ON users FOR SELECT TO avb_app USING (EXISTS ({theirs}))")
    op.execute("GRANT SELECT (id, email, first_name, last_name, is_active, last_login) ON users TO avb_app")
    grant("users", avb_system="SELECT, INSERT, UPDATE")
    grant("members", avb_app="SELECT, UPDATE", avb_system="SELECT, INSERT, UPDATE", avb_keeper="SELECT, DELETE")
    grant("invitations", avb_app="SELECT, INSERT, UPDATE", avb_system="SELECT, UPDATE", avb_keeper="SELECT, DELETE")
    grant("relations", avb_app="SELECT, INSERT, DELETE", avb_system="SELECT, INSERT, DELETE")
    grant("relations", avb_keeper="SELECT, DELETE")
    grant("key_revocations", avb_keeper="INSERT")


def downgrade() -> None:
    op.execute("DROP TABLE relations, invitations, members, users")
    op.execute("DROP FUNCTION note_relation()")
    op.execute("REVOKE INSERT ON key_revocations FROM avb_keeper")
