"""The WebSocket doors: who may come in, to which session, speaking which protocol.

Both doors take a tenant's API key with the scope `realtime`, from `Authorization: Bearer …`, `api-key: …`, or the
subprotocol `openai-insecure-api-key.…` for browsers, and never from the query string. Everything else is refused before
the upgrade, with the JSON error of the door's protocol.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import re
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import parse_qs

import msgspec

from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.books import Books
from agentvoicebox.bus_bridge.bus import Bus, Line
from agentvoicebox.bus_bridge.connection import Codec, Connection, Receive
from agentvoicebox.bus_bridge.engines import Engines
from agentvoicebox.bus_bridge.models import SessionSettings, TurnDetection
from agentvoicebox.bus_bridge.native import NativeCodec, SessionConfig
from agentvoicebox.bus_bridge.outbox import Outbox, Send
from agentvoicebox.bus_bridge.realtime.codec import RealtimeCodec
from agentvoicebox.bus_bridge.session import Session
from agentvoicebox.bus_bridge.websocket import ABORT, FRAMES
from agentvoicebox.bus_bridge.wire import Clock
from agentvoicebox.config.errors import AvbError, BadInput, Forbidden, NotFound, Refused, Unavailable
from agentvoicebox.config.settings import Settings
from agentvoicebox.tenancy import sessions, voices
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keys import Grant, Keyring
from agentvoicebox.tenancy.models import Session as Row
from agentvoicebox.tenancy.models import SessionStatus

log = logging.getLogger(__name__)

Scope = dict[str, Any]

NATIVE = re.compile(r"^/ws/v2/sessions/([0-9A-Fa-f-]{32,36})/?$")
REALTIME = ("/v1/realtime", "/realtime", "/openai/v1/realtime")
"""The path of the protocol, and those that clients make of a bare host or an Azure-style base URL."""

KEY_SUBPROTOCOL = "openai-insecure-api-key."

LONGEST_SESSION = 24 * 3600
"""Seconds after which a session is ended."""

CLOCK = Clock()

PATIENCE = 10.0
"""Seconds that clients have to leave when the node stops."""

RESTARTING = 1012
UNAUTHORISED = 4001
NO_SESSION = 4004
EXPIRED = 4008
IN_USE = 4009
"""Close codes of ours, beside those of RFC 6455."""


@dataclass(slots=True)
class Cells:
    """The buses of a node's cells; a tenant always meets the same one."""

    buses: dict[str, Bus]

    def of(self, tenant_id: str) -> Bus:
        """Rendezvous hashing: only the tenants of a cell that comes or goes move."""
        return self.buses[max(self.buses, key=lambda name: hash_of(name, tenant_id))]


def hash_of(name: str, tenant_id: str) -> int:
    """A stable weight of a cell for a tenant."""
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{name}/{tenant_id}").int


@dataclass(frozen=True, slots=True)
class Call:
    """A client at the door, admitted, and the session it comes for."""

    scope: Scope
    receive: Receive
    send: Send
    secret: str = field(repr=False)
    grant: Grant
    session_id: uuid.UUID
    new_id: Callable[[str], str]
    voice: voices.VoiceConfig


@dataclass(slots=True)
class Gateway:
    """The ASGI application for WebSockets."""

    settings: Settings
    database: Database
    keyring: Keyring
    cells: Cells
    engines: Engines
    books: Books
    _live: dict[uuid.UUID, set[Connection]] = field(default_factory=dict)
    """Open connections by the key that opened them."""
    _connected: set[uuid.UUID] = field(default_factory=set)
    """Sessions with a connection, or whose end is not in the store yet."""
    _closing: bool = False
    _serving: set[asyncio.Task[Any]] = field(default_factory=set)
    """The server's tasks in which connections run."""
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    """Work for sessions, which may outlive their connection."""

    def __post_init__(self) -> None:
        self.keyring.on_revoked(self._revoked)

    @property
    def connections(self) -> int:
        """How many sessions are connected."""
        return sum(len(found) for found in self._live.values())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one WebSocket connection (ASGI)."""
        await receive()  # websocket.connect
        realtime = scope["path"].rstrip("/") in REALTIME
        try:
            if self._closing:
                raise Unavailable("The node is restarting; connect again in a few seconds.")
            secret, grant = await self._admit(scope)
            if realtime:
                await self._serve_realtime(scope, receive, send, secret, grant)
            elif native := NATIVE.match(scope["path"]):
                await self._serve_native(native.group(1), scope, receive, send, secret, grant)
            else:
                raise NotFound(f"There is no socket at {scope['path']}.")
        except AvbError as error:
            await _reject(send, error, realtime)

    async def close(self) -> None:
        """Let clients know that we are going, and wait until what they used is in the books; a few seconds at most."""
        self._closing = True
        for connection in [c for found in self._live.values() for c in found]:
            connection.close(RESTARTING, "restarting")
        try:
            async with asyncio.timeout(PATIENCE):
                while busy := self._serving | self._tasks:
                    await asyncio.wait(busy)
        except TimeoutError:
            log.warning("%d sessions did not end in time", self.connections)

    # --- who may come in ----------------------------------------------------------------------------------------------

    async def _admit(self, scope: Scope) -> tuple[str, Grant]:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._check_origin(headers, scope["scheme"])
        if _names(scope["query_string"]) & {"key", "api_key", "api-key", "token", "access_token"}:
            raise Refused("Keys do not belong into a URL: send `Authorization: Bearer …`.", code="invalid_api_key")
        secret = _secret(headers, scope["subprotocols"])
        if secret is None:
            raise Refused("An API key is needed: send `Authorization: Bearer avb_…`.", code="authentication_failed")
        grant = await self.keyring.verify(secret)
        grant.require("realtime")
        return secret, grant

    def _check_origin(self, headers: dict[str, str], scheme: str) -> None:
        """Browsers say whose page opens the socket; only our own and declared ones may (cross-site hijacking)."""
        origin = headers.get("origin")
        if origin is None or origin in self.settings.allowed_origins:
            return
        own = "https" if scheme == "wss" else "http"
        if origin != f"{own}://{headers.get('host')}":
            raise Forbidden(
                "This page may not open a socket here; the operator allows origins with AVB_ALLOWED_ORIGINS.",
                code="origin_not_allowed",
            )

    # --- the doors ----------------------------------------------------------------------------------------------------

    async def _serve_realtime(self, scope: Scope, receive: Receive, send: Send, secret: str, grant: Grant) -> None:
        headers = dict(scope["headers"])
        offered = scope["subprotocols"]
        if b"realtime=v1" in headers.get(b"openai-beta", b"") or "openai-beta.realtime-v1" in offered:
            message = "The beta protocol is not served; drop the OpenAI-Beta header."
            raise BadInput(message, code="beta_api_shape_disabled")
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if query.get("intent", ["conversation"]) != ["conversation"] or "call_id" in query:
            raise BadInput("Only conversation sessions are served here.", code="invalid_value", param="intent")
        voice = await voices.get(self.database, grant.tenant_id)
        settings = self._settings(voice)
        model = query.get("model", ["gpt-realtime"])[0][:100]
        row = await sessions.create(
            self.database,
            grant.tenant_id,
            project_id=grant.project_id,
            api_key_id=grant.key_id,
            config={"door": "realtime", "model": model},
            client_ip=_client(scope),
            user_agent=_user_agent(headers),
        )
        new_id = identifiers(row.id)
        codec = RealtimeCodec(row.id.hex, model, int(time.time()) + LONGEST_SESSION, new_id)
        self._connected.add(row.id)
        call = Call(scope, receive, send, secret, grant, row.id, new_id, voice)
        await self._serve(call, settings, codec)

    async def _serve_native(
        self, name: str, scope: Scope, receive: Receive, send: Send, secret: str, grant: Grant
    ) -> None:
        offered = scope["subprotocols"]
        row, refusal = await self._find(name, grant)
        if row is not None and row.id in self._connected:
            row, refusal = None, (IN_USE, "this session is connected already")
        if row is None:
            await send({"type": "websocket.accept", "subprotocol": _select(offered)})
            await send({"type": "websocket.close", "code": refusal[0], "reason": refusal[1]})
            return
        self._connected.add(row.id)
        try:
            voice = await voices.get(self.database, grant.tenant_id)
        except BaseException:
            self._connected.discard(row.id)
            raise
        settings = self._settings(voice)
        chosen: dict[str, Any] = msgspec.convert(row.config, SessionConfig).changes(settings)
        if chosen.get("language") not in self.settings.languages:
            chosen.pop("language", None)
        codec = NativeCodec(str(row.id), row.created_at, CLOCK)
        call = Call(scope, receive, send, secret, grant, row.id, identifiers(row.id), voice)
        await self._serve(call, dataclasses.replace(settings, **chosen), codec)

    async def _find(self, name: str, grant: Grant) -> tuple[Row | None, tuple[int, str]]:
        """The session of that id if it can be connected to, else the close code and reason."""
        gone = (NO_SESSION, "no such session, or it has ended: create one with POST /api/v2/sessions")
        try:
            row = await sessions.get(self.database, grant.tenant_id, uuid.UUID(name))
        except (ValueError, NotFound):
            return None, gone
        if row.status not in sessions.OPEN or row.config.get("door") == "realtime":
            return None, gone
        return row, (1000, "")

    def _settings(self, voice: voices.VoiceConfig) -> SessionSettings:
        """Where a session of this tenant begins. A language that no cell speaks becomes the first one that they do."""
        languages = self.settings.languages
        return SessionSettings(
            language=voice.language if voice.language in languages else languages[0],
            voice=voice.voice,
            speed=voice.speed,
            stt=voice.stt,
            tts=voice.tts,
            turn_detection=TurnDetection(silence=self.settings.vad_hangover),
        )

    async def _serve(self, call: Call, settings: SessionSettings, codec: Codec) -> None:
        grant = call.grant
        outcome = SessionStatus.ERROR
        try:
            # Before the upgrade: a store that is away refuses here.
            await sessions.activate(self.database, grant.tenant_id, call.session_id)
            await call.send({"type": "websocket.accept", "subprotocol": _select(call.scope["subprotocols"])})
            code = await self._run(call, settings, codec)
            ended = code in (1000, 1001, 1005, 1006)
            outcome = SessionStatus.COMPLETED if ended else SessionStatus.TERMINATED
        finally:
            done = partial(self._connected.discard, call.session_id)
            self.books.end(grant.tenant_id, call.session_id, outcome, done)

    async def _run(self, call: Call, settings: SessionSettings, codec: Codec) -> int:
        grant = call.grant
        tenant_id = str(grant.tenant_id)
        line = Line(
            str(call.session_id),
            tenant_id,
            context={"tenant_name": grant.tenant_name, "persona_name": call.voice.persona_name},
            disabled_skills=call.voice.disabled_skills,
        )
        extensions = call.scope["extensions"]
        connection = Connection(
            Session(settings, call.new_id),
            codec,
            line,
            bus=self.cells.of(tenant_id),
            engines=self.engines,
            books=self.books.of(grant, call.session_id),
            vad=self.settings.vad,
            languages=self.settings.languages,
            receive=call.receive,
            outbox=Outbox(call.send, extensions.get(FRAMES), extensions.get(ABORT), self._spawn),
            spawn=self._spawn,
        )
        self._live.setdefault(grant.key_id, set()).add(connection)
        timer = self._expire(connection, grant)
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await self._check_again(call, connection)
            return await connection.run()
        finally:
            timer.cancel()
            self._serving.discard(task)
            self._live[grant.key_id].discard(connection)
            if not self._live[grant.key_id]:
                del self._live[grant.key_id]

    async def _check_again(self, call: Call, connection: Connection) -> None:
        """The key may have been revoked while the session was prepared, when nobody could be told."""
        try:
            await self.keyring.verify(call.secret)
        except AvbError as error:
            connection.close(UNAUTHORISED, error.code, ev.Problem(error.code, error.message))

    # --- credentials that die later -----------------------------------------------------------------------------------

    def _expire(self, connection: Connection, grant: Grant) -> asyncio.TimerHandle:
        left = float(LONGEST_SESSION)
        code, reason, message = EXPIRED, "session_expired", "The session hit its maximum duration of 1440 minutes."
        if grant.expires_at is not None:
            good = (grant.expires_at - datetime.now(UTC)).total_seconds()
            if good < left:
                left, code, reason, message = good, UNAUTHORISED, "api_key_expired", "The API key has expired."
        problem = ev.Problem(reason, message)
        return asyncio.get_running_loop().call_later(max(left, 0), connection.close, code, reason, problem)

    def _revoked(self, key_id: uuid.UUID) -> None:
        for connection in list(self._live.get(key_id, ())):
            problem = ev.Problem("api_key_revoked", "The API key has been revoked.")
            connection.close(UNAUTHORISED, "api_key_revoked", problem)

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a session's work failed unexpectedly", exc_info=error)


def identifiers(session_id: uuid.UUID) -> Callable[[str], str]:
    """Fresh identifiers for one session, as in `resp_5b0c…_1f`: its own, and counted in it."""
    numbers = itertools.count(1)
    name = f"{session_id.hex[:16]}{secrets.token_hex(3)}"
    return lambda kind: f"{kind}_{name}_{next(numbers):x}"


def _secret(headers: dict[str, str], subprotocols: list[str]) -> str | None:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    if headers.get("api-key"):
        return headers["api-key"]
    return next((p.removeprefix(KEY_SUBPROTOCOL) for p in subprotocols if p.startswith(KEY_SUBPROTOCOL)), None)


def _names(query: bytes) -> set[str]:
    return {name.lower() for name in parse_qs(query.decode("latin-1"), keep_blank_values=True)}


def _select(offered: list[str]) -> str | None:
    """The subprotocol of our reply: browsers need one of theirs, and the one with the key is never repeated."""
    return "realtime" if "realtime" in offered else None


def _client(scope: Scope) -> str | None:
    return scope["client"][0] if scope.get("client") else None


def _user_agent(headers: dict[bytes, bytes]) -> str:
    return headers.get(b"user-agent", b"").decode("latin-1")[:500]


async def _reject(send: Send, error: AvbError, realtime: bool) -> None:
    """Answer the upgrade with an HTTP error in the door's own format."""
    body: dict[str, Any] = {"error": error.code, "message": error.message}
    if realtime:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        body = {"error": {"message": error.message, "type": kind, "code": error.code, "param": error.param}}
    headers = [(b"content-type", b"application/json")]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": msgspec.json.encode(body)})
