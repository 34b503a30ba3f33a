"""Searching the log, reading one entry, and exports that take no memory."""

from __future__ import annotations

import json
import string
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, NotFound
from agentvoicebox.tenancy import pages, tables
from agentvoicebox.tenancy.audit.lines import append
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import PLATFORM, Action, AuditEntry
from agentvoicebox.tenancy.pages import Page

_BATCH = 500
_WORDS = 10
_LONGEST = 200
_SPACES = str.maketrans(string.punctuation, " " * len(string.punctuation))
"""The database's audit_words() does the same to what is searched."""

COLUMNS = (
    "id", "tenant_id", "seq", "at", "actor_type", "actor_id", "actor_email", "ip_address", "user_agent", "action",
    "resource_type", "resource_id", "description", "old_values", "new_values", "details", "request_id", "prev", "hash",
)  # fmt: skip
"""What an export holds of each entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which entries: those that are all of what is given. `since` is included, `until` not; `q` is words."""

    actor_id: uuid.UUID | None = None
    action: str | None = None
    resource_type: str | None = None
    resource_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    q: str | None = None


NOTHING = Filter()


async def search(
    database: Database,
    tenant_id: uuid.UUID | None,
    *,
    actor_id: uuid.UUID | None = None,
    action: str | None = None,
    resource_type: str | None = None,
    resource_id: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    q: str | None = None,
    page: int = 1,
    page_size: int = 20,
) -> Page[AuditEntry]:
    """Entries, the newest first: of one tenant, of the platform itself (`PLATFORM`), or of all (None: the operator's).

    `q` finds entries that hold words beginning with each of its words, in description, resource type or id. Raises
    `BadInput`.
    """
    wanted = Filter(
        actor_id=actor_id,
        action=action,
        resource_type=resource_type,
        resource_id=resource_id,
        since=since,
        until=until,
        q=q,
    )
    query = select(AuditEntry).where(*_conditions(tenant_id, wanted))
    async with _session(database, tenant_id) as session:
        ordered = query.order_by(AuditEntry.at.desc(), AuditEntry.seq.desc(), AuditEntry.tenant_id)
        return await pages.turn_to(session, ordered, page, page_size)


async def entry(database: Database, tenant_id: uuid.UUID | None, entry_id: uuid.UUID) -> AuditEntry:
    """One entry by its id; tenants as in `search`. Raises `NotFound`."""
    query = select(AuditEntry).where(AuditEntry.id == entry_id, *_conditions(tenant_id, NOTHING))
    async with _session(database, tenant_id) as session:
        found = (await session.scalars(query.limit(1))).one_or_none()
    if found is None:
        raise NotFound("There is no such audit entry; those older than the retention are in its archive.")
    return found


def export(
    database: Database, tenant_id: uuid.UUID | None, wanted: Filter = NOTHING, format: str = "csv"
) -> AsyncGenerator[bytes, None]:
    """The entries in order of their chains, as pieces of a `csv` or `json` document; tenants as in `search`.

    The export is a line of the log itself. Nothing is held between the pieces, neither rows nor a connection, so it
    takes no more memory for a million entries, and a reader who stalls keeps nobody waiting: lines never change, and
    the next piece begins after the last line that was read. Raises `BadInput` at once.
    """
    if format not in ("csv", "json"):
        raise BadInput("format must be csv or json.", param="format")
    given = {field.name: value for field in fields(wanted) if (value := getattr(wanted, field.name)) is not None}
    details = {"format": format, "filter": given}
    return _pieces(database, tenant_id, _conditions(tenant_id, wanted), details, _Csv() if format == "csv" else _Json())


async def _pieces(
    database: Database,
    tenant_id: uuid.UUID | None,
    conditions: list[ColumnElement[bool]],
    details: dict[str, Any],
    writer: _Csv | _Json,
) -> AsyncGenerator[bytes, None]:
    chain = PLATFORM if tenant_id in (None, PLATFORM) else None
    async with _session(database, tenant_id) as session:
        await append(session, Action.API_CALL, "audit_log", "", "export", tenant_id=chain, details=details)
        end = (await session.scalars(select(func.now()))).one()
    conditions = [*conditions, AuditEntry.at <= end]
    yield writer.begin()
    key = tuple_(AuditEntry.tenant_id, AuditEntry.seq, AuditEntry.at)
    query = select(AuditEntry).order_by(AuditEntry.tenant_id, AuditEntry.seq, AuditEntry.at).limit(_BATCH)
    after: ColumnElement[bool] | None = None
    while True:
        async with _session(database, tenant_id) as session:
            rows = (await session.scalars(query.where(*conditions, *([] if after is None else [after])))).all()
        if rows:
            yield writer.rows(rows)
            after = key > tuple_(rows[-1].tenant_id, rows[-1].seq, rows[-1].at)
        if len(rows) < _BATCH:
            break
    yield writer.end()


def as_dict(entry: AuditEntry) -> dict[str, Any]:
    """An entry as JSON can hold it: ids, times and addresses as text, hashes in hexadecimal."""
    return {name: _plain(getattr(entry, name)) for name in COLUMNS}


def _session(database: Database, tenant_id: uuid.UUID | None) -> AbstractAsyncContextManager[AsyncSession]:
    return database.system() if tenant_id is None or tenant_id == PLATFORM else database.tenant(tenant_id)


def _conditions(tenant_id: uuid.UUID | None, wanted: Filter) -> list[ColumnElement[bool]]:
    for name, moment in (("since", wanted.since), ("until", wanted.until)):
        if moment is not None and moment.tzinfo is None:
            raise BadInput(f"{name} must name its time zone.", param=name)
    if wanted.action is not None and wanted.action not in tuple(Action):
        raise BadInput(f"action must be one of {', '.join(Action)}.", param="action")
    given: list[ColumnElement[bool]] = []
    if tenant_id is not None:
        given.append(AuditEntry.tenant_id == tenant_id)
    for column, value in (
        (AuditEntry.actor_id, wanted.actor_id),
        (AuditEntry.action, wanted.action),
        (AuditEntry.resource_type, wanted.resource_type),
        (AuditEntry.resource_id, wanted.resource_id),
    ):
        if value is not None:
            given.append(column == value)
    if wanted.since is not None:
        given.append(AuditEntry.at >= wanted.since)
    if wanted.until is not None:
        given.append(AuditEntry.at < wanted.until)
    if wanted.q is not None:
        given.append(AuditEntry.words.bool_op("@@")(func.to_tsquery("simple", _query(wanted.q))))
    return given


def _query(q: str) -> str:
    words = q.replace("\0", " ").translate(_SPACES).split()
    if not words or len(q) > _LONGEST or len(words) > _WORDS:
        raise BadInput(f"q must hold 1 to {_WORDS} words, in {_LONGEST} characters.", param="q")
    return " & ".join(f"'{word}':*" for word in words)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (dict, int)):
        return value
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if isinstance(value, datetime) else str(value)


class _Json:
    """One array."""

    def __init__(self) -> None:
        self._between = ""

    def begin(self) -> bytes:
        return b"[\n"

    def rows(self, rows: Sequence[AuditEntry]) -> bytes:
        text = self._between + ",\n".join(json.dumps(as_dict(row), ensure_ascii=False) for row in rows)
        self._between = ",\n"
        return text.encode()

    def end(self) -> bytes:
        return b"\n]\n"


class _Csv:
    """A table."""

    def begin(self) -> bytes:
        return tables.row(COLUMNS).encode()

    def rows(self, rows: Sequence[AuditEntry]) -> bytes:
        return "".join(tables.row(as_dict(row).values()) for row in rows).encode()

    def end(self) -> bytes:
        return b""
