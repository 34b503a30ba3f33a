"""Everything embedded: store, cells, engines, bridge and REST service in one process and the cells' own."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import uvicorn

from agentvoicebox.admin_api import app
from agentvoicebox.admin_api.health import Check
from agentvoicebox.admin_api.housekeeping import Housekeeping, Task
from agentvoicebox.admin_api.http import BoundedProtocol
from agentvoicebox.admin_api.node import Node
from agentvoicebox.bus_bridge import cells, vad
from agentvoicebox.bus_bridge.answers import Answers
from agentvoicebox.bus_bridge.books import Books
from agentvoicebox.bus_bridge.bus import Bus
from agentvoicebox.bus_bridge.cells import Cell
from agentvoicebox.bus_bridge.chat import CellDoor, ChatDoor
from agentvoicebox.bus_bridge.door import Door
from agentvoicebox.bus_bridge.engines import Engines
from agentvoicebox.bus_bridge.gateway import Cells, Gateway
from agentvoicebox.bus_bridge.websocket import BatchingProtocol
from agentvoicebox.bus_bridge.wire import MAX_FRAME
from agentvoicebox.config import ovos
from agentvoicebox.config.errors import AvbError, BadInput, Conflict, Unavailable
from agentvoicebox.config.settings import Settings
from agentvoicebox.config.tasks import begin, end
from agentvoicebox.plugins import models
from agentvoicebox.plugins.chat import Chats
from agentvoicebox.plugins.chat.solvers import Solvers
from agentvoicebox.plugins.pool import Pool
from agentvoicebox.plugins.spoken import Spoken
from agentvoicebox.tenancy import audit, devices, keys, outbox, pairings, personas, sessions, state, usage
from agentvoicebox.tenancy import database as stores
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.dns import Dns
from agentvoicebox.tenancy.embedded import Postgres
from agentvoicebox.tenancy.keyring import Keyring
from agentvoicebox.tenancy.limits import Limiter, Reconciler
from agentvoicebox.tenancy.masterkeys import EnvironmentKeys, FileKeys, MasterKeys
from agentvoicebox.tenancy.metering import Ledger
from agentvoicebox.tenancy.state import SharedState

if TYPE_CHECKING:
    from agentvoicebox.plugins.pool.processes import Processes
    from agentvoicebox.plugins.pool.streams import Streams

log = logging.getLogger(__name__)

Tell = Callable[[str], None]

SOON, MINUTE, HOUR, DAY = 5.0, 60.0, 3600.0, 86400.0

AGAIN = 1.0
"""Seconds before something that failed is tried again."""


class Stack:
    """One whole installation here. `start` returns when a turn can be spoken; `stop` leaves nothing running."""

    database: Database
    gateway: Gateway
    limiter: Limiter
    engines: Engines
    _ledger: Ledger
    _books: Books
    _keys: MasterKeys
    _solvers: Solvers
    _answers: Answers
    postgres: Postgres | None = None
    operator_key_made = False
    """Whether this is the first start, and the operator has not seen the key yet."""

    def __init__(self, settings: Settings, tell: Tell = lambda step: None) -> None:
        if settings.workers > 1:
            raise BadInput("This release serves with one worker; leave --workers at 1.", param="workers")
        self.settings = settings
        self.cells: dict[str, Cell] = {}
        self._tell = tell
        self._exit = AsyncExitStack()
        self._serving: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None
        self._inside: socket.socket | None = None
        """Where cells ask the node; nobody else reaches it."""
        self._cell_keys: dict[str, str] = {}

    @property
    def url(self) -> str:
        """Where clients find the node."""
        assert self._socket is not None
        host, port = self._socket.getsockname()[:2]
        scheme = "https" if self.settings.tls_cert else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def start(self) -> None:
        """Start everything. Raises `AvbError`, and then has stopped again what it had started."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop everything, the front door first: what was used is in the books before the store goes."""
        await self._exit.aclose()

    async def finished(self) -> None:
        """Wait until the server has ended, which it does only when it is told to or fails; raises why it failed."""
        assert self._serving is not None
        await asyncio.shield(self._serving)

    async def _start(self) -> None:
        exit_stack = self._exit
        _create_private(self.settings.data)
        exit_stack.enter_context(owned(self.settings.data))
        self._socket = exit_stack.enter_context(_listen(self.settings))
        self._inside = exit_stack.enter_context(socket.create_server((ovos.HOST, 0)))
        # The slowest first: core loads its skills in its own process while the rest happens here.
        starting = [asyncio.create_task(self._start_cell(f"cell-{n + 1}")) for n in range(self.settings.cells)]
        try:
            await asyncio.sleep(0)  # let them begin before the store holds the loop
            await self._open_store()
            self._open_books()
            await self._load_engines()
            buses = dict(await asyncio.gather(*starting))
        except BaseException:
            for task in starting:
                task.cancel()  # once: their processes are waited for
            await asyncio.gather(*starting, return_exceptions=True)
            raise
        await self._serve(Cells(buses))

    async def _start_cell(self, name: str) -> tuple[str, Bus]:
        assert self._inside is not None
        port = self._inside.getsockname()[1]
        self._cell_keys[name] = secrets.token_urlsafe(32)
        node = ovos.Node(f"http://{ovos.HOST}:{port}/v1", self._cell_keys[name])
        cell = self.cells[name] = Cell(name, self.settings.data / "cells" / name, self.settings.languages, node=node)
        self._exit.push_async_callback(cell.stop)
        await cell.start(self._tell)
        bus = Bus()
        self._exit.push_async_callback(bus.close)
        await bus.connect(cell.url)
        keeper = begin(keep(cell, bus), f"keeper of {name}")
        self._exit.push_async_callback(end, keeper)
        return name, bus

    async def _open_store(self) -> None:
        if self.settings.database is None:
            self._tell("starting the store")
            self.postgres = Postgres(self.settings.data)
            self._exit.callback(self.postgres.stop)
            self.postgres.start()
            keeper = begin(self.postgres.keep(), "keeper of the store")
            self._exit.push_async_callback(end, keeper)
            address: stores.Address = self.postgres.url
        else:
            self._tell("connecting to the store")
            address = stores.external(self.settings.database)
        await stores.prepare(address)
        self.database = Database(address)
        self._exit.push_async_callback(self.database.close)
        if self.postgres is not None:  # which nobody else serves
            await sessions.close_stale(self.database, "node_restarted")

    def _open_books(self) -> None:
        """What is used is written down, and whoever answers what no skill does is found."""
        settings = self.settings
        self._ledger = Ledger(self.database)
        self._exit.push_async_callback(self._ledger.close)
        self._books = Books(self.database, self._ledger)
        self._exit.push_async_callback(self._books.close)
        given = settings.secrets_keys
        self._keys = EnvironmentKeys(given) if given is not None else FileKeys(settings.data / "master.keys")
        chats = Chats()
        self._exit.push_async_callback(chats.close)
        self._solvers = Solvers()
        self._exit.callback(self._solvers.close)
        self._answers = Answers(
            self.database, self._keys, chats, self._solvers, self._ledger, settings, spent=self._books.count
        )
        self._exit.push_async_callback(self._answers.close)
        loading = begin(chats.load(self._answers.platform_providers), "providers")
        self._exit.push_async_callback(end, loading)

    async def _load_engines(self) -> None:
        settings = self.settings
        elsewhere = settings.speech == "queue"
        if settings.engine == "auto" and not elsewhere:
            await models.fetch_defaults(settings.models, settings.whisper, self._tell, url=settings.models_url)
        if settings.engine == "models" and elsewhere:  # which are the workers'
            choice = models.wanted(settings.models, settings.whisper)
        else:
            choice = models.choose(settings.engine, settings.models, settings.whisper)
        if choice.notice:
            self._tell(choice.notice)
            if elsewhere:
                self._tell("If it is the workers that have models, set AVB_ENGINE=models.")
        self._tell(f"loading {choice.stt.plugin} and {choice.tts.plugin}")
        runner = self._runner()
        if runner is not None:
            self._exit.push_async_callback(runner.close)
        pool = Pool(memory=settings.speech_memory * 2**20, spoken=Spoken(), runner=runner)
        self._exit.callback(pool.close)
        self.engines = Engines(pool, choice, settings, self._answers.key_of)
        try:
            await self.engines.load()
        except Unavailable as error:
            if not elsewhere:
                raise
            self._tell(error.message)  # workers may come later: engines are loaded at the first word then
        await asyncio.to_thread(vad.warm, settings.vad)

    def _runner(self) -> Processes | Streams | None:
        """Who does the engines' work, when that is not this process."""
        settings = self.settings
        if settings.speech == "processes":
            from agentvoicebox.plugins.pool.processes import Processes

            return Processes(settings.speech_processes)
        if settings.speech == "queue":
            if settings.redis is None:
                raise BadInput("AVB_SPEECH=queue needs AVB_REDIS, where `avb worker` finds its work.", param="speech")
            from agentvoicebox.plugins.pool.streams import Streams  # Redis is not on every node

            return Streams(settings.redis, models=settings.models)
        return None

    async def _serve(self, buses: Cells) -> None:
        feed = Feed(self.database)
        await feed.start()
        self._exit.push_async_callback(feed.close)
        keyring = Keyring(self.database, feed)
        await keyring.start()
        self._exit.push_async_callback(keyring.close)
        shared, limiter = await self._share()
        self.limiter = limiter
        door = Door(self.settings, keyring, limiter)
        ledger, books, answers = self._ledger, self._books, self._answers
        self.gateway = Gateway(self.settings, self.database, door, shared, buses, self.engines, answers, books)
        feed.subscribe(self.gateway.devices.heed)
        feed.on_gap(self.gateway.devices.heed_all)
        operator, self.operator_key_made = keys.operator_key(self.settings.data)
        rest = app.create(
            self.database,
            keyring,
            limiter,
            ledger,
            operator=operator,
            base=self.settings.base_domain or "",
            checks={"state": _asked(shared)},
            resolver=Dns(),
            engines=self.engines,
            answers=answers,
            secrets=self._keys,
            solvers=self._solvers,
        )
        rest.state.gateway = self.gateway.live
        self._keep_house(ledger)
        assert self._inside is not None
        assert self._socket is not None
        turns = {self._cell_keys[name]: bus.turn for name, bus in buses.buses.items()}
        inside = _Server(loopback(CellDoor(answers, turns, self.database)))
        asking = asyncio.create_task(inside.serve(sockets=[self._inside]))
        self._exit.push_async_callback(_ended, inside, asking)
        await _started(inside, asking)
        server = _Server(configured(self.settings, Node(self.gateway, rest, ChatDoor(door, answers, ledger))))
        self._serving = asyncio.create_task(server.serve(sockets=[self._socket]))
        self._exit.push_async_callback(self._close_door, server)
        await _started(server, self._serving)

    async def _share(self) -> tuple[SharedState, Limiter]:
        """What this node shares with others, if there are any."""
        shared = state.connect(self.settings.redis, f"{socket.gethostname()}-{os.getpid()}")
        await shared.start()
        self._exit.push_async_callback(shared.close)
        limiter = Limiter()
        reconciler = Reconciler(limiter, shared)
        await reconciler.start()
        self._exit.push_async_callback(reconciler.close)
        return shared, limiter

    def _keep_house(self, ledger: Ledger) -> None:
        tasks = [
            Task("audit months", DAY, lambda: audit.months(self.database)),
            Task("expired sessions", HOUR, lambda: sessions.expire(self.database)),
            Task("usage outbox", 5 * MINUTE, lambda: outbox.seal(self.database)),
            Task("uses of personas", SOON, self._count_personas),
            Task("events of devices", DAY, lambda: devices.prune(self.database)),
            Task("pairings", HOUR, lambda: pairings.prune(self.database)),
            Task("storage", DAY, lambda: usage.measure_storage(self.database, ledger)),
        ]
        if self.postgres is not None:  # else it is the operator who says where the archive is: `avb audit archive`
            archive = self.settings.data / "audit"
            tasks.append(Task("audit archive", DAY, lambda: audit.archive(self.database, archive)))
        housekeeping = Housekeeping(*tasks)
        housekeeping.start()
        self._exit.push_async_callback(housekeeping.close)

    async def _count_personas(self) -> None:
        uses, self.gateway.uses = self.gateway.uses, Counter()
        try:
            await personas.count_uses(self.database, uses)
        except AvbError:
            self.gateway.uses.update(uses)
            raise

    async def _close_door(self, server: uvicorn.Server) -> None:
        await self.gateway.close()
        assert self._serving is not None
        await _ended(server, self._serving)


async def _started(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    while not server.started:
        if serving.done():
            serving.result()
            raise Unavailable("The server ended while it was starting.", code="server_failed")
        await asyncio.sleep(0.005)


async def _ended(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    server.should_exit = True
    await asyncio.gather(serving, return_exceptions=True)


def _asked(shared: SharedState) -> Check:
    async def check() -> str:
        return "degraded" if shared.degraded else "ok"  # the node serves on, by what it knows itself

    return check


async def keep(cell: Cell, bus: Bus) -> None:
    """Keep a started cell alive and `bus` connected to it, until cancelled."""
    connecting: asyncio.Task[None] | None = None

    def lost(reason: str) -> None:
        log.warning("%s is lost: %s; it is being replaced", cell.name, reason)
        if connecting is not None:
            connecting.cancel()
        bus.lose("The assistant has stopped.")

    def ready(url: str) -> None:
        nonlocal connecting
        log.info("%s is back", cell.name)
        connecting = asyncio.create_task(_connect(cell, bus, url))

    try:
        while True:
            try:
                await cells.keep(cell, bus.canary, lost=lost, ready=ready)
            except Exception:
                log.exception("keeping %s failed; it is tried again", cell.name)
            await asyncio.sleep(AGAIN)
    finally:
        if connecting is not None:
            connecting.cancel()


async def _connect(cell: Cell, bus: Bus, url: str) -> None:
    while True:
        try:
            return await bus.connect(url)
        except Exception as error:
            log.warning("%s cannot be reached: %s", cell.name, error)
        await asyncio.sleep(AGAIN)


def configured(settings: Settings, node: Node) -> uvicorn.Config:
    """How `node` is served."""
    return uvicorn.Config(
        node,
        http=BoundedProtocol,
        ws=BatchingProtocol,
        ws_max_size=MAX_FRAME,
        ws_per_message_deflate=False,  # 200 KB a connection, for audio that does not compress
        lifespan="off",
        log_config=None,
        access_log=False,  # it would write query strings
        server_header=False,
        # Left alone, it believes whoever is on this machine.
        proxy_headers=settings.behind_proxy,
        forwarded_allow_ips=list(settings.trusted_proxies),
        timeout_graceful_shutdown=5,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )


def loopback(app: CellDoor) -> uvicorn.Config:
    """How the cells of this machine are served."""
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )


class _Server(uvicorn.Server):
    """Signals are the command line's to handle: it stops the cells and the store as well."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextmanager
def owned(data: Path) -> Iterator[None]:
    """Hold the data directory for this process alone. Raises `Conflict` when another one has it."""
    file: IO[str] = open(os.open(data / "avb.lock", os.O_RDWR | os.O_CREAT, 0o600), "r+")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = file.read().strip() or "unknown"
            raise Conflict(
                f"{data} is in use by another `avb up` (process {holder}): stop that one, or choose another --data.",
                code="already_running",
            ) from error
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield
        file.truncate(0)


def _create_private(data: Path) -> None:
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(data, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied", str(data))
    except OSError as error:
        raise Unavailable(
            f"The data directory {data} cannot be used: {error.strerror}. Choose another one with --data.",
            code="data_unavailable",
        ) from error


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise Conflict(
            f"Cannot listen on {settings.host}:{settings.port}: {error.strerror}. Choose another one with --port.",
            code="port_taken",
        ) from error
    # Connections inherit it: a frame must not wait for the acknowledgement of the one before.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
