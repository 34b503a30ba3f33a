"""A node with all of the REST service on a real store and real sockets, without cells; and engines to give it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from agentvoicebox.admin_api import app
from agentvoicebox.admin_api.http import BoundedProtocol
from agentvoicebox.admin_api.node import Node
from agentvoicebox.bus_bridge.answers import Answers
from agentvoicebox.bus_bridge.engines import Engines
from agentvoicebox.config.settings import Settings
from agentvoicebox.plugins import models
from agentvoicebox.plugins.chat import Chats
from agentvoicebox.plugins.chat.solvers import Solvers
from agentvoicebox.plugins.pool import Pool
from agentvoicebox.tenancy import keys, metering, tenants
from agentvoicebox.tenancy.audit import lines
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Database, prepare
from agentvoicebox.tenancy.embedded import serving
from agentvoicebox.tenancy.keyring import Keyring
from agentvoicebox.tenancy.limits import Limiter
from agentvoicebox.tenancy.masterkeys import FileKeys
from agentvoicebox.tenancy.metering import Ledger
from agentvoicebox.tenancy.models import RateClass

OPERATOR = "avb_operator_" + "o" * 43
ALL = ("realtime", "sessions", "usage", "billing", "admin")
PATIENCE = 60.0
"""Seconds that a client of the tests waits: the node and its clients share one process, and it may stand still."""


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
    secrets: FileKeys


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
async def service(store: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """The node."""
    secrets = FileKeys(tmp_path_factory.mktemp("secrets") / "master.keys")
    database = Database(store)
    feed = Feed(database)
    await feed.start()
    keyring = Keyring(database, feed)
    await keyring.start()
    clock, resolver = Clock(), Resolver()
    limiter, ledger, gateway = Limiter(clock), Ledger(database), Gateway()
    made = app.create(database, keyring, limiter, ledger, operator=OPERATOR, resolver=resolver, secrets=secrets)
    made.state.gateway = gateway
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as a node does, or each answer takes 40 ms
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
    yield Service(f"http://{host}:{port}", made, database, ledger, limiter, clock, gateway, resolver, store, secrets)
    server.should_exit = True
    await serving_
    listening.close()
    await ledger.close()
    await keyring.close()
    await feed.close()
    await database.close()


@pytest.fixture
def frozen(service: Service) -> Iterator[None]:
    """No time passes between requests, as the limiter sees it; and what was before is long ago."""
    service.clock.now += 100_000
    service.clock.pace = 0.0
    yield
    service.clock.pace = 60.0


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a credential."""
    async with httpx.AsyncClient(base_url=service.url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
async def operator(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """The operator."""
    headers = {"Authorization": f"Bearer {OPERATOR}"}
    async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=PATIENCE) as client:
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
        headers = {"Authorization": f"Bearer {issued.key}"}
        http = httpx.AsyncClient(base_url=service.url, headers=headers, timeout=PATIENCE)
        clients.append(http)
        return Client(tenant, slug, issued.key, issued.id, http)

    yield make
    for client in clients:
        await client.aclose()


@pytest.fixture(autouse=True)
def heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is in the audit log, however much other tests were refused in the same minute."""
    monkeypatch.setattr(lines, "_throttles", WeakKeyDictionary())


@pytest.fixture
async def client(new_client: NewClient) -> Client:
    """A tenant's administrator."""
    return await new_client("admin")


@dataclass(frozen=True)
class Speaking:
    """The offline engines, and a language model."""

    engines: Engines
    model: Any
    """A `LanguageModel` of the tests."""


@pytest.fixture(scope="session")
async def offline(
    tmp_path_factory: pytest.TempPathFactory, new_language_model: Callable[[], Any]
) -> AsyncIterator[Speaking]:
    """Flite and pocketsphinx, and the language model, for as long as the tests run."""
    model = new_language_model()
    await model.start()
    data = tmp_path_factory.mktemp("offline")
    decided = Settings(data=data, models=data, engine="offline", compatible_url=model.url, compatible_key="ours")
    pool = Pool()
    engines = Engines(pool, models.choose("offline", data), decided)
    try:
        await engines.load()
        yield Speaking(engines, model)
    finally:
        pool.close()
        await model.stop()


@pytest.fixture
async def speaking(service: Service, offline: Speaking) -> AsyncIterator[Speaking]:
    """The node has engines and answers while the test runs."""
    offline.model.says()
    offline.model.asked.clear()
    offline.model.keys.clear()
    chats, solvers = Chats(), Solvers()
    answers = Answers(service.database, service.secrets, chats, solvers, service.ledger, offline.engines.settings)
    given = {"engines": offline.engines, "answers": answers, "solvers": solvers}
    for name, part in given.items():
        setattr(service.app.state, name, part)
    yield offline
    for name in given:
        setattr(service.app.state, name, None)
    solvers.close()
    await chats.close()


@pytest.fixture
def used(service: Service) -> Callable[[Client], Awaitable[dict[str, float]]]:
    """What a tenant's ledger holds beside requests."""

    async def read(client: Client) -> dict[str, float]:
        found = await metering.totals(service.database, client.tenant)
        return {str(metric): quantity for metric, quantity in found.items() if metric != "api_calls"}

    return read


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    """The address of a Redis without workers."""
    with tempfile.TemporaryDirectory(prefix="avb-redis-") as directory:
        path = f"{directory}/r.sock"
        process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL,
        )
        while True:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(path)
                break
            assert process.poll() is None, "redis-server did not start."
            time.sleep(0.01)
        yield f"unix://{path}"
        process.kill()
        process.wait()
