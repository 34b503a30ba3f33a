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
    email varchar(320) NOT NULL,
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
-- However it is spelled, an address is one person's.
CREATE UNIQUE INDEX users_email_key ON users (lower(email));

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
    PRIMARY KEY (tenant_id, id),
    CONSTRAINT invitations_no_sysadmin_check CHECK (role <> 'sysadmin')
);
CREATE UNIQUE INDEX invitations_pending_key ON invitations (tenant_id, lower(email)) WHERE status = 'pending';

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

-- Once for each statement, since a tenant's roles are read again as a whole.
CREATE FUNCTION note_relation() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO key_revocations (tenant_id, kind) SELECT DISTINCT tenant_id, 'relations' FROM changed;
    RETURN NULL;
END $$;
CREATE TRIGGER noted_insert AFTER INSERT ON relations
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION note_relation();
CREATE TRIGGER noted_update AFTER UPDATE ON relations
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION note_relation();
CREATE TRIGGER noted_delete AFTER DELETE ON relations
    REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION note_relation();
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
    # A tenant's own transactions make nobody a member, and turn no member into somebody else, whom they would then see.
    grant("members", avb_app="SELECT, UPDATE (status, updated_at)", avb_system="SELECT, INSERT, UPDATE")
    grant("members", avb_keeper="SELECT, DELETE")
    grant("invitations", avb_app="SELECT, INSERT, UPDATE (status, token_hash, expires_at, updated_at)")
    grant("invitations", avb_system="SELECT, UPDATE", avb_keeper="SELECT, DELETE")
    grant("relations", avb_app="SELECT, INSERT, DELETE", avb_system="SELECT, INSERT, DELETE")
    grant("relations", avb_keeper="SELECT, DELETE")
    # Nor a sysadmin, who would be one on the platform's word.
    op.execute(
        "CREATE POLICY no_sysadmin ON relations AS RESTRICTIVE FOR INSERT TO avb_app "
        "WITH CHECK (relation <> 'sysadmin')"
    )
    op.execute("GRANT INSERT (tenant_id, key_id, kind) ON key_revocations TO avb_keeper")


def downgrade() -> None:
    op.execute("DROP TABLE relations, invitations, members, users")
    op.execute("DROP FUNCTION note_relation()")
    op.execute("REVOKE INSERT (tenant_id, key_id, kind) ON key_revocations FROM avb_keeper")
