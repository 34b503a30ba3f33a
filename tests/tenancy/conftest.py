"""One real PostgreSQL per run, one database per module, one fresh tenant per test."""

from __future__ import annotations

import itertools
import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from agentvoicebox.tenancy import roles, tenants
from agentvoicebox.tenancy.database import Address, Database, prepare
from agentvoicebox.tenancy.embedded import DATABASE, Postgres, serving
from agentvoicebox.tenancy.models import Tenant

_numbers = itertools.count()


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
