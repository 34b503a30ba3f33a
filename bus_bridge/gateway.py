"""The WebSocket doors: to which session a client comes, speaking which protocol. Who may come in is in `door`."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import re
import secrets
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import parse_qs

import msgspec

from agentvoicebox.bus_bridge import door
from agentvoicebox.bus_bridge.answers import Answers
from agentvoicebox.bus_bridge.books import Books
from agentvoicebox.bus_bridge.bus import Bus, Line
from agentvoicebox.bus_bridge.calls import Calls
from agentvoicebox.bus_bridge.connection import Codec, Connection, Receive
from agentvoicebox.bus_bridge.converse import Conversation
from agentvoicebox.bus_bridge.device.devices import Devices
from agentvoicebox.bus_bridge.device.requests import Desk
from agentvoicebox.bus_bridge.door import Credential, Door, Scope
from agentvoicebox.bus_bridge.engines import Engines, manner
from agentvoicebox.bus_bridge.events import SettingsWanted
from agentvoicebox.bus_bridge.live import LONGEST_SESSION, Live, Visit
from agentvoicebox.bus_bridge.models import SessionSettings
from agentvoicebox.bus_bridge.native import NativeCodec, SessionConfig
from agentvoicebox.bus_bridge.outbox import Outbox, Send
from agentvoicebox.bus_bridge.realtime.codec import RateState, RealtimeCodec
from agentvoicebox.bus_bridge.session import Session
from agentvoicebox.bus_bridge.talk import Talk
from agentvoicebox.bus_bridge.websocket import ABORT, FRAMES
from agentvoicebox.bus_bridge.wire import Clock
from agentvoicebox.config.errors import AvbError, BadInput, Conflict, Forbidden, NotFound, Unavailable, unexpected
from agentvoicebox.config.settings import Settings
from agentvoicebox.plugins.device import wire
from agentvoicebox.tenancy import personas, sessions, voices
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keyring import Grant
from agentvoicebox.tenancy.limits import KEYS, SESSIONS
from agentvoicebox.tenancy.models import Persona, SessionStatus
from agentvoicebox.tenancy.models import Session as Row
from agentvoicebox.tenancy.state import SharedState

log = logging.getLogger(__name__)

NATIVE = re.compile(r"^/ws/v2/sessions/([0-9A-Fa-f-]{32,36})/?$")
REALTIME = ("/v1/realtime", "/realtime", "/openai/v1/realtime")
"""The path of the protocol, and those that clients make of a bare host or an Azure-style base URL."""

CLOCK = Clock()

PATIENCE = 10.0
"""Seconds that clients have to leave when the node stops."""

COMING = 16
"""Devices that are let in at once: after a restart all of them come. A node that is busy with thousands at a time hears
too late what has changed, and has to look up every key twice."""
OPENING = 4.0
"""Seconds for which the others wait: a device hangs up soon after, and is let in for nothing then."""
RESTARTING = 1012
NO_SESSION = 4004
IN_USE = 4009
"""Close codes of ours, beside those of RFC 6455."""
_GONE = (NO_SESSION, "no such session, or it has ended: create one with POST /api/v2/sessions")
"""Code and reason."""


@dataclass(slots=True)
class Cells:
    """The buses of a node's cells; a tenant always meets the same one."""

    buses: dict[str, Bus]

    def of(self, tenant_id: str) -> Bus:
        """Rendezvous hashing: only the tenants of a cell that comes or goes move."""
        return self.buses[max(self.buses, key=lambda name: hash_of(name, tenant_id))]


def _name(persona: Persona | None, voice: voices.VoiceConfig) -> str:
    """How whoever answers is called."""
    return persona.name if persona is not None else voice.persona_name


def hash_of(name: str, tenant_id: str) -> int:
    """A stable weight of a cell for a tenant."""
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{name}/{tenant_id}").int


@dataclass(frozen=True, slots=True)
class Call:
    """A client at the door, admitted, and the session it comes for."""

    scope: Scope
    receive: Receive
    send: Send
    credential: Credential
    grant: Grant
    session_id: uuid.UUID
    new_id: Callable[[str], str]
    voice: voices.VoiceConfig
    persona: Persona | None
    sequence: int = 0
    """Number of the session's next line of history."""
    chosen: frozenset[str] = frozenset()
    """Fields of the settings that the client has chosen already."""


@dataclass(slots=True)
class Gateway:
    """The ASGI application for WebSockets."""

    settings: Settings
    database: Database
    door: Door
    state: SharedState
    cells: Cells
    engines: Engines
    answers: Answers
    books: Books
    live: Live = field(init=False)
    devices: Devices = field(init=False)
    uses: Counter[tuple[uuid.UUID, uuid.UUID]] = field(default_factory=Counter)
    """Sessions that personas have begun, by tenant and persona, for whoever writes that down."""
    _coming: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(COMING))
    _connected: set[uuid.UUID] = field(default_factory=set)
    """Sessions with a connection."""
    _ending: set[uuid.UUID] = field(default_factory=set)
    """Sessions whose end is not in the store yet."""
    _closing: bool = False
    _serving: set[asyncio.Task[Any]] = field(default_factory=set)
    """The server's tasks in which clients are served, from the door to the end."""
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    """Work for sessions, which may outlive their connection."""

    def __post_init__(self) -> None:
        self.live = Live(self.door)
        desk = Desk(self.database, self.engines, self.answers, self.books.ledger, self.settings.vad)
        self.devices = Devices(desk)

    @property
    def connections(self) -> int:
        """How many sessions are connected."""
        return len(self.live)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one WebSocket connection (ASGI)."""
        await receive()  # websocket.connect
        realtime = scope["path"].rstrip("/") in REALTIME
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            if self._closing:
                raise Unavailable("The node is restarting; connect again in a few seconds.")
            device = scope["path"].rstrip("/") == wire.PATH
            async with self._turn() if device else nullcontext():
                credential, grant = await self.door.admit(scope)
            if realtime:
                await self._serve_realtime(scope, receive, send, credential, grant)
            elif device:
                await self._serve_device(scope, receive, send, credential, grant)
            elif native := NATIVE.match(scope["path"]):
                await self._serve_native(native.group(1), scope, receive, send, credential, grant)
            else:
                raise NotFound(f"There is no socket at {scope['path']}.")
        except AvbError as error:
            await door.reject(send, error, realtime)
        finally:
            self._serving.discard(task)

    async def close(self) -> None:
        """Let clients know that we are going, and wait until what they used is in the books; a few seconds at most."""
        self._closing = True
        for visit in self.live:
            visit.connection.close(RESTARTING, "restarting")
        try:
            async with asyncio.timeout(PATIENCE):
                while busy := self._serving | self._tasks:
                    await asyncio.wait(busy)
        except TimeoutError:
            log.warning("%d sessions and devices did not end in time", len(self._serving))
        await self.devices.close()
        await self.live.close()

    # --- the doors ----------------------------------------------------------------------------------------------------

    async def _serve_realtime(
        self, scope: Scope, receive: Receive, send: Send, credential: Credential, grant: Grant
    ) -> None:
        headers = dict(scope["headers"])
        offered = scope["subprotocols"]
        if b"realtime=v1" in headers.get(b"openai-beta", b"") or "openai-beta.realtime-v1" in offered:
            message = "The beta protocol is not served; drop the OpenAI-Beta header."
            raise BadInput(message, code="beta_api_shape_disabled")
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if query.get("intent", ["conversation"]) != ["conversation"] or "call_id" in query:
            raise BadInput("Only conversation sessions are served here.", code="invalid_value", param="intent")
        voice = await voices.get(self.database, grant.tenant_id)
        model = query.get("model", ["gpt-realtime"])[0][:100]
        persona = await self._asked_for(grant, model)
        settings = self._settings(voice, grant, persona)
        session_id = uuid.uuid4()
        async with self._entered(grant, session_id):
            await sessions.create(
                self.database,
                grant.tenant_id,
                session_id=session_id,
                project_id=grant.project_id,
                api_key_id=grant.key_id,
                config={"door": "realtime", "model": model},
                client_ip=credential.ip,
                user_agent=_user_agent(headers),
            )
            new_id = identifiers(session_id)
            expires_at = int(time.time()) + LONGEST_SESSION
            codec = RealtimeCodec(session_id.hex, model, expires_at, new_id, partial(self._rates, grant))
            call = Call(scope, receive, send, credential, grant, session_id, new_id, voice, persona)
            await self._serve(call, settings, codec)

    async def _serve_native(
        self, name: str, scope: Scope, receive: Receive, send: Send, credential: Credential, grant: Grant
    ) -> None:
        row, refusal = await self._find(name, grant)
        if row is not None and await self._is_served(row):
            row, refusal = None, (IN_USE, "this session is connected already")
        if row is None:
            await _turn_away(scope, send, *refusal)
            return
        async with self._entered(grant, row.id):
            voice = await voices.get(self.database, grant.tenant_id)
            config = msgspec.convert(row.config, SessionConfig)
            persona = await self._persona(grant, None if config.persona_id is msgspec.UNSET else config.persona_id)
            settings = self._settings(voice, grant, persona)
            chosen: dict[str, Any] = config.changes(settings)
            if chosen.get("language") not in self.settings.languages:
                chosen.pop("language", None)
            codec = NativeCodec(str(row.id), row.created_at, CLOCK)
            # A node that served it has died: its history goes on where that one's ends.
            past = (
                []
                if row.status == SessionStatus.CREATED
                else await sessions.history(self.database, grant.tenant_id, row.id)
            )
            sequence = past[-1].sequence + 1 if past else 0
            new_id = identifiers(row.id)
            call = Call(
                scope, receive, send, credential, grant, row.id, new_id, voice, persona, sequence, frozenset(chosen)
            )
            await self._serve(call, dataclasses.replace(settings, **chosen), codec)

    async def _serve_device(
        self, scope: Scope, receive: Receive, send: Send, credential: Credential, grant: Grant
    ) -> None:
        """A process of a device: no session, and not counted as one; it stays for as long as its key is good."""
        await send({"type": "websocket.accept", "subprotocol": _select(scope["subprotocols"])})
        outbox = Outbox(send, scope["extensions"].get(FRAMES), scope["extensions"].get(ABORT), self._spawn)
        socket = self.devices.socket(grant, receive, outbox, self._spawn)
        visit = Visit(uuid.uuid4(), socket, credential, grant, stays=True)
        with self.live.visiting(visit):
            await self.live.check(visit)
            if self._closing:
                socket.close(RESTARTING, "restarting")
            await socket.run()

    async def _is_served(self, row: Row) -> bool:
        """Whether a client is connected to the session, here or, as far as can be known, on another node."""
        if row.id in self._connected or row.id in self._ending:
            return True
        return await self.state.where(row.tenant_id, row.id) is not None

    async def _find(self, name: str, grant: Grant) -> tuple[Row | None, tuple[int, str]]:
        """The session of that id if it can be connected to, else the close code and reason."""
        try:
            row = await sessions.get(self.database, grant.tenant_id, uuid.UUID(name))
        except (ValueError, NotFound):
            return None, _GONE
        if row.status not in sessions.OPEN or row.config.get("door") == "realtime":
            return None, _GONE
        return row, (1000, "")

    async def _asked_for(self, grant: Grant, model: str) -> Persona | None:
        """Who answers a client that asks for this model. Raises `NotFound` for a persona that there is not."""
        if not model.startswith("persona:"):
            return await self._persona(grant, None)
        try:
            return await self.answers.named(grant.tenant_id, model.removeprefix("persona:"))
        except NotFound as error:
            raise NotFound(error.message, code="model_not_found", param="model") from error

    async def _persona(self, grant: Grant, wanted: str | None) -> Persona | None:
        """Who answers in a session: whom it names, else the default of its project, else of its tenant."""
        return await personas.resolve(self.database, grant.tenant_id, grant.project_id, wanted)

    def _settings(self, voice: voices.VoiceConfig, grant: Grant, persona: Persona | None) -> SessionSettings:
        """Where a session of this tenant begins, in the voice of whom it talks to."""
        settings = self.engines.begin(voice, grant.default_stt_model, grant.default_tts_voice)
        return (
            settings if persona is None else dataclasses.replace(settings, **manner(persona, self.settings.languages))
        )

    def _rates(self, grant: Grant) -> Sequence[RateState]:
        """What the key may still ask for."""
        if (rate := KEYS[grant.rate_class]) is None:
            return ()
        standing = self.door.limiter.decide(("key", grant.key_id), rate, cost=0)
        return [RateState("requests", standing.limit, standing.remaining, max(0.0, standing.reset - time.time()))]

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """While a device is let in. Raises `Unavailable` when too many come before it."""
        try:
            async with asyncio.timeout(OPENING):
                await self._coming.acquire()
        except TimeoutError as error:
            raise Unavailable("All devices come at once; connect again in a few seconds.") from error
        try:
            yield
        finally:
            self._coming.release()

    @asynccontextmanager
    async def _entered(self, grant: Grant, session_id: uuid.UUID) -> AsyncIterator[None]:
        """The session is one of those that the tenant may have at once, until the block ends. Raises `Forbidden`."""
        most = SESSIONS[grant.tier]
        self._connected.add(session_id)
        try:
            if not await self.state.enter(grant.tenant_id, session_id, most):
                raise Forbidden(
                    f"The limit of {most} concurrent sessions is reached: end one, or choose a larger plan.",
                    code="tenant_limit_exceeded",
                    param="concurrent_sessions",
                )
            try:
                yield
            finally:
                await self.state.leave(grant.tenant_id, session_id)
        finally:
            self._connected.discard(session_id)

    async def _serve(self, call: Call, settings: SessionSettings, codec: Codec) -> None:
        grant = call.grant
        outcome, reason = SessionStatus.ERROR, ""
        try:
            try:
                # Before the upgrade: a store that is away refuses here.
                await sessions.activate(self.database, grant.tenant_id, call.session_id)
            except Conflict:  # it has ended since it was found
                await _turn_away(call.scope, call.send, *_GONE)
                return
            await call.send({"type": "websocket.accept", "subprotocol": _select(call.scope["subprotocols"])})
            code, reason = await self._run(call, settings, codec)
            ended = code in (1000, 1001, 1005, 1006) and not reason
            outcome = SessionStatus.COMPLETED if ended else SessionStatus.TERMINATED
        finally:
            self._ending.add(call.session_id)
            done = partial(self._ending.discard, call.session_id)
            self.books.end(grant.tenant_id, call.session_id, outcome, done, reason)

    async def _run(self, call: Call, settings: SessionSettings, codec: Codec) -> tuple[int, str]:
        grant = call.grant
        tenant_id = str(grant.tenant_id)
        line = Line(
            str(call.session_id),
            tenant_id,
            context={"tenant_name": grant.tenant_name, "persona_name": _name(call.persona, call.voice)},
            disabled_skills=call.voice.disabled_skills,
        )
        if call.persona is not None:
            self.uses[grant.tenant_id, call.persona.id] += 1
        talk = line.talk = Talk(
            project_id=grant.project_id,
            persona=call.persona.id if call.persona is not None else None,
            instructions=settings.instructions,
            language=settings.language,
        )
        extensions = call.scope["extensions"]
        connection = Connection(
            Session(settings, call.new_id),
            codec,
            line,
            bus=self.cells.of(tenant_id),
            engines=self.engines,
            books=self.books.of(grant, call.session_id, call.sequence),
            tenant=grant.tenant_id,
            conversation=Conversation(self.answers, grant.tenant_id, call.session_id, talk, Calls()),
            vad=self.settings.vad,
            languages=self.settings.languages,
            receive=call.receive,
            outbox=Outbox(call.send, extensions.get(FRAMES), extensions.get(ABORT), self._spawn),
            spawn=self._spawn,
        )
        connection.chosen = call.chosen
        before = {"voice": settings.voice, "speed": settings.speed, "language": settings.language}

        def switched(persona: Persona | None) -> None:
            """The user talks to somebody else now, in whose name and voice the answers come.

            What that persona leaves open is as the session began, and what the client has chosen stays.
            """
            line.context["persona_name"] = _name(persona, call.voice)
            spoken = before | (manner(persona, self.settings.languages) if persona is not None else {})
            changes = {name: value for name, value in spoken.items() if name not in connection.chosen}
            connection.hear(SettingsWanted(changes))

        talk.on_switch = switched
        visit = Visit(call.session_id, connection, call.credential, grant)
        with self.live.visiting(visit):
            # The key may have been revoked while the session was prepared, when nobody could be told.
            await self.live.check(visit)
            if self._closing:
                connection.close(RESTARTING, "restarting")
            return await connection.run(), visit.reason

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a session's work failed unexpectedly: %s", unexpected(error))


def identifiers(session_id: uuid.UUID) -> Callable[[str], str]:
    """Fresh identifiers for one session, as in `resp_5b0c…_1f`: its own, and counted in it."""
    numbers = itertools.count(1)
    name = f"{session_id.hex[:16]}{secrets.token_hex(3)}"
    return lambda kind: f"{kind}_{name}_{next(numbers):x}"


async def _turn_away(scope: Scope, send: Send, code: int, reason: str) -> None:
    """Tell a client by a close code why there is no session for it: browsers show no other refusal."""
    await send({"type": "websocket.accept", "subprotocol": _select(scope["subprotocols"])})
    await send({"type": "websocket.close", "code": code, "reason": reason})


def _select(offered: list[str]) -> str | None:
    """The subprotocol of our reply: browsers need one of theirs, and the one with the key is never repeated."""
    return "realtime" if "realtime" in offered else None


def _user_agent(headers: dict[bytes, bytes]) -> str:
    return headers.get(b"user-agent", b"").decode("latin-1")[:500]
