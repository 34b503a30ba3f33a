"""`avb key create`."""

from __future__ import annotations

import argparse

from agentvoicebox.admin_api.cli import console, store
from agentvoicebox.tenancy import keys, tenants
from agentvoicebox.tenancy.database import Database


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `avb key`."""
    create = parser.add_subparsers(dest="action", required=True).add_parser("create", help="make an API key")
    create.add_argument("--tenant", required=True, metavar="SLUG")
    create.add_argument("--name", required=True, help="what it is for")
    create.add_argument("--scopes", default="realtime", help="of realtime,sessions,usage,billing,admin")
    console.add_data(create)
    console.add_json(create)
    create.set_defaults(run=run)


def run(found: argparse.Namespace) -> int:
    """Make the key and print it, this once."""
    scopes = tuple(scope.strip() for scope in found.scopes.split(",") if scope.strip())

    async def issue(database: Database) -> keys.Issued:
        tenant = await tenants.by_slug(database, found.tenant)
        return await keys.issue(database, tenant.id, found.name, scopes)

    made = store.use(console.settings(found), issue)
    if found.json:
        console.emit({"id": str(made.id), "key": made.key, "prefix": made.prefix, "scopes": list(scopes)})
    else:
        console.stdout.print(f"Key {made.prefix}… ({', '.join(scopes)}), shown only now:")
        print(made.key)
    return 0
