"""`avb tenant`: making tenants, looking at them, and what becomes of them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from agentvoicebox.admin_api.cli import console, store
from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.tenancy import erasure, quotas, tenants
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import Tenant
from agentvoicebox.tenancy.voices import VoiceConfig


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `avb tenant`."""
    actions = parser.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make a tenant")
    create.add_argument("--slug", required=True, help="short name: a-z, 0-9 and -")
    create.add_argument("--name", required=True, help="name of the organisation")
    create.add_argument("--tier", default="free", help="free, starter, pro or enterprise")
    create.add_argument("--email", default="", help="where the organisation is written to")
    create.add_argument("--timezone", default="UTC", help="such as Europe/Vienna")
    voice = create.add_argument_group("its assistant")
    voice.add_argument("--voice", default="auto", help="a voice of the speech engine")
    voice.add_argument("--speed", type=float, default=1.0, help="0.5 to 2.0")
    voice.add_argument("--language", default="en-US", help="a language tag such as en-US")
    voice.add_argument(
        "--wake-word", metavar="PHRASE", help=f"what its devices listen for, else {VoiceConfig().wake_word}"
    )
    voice.add_argument("--persona-name", default="Assistant", help="what the assistant calls itself")
    voice.add_argument("--disable-skill", action="append", default=[], metavar="ID", help="a skill that never answers")
    create.set_defaults(run=run)

    listing = actions.add_parser("list", help="all tenants, the newest first")
    listing.add_argument("--status", help="active, suspended, pending or deleted")
    listing.add_argument("--tier", help="free, starter, pro or enterprise")
    listing.add_argument("--search", default="", help="a part of name, slug, e-mail address or id")
    listing.add_argument("--page", type=int, default=1)
    listing.set_defaults(run=list_)

    show = actions.add_parser("show", help="one tenant, and how much of its limits it has used")
    show.set_defaults(run=shown)
    suspend = actions.add_parser("suspend", help="let nobody in until it is activated again")
    suspend.add_argument("--reason", required=True, help="for the audit log and the tenant")
    suspend.set_defaults(run=suspended)
    activate = actions.add_parser("activate", help="let a pending, suspended or deleted tenant in")
    activate.set_defaults(run=activated)
    delete = actions.add_parser("delete", help="close a tenant; its data stay until they are erased")
    delete.set_defaults(run=deleted)
    export = actions.add_parser("export", help="everything that is the tenant's, one JSON object per line")
    export.add_argument("-o", "--output", metavar="FILE", help="where to; else standard output")
    export.set_defaults(run=exported)
    erase = actions.add_parser("erase", help="erase a deleted tenant's data for good")
    erase.add_argument("--yes", action="store_true", help="it cannot be undone, and is to be done")
    erase.set_defaults(run=erased)
    for action in (show, suspend, activate, delete, export, erase):
        action.add_argument("slug", metavar="SLUG")
    for action in (create, listing, show, suspend, activate, delete, export, erase):
        console.add_data(action)
    for action in (create, listing, show, suspend, activate, delete, erase):
        console.add_json(action)


def run(found: argparse.Namespace) -> int:
    """Make the tenant and print it."""
    voice = VoiceConfig(
        voice=found.voice,
        speed=found.speed,
        language=found.language,
        persona_name=found.persona_name,
        disabled_skills=tuple(found.disable_skill),
    )
    if found.wake_word is not None:
        from agentvoicebox.plugins import phrases

        voice = replace(voice, wake_word=phrases.check(found.wake_word, voice.language).phrase)
    made = store.use(
        console.settings(found),
        lambda database: tenants.create(
            database, found.slug, found.name, found.tier, voice, email=found.email, timezone=found.timezone
        ),
    )
    if found.json:
        console.emit(
            {
                "id": str(made.id),
                "slug": made.slug,
                "name": made.name,
                "tier": made.tier,
                "status": made.status,
                "created_at": made.created_at.isoformat(),
            }
        )
    else:
        console.stdout.print(f"Tenant [bold]{made.slug}[/bold] ({made.name}, {made.tier}) is {made.id}")
        console.stdout.print(f"Next: avb key create --tenant {made.slug} --name first")
    return 0


def list_(found: argparse.Namespace) -> int:
    """Print a page of tenants."""
    page = store.use(
        console.settings(found),
        lambda database: tenants.list_(
            database, status=found.status, tier=found.tier, search=found.search, page=found.page
        ),
    )
    if found.json:
        items = [
            {
                **_told(each.tenant),
                "users": each.users,
                "projects": each.projects,
                "api_keys": each.api_keys,
                "sessions": each.sessions,
            }
            for each in page.items
        ]
        console.emit({"items": items, "total": page.total, "page": page.page, "page_size": page.page_size})
        return 0
    rows = [
        [each.tenant.slug, each.tenant.name, each.tenant.tier, each.tenant.status]
        + [str(count) for count in (each.users, each.projects, each.api_keys, each.sessions)]
        for each in page.items
    ]
    title = f"Tenants, page {page.page} of {max(1, -(-page.total // page.page_size))}"
    console.table(title, ["slug", "name", "tier", "status", "users", "projects", "keys", "sessions"], rows)
    return 0


def shown(found: argparse.Namespace) -> int:
    """Print one tenant and its limits."""

    async def look(database: Database) -> tuple[Tenant, quotas.Usage]:
        tenant = await tenants.by_slug(database, found.slug)
        return tenant, await quotas.usage(database, tenant.id)

    tenant, usage = store.use(console.settings(found), look)
    kinds = ("users", "projects", "api_keys", "sessions_this_month")
    used = {kind: getattr(usage, kind) for kind in kinds}
    if found.json:
        counts = {kind: {"current": quota.current, "limit": quota.limit} for kind, quota in used.items()}
        console.emit({**_told(tenant), "usage": counts})
        return 0
    about = [
        [name, str(value)]
        for name, value in _told(tenant).items()
        if value not in ("", None) and not name.startswith("max_")
    ]
    about += [[kind.replace("_", " "), f"{quota.current} of {quota.limit}"] for kind, quota in used.items()]
    console.table(tenant.name, ["", ""], about)
    return 0


def suspended(found: argparse.Namespace) -> int:
    """Suspend the tenant."""

    async def turn(database: Database) -> Tenant:
        return await tenants.suspend(database, (await tenants.by_slug(database, found.slug)).id, found.reason)

    return _turned(found, store.use(console.settings(found), turn))


def activated(found: argparse.Namespace) -> int:
    """Activate the tenant."""

    async def turn(database: Database) -> Tenant:
        return await tenants.activate(database, (await tenants.by_slug(database, found.slug)).id)

    return _turned(found, store.use(console.settings(found), turn))


def deleted(found: argparse.Namespace) -> int:
    """Close the tenant."""

    async def turn(database: Database) -> Tenant:
        return await tenants.delete(database, (await tenants.by_slug(database, found.slug)).id)

    return _turned(found, store.use(console.settings(found), turn))


def exported(found: argparse.Namespace) -> int:
    """Write everything that is the tenant's."""

    async def write(database: Database) -> int:
        tenant = await tenants.by_slug(database, found.slug)
        count = 0
        with _whole(found.output) as file:
            async with aclosing(erasure.export(database, tenant.id)) as rows:
                async for name, row in rows:
                    file.write(json.dumps({"table": name, "row": row}, ensure_ascii=False, default=_plain) + "\n")
                    count += 1
        return count

    count = store.use(console.settings(found), write)
    console.stderr.print(f"{count} rows of {found.slug} written")
    return 0


def erased(found: argparse.Namespace) -> int:
    """Erase the tenant's data."""
    if not found.yes:
        raise BadInput("Erasing cannot be undone: export what is still wanted, then give --yes.", param="yes")

    async def erase(database: Database) -> dict[str, int]:
        return await erasure.erase(database, (await tenants.by_slug(database, found.slug)).id)

    gone = store.use(console.settings(found), erase)
    if found.json:
        console.emit({"erased": gone})
    else:
        console.stdout.print(f"Erased {sum(gone.values())} rows of {found.slug}; its usage and audit log stay")
    return 0


def _turned(found: argparse.Namespace, tenant: Tenant) -> int:
    if found.json:
        console.emit({"status": tenant.status, "tenant_id": str(tenant.id)})
    else:
        console.stdout.print(f"Tenant [bold]{tenant.slug}[/bold] is {tenant.status}")
    return 0


def _told(tenant: Tenant) -> dict[str, Any]:
    names = ("id", "slug", "name", "email", "timezone", "tier", "status", "suspension_reason")
    limits = ("max_users", "max_projects", "max_api_keys", "max_sessions_per_month")
    times = ("created_at", "activated_at", "suspended_at", "deleted_at", "erased_at")
    told = {name: _plain(getattr(tenant, name)) for name in names}
    told |= {name: getattr(tenant, name) for name in limits}
    return told | {name: moment and moment.isoformat() for name in times for moment in (getattr(tenant, name),)}


def _plain(value: Any) -> str:
    """What JSON has no word for."""
    return value.hex() if isinstance(value, bytes) else str(value)


@contextmanager
def _whole(path: str | None) -> Iterator[IO[str]]:
    """Standard output, or a file for its owner's eyes that is there when all of it is. Raises `Unavailable`."""
    if path is None:
        yield sys.stdout
        return
    try:
        handle, name = tempfile.mkstemp(dir=Path(path).absolute().parent, prefix=".export")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                yield file
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as error:
        raise Unavailable(f"{path} cannot be written: {error.strerror}.", code="file_unavailable") from error
