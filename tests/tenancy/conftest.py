"""Two real PostgreSQLs per run, the embedded one and the system's; a database per module, a fresh tenant per test."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pytest
from psycopg import sql
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from agentvoicebox.tenancy import database as stores
from agentvoicebox.tenancy import embedded, roles, tenants
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Address, Database, external, prepare
from agentvoicebox.tenancy.embedded import DATABASE, Postgres, serving
from agentvoicebox.tenancy.models import Tenant
from agentvoicebox.tenancy.permissions import Relations
from agentvoicebox.tenancy.state import redis as shared_state

_numbers = itertools.count()


@dataclass(frozen=True)
class Site:
    """A database, as the product reaches it and as its superuser does."""

    address: Address
    superuser: str
    own_logins: Address
    """As `address`, where every role has a login of its own."""


class Server(Protocol):
    """A PostgreSQL on which there can be databases for tests."""

    def database(self, name: str) -> Site:
        """A new, empty one."""


@contextmanager
def new_site(server: Server) -> Iterator[Site]:
    """A new, empty database for as long as the block runs."""
    name = f"site_{next(_numbers)}_{uuid.uuid4().hex[:6]}"
    site = server.database(name)
    yield site
    maintenance = psycopg.conninfo.make_conninfo(site.superuser, dbname="postgres")
    with psycopg.connect(maintenance, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


class EmbeddedServer:
    """The wheel's, where every role logs in by its name."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres

    def database(self, name: str) -> Site:
        with psycopg.connect(self._postgres.url(roles.ADMIN, "postgres"), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))

        def address(role: str) -> str:
            return self._postgres.url(role, name)

        return Site(address, address(roles.ADMIN), address)


class SystemServer:
    """The system's own binaries, reached as an operator's server is: by one ordinary login that takes on our roles."""

    LOGIN = "operator"
    _BINARIES = "/usr/lib/postgresql"  # Debian's place, which is not on the path

    def __init__(self, directory: Path) -> None:
        found = sorted(Path(self._BINARIES).glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
        on_path = shutil.which("postgres")
        assert found or on_path, "No PostgreSQL is installed on this system; `./run test` installs one on Debian."
        binaries = (found[-1] if found else Path(str(on_path)).resolve()).parent
        account = embedded._account(directory)
        embedded._open_way(account, directory.parent)
        directory.mkdir(mode=0o700)
        if account.switch:
            os.chown(directory, account.uid, account.gid)
        self._sockets = directory
        data = directory / "data"
        subprocess.run(
            [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"],
            check=True,
            stdout=subprocess.DEVNULL,
            **{**account.popen(), "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}},  # type: ignore[call-overload]
        )
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(directory),
            "unix_socket_permissions": "0700",
        }
        settings |= {"fsync": "off", "dynamic_shared_memory_type": "mmap", "log_min_messages": "panic"}
        self._process = subprocess.Popen(
            [binaries / "postgres", "-D", data, *(f"-c{name}={value}" for name, value in settings.items())],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=embedded._die_with(os.getpid()),
            **account.popen(),  # type: ignore[call-overload]
        )
        try:
            self._prepare()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)

    def database(self, name: str) -> Site:
        with self._connect() as connection:
            new = sql.SQL("CREATE DATABASE {} OWNER {}")
            connection.execute(new.format(sql.Identifier(name), sql.Identifier(self.LOGIN)))
        own = external(self._dsn("{role}", name))
        return Site(external(self._dsn(self.LOGIN, name)), self._dsn("postgres", name), own)

    def _prepare(self) -> None:
        """Make the login, and our roles, as the operator's superuser is asked to."""
        while True:
            with suppress(psycopg.OperationalError), self._connect() as connection:
                connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(self.LOGIN)))
                connection.execute(roles.CREATE)
                granted = sql.SQL(", ").join(map(sql.Identifier, roles.ALL))
                connection.execute(sql.SQL("GRANT {} TO {}").format(granted, sql.Identifier(self.LOGIN)))
                return
            assert self._process.poll() is None, "The system's PostgreSQL did not start."
            time.sleep(0.05)

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(self._dsn("postgres", "postgres"), autocommit=True)

    def _dsn(self, user: str, name: str) -> str:
        return f"host={self._sockets} port=5432 user={user} dbname={name}"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was made and stopped, to be copied: making one takes seconds on a busy disk."""
    data = tmp_path_factory.mktemp("made")
    with serving(data) as postgres, psycopg.connect(postgres.url(roles.ADMIN, "postgres")) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS one")
    return data


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A store of this test's own, not running."""
    return copied(made, tmp_path / "data")


def copied(made: Path, to: Path) -> Path:
    subprocess.run(["cp", "-a", made, to], check=True)
    return to


@pytest.fixture(scope="session")
def server(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with serving(copied(made, tmp_path_factory.mktemp("server") / "data")) as postgres:
        yield postgres


@pytest.fixture(scope="session")
def system_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemServer]:
    server = SystemServer(tmp_path_factory.mktemp("system") / "pg")
    yield server
    server.stop()


@pytest.fixture(scope="session", params=["embedded", "system"])
def either(request: pytest.FixtureRequest) -> Server:
    """First the one server, then the other."""
    if request.param == "system":
        return request.getfixturevalue("system_server")
    return EmbeddedServer(request.getfixturevalue("server"))


@pytest.fixture(scope="module")
def new_either(either: Server) -> Iterator[Site]:
    """A database of nothing, for a module's tests to share."""
    with new_site(either) as site:
        yield site


@pytest.fixture
def empty(either: Server) -> Iterator[Site]:
    """A database of nothing."""
    with new_site(either) as site:
        yield site


@pytest.fixture(scope="module", autouse=True)
def patient_pools() -> Iterator[None]:
    """Who waits for a connection waits longer than in earnest: on a slow machine a crowd of tasks takes its time."""

    def patient(url: str, **options: Any) -> AsyncEngine:
        return create_async_engine(url, **{**options, "pool_timeout": 60})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "create_async_engine", patient)
        yield


@pytest.fixture(scope="session")
async def template(server: Postgres) -> str:
    await prepare(server.url)
    return DATABASE


@pytest.fixture(scope="module")
def address(server: Postgres, template: str) -> Iterator[Address]:
    name = f"module_{next(_numbers)}"
    with psycopg.connect(server.url(roles.ADMIN, "postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield lambda role: server.url(role, name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
async def database(address: Address) -> AsyncIterator[Database]:
    database = Database(address)
    yield database
    await database.close()


@pytest.fixture
def new_tenant(database: Database) -> Callable[[], Awaitable[Tenant]]:
    async def make() -> Tenant:
        return await tenants.create(database, f"t-{uuid.uuid4().hex[:12]}", "A tenant", "enterprise")

    return make


@pytest.fixture
async def tenant(new_tenant: Callable[[], Awaitable[Tenant]]) -> Tenant:
    return await new_tenant()


@pytest.fixture
async def other(new_tenant: Callable[[], Awaitable[Tenant]]) -> Tenant:
    return await new_tenant()


@pytest.fixture
async def admin(database: Database) -> AsyncIterator[psycopg.AsyncConnection]:
    """The superuser, who sees through everything."""
    connection = await database.connect(roles.ADMIN)
    yield connection
    await connection.close()


@pytest.fixture
async def blocked(database: Database) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Wait until that many of the module's transactions wait for locks of others."""
    connection = await database.connect(roles.ADMIN)

    async def wait(most: int) -> None:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        async with asyncio.timeout(30):
            while (await (await connection.execute(query)).fetchone()) != (most,):
                await asyncio.sleep(0.01)

    yield wait
    await connection.close()


class RedisServer:
    """A real Redis of the tests' own, which keeps nothing on disk: stopped and started again, it has forgotten all."""

    def __init__(self, directory: Path) -> None:
        self._socket = directory / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", self._socket, "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL,
            preexec_fn=embedded._die_with(os.getpid()),
        )
        while True:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(self._socket))
                return
            assert self._process.poll() is None, "redis-server did not start."
            time.sleep(0.01)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._socket.unlink()

    def hang(self) -> None:
        """Accept whatever comes, and answer nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End that."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="session")
def one_redis() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="avb-redis-") as directory:  # a socket's path must be short
        server = RedisServer(Path(directory))
        yield server
        server.stop()


@pytest.fixture
def redis(one_redis: RedisServer) -> RedisServer:
    """A Redis that is running and empty."""
    one_redis.stop()
    one_redis.start()
    return one_redis


@pytest.fixture
def patient_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis counts as away only when it is: a stalled machine makes answers late that a node would do without."""
    for name in ("_GLANCE", "_DEADLINE", "_PATIENCE"):
        monkeypatch.setattr(shared_state, name, 60.0)


@pytest.fixture(scope="module")
async def feed(database: Database) -> AsyncIterator[Feed]:
    feed = Feed(database)
    await feed.start()
    yield feed
    await feed.close()


@pytest.fixture(scope="module")
async def relations(database: Database, feed: Feed) -> AsyncIterator[Relations]:
    relations = Relations(database, feed)
    yield relations
    await relations.close()
