"""Months of the log: made ahead, and archived when they are old."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import psycopg
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, Conflict, Unavailable
from agentvoicebox.tenancy import roles
from agentvoicebox.tenancy.database import Database, sqlstate, translated
from agentvoicebox.tenancy.models import AuditAnchor, AuditEntry

SHORTEST = 90
"""Days for which every line stays in the database; the database itself refuses to give up younger ones."""
_AHEAD = 12
_BATCH = 2_000
_LOCK = 0x41564203
"""Our advisory lock: one archiving at a time."""
_TRIES = 5
_PAUSE = 1.0
_MONTH = re.compile(r"audit_log_(\d{4})_(\d\d)")

_GONE = "42P01"
_BUSY = "55P03"
_TAMPERED = "AV006"

_PARTITIONS = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'audit_log'::regclass"
_LINES = """
SELECT tenant_id, seq, prev, hash, audit_text(l) FROM audit_log l WHERE at >= %s AND at < %s ORDER BY tenant_id, seq, at
"""
_FIELDS = (
    "tenant_id", "seq", "at", "id", "actor_type", "actor_id", "actor_email", "ip_address", "user_agent", "action",
    "resource_type", "resource_id", "description", "old_values", "new_values", "metadata", "request_id",
)  # fmt: skip
"""What audit_text() strings together."""


@dataclass(frozen=True, slots=True)
class Archived:
    """A month that is in a file and no longer in the database."""

    month: datetime
    file: Path
    lines: int
    digest: str
    """SHA-256 of the file."""


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept where: API-176."""

    retention_days: int
    oldest: datetime | None
    """When the oldest line was written that the database holds."""
    archived_until: datetime | None
    """All before this is archived; None when nothing is."""
    last_archived_at: datetime | None
    due: tuple[datetime, ...]
    """Months that could be archived now."""

    @property
    def archive_status(self) -> str:
        """`due` when there are months to archive, else `current`."""
        return "due" if self.due else "current"


async def months(database: Database) -> int:
    """Make the places of this month and the coming twelve; how many were missing. For every start and every day."""
    async with database.system() as session:
        made: int = await session.scalar(text("SELECT audit_months(:ahead)"), {"ahead": _AHEAD})
    return made


async def retention(database: Database, keep_days: int = SHORTEST, tenant_id: uuid.UUID | None = None) -> Retention:
    """How far back the log goes, or one tenant's chain, and whether archiving is behind. Raises `BadInput`."""
    _check(keep_days)
    async with database.system() as session:
        last = (await session.execute(text("SELECT max(month), max(archived_at) FROM audit_anchors"))).one()
        names = (await session.scalars(text(_PARTITIONS))).all()
        now: datetime = await session.scalar(text("SELECT now()"))
        oldest = await _oldest(session, _months(names), tenant_id)
    until = None if last[0] is None else _after(last[0].astimezone(UTC))
    return Retention(keep_days, oldest, until, last[1], tuple(_due(names, now, keep_days)))


async def _oldest(session: AsyncSession, months: Sequence[datetime], tenant_id: uuid.UUID | None) -> datetime | None:
    """From the first month that has a line: years of them are not to be read for one time."""
    query = select(func.min(AuditEntry.at))
    if tenant_id is not None:
        query = query.where(AuditEntry.tenant_id == tenant_id)
    for month in months:
        found = await session.scalar(query.where(AuditEntry.at >= month, AuditEntry.at < _after(month)))
        if found is not None:
            return found
    return None


async def archive(database: Database, directory: Path, keep_days: int = SHORTEST) -> list[Archived]:
    """Move each whole month that ended more than `keep_days` (90 at least) days ago into a file of `directory`.

    `audit-YYYY-MM.jsonl.gz` (0600) holds the lines with their hashes, and where each chain's pieces begin and end. It
    is on disk before the database drops the month; ended in between, the same call does it again. Raises `BadInput`,
    `Conflict` while another archives, when the month was tampered with, or was archived before, and `Unavailable`.
    """
    _check(keep_days)
    connection = await database.connect(roles.KEEPER)
    try:
        with translated():
            alone = await (await connection.execute("SELECT pg_try_advisory_lock(%s), now()", (_LOCK,))).fetchone()
            assert alone is not None
            if not alone[0]:
                raise Conflict("The audit log is being archived by another process; wait for its end.")
            names = [name for (name,) in await (await connection.execute(_PARTITIONS)).fetchall()]
            async with database.system() as session:
                before = {
                    month.astimezone(UTC) for month in await session.scalars(select(AuditAnchor.month).distinct())
                }
            archived = []
            for month in _due(names, alone[1], keep_days):
                if month in before:
                    raise Conflict(
                        f"{month:%Y-%m} is archived already, and there is a partition of it again. Keep its file as it "
                        "is, find out who made the partition, and have a superuser drop it.",
                        code="audit_broken",
                    )
                if (done := await _archive(connection, directory, month)) is not None:
                    archived.append(done)
            return archived
    finally:
        await connection.close()


async def _archive(connection: psycopg.AsyncConnection[Any], directory: Path, month: datetime) -> Archived | None:
    try:
        file, lines, digest = await _write(connection, directory, month)
    except OSError as error:
        raise Unavailable(
            f"The archive cannot be written: {error}. Give a directory of your own with room on its disk; nothing was "
            "removed from the database.",
            code="audit_archive_unwritable",
        ) from error
    for left in reversed(range(_TRIES)):
        try:
            await connection.execute("SELECT audit_archive(%s, %s, %s)", (month, lines, bytes.fromhex(digest)))
            return Archived(month, file, lines, digest)
        except psycopg.Error as error:
            if sqlstate(error) == _TAMPERED:
                raise Conflict(
                    f"{month:%Y-%m} is not archived: {error.diag.message_primary}. See `avb audit verify`.",
                    code="audit_broken",
                ) from error
            if sqlstate(error) != _BUSY or left == 0:
                raise
            await asyncio.sleep(_PAUSE)  # a long transaction has written lines; others take their turn meanwhile
    return None


class _Sink(Protocol):
    def write(self, data: bytes, /) -> int: ...


async def _write(connection: psycopg.AsyncConnection[Any], directory: Path, month: datetime) -> tuple[Path, int, str]:
    """The month as a file that is wholly on disk: its path, lines and SHA-256."""
    await asyncio.to_thread(directory.mkdir, mode=0o700, parents=True, exist_ok=True)
    path = directory / f"audit-{month:%Y-%m}.jsonl.gz"
    handle, name = tempfile.mkstemp(dir=directory, prefix=".audit-")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as raw:
            with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file:
                lines = await _pour(connection, month, file)
            raw.flush()
            os.fsync(raw.fileno())
        digest = await asyncio.to_thread(_digest, Path(name))
        os.replace(name, path)
        _sync(directory)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    return path, lines, digest


async def _pour(connection: psycopg.AsyncConnection[Any], month: datetime, file: _Sink) -> int:
    def put(*rows: str) -> None:
        file.write("".join(f"{row}\n" for row in rows).encode())

    put(json.dumps({"format": "avb-audit-1", "month": f"{month:%Y-%m}", "fields": _FIELDS}))
    pieces = _Pieces()
    async with connection.transaction(), connection.cursor(name="archive") as cursor:
        await cursor.execute(_LINES, (month, _after(month)))
        while rows := await cursor.fetchmany(_BATCH):
            written = [
                row
                for tenant, seq, prev, hash_, entry in rows
                for row in (
                    *pieces.add(str(tenant), seq, prev.hex(), hash_.hex()),
                    # The text that was hashed, as it is: whoever parses it first may spell it differently.
                    f'{{"prev": "{prev.hex()}", "hash": "{hash_.hex()}", "entry": {entry}}}',
                )
            ]
            await asyncio.to_thread(put, *written)
    put(*pieces.end(), json.dumps({"end": True, "lines": pieces.lines}))
    return pieces.lines


class _Pieces:
    """Follows the lines by, and says after each unbroken stretch of a chain where it began and ended."""

    def __init__(self) -> None:
        self.lines = 0
        self._open: dict[str, Any] | None = None

    def add(self, tenant: str, seq: int, prev: str, hash_: str) -> list[str]:
        self.lines += 1
        held = self._open
        if held is not None and held["piece"] == tenant and held["last"] == seq - 1:
            held.update(last=seq, hash=hash_)
            return []
        done = self.end()
        self._open = {"piece": tenant, "first": seq, "last": seq, "prev": prev, "hash": hash_}
        return done

    def end(self) -> list[str]:
        done = [] if self._open is None else [json.dumps(self._open)]
        self._open = None
        return done


def _months(names: Iterable[str]) -> list[datetime]:
    return sorted(
        datetime(int(match[1]), int(match[2]), 1, tzinfo=UTC) for name in names if (match := _MONTH.search(name))
    )


def _due(names: Iterable[str], now: datetime, keep_days: int) -> list[datetime]:
    return [month for month in _months(names) if _after(month) <= now - timedelta(days=keep_days)]


def _after(month: datetime) -> datetime:
    return month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)


def _check(keep_days: int) -> None:
    if not SHORTEST <= keep_days <= 36_500:
        raise BadInput(f"Audit lines are kept for {SHORTEST} to 36500 days.", param="keep_days")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
