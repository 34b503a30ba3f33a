"""`avb audit verify|anchor|export|archive`."""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from agentvoicebox.admin_api.cli import console, store
from agentvoicebox.config.errors import BadInput, NotFound
from agentvoicebox.tenancy import audit, tenants
from agentvoicebox.tenancy.audit import Broken, Verdict
from agentvoicebox.tenancy.audit.reading import Filter
from agentvoicebox.tenancy.database import Database

_FORMAT = "avb-audit-anchors-1"


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `avb audit`."""
    actions = parser.add_subparsers(dest="action", required=True)

    verify = actions.add_parser("verify", help="whether every line is there and says what it said (exit code 1: no)")
    verify.add_argument("--tenant", metavar="SLUG", help="one tenant's lines only")
    verify.add_argument("--against", metavar="FILE", help="also compare with what `avb audit anchor` wrote then")
    console.add_json(verify)
    verify.set_defaults(run=run_verify)

    anchor = actions.add_parser("anchor", help="write down where every chain ends; keep the file outside the database")
    anchor.add_argument("-o", "--output", metavar="FILE", required=True)
    console.add_json(anchor)
    anchor.set_defaults(run=run_anchor)

    export = actions.add_parser("export", help="write lines as CSV or JSON")
    export.add_argument("--tenant", metavar="SLUG", help="one tenant's lines only")
    export.add_argument("--format", choices=["csv", "json"], default="csv")
    export.add_argument("--since", metavar="TIME", type=_time, help="from this time on, such as 2026-01-31 or …T12:00Z")
    export.add_argument("--until", metavar="TIME", type=_time, help="before this time")
    export.add_argument("-o", "--output", metavar="FILE", help="stdout if not given")
    export.set_defaults(run=run_export)

    archive = actions.add_parser("archive", help="move old months into files, out of the database")
    archive.add_argument("directory", metavar="DIR")
    archive.add_argument("--keep-days", type=int, default=90, help="days that stay in the database: 90 or more")
    console.add_json(archive)
    archive.set_defaults(run=run_archive)

    for action in (verify, anchor, export, archive):
        console.add_data(action)


def run_verify(found: argparse.Namespace) -> int:
    """Check, and print what is broken."""
    anchors = None if found.against is None else _read(Path(found.against))

    async def work(database: Database) -> tuple[Verdict, list[Broken], dict[uuid.UUID, str]]:
        tenant_id = await _tenant(database, found.tenant)
        with console.progress() as tell:
            tell("looking at the chains")
            verdict = await audit.verify(
                database, tenant_id, lambda rows, tenants: tell(f"{rows} lines of {tenants} chains looked at")
            )
            broken = list(verdict.broken)
            if anchors is not None:
                known = {name: head for name, head in anchors.items() if tenant_id in (None, uuid.UUID(name))}
                broken += await audit.against(database, known)
        return verdict, broken, await _names(database, {one.tenant_id for one in broken})

    verdict, broken, names = store.use(console.settings(found), work)
    if found.json:
        console.emit(
            {
                "whole": not broken,
                "lines": verdict.rows,
                "chains": verdict.tenants,
                "broken": [
                    {
                        "tenant_id": str(one.tenant_id),
                        "tenant": names[one.tenant_id],
                        "line": one.seq,
                        "at": one.at and one.at.astimezone(UTC).isoformat(),
                        "what": one.what,
                    }
                    for one in broken
                ],
            }
        )
    elif broken:
        console.table(
            "What the audit log does not hold any more as it was written: the first such line of each chain",
            ["tenant", "line", "time", "what"],
            [[names[one.tenant_id], str(one.seq), _shown(one.at), one.what] for one in broken],
        )
    else:
        console.stdout.print(f"Whole: {verdict.rows} lines of {verdict.tenants} chains.")
    return 1 if broken else 0


def run_anchor(found: argparse.Namespace) -> int:
    """Write the heads of all chains into a file."""
    heads = store.use(console.settings(found), audit.heads)
    document = {"format": _FORMAT, "at": datetime.now(UTC).isoformat(), "heads": heads}
    _write(Path(found.output), json.dumps(document, indent=1).encode())
    if found.json:
        console.emit({"file": found.output, "chains": len(heads)})
    else:
        console.stdout.print(
            f"Anchored {len(heads)} chains in {found.output}; keep it where the database's admin cannot write."
        )
    return 0


def run_export(found: argparse.Namespace) -> int:
    """Write the lines as they come."""

    async def work(database: Database) -> None:
        tenant_id = await _tenant(database, found.tenant)
        pieces = audit.export(database, tenant_id, Filter(since=found.since, until=found.until), found.format)
        with ExitStack() as stack:
            out: BinaryIO = sys.stdout.buffer
            if found.output is not None:
                out = stack.enter_context(_open(Path(found.output)))
            async for piece in pieces:
                out.write(piece)
            out.flush()

    store.use(console.settings(found), work)
    return 0


def run_archive(found: argparse.Namespace) -> int:
    """Archive what is old, and say what was."""
    done = store.use(
        console.settings(found), lambda database: audit.archive(database, Path(found.directory), found.keep_days)
    )
    if found.json:
        console.emit(
            {
                "archived": [
                    {"month": f"{one.month:%Y-%m}", "file": str(one.file), "lines": one.lines, "sha256": one.digest}
                    for one in done
                ]
            }
        )
    for one in () if found.json else done:
        console.stdout.print(f"{one.month:%Y-%m}: {one.lines} lines in {one.file}")
    if not done and not found.json:
        console.stdout.print("There is no month to archive.")
    return 0


async def _tenant(database: Database, slug: str | None) -> uuid.UUID | None:
    return None if slug is None else (await tenants.by_slug(database, slug)).id


async def _names(database: Database, wanted: set[uuid.UUID]) -> dict[uuid.UUID, str]:
    """What people call them; the lines of a tenant outlive it."""
    names = {tenant_id: str(tenant_id) for tenant_id in wanted} | {audit.PLATFORM: "(platform)"}
    for tenant_id in wanted - {audit.PLATFORM}:
        try:
            names[tenant_id] = (await tenants.get(database, tenant_id)).slug
        except NotFound:
            continue
    return names


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != _FORMAT:
            raise ValueError("another format")
        heads: dict[str, Any] = {str(uuid.UUID(name)): head for name, head in document["heads"].items()}
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.", param="against") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} holds no anchors: give what `avb audit anchor` wrote.", param="against") from error
    return heads


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("wb")
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}.", param="output") from error


def _write(path: Path, content: bytes) -> None:
    with _open(path) as file:
        file.write(content + b"\n")


def _time(text: str) -> datetime:
    given = datetime.fromisoformat(text)
    return given if given.tzinfo else given.replace(tzinfo=UTC)


def _shown(at: datetime | None) -> str:
    return "" if at is None else at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
