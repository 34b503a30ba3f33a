"""API keys: issued once, kept as digests, checked from a cache that is never a second behind."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import tempfile
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import func, select, update

from agentvoicebox.config.errors import BadInput, Forbidden, NotFound, Refused, Unavailable
from agentvoicebox.tenancy import roles
from agentvoicebox.tenancy.checks import words
from agentvoicebox.tenancy.database import Database, translated
from agentvoicebox.tenancy.models import ApiKey, Project, Tenant, TenantStatus

CHANNEL = "avb_key_revoked"
"""Where the database says that the revocation log has grown."""

_PREFIX = "avb_"
_LENGTH = 47
_SHOWN = 12
_OPERATOR_PREFIX = "avb_operator_"

_POLL = 0.3
_LEASE = 0.9
"""Seconds for which a look at the revocation log lets the cache answer; with one poll that is under a second."""
_CACHED = 10_000
_LAST_XID = 2**63 - 1

# What transactions have revoked that had not ended at the last look. A growing id alone would have gaps: it is given
# out before its transaction commits. The day keeps a restored database, whose numbers restart, from repeating history.
_NEWS = """
SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint,
       array(SELECT key_id FROM key_revocations WHERE xid >= %s AND at > now() - interval '1 day')
"""

_log = logging.getLogger(__name__)


class Scope(StrEnum):
    """What a key may be used for."""

    REALTIME = "realtime"
    SESSIONS = "sessions"
    USAGE = "usage"
    BILLING = "billing"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Issued:
    """A new key; the only time its secret is seen."""

    id: uuid.UUID
    key: str = field(repr=False)
    prefix: str
    scopes: tuple[Scope, ...]
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Grant:
    """Who holds a good key, and what for."""

    tenant_id: uuid.UUID
    tenant_slug: str
    tenant_name: str
    key_id: uuid.UUID
    project_id: uuid.UUID | None
    scopes: frozenset[str]
    expires_at: datetime | None

    def require(self, scope: Scope | str) -> None:
        """Raise `Forbidden` unless the key has this scope."""
        if scope not in self.scopes:
            raise Forbidden(f"This key lacks the scope {str(scope)!r}; use one that has it.", code="insufficient_scope")


async def issue(
    database: Database,
    tenant_id: uuid.UUID,
    name: str,
    scopes: Iterable[str] = (Scope.REALTIME,),
    expires_at: datetime | None = None,
    project_id: uuid.UUID | None = None,
) -> Issued:
    """Make a key of the tenant's project, by default its first one. Raises `BadInput`, `NotFound`."""
    words(name, "name", 1, 100)
    wanted = tuple(dict.fromkeys(scopes))
    if not wanted or any(scope not in tuple(Scope) for scope in wanted):
        raise BadInput(f"scopes must be one or more of {', '.join(Scope)}.", param="scopes")
    if expires_at is not None and (expires_at.tzinfo is None or expires_at <= datetime.now(UTC)):
        raise BadInput("expires_at must have a time zone and lie in the future.", param="expires_at")
    secret = _PREFIX + secrets.token_urlsafe(32)
    async with database.tenant(tenant_id) as session:
        mine = Project.is_default if project_id is None else Project.id == project_id
        project = (await session.execute(select(Project.id).where(mine))).scalar_one_or_none()
        if project is None:
            if project_id is None:
                raise NotFound("There is no such tenant.", code="tenant_not_found")
            raise NotFound("There is no such project.", param="project_id")
        key = ApiKey(
            id=uuid.uuid4(),
            project_id=project,
            name=name,
            key_prefix=secret[:_SHOWN],
            key_hash=_digest(secret),
            scopes=[str(scope) for scope in wanted],
            expires_at=expires_at,
        )
        session.add(key)
    _log.info("key_issued tenant_id=%s key_id=%s", tenant_id, key.id)
    return Issued(key.id, secret, secret[:_SHOWN], tuple(Scope(scope) for scope in wanted), expires_at)


async def revoke(database: Database, tenant_id: uuid.UUID, key_id: uuid.UUID) -> None:
    """End a key, everywhere within a second; ending it again changes nothing. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        # The revocation log is written by a trigger, so that no way of revoking can forget it.
        ended = await session.execute(
            update(ApiKey)
            .where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
            .values(revoked_at=func.now())
            .returning(ApiKey.id)
        )
        if ended.scalar_one_or_none() is None and await session.get(ApiKey, (tenant_id, key_id)) is None:
            raise NotFound("There is no such key.", param="key_id")
    _log.info("key_revoked tenant_id=%s key_id=%s", tenant_id, key_id)


class Keyring:
    """One node's view of all keys.

    It answers from memory only while its last look at the revocation log is under a second old, else from the database,
    and not at all when that is away. Between looks the database's notifications hasten the next one.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._grants: OrderedDict[bytes, tuple[Grant, float]] = OrderedDict()
        self._digests: dict[uuid.UUID, bytes] = {}
        self._callbacks: list[Callable[[uuid.UUID], None]] = []
        self._fresh_until = 0.0
        self._since = _LAST_XID
        self._reported: frozenset[uuid.UUID] = frozenset()
        self._looks = 0
        self._feed: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to follow revocations. Raises `Unavailable` when the store does not answer."""
        connection = await self._listen()
        await self._look(connection)
        self._feed = asyncio.create_task(self._follow(connection), name="revocations")

    async def close(self) -> None:
        """Stop following; from now on every answer comes from the database."""
        if self._feed is not None:
            self._feed.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._feed
            self._feed = None
        self._fresh_until = 0.0

    def on_revoked(self, callback: Callable[[uuid.UUID], None]) -> None:
        """Call `callback` with the id of every key that is revoked, or whose tenant stops being active, from now on."""
        self._callbacks.append(callback)

    async def verify(self, secret: str) -> Grant:
        """Whose key this is. Raises `Refused`, `Forbidden`, `NotFound` for a deleted tenant, `Unavailable`."""
        digest = hashlib.sha256(secret.encode(errors="replace")).digest()
        held = self._grants.get(digest)
        if held is None or time.monotonic() >= self._fresh_until:
            held = await self._read(secret, digest)
        else:
            self._grants.move_to_end(digest)
        grant, expiry = held
        if self._clock() >= expiry:
            raise Refused("This key has expired; issue a new one.", code="api_key_expired")
        return grant

    async def _read(self, secret: str, digest: bytes) -> tuple[Grant, float]:
        if len(secret) != _LENGTH or not secret.startswith(_PREFIX):
            raise _unknown()
        looks = self._looks
        async with self._database.system() as session:
            found = (
                await session.execute(
                    select(ApiKey, Tenant)
                    .join(Tenant, Tenant.id == ApiKey.tenant_id)
                    .where(ApiKey.key_hash == digest.hex())
                )
            ).one_or_none()
        if found is None:
            raise _unknown()
        key, tenant = found
        if key.revoked_at is not None:
            raise Refused("This key has been revoked; issue a new one.", code="api_key_revoked")
        expiry = key.expires_at.timestamp() if key.expires_at else float("inf")
        grant = Grant(
            tenant_id=tenant.id,
            tenant_slug=tenant.slug,
            tenant_name=tenant.name,
            key_id=key.id,
            project_id=key.project_id,
            scopes=frozenset(key.scopes),
            expires_at=key.expires_at,
        )
        if self._clock() < expiry:
            _check_active(tenant.status)
            if looks == self._looks:  # else a revocation may have been reported while we read
                self._keep(digest, grant, expiry)
        return grant, expiry

    def _keep(self, digest: bytes, grant: Grant, expiry: float) -> None:
        self._grants[digest] = (grant, expiry)
        self._grants.move_to_end(digest)
        self._digests[grant.key_id] = digest
        if len(self._grants) > _CACHED:
            _, (oldest, _) = self._grants.popitem(last=False)
            self._digests.pop(oldest.key_id, None)

    async def _listen(self) -> psycopg.AsyncConnection[Any]:
        connection = await self._database.connect(roles.SYSTEM)
        connection.add_notify_handler(lambda _: None)  # it arrives with the next look; without this they pile up
        with translated():
            await connection.execute(f"LISTEN {CHANNEL}")
        return connection

    async def _follow(self, connection: psycopg.AsyncConnection[Any] | None) -> None:
        """Look at the log at once when told to, and every 0.3 s anyway; connect again for as long as it takes."""
        try:
            while True:
                try:
                    if connection is None:
                        connection = await self._listen()
                    await self._look(connection)
                    await _told(connection.fileno(), _POLL)
                except Exception as error:
                    if isinstance(error, Unavailable):
                        _log.warning("The revocation log is out of reach: %s", error.message)
                    else:
                        _log.exception("The revocation log cannot be followed; trying again.")
                    if connection is not None:
                        await connection.close()
                    connection = None
                    await asyncio.sleep(_POLL)
        finally:
            if connection is not None:
                await connection.close()

    async def _look(self, connection: psycopg.AsyncConnection[Any]) -> None:
        looked_at = time.monotonic()
        with translated():
            cursor = await connection.execute(_NEWS, (self._since,))
            row = await cursor.fetchone()
        assert row is not None
        self._since, news = row[0], frozenset(row[1])
        if news:
            self._looks += 1
        for key_id in news:
            if (digest := self._digests.pop(key_id, None)) is not None:
                self._grants.pop(digest, None)
        for key_id in news - self._reported:
            self._report(key_id)
        self._reported = news
        self._fresh_until = looked_at + _LEASE

    def _report(self, key_id: uuid.UUID) -> None:
        for callback in self._callbacks:
            try:
                callback(key_id)
            except Exception:
                _log.exception("Could not act on the revocation of key %s.", key_id)


async def _told(socket: int, patience: float) -> None:
    """Wait until the database says something, or not. Much cheaper than psycopg's notifies(), which wakes up ten times
    a second."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(socket, told.set)
    try:
        async with asyncio.timeout(patience):
            await told.wait()
    except TimeoutError:
        pass
    finally:
        loop.remove_reader(socket)


def operator_key(data: Path) -> tuple[str, bool]:
    """The operator's key of this installation, and whether it was made just now (then show it once).

    `DIR/operator.key` holds the secret itself, readable by its owner only, since the operator's own commands send it;
    a server compares with `same_key`. Raises `Unavailable` when the file cannot be made or holds no key.
    """
    path = data / "operator.key"
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = not path.exists() and _place(path, _OPERATOR_PREFIX + secrets.token_urlsafe(32))
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Unavailable(
            f"The operator key {path} cannot be used: {error}. Mend it, or remove it to get a new one.",
            code="store_unavailable",
        ) from error
    if not key.startswith(_OPERATOR_PREFIX) or len(key) < len(_OPERATOR_PREFIX) + 43:
        raise Unavailable(
            f"The operator key {path} is damaged: remove it, and the next start makes a new one.",
            code="store_unavailable",
        )
    return key, made


def same_key(given: str, expected: str) -> bool:
    """Whether two secrets are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(
        hashlib.sha256(given.encode(errors="replace")).digest(), hashlib.sha256(expected.encode()).digest()
    )


def _place(path: Path, secret: str) -> bool:
    """Write the file whole, unless another process was faster."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".operator")  # mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secret + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(name, path)
        except FileExistsError:
            return False
        return True
    finally:
        os.unlink(name)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _unknown() -> Refused:
    return Refused("This API key is not known; check it, or issue a new one.", code="invalid_api_key")


def _check_active(status: TenantStatus) -> None:
    if status == TenantStatus.ACTIVE:
        return
    if status == TenantStatus.DELETED:
        raise NotFound("There is no such tenant.", code="tenant_not_found")
    if status == TenantStatus.SUSPENDED:
        raise Forbidden("This tenant is suspended; its administrator can ask why.", code="tenant_suspended")
    raise Forbidden("This tenant is not active yet; finish its onboarding.", code="tenant_pending")
