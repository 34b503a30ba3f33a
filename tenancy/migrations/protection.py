"""Row-level security for a table, as every table of tenants' rows gets it."""

from __future__ import annotations

from alembic import op

MINE = "(SELECT app_tenant())"
"""The tenant bound to the transaction. The sub-select makes the planner ask once per query."""


def protect(table: str, column: str = "tenant_id", roles: str = "avb_app, avb_owner, avb_keeper") -> None:
    """Show and take only rows of the tenant bound to the transaction, also from and by the owner; others see none.

    A later migration that changes rows of all tenants does so
    after `SET LOCAL ROLE avb_system`.
    """
    mine = f"{column} = {MINE}"
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY tenant_isolation ON {table} TO {roles} USING ({mine}) WITH CHECK ({mine})")


def grant(table: str, **rights: str) -> None:
    """Give roles their rights on a table: `grant("projects", avb_app="SELECT, INSERT")`."""
    for role, right in rights.items():
        op.execute(f"GRANT {right} ON {table} TO {role}")
