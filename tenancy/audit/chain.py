"""Whether every line is still there and says what it said."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import psycopg

from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy import roles
from agentvoicebox.tenancy.database import Database, translated

_BATCH = 200_000
"""Lines, roughly, that are looked at in one statement: some seconds."""
_ANCHORS = 10_000
_LAST = uuid.UUID(int=2**128 - 1)

_WHAT = {
    "inserted": "was put in afterwards",
    "edited": "does not say what it said when it was written",
    "rewritten": "was replaced: the next line continues another one",
    "unbacked": "is said to be archived, but no month was archived that holds it",
    "archive": "ends what was archived, and the next line does not continue it",
    "head": "is the last, but there is no record that it should be",
}

_AGAINST = """
SELECT f.tenant_id, f.seq, h.seq, coalesce(l.hash, a.hash), f.hash,
    EXISTS (SELECT FROM audit_anchors i WHERE i.tenant_id = f.tenant_id AND f.seq >= i.first AND f.seq < i.seq)
FROM unnest(%s::uuid[], %s::bigint[], %s::bytea[]) AS f (tenant_id, seq, hash)
LEFT JOIN audit_heads h ON h.tenant_id = f.tenant_id
LEFT JOIN audit_log l ON l.tenant_id = f.tenant_id AND l.seq = f.seq
LEFT JOIN audit_anchors a ON a.tenant_id = f.tenant_id AND a.seq = f.seq
"""


class Broken(NamedTuple):
    """A place at which a chain does not hold: `PLATFORM` for the platform's own; `at` when there is such a line."""

    tenant_id: uuid.UUID
    seq: int
    at: datetime | None
    what: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was looked at, and the first bad line of each chain that is broken."""

    rows: int
    tenants: int
    broken: tuple[Broken, ...]


def _silent(_: int, __: int) -> None:
    pass


async def verify(
    database: Database, tenant_id: uuid.UUID | None = None, tell: Callable[[int, int], None] = _silent
) -> Verdict:
    """Recompute a tenant's chain, or all of them; `tell` hears how many lines and tenants are done.

    Finds lines edited, removed, put in or exchanged, also by a superuser behind the triggers' back, and chains cut off
    at either end. What is archived must be of a month that the platform's chain tells of, with as many lines; which of
    that month's pieces is false the database cannot tell, so all are named. Whoever rewrites everything after the line,
    and the head, is found with `against` only. The platform's chain is looked at when all are: who has rewritten its
    end, or properly added a line of a month that never was, is found only by the file that the archive lacks. Raises
    `Unavailable`.
    """
    rows = tenants = 0
    broken: list[Broken] = []
    connection = await database.connect(roles.SYSTEM)  # of its own: the pools' give up on what takes long
    try:
        with translated():
            spans = [(tenant_id, tenant_id)] if tenant_id is not None else await _spans(connection)
            for span in spans:
                found = await connection.execute("SELECT * FROM audit_verify(%s, %s)", span)
                async for tenant, lines, seq, at, upto, what in found:
                    rows, tenants = rows + lines, tenants + 1
                    if what is not None:
                        broken.append(Broken(tenant, seq, at, _told(what, seq, upto)))
                tell(rows, tenants)
    finally:
        await connection.close()
    return Verdict(rows, tenants, tuple(broken))


async def heads(database: Database) -> dict[str, dict[str, Any]]:
    """Where every chain ends now, for keeping outside the database: `{"<tenant>": {"seq": 7, "hash": "<hex>"}}`."""
    connection = await database.connect(roles.SYSTEM)
    try:
        with translated():
            found = await connection.execute("SELECT tenant_id, seq, hash FROM audit_heads ORDER BY tenant_id")
            return {str(tenant): {"seq": seq, "hash": digest.hex()} async for tenant, seq, digest in found}
    finally:
        await connection.close()


async def against(database: Database, heads: Mapping[str, Mapping[str, Any]]) -> tuple[Broken, ...]:
    """The chains that do not hold the lines that `heads` once returned. Raises `BadInput` when it cannot be read.

    A line within an archived month is not in the database to be compared; its month's end is, by `verify`.
    """
    wanted = _parsed(heads)
    broken: list[Broken] = []
    connection = await database.connect(roles.SYSTEM)
    try:
        with translated():
            for start in range(0, len(wanted), _ANCHORS):
                columns = zip(*wanted[start : start + _ANCHORS], strict=True)
                found = await connection.execute(_AGAINST, [list(column) for column in columns])
                async for tenant, seq, end, digest, expected, archived in found:
                    if digest == expected or (digest is None and archived) or (seq == 0 and end is not None):
                        continue
                    lost = end is None or end < seq
                    what = (
                        "is missing, though it was anchored"
                        if lost or digest is None
                        else ("is not the one that was anchored: the chain up to it was rewritten")
                    )
                    broken.append(Broken(tenant, seq, None, what))
    finally:
        await connection.close()
    return tuple(sorted(broken))


def _told(what: str, seq: int, upto: int) -> str:
    if what == "missing":
        return "is missing" if seq == upto else f"and all up to {upto} are missing"
    return _WHAT[what]


async def _spans(connection: psycopg.AsyncConnection[Any]) -> list[tuple[uuid.UUID, uuid.UUID]]:
    """All tenants in stretches of some `_BATCH` lines: those between the known ones may have lost their head."""
    found = await connection.execute("SELECT tenant_id, seq FROM audit_heads ORDER BY tenant_id")
    spans: list[tuple[uuid.UUID, uuid.UUID]] = []
    begin, lines = uuid.UUID(int=0), 0
    async for tenant, seq in found:
        lines += seq
        if lines >= _BATCH and tenant != _LAST:
            spans.append((begin, tenant))
            begin, lines = uuid.UUID(int=tenant.int + 1), 0
    return [*spans, (begin, _LAST)]


def _parsed(heads: Mapping[str, Mapping[str, Any]]) -> list[tuple[uuid.UUID, int, bytes]]:
    try:
        return [(uuid.UUID(tenant), int(head["seq"]), bytes.fromhex(head["hash"])) for tenant, head in heads.items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput("The anchors cannot be read: give what `avb audit anchor` wrote.", param="against") from error
