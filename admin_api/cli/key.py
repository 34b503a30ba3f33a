"""`avb key`: the API keys of a tenant."""

from __future__ import annotations

import argparse

from agentvoicebox.admin_api.cli import console, store
from agentvoicebox.tenancy import checks, keys, tenants
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import ApiKey, RateClass
from agentvoicebox.tenancy.pages import Page


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `avb key`."""
    actions = parser.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make an API key")
    create.add_argument("--name", required=True, help="what it is for")
    create.add_argument("--scopes", default="realtime", help="of realtime,sessions,usage,billing,admin")
    create.add_argument("--rate-class", default=RateClass.STANDARD, help="standard, elevated or unlimited")
    create.set_defaults(run=run)
    listing = actions.add_parser("list", help="a tenant's keys, of which the secrets are nowhere")
    listing.add_argument("--page", type=int, default=1)
    listing.set_defaults(run=list_)
    rotate = actions.add_parser("rotate", help="replace a key by a new one; both are good for a while")
    rotate.add_argument("--grace", type=float, metavar="SECONDS", help="how long the old one still is (a day)")
    rotate.set_defaults(run=rotated)
    revoke = actions.add_parser("revoke", help="end a key, everywhere within a second")
    revoke.set_defaults(run=revoked)
    for action in (rotate, revoke):
        action.add_argument("id", metavar="ID", help="as `avb key list` shows it")
    for action in (create, listing, rotate, revoke):
        action.add_argument("--tenant", required=True, metavar="SLUG")
        console.add_data(action)
        console.add_json(action)


def run(found: argparse.Namespace) -> int:
    """Make the key and print it, this once."""
    scopes = tuple(scope.strip() for scope in found.scopes.split(",") if scope.strip())

    async def issue(database: Database) -> keys.Issued:
        tenant = await tenants.by_slug(database, found.tenant)
        return await keys.issue(database, tenant.id, found.name, scopes, rate_class=found.rate_class)

    made = store.use(console.settings(found), issue)
    if found.json:
        console.emit({"id": str(made.id), "key": made.key, "prefix": made.prefix, "scopes": list(scopes)})
    else:
        console.stdout.print(f"Key {made.prefix}… ({', '.join(scopes)}), shown only now:")
        print(made.key)
    return 0


def list_(found: argparse.Namespace) -> int:
    """Print a page of keys."""

    async def look(database: Database) -> Page[ApiKey]:
        tenant = await tenants.by_slug(database, found.tenant)
        return await keys.list_(database, tenant.id, page=found.page)

    page = store.use(console.settings(found), look)
    if found.json:
        items = [
            {
                "id": str(key.id),
                "name": key.name,
                "prefix": key.key_prefix,
                "scopes": list(key.scopes),
                "created_at": key.created_at.isoformat(),
                "expires_at": key.expires_at and key.expires_at.isoformat(),
                "revoked_at": key.revoked_at and key.revoked_at.isoformat(),
                "last_used_at": key.last_used_at and key.last_used_at.isoformat(),
            }
            for key in page.items
        ]
        console.emit({"items": items, "total": page.total, "page": page.page, "page_size": page.page_size})
        return 0
    rows = [[str(key.id), f"{key.key_prefix}…", key.name, ",".join(key.scopes), _state(key)] for key in page.items]
    title = f"Keys of {found.tenant}, page {page.page} of {max(1, -(-page.total // page.page_size))}"
    console.table(title, ["id", "key", "name", "scopes", "state"], rows)
    return 0


def rotated(found: argparse.Namespace) -> int:
    """Replace a key and print the new one, this once."""
    key_id = checks.identifier(found.id, "id")

    async def rotate(database: Database) -> keys.Issued:
        tenant = await tenants.by_slug(database, found.tenant)
        return await keys.rotate(database, tenant.id, key_id, keys.GRACE if found.grace is None else found.grace)

    made = store.use(console.settings(found), rotate)
    if found.json:
        console.emit({"id": str(made.id), "key": made.key, "prefix": made.prefix, "scopes": list(made.scopes)})
    else:
        console.stdout.print(f"Key {made.prefix}… ({', '.join(made.scopes)}), shown only now:")
        print(made.key)
    return 0


def revoked(found: argparse.Namespace) -> int:
    """End a key."""
    key_id = checks.identifier(found.id, "id")

    async def revoke(database: Database) -> None:
        await keys.revoke(database, (await tenants.by_slug(database, found.tenant)).id, key_id)

    store.use(console.settings(found), revoke)
    if found.json:
        console.emit({"id": str(key_id), "revoked": True})
    else:
        console.stdout.print(f"Key {key_id} is revoked")
    return 0


def _state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return f"until {key.expires_at:%Y-%m-%d %H:%M %Z}" if key.expires_at is not None else "active"
