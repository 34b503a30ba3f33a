"""Transactions bound to one tenant, and the one place where the store's troubles become our errors."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
from psycopg import conninfo, sql
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction, UOWTransaction, with_loader_criteria

from agentvoicebox.config.errors import AvbError, BadInput, Forbidden, Unavailable
from agentvoicebox.tenancy import migrations, roles
from agentvoicebox.tenancy.models import PLATFORM, TenantOwned

Address = Callable[[str], str]
"""From one of the names in `roles` to the libpq address that connects as it; `Postgres.url` and `external` are such."""

_MIGRATING = 0x41564202
_INDEXING = 0x41564207
"""Our advisory locks: one migration at a time, and one maker of indexes."""
LOCK_TIMEOUT = 2.0
"""Seconds for which a migration waits for a table. Whoever wants the table after it waits behind it."""
LOCK_TRIES = 10
LOCK_PAUSE = 1.0
_AUDIT_MONTHS = 12
"""How many months ahead there are partitions of the audit log, so that a node need not start more often."""

STATEMENT_TIMEOUT = 30
"""Seconds after which the server gives up on a statement of a request or a job."""
_CONNECT_TIMEOUT = 10
_RECYCLE = 300
"""Seconds after which a pooled connection is replaced: they collect memory, and addresses of servers change."""

_NO_TENANT = "AV001"
_OVER_LIMIT = "AV003"
_APPEND_ONLY = "AV004"
"""What functions of the database raise: app_tenant(), the quota triggers, and the audit log's."""
_LOCK_NOT_AVAILABLE = "55P03"
_DEADLOCK = "40P01"
_SERIALIZATION = "40001"
_CANCELED = "57014"

_log = logging.getLogger(__name__)


class NoTenant(BadInput):
    """Rows of a tenant were asked for, and no tenant is bound to the transaction."""

    default_code = "tenant_required"


def external(dsn: str) -> Address:
    """Addresses on a PostgreSQL (15 or newer) of the operator's, whose login takes on our roles one by one.

    The login owns the database and is a member of the roles of `roles`. `prepare` makes roles and memberships itself
    when the login is a superuser, or has CREATEROLE and BYPASSRLS on PostgreSQL 16 or newer; else a superuser runs
    `roles.CREATE` once and grants them to the login. Whoever has taken on a role by way of such a login can put it off
    again: a `{role}` in `dsn`, as in `postgresql://{role}@host/name`, stands for logins of the roles' own, whose
    passwords libpq finds in its password file. Raises `BadInput` when `dsn` cannot be read.
    """
    own = "{role}" in dsn
    try:
        given = conninfo.conninfo_to_dict(dsn.replace("{role}", roles.APP))
    except psycopg.ProgrammingError as error:
        raise BadInput(
            "The database address cannot be read; give postgresql://user@host/name or `host=… dbname=…`.",
            param="database",
        ) from error

    def address(role: str) -> str:
        if own:
            return dsn.replace("{role}", role)
        if role == roles.ADMIN:
            return dsn
        options = f"{given.get('options') or ''} -c role={role}".strip()
        return conninfo.make_conninfo(dsn, options=options)

    return address


class _TenantSession(Session):
    """A session whose every transaction is pinned to `info["tenant"]`."""


@event.listens_for(_TenantSession, "after_begin")
def _pin(session: Session, _: SessionTransaction, connection: Connection) -> None:
    tenant = session.info["tenant"]
    if session.info.setdefault("pinned", tenant) != tenant:
        raise NoTenant("This session is bound to another tenant, whose rows it may still hold: use a new one.")
    connection.exec_driver_sql("SELECT set_config('app.tenant_id', %s, true)", (str(tenant),))


@event.listens_for(_TenantSession, "do_orm_execute")
def _filter(state: ORMExecuteState) -> None:
    # The second belt: the database would show nothing else anyway, and the planner likes the plain condition.
    if state.is_select or state.is_update or state.is_delete:
        tenant = state.session.info["tenant"]
        mine = with_loader_criteria(TenantOwned, lambda cls: cls.tenant_id == tenant, include_aliases=True)
        state.statement = state.statement.options(mine)


@event.listens_for(_TenantSession, "before_flush")
def _own(session: Session, _: UOWTransaction, __: object) -> None:
    for row in session.new:
        if isinstance(row, TenantOwned) and row.tenant_id is None:
            row.tenant_id = session.info["tenant"]


class Database:
    """Sessions on the store, one small pool for requests and one for the system."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._app = _engine(_bounded(address), roles.APP, keep=5, most=15)
        self._system = _engine(_bounded(address), roles.SYSTEM, keep=1, most=5, ping=True)

    @asynccontextmanager
    async def tenant(self, tenant_id: uuid.UUID) -> AsyncIterator[AsyncSession]:
        """A transaction that sees and writes rows of this tenant only; committed when the block ends well.

        Raises `Unavailable` when the store does not answer, `BadInput` for a value it cannot hold.
        """
        if not isinstance(tenant_id, uuid.UUID) or tenant_id == PLATFORM:
            raise NoTenant("No tenant is bound: name the tenant whose rows these are.")
        info = {"tenant": tenant_id}
        with translated():
            session = AsyncSession(self._app, sync_session_class=_TenantSession, expire_on_commit=False, info=info)
            async with session:
                try:
                    await session.connection()
                except DBAPIError as error:
                    if not error.connection_invalidated:
                        raise
                    # A pooled connection had died with an earlier server; nothing was done yet, and the pool is empty.
                    await session.rollback()
                    await session.connection()
                yield session
                await session.commit()

    @asynccontextmanager
    async def system(self) -> AsyncIterator[AsyncSession]:
        """A transaction over all tenants, for jobs, key look-up and the operator; else as `tenant`."""
        with translated():
            async with AsyncSession(self._system, expire_on_commit=False) as session, session.begin():
                yield session

    async def connect(self, role: str) -> psycopg.AsyncConnection[Any]:
        """A connection of one's own, outside the pools, that commits each statement. Raises `Unavailable`."""
        with translated():
            return await _connect(self._address(role), autocommit=True)

    async def close(self) -> None:
        """Give all connections back to the server."""
        await self._app.dispose()
        await self._system.dispose()


async def prepare(address: Address) -> None:
    """Make the roles and bring the tables up to date: wholly or not at all, by one process at a time.

    Nodes may be at work on the tables meanwhile. A table that a long transaction holds is waited for in short spells,
    between which everybody else has their turn. Raises `Unavailable` when the server does not let us, or that
    transaction does not end, naming why and the remedy.
    """
    engine = _engine(address, roles.ADMIN, keep=1, most=1)
    try:
        for left in reversed(range(LOCK_TRIES)):
            try:
                async with engine.connect() as connection, connection.begin():
                    await _bring_up_to_date(connection)
                break
            except DBAPIError as error:
                if left == 0 or sqlstate(error) not in (_LOCK_NOT_AVAILABLE, _DEADLOCK):
                    raise
                _log.warning("A long transaction holds a table that has to change; trying again, %d times more.", left)
                await asyncio.sleep(LOCK_PAUSE)
    except DBAPIError as error:
        if _lacks_rights(error):
            raise Unavailable(
                "The login of --database may not make our roles or tables. As a superuser of that server, run the "
                f"SQL of agentvoicebox.tenancy.roles.CREATE, then GRANT {', '.join(roles.ALL)} to the login, which "
                "must own the database.",
                code="store_unavailable",
            ) from error
        if sqlstate(error) in (_LOCK_NOT_AVAILABLE, _DEADLOCK):
            raise Unavailable(
                "The tables cannot be brought up to date while a long transaction holds one of them: end it (see "
                "pg_stat_activity), then start again. Nothing was changed.",
                code="store_unavailable",
            ) from error
        if (known := _meaning(error)) is None:
            raise
        reason = str(error.orig).splitlines()[0] if str(error.orig) else "no reason given"
        raise Unavailable(f"{known.message} ({reason})", code=known.code) from error
    finally:
        await engine.dispose()
    with translated():
        await _index(address)


async def _bring_up_to_date(connection: AsyncConnection) -> None:
    await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATING})
    # Only now: another process that migrates is waited for as long as it takes.
    await connection.execute(
        text("SELECT set_config('lock_timeout', :most, true)"), {"most": f"{round(LOCK_TIMEOUT * 1000)}ms"}
    )
    await connection.exec_driver_sql(roles.CREATE, execution_options={"no_parameters": True})
    await connection.execute(text("SELECT set_config('role', :owner, true)"), {"owner": roles.OWNER})
    await connection.run_sync(migrations.upgrade)
    await connection.execute(text("SELECT audit_months(:ahead)"), {"ahead": _AUDIT_MONTHS})


async def _index(address: Address) -> None:
    """Make the indexes that are missing while others write; without one some queries are slow, and no more."""
    connection = await _connect(address(roles.ADMIN), autocommit=True)
    try:
        found = await connection.execute(
            "SELECT array(SELECT indexrelid::regclass::text FROM pg_index WHERE indisvalid), pg_try_advisory_lock(%s)",
            (_INDEXING,),
        )
        made, alone = await found.fetchone() or ([], False)
        if not alone:
            return  # another process is at it
        await connection.execute("SELECT set_config('role', %s, false)", (roles.OWNER,))
        await connection.execute("SELECT set_config('lock_timeout', %s, false)", (f"{round(LOCK_TIMEOUT * 1000)}ms",))
        for name, statement in migrations.INDEXES.items():
            if name in made:
                continue
            try:
                # What an attempt that was cut short has left; nobody uses it, and everybody pays for it.
                await connection.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(name)))
                await connection.execute(statement)
            except psycopg.OperationalError as error:
                if sqlstate(error) not in (_LOCK_NOT_AVAILABLE, _DEADLOCK):
                    raise
                _log.warning("A long transaction keeps the index %s from being made; the next start tries again.", name)
    finally:
        await connection.close()


@contextmanager
def translated() -> Iterator[None]:
    """Turn the store being away, full or unable to hold a value into `Unavailable` and `BadInput`."""
    try:
        yield
    except (DBAPIError, PoolTimeout, psycopg.Error) as error:
        if (known := _meaning(error)) is None:
            raise
        raise known from error
    except UnicodeEncodeError as error:
        raise _unstorable() from error


def sqlstate(error: BaseException) -> str:
    """The five characters by which PostgreSQL says what went wrong; empty when it said nothing."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return getattr(cause, "sqlstate", None) or ""


def _meaning(error: Exception) -> AvbError | None:
    state = sqlstate(error)
    cause = error.orig if isinstance(error, DBAPIError) else error
    if state == _NO_TENANT:
        return NoTenant("No tenant is bound: name the tenant whose rows these are.")
    if state == _OVER_LIMIT:
        kind, most = _over_limit(cause)
        return Forbidden(
            f"The limit of {most} {kind} is reached; a larger plan allows more.",
            code="tenant_limit_exceeded",
            param=kind,
        )
    if state == _APPEND_ONLY:
        return Forbidden("The audit log is only ever appended to.", code="append_only")
    if state == "53100":
        return Unavailable(
            "The disk of the store is full: free some space. Nothing was written.", code="store_unavailable"
        )
    if isinstance(cause, psycopg.DataError):
        return _unstorable()
    if state == _CANCELED:
        return Unavailable(
            f"The store was not done within {STATEMENT_TIMEOUT} s: ask for less at once, or try again later.",
            code="store_unavailable",
        )
    if state in (_LOCK_NOT_AVAILABLE, _DEADLOCK, _SERIALIZATION):
        return Unavailable("Somebody else is changing the same. Try again.", code="store_unavailable")
    # 25006: a standby that was our server a moment ago. 58 and XX: the server itself fails, as on a disk quota.
    if (
        isinstance(error, PoolTimeout)
        or isinstance(cause, psycopg.OperationalError)
        or state[:2] in ("08", "58", "XX")
        or state == "25006"
        or (isinstance(error, DBAPIError) and error.connection_invalidated)
    ):
        return Unavailable(
            "The store does not answer: is PostgreSQL running, has its disk room, and is --database right? Try again.",
            code="store_unavailable",
        )
    return None


def _over_limit(cause: BaseException | None) -> tuple[str, str]:
    diagnostic = cause.diag if isinstance(cause, psycopg.Error) else None
    kind = (diagnostic and diagnostic.message_primary) or "things"
    return kind.replace("_", " "), (diagnostic and diagnostic.message_detail) or "?"


def _unstorable() -> BadInput:
    return BadInput("A value cannot be stored: it is too long, out of range, or holds a character that is not text.")


def _lacks_rights(error: DBAPIError) -> bool:
    return sqlstate(error) == "42501"


def _bounded(address: Address) -> Address:
    """The same addresses, on which no statement takes longer than `STATEMENT_TIMEOUT`, or what the operator's say."""

    def bounded(role: str) -> str:
        own = conninfo.conninfo_to_dict(address(role)).get("options") or ""
        return conninfo.make_conninfo(address(role), options=f"-c statement_timeout={STATEMENT_TIMEOUT}s {own}".strip())

    return bounded


def _engine(address: Address, role: str, *, keep: int, most: int, ping: bool = False) -> AsyncEngine:
    """An engine with at most `keep` idle connections: each idle one costs the server some 2 MB.

    `ping` asks a pooled connection whether it still lives before it is used, where no pinning statement does so.
    """

    async def creator() -> psycopg.AsyncConnection[Any]:
        return await _connect(address(role))

    return create_async_engine(
        "postgresql+psycopg://",
        async_creator=creator,
        pool_size=keep,
        max_overflow=most - keep,
        pool_pre_ping=ping,
        pool_timeout=5,
        pool_recycle=_RECYCLE,
        pool_use_lifo=True,
        use_native_hstore=False,
        hide_parameters=True,  # they hold transcripts, and exceptions end up in logs
    )


async def _connect(address: str, *, autocommit: bool = False) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(address, autocommit=autocommit, connect_timeout=_CONNECT_TIMEOUT)
