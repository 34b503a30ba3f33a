"""A node with all of the REST service on a real store and real sockets, without cells and engines."""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from agentvoicebox.admin_api import app
from agentvoicebox.admin_api.http import BoundedProtocol
from agentvoicebox.admin_api.node import Node
from agentvoicebox.tenancy import keys, tenants
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Database, prepare
from agentvoicebox.tenancy.embedded import serving
from agentvoicebox.tenancy.keyring import Keyring
from agentvoicebox.tenancy.limits import Limiter
from agentvoicebox.tenancy.metering import Ledger
from agentvoicebox.tenancy.models import RateClass

OPERATOR = "avb_operator_" + "o" * 43
ALL = ("realtime", "sessions", "usage", "billing", "admin")


class Clock:
    """Time as the limiter sees it: between two decisions so much passes that nothing is ever too much."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pace = 60.0

    def __call__(self) -> float:
        self.now += self.pace
        return self.now


class Resolver:
    """A DNS that says what it is told to."""

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {}

    async def txt(self, name: str) -> list[str]:
        return self.texts.get(name, [])


class Gateway:
    """Stands where the bridge would: it knows which sessions it was told to end."""

    def __init__(self) -> None:
        self.ended: list[tuple[uuid.UUID, str]] = []

    def terminate(self, session_id: uuid.UUID, reason: str) -> None:
        self.ended.append((session_id, reason))


@dataclass(frozen=True)
class Service:
    """A running node and its parts."""

    url: str
    app: FastAPI
    database: Database
    ledger: Ledger
    limiter: Limiter
    clock: Clock
    gateway: Gateway
    resolver: Resolver
    address: Any


@dataclass(frozen=True)
class Client:
    """A tenant with a key, and how it talks to the node."""

    tenant: uuid.UUID
    slug: str
    key: str
    key_id: uuid.UUID
    http: httpx.AsyncClient


@pytest.fixture(scope="session")
async def store(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """Where the store listens."""
    with serving(tmp_path_factory.mktemp("api")) as postgres:
        await prepare(postgres.url)
        yield postgres.url


@pytest.fixture(scope="session")
async def service(store: Any) -> AsyncIterator[Service]:
    """The node."""
    database = Database(store)
    feed = Feed(database)
    await feed.start()
    keyring = Keyring(database, feed)
    await keyring.start()
    clock, resolver = Clock(), Resolver()
    limiter, ledger, gateway = Limiter(clock), Ledger(database), Gateway()
    made = app.create(database, keyring, limiter, ledger, operator=OPERATOR, resolver=resolver)
    made.state.gateway = gateway
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        Node(None, made),
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
    )
    server = uvicorn.Server(config)
    serving_ = asyncio.create_task(server._serve([listening]))
    while not server.started:
        await asyncio.sleep(0.005)
    host, port = listening.getsockname()
    yield Service(f"http://{host}:{port}", made, database, ledger, limiter, clock, gateway, resolver, store)
    server.should_exit = True
    await serving_
    listening.close()
    await ledger.close()
    await keyring.close()
    await feed.close()
    await database.close()


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a credential."""
    async with httpx.AsyncClient(base_url=service.url) as client:
        yield client


@pytest.fixture
async def operator(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """The operator."""
    async with httpx.AsyncClient(base_url=service.url, headers={"Authorization": f"Bearer {OPERATOR}"}) as client:
        yield client


NewClient = Callable[..., Awaitable[Client]]


@pytest.fixture
async def new_client(service: Service) -> AsyncIterator[NewClient]:
    """Makes tenants, each with a key of some scopes, whose requests nothing limits."""
    clients: list[httpx.AsyncClient] = []

    async def make(*scopes: str, tenant: uuid.UUID | None = None, rate_class: str = RateClass.UNLIMITED) -> Client:
        slug = f"t-{uuid.uuid4().hex[:12]}"
        if tenant is None:
            tenant = (await tenants.create(service.database, slug, "A tenant", "enterprise")).id
        issued = await keys.issue(service.database, tenant, "test", scopes or ("admin",), rate_class=rate_class)
        http = httpx.AsyncClient(base_url=service.url, headers={"Authorization": f"Bearer {issued.key}"})
        clients.append(http)
        return Client(tenant, slug, issued.key, issued.id, http)

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture
async def client(new_client: NewClient) -> Client:
    """A tenant's administrator."""
    return await new_client("admin")
