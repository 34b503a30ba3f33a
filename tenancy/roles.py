"""The database roles, what each may do, and their making.

    avb_owner   owns every table; nobody logs in as it, migrations take it on
    avb_app     requests: sees the rows of the tenant bound to its transaction, and those only
    avb_system  jobs, key look-up and the operator: passes over row-level security, still bound by its grants
    avb_ledger  appends usage of many tenants at once, and can read nothing else
    avb_keeper  archives months of audit, and erases the tenant bound to its transaction
    avb_cell    what runs in a cell: it has no business here, and no right to anything

A ledger group holds the usage of whatever tenants spoke in the last moment, so no single tenant can be bound to its
transaction. A role of its own is narrower than lending it `avb_system`: were its connection abused, it could add usage,
but read no key, no name, no transcript, and change no usage event that stands.
"""

from __future__ import annotations

OWNER, APP, SYSTEM, LEDGER = "avb_owner", "avb_app", "avb_system", "avb_ledger"
KEEPER, CELL = "avb_keeper", "avb_cell"
ALL = (OWNER, APP, SYSTEM, LEDGER, KEEPER, CELL)
ADMIN = "avb_admin"
"""Whoever may make the others: the embedded server's superuser, or the login of the operator's DSN."""

CREATE = """
DO $$
DECLARE
    wanted record;
    needed text := CASE WHEN current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END;
BEGIN
    FOR wanted IN SELECT * FROM (VALUES
        ('avb_owner', 'NOLOGIN'), ('avb_app', 'LOGIN'), ('avb_system', 'LOGIN BYPASSRLS'), ('avb_ledger', 'LOGIN'),
        ('avb_keeper', 'LOGIN'), ('avb_cell', 'LOGIN')
    ) AS role (name, attributes)
    LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted.name) THEN
            EXECUTE format('CREATE ROLE %I %s', wanted.name, wanted.attributes);
        END IF;
        IF NOT pg_has_role(current_user, wanted.name, needed) THEN
            EXECUTE format('GRANT %I TO CURRENT_USER', wanted.name);
        END IF;
    END LOOP;
    IF NOT has_schema_privilege('avb_owner', 'public', 'CREATE') THEN
        GRANT CREATE, USAGE ON SCHEMA public TO avb_owner;
    END IF;
    -- A table or function of one's own making could stand in for one of ours in the triggers that run for it.
    IF has_schema_privilege('avb_cell', 'public', 'CREATE') THEN
        REVOKE CREATE ON SCHEMA public FROM PUBLIC;
    END IF;
    IF has_database_privilege('avb_cell', current_database(), 'TEMPORARY') THEN
        EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC', current_database());
    END IF;
END $$;
"""
"""Makes what is missing. For a login without the right to, a superuser runs this once."""
