"""Rotation, and a log that tells nodes of every change to a key, not only of its end."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"

# The uses of keys are counted in place, every few seconds: with room on its page a row need not move.
TABLES = """
ALTER TABLE api_keys
    ADD COLUMN rotated_from uuid,
    ADD COLUMN replaced_by uuid,
    ADD CONSTRAINT api_keys_rotated_from_check CHECK (rotated_from <> id),
    SET (fillfactor = 85);
ALTER TABLE key_revocations
    ADD COLUMN kind varchar(20) NOT NULL DEFAULT 'revoked',
    ALTER COLUMN key_id DROP NOT NULL,
    ADD CONSTRAINT key_revocations_kind_check CHECK (kind IN ('revoked', 'changed', 'tenant', 'relations'));
"""

TRIGGERS = """
CREATE FUNCTION note_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO key_revocations (tenant_id, key_id, kind) VALUES (NEW.tenant_id, NEW.id, 'changed');
    RETURN NULL;
END $$;
CREATE TRIGGER changed AFTER UPDATE OF expires_at, scopes, rate_limit_tier, project_id ON api_keys FOR EACH ROW
    WHEN (NEW.revoked_at IS NULL AND
          (OLD.expires_at, OLD.scopes, OLD.rate_limit_tier, OLD.project_id) IS DISTINCT FROM
          (NEW.expires_at, NEW.scopes, NEW.rate_limit_tier, NEW.project_id))
    EXECUTE FUNCTION note_change();

-- What keys carry of their tenant. Its status is among it: keys that are issued while it is being suspended are not
-- among those that the suspension sees.
CREATE FUNCTION note_tenant() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO key_revocations (tenant_id, kind)
        VALUES ((to_jsonb(NEW) ->> CASE TG_TABLE_NAME WHEN 'tenants' THEN 'id' ELSE 'tenant_id' END)::uuid, 'tenant');
    RETURN NULL;
END $$;
CREATE TRIGGER changed AFTER UPDATE OF name, slug, tier, status ON tenants FOR EACH ROW
    WHEN ((OLD.name, OLD.slug, OLD.tier, OLD.status) IS DISTINCT FROM (NEW.name, NEW.slug, NEW.tier, NEW.status))
    EXECUTE FUNCTION note_tenant();
CREATE TRIGGER changed AFTER INSERT OR UPDATE ON tenant_settings FOR EACH ROW EXECUTE FUNCTION note_tenant();

-- A key that replaces another takes its place in the tenant's limit, so the replaced ones that are still good need a
-- limit too: else who rotates again and again has any number of keys.
CREATE FUNCTION limit_replaced() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    most bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended('replaced ' || NEW.tenant_id::text, 0));
    SELECT max_api_keys INTO most FROM tenants WHERE id = NEW.tenant_id;
    IF (SELECT count(*) FROM api_keys
        WHERE tenant_id = NEW.tenant_id AND replaced_by IS NOT NULL
          AND revoked_at IS NULL AND expires_at > now()) >= most
    THEN
        RAISE EXCEPTION 'replaced_api_keys_that_are_still_good' USING ERRCODE = 'AV003', DETAIL = most;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER replaced BEFORE UPDATE OF replaced_by ON api_keys FOR EACH ROW
    WHEN (OLD.replaced_by IS NULL AND NEW.replaced_by IS NOT NULL AND NEW.revoked_at IS NULL)
    EXECUTE FUNCTION limit_replaced();
"""

FINALITY = """
CREATE FUNCTION refuse_unrevoking() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a revoked key stays revoked' USING ERRCODE = 'AV002';
END $$;
CREATE TRIGGER final BEFORE UPDATE OF revoked_at ON api_keys FOR EACH ROW
    WHEN (OLD.revoked_at IS NOT NULL AND NEW.revoked_at IS NULL AND current_user = 'avb_app')
    EXECUTE FUNCTION refuse_unrevoking();
"""

CHANGEABLE = (
    "name, description, project_id, scopes, rate_limit_tier, expires_at, revoked_at, revoked_by, replaced_by, "
    "updated_at"
)


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(TRIGGERS)
    op.execute(FINALITY)
    # A line that says its own number or time could pass for another tenant's, and nodes would not hear of that one.
    op.execute("REVOKE INSERT ON key_revocations FROM avb_app")
    op.execute("GRANT INSERT (tenant_id, key_id, kind) ON key_revocations TO avb_app")
    op.execute("GRANT DELETE ON key_revocations TO avb_system")
    # What foreign keys change is written down by the owner, whatever tenant is bound (PostgreSQL 18).
    op.execute("ALTER POLICY tenant_isolation ON key_revocations TO avb_app, avb_keeper")
    op.execute("CREATE POLICY noted ON key_revocations FOR INSERT TO avb_owner WITH CHECK (true)")
    op.execute("REVOKE UPDATE ON api_keys FROM avb_app")
    op.execute(f"GRANT UPDATE ({CHANGEABLE}) ON api_keys TO avb_app")


def downgrade() -> None:
    op.execute("SET LOCAL ROLE avb_system")
    op.execute("DELETE FROM key_revocations WHERE kind <> 'revoked'")
    op.execute("SET LOCAL ROLE avb_owner")
    op.execute("DROP TRIGGER replaced ON api_keys")
    op.execute("DROP TRIGGER final ON api_keys")
    op.execute("DROP FUNCTION refuse_unrevoking()")
    op.execute("DROP POLICY noted ON key_revocations")
    op.execute("ALTER POLICY tenant_isolation ON key_revocations TO avb_app, avb_owner, avb_keeper")
    op.execute("REVOKE INSERT (tenant_id, key_id, kind) ON key_revocations FROM avb_app")
    op.execute("GRANT INSERT ON key_revocations TO avb_app")
    op.execute(f"REVOKE UPDATE ({CHANGEABLE}) ON api_keys FROM avb_app")
    op.execute("GRANT UPDATE ON api_keys TO avb_app")
    for table in ("api_keys", "tenants", "tenant_settings"):
        op.execute(f"DROP TRIGGER changed ON {table}")
    op.execute("DROP FUNCTION note_change(), note_tenant(), limit_replaced()")
    op.execute("REVOKE DELETE ON key_revocations FROM avb_system")
    op.execute("ALTER TABLE key_revocations DROP COLUMN kind, ALTER COLUMN key_id SET NOT NULL")
    op.execute("ALTER TABLE api_keys DROP COLUMN rotated_from, DROP COLUMN replaced_by, RESET (fillfactor)")
