"""The chat door: `/v1/chat/completions` and `/v1/models` in OpenAI's format, for a tenant's keys and for our own cells.

Cells also ask here what their skills may know of a tenant (`/v1/about`), and change who answers (`/v1/persona`).

These requests are many and small, so they are served as plain ASGI. An answer that is streamed begins when there is
something to say, so that what fails before has an HTTP status of its own; what fails later is an `error` among the
events. Pieces that are there at the same moment leave in one. Who goes away ends the work at once.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar
from urllib.parse import parse_qs

import msgspec

from agentvoicebox.bus_bridge import about, door
from agentvoicebox.bus_bridge.answers import Answers, Who
from agentvoicebox.bus_bridge.bus import Line
from agentvoicebox.bus_bridge.connection import Receive
from agentvoicebox.bus_bridge.door import Door, Scope
from agentvoicebox.bus_bridge.outbox import Send
from agentvoicebox.bus_bridge.talk import Talk
from agentvoicebox.config.errors import AvbError, BadInput, NotFound, Refused, TooLarge, unexpected
from agentvoicebox.plugins.chat import Delta, Tokens
from agentvoicebox.plugins.chat.pieces import Pieces
from agentvoicebox.tenancy import keys, limits
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keyring import Grant
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import Metric, Persona

log = logging.getLogger(__name__)

COMPLETIONS = "/v1/chat/completions"
MODELS = "/v1/models"
ABOUT = "/v1/about"
PERSONA = "/v1/persona"

MAX_BODY = 1024 * 1024
"""Bytes of a request."""
MAX_MESSAGES = 1_000
MAX_TOKENS = 4_096
MAX_UTTERANCE = 10_000
"""Characters of what is asked in a session."""

_AHEAD = 64
"""Pieces that an answer may be ahead of a client that reads slowly."""

_MODEL = re.compile(r"(openai|anthropic|groq|ollama|compatible)/\S{1,150}")
_AT = re.compile(r"(.*) - at `\$\.?(.*)`", re.DOTALL)
_FIELD = re.compile(r"missing required field `(\w+)`$")
_TURN = re.compile(r"[\x21-\x7e]{1,64}")

Headers = list[tuple[bytes, bytes]]
Message = dict[str, Any]
Value = TypeVar("Value")


class WrongMethod(AvbError):
    """There is something at this path, but not for this method."""

    status: ClassVar[int] = 405
    default_code: ClassVar[str] = "method_not_allowed"


class _Gone(Exception):
    """The client went away before it had asked."""


class _Said(msgspec.Struct):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def plain(self) -> Message:
        """The message as providers get it."""
        found: Message = {"role": self.role, "content": self.content}
        for field in ("name", "tool_calls", "tool_call_id"):
            if (value := getattr(self, field)) is not None:
                found[field] = value
        return found


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


_Messages = Annotated[list[_Said], msgspec.Meta(min_length=1, max_length=MAX_MESSAGES)]
_Limit = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)]


class _Asked(msgspec.Struct):
    """What a tenant may ask; fields that are not here are ignored."""

    messages: _Messages
    model: Annotated[str, msgspec.Meta(max_length=200)] = "default"
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    max_tokens: _Limit | None = None
    max_completion_tokens: _Limit | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=1)] | None = None
    tools: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None


class _Uttered(msgspec.Struct):
    """What a cell asks in a turn of one of its sessions."""

    messages: _Messages
    stream: bool | None = True
    language: Annotated[str, msgspec.Meta(max_length=35)] = ""


class _Wanted(msgspec.Struct):
    """Who is to answer; nobody in particular by default."""

    name: Annotated[str, msgspec.Meta(max_length=200)]


_ASKED = msgspec.json.Decoder(_Asked)
_WANTED = msgspec.json.Decoder(_Wanted)
_UTTERED = msgspec.json.Decoder(_Uttered)
_ENCODER = msgspec.json.Encoder()


class ChatDoor:
    """The ASGI application for tenants: any key of theirs with the scope `realtime` or `admin`."""

    def __init__(self, door: Door, answers: Answers, ledger: Ledger) -> None:
        self._door = door
        self._answers = answers
        self._ledger = ledger

    @staticmethod
    def serves(path: str) -> bool:
        """Whether requests for this path belong here."""
        return path in (COMPLETIONS, MODELS) or path.startswith(MODELS + "/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        call = _Call(receive, send)
        await _guarded(call, self._serve(scope, call))

    async def _serve(self, scope: Scope, call: _Call) -> None:
        grant, decision = await self._door.admit_request(scope)
        call.headers = [
            (name.lower().encode(), text.encode()) for name, text in limits.headers(decision) if name != "Retry-After"
        ]
        request_id = uuid.uuid4().hex
        call.usage = partial(self._ledger.record, [_api_call(grant, request_id)])
        path, method = scope["path"], scope["method"]
        if path == COMPLETIONS:
            _check_method(method, "POST")
            await self._complete(scope, call, grant, request_id)
        else:
            _check_method(method, "GET")
            await self._list(call, grant, path.removeprefix(MODELS).removeprefix("/"))

    async def _complete(self, scope: Scope, call: _Call, grant: Grant, request_id: str) -> None:
        asked = _decoded(_ASKED, await _body(scope, call.receive))
        persona, model = await self._chosen(grant, asked.model)
        who = Who(grant.tenant_id, grant.project_id, None, f"chat:{request_id}")
        deltas = self._answers.stream(
            who,
            persona,
            [message.plain() for message in asked.messages],
            temperature=asked.temperature,
            max_tokens=asked.max_completion_tokens or asked.max_tokens,
            tools=asked.tools or None,
            tool_choice=asked.tool_choice,
            model=model,
        )
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        reply = _Reply(f"chatcmpl-{request_id}", asked.model, usage)
        await (_stream if asked.stream else _send_whole)(call, reply, deltas)

    async def _chosen(self, grant: Grant, model: str) -> tuple[Persona | None, str | None]:
        """Who is to answer, and the model if it is asked for by name."""
        if model in ("", "default"):
            return await self._answers.persona(grant.tenant_id, grant.project_id), None
        if model.startswith("persona:"):
            try:
                return await self._answers.named(grant.tenant_id, model.removeprefix("persona:")), None
            except NotFound as error:
                raise NotFound(error.message, code="model_not_found", param="model") from error
        if _MODEL.fullmatch(model):
            return None, model
        raise NotFound(
            f"There is no model {model[:100]!r}: ask for default, persona:NAME, or PROVIDER/MODEL.",
            code="model_not_found",
            param="model",
        )

    async def _list(self, call: _Call, grant: Grant, wanted: str) -> None:
        personas = [f"persona:{name}" for _, name in await self._answers.names(grant.tenant_id)]
        names = ["default", *personas, *await self._answers.models(grant.tenant_id)]
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": grant.tenant_slug} for name in names]
        if not wanted:
            await call.answer(200, {"object": "list", "data": listed})
            return
        for model in listed:
            if model["id"] == wanted:
                await call.answer(200, model)
                return
        raise NotFound(f"There is no model {wanted[:100]!r}.", code="model_not_found", param="model")


class CellDoor:
    """The ASGI application for the plugins in cells: they name a turn in flight, all else is known here.

    `cells` has for each cell's key what finds the turns in flight in that cell: no cell can name another's. These keys
    open this and nothing else, and no other key opens it.
    """

    def __init__(self, answers: Answers, cells: Mapping[str, Callable[[str], Line | None]], database: Database) -> None:
        self._answers = answers
        self._cells = cells
        self._database = database

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] == "http":
            call = _Call(receive, send)
            await _guarded(call, self._serve(scope, call))

    async def _serve(self, scope: Scope, call: _Call) -> None:
        given = dict(scope["headers"])
        kind, _, key = given.get(b"authorization", b"").decode("latin-1").partition(" ")
        found = [turn for known, turn in self._cells.items() if keys.same_key(key.strip(), known)]
        if kind.lower() != "bearer" or not found:
            raise Refused("Only the cells of this node may ask here.")
        doors = {COMPLETIONS: ("POST", self._complete), ABOUT: ("GET", self._tell), PERSONA: ("POST", self._choose)}
        if scope["path"] not in doors:
            raise NotFound(f"There is nothing here but {', '.join(doors)}.")
        method, serve = doors[scope["path"]]
        _check_method(scope["method"], method)
        turn_id = given.get(b"x-avb-turn", b"").decode("latin-1")
        line = found[0](turn_id) if _TURN.fullmatch(turn_id) else None
        talk = line.talk if line is not None else None
        if line is None or not isinstance(talk, Talk):
            raise NotFound("There is no such turn, or nobody waits for its answer.", code="turn_not_found")
        await serve(scope, call, _InFlight(turn_id, line, talk))

    async def _complete(self, scope: Scope, call: _Call, turn: _InFlight) -> None:
        asked = _decoded(_UTTERED, await _body(scope, call.receive))
        text = asked.messages[-1].content
        if asked.messages[-1].role != "user" or not isinstance(text, str) or len(text) > MAX_UTTERANCE:
            raise BadInput(
                f"The last message must be what the user said: text of at most {MAX_UTTERANCE} characters.",
                param="messages",
            )
        who = turn.who(asked.language or turn.line.language)
        reply = _Reply(f"chatcmpl-{uuid.uuid4().hex}", "persona", usage=False)
        deltas = self._answers.answer_turn(who, turn.talk, text)
        await (_send_whole if asked.stream is False else _stream)(call, reply, deltas)

    async def _tell(self, scope: Scope, call: _Call, turn: _InFlight) -> None:
        """What a skill may know of the tenant of this turn."""
        asked = parse_qs(scope["query_string"].decode("latin-1"))
        who = turn.who(turn.line.language)
        name = turn.name(await self._answers.answering(who, turn.talk))
        skill = asked.get("skill", [""])[0]
        told = await about.tell(
            self._database, self._answers, who.tenant_id, who.project_id, who.session_id, name, who.language, skill
        )
        await call.answer(200, told)

    async def _choose(self, scope: Scope, call: _Call, turn: _InFlight) -> None:
        """Let somebody else answer in the session of this turn."""
        wanted = _decoded(_WANTED, await _body(scope, call.receive)).name.strip()
        who = turn.who(turn.line.language)
        persona = await self._answers.heard(who.tenant_id, wanted, who.language) if wanted else None
        turn.talk.persona = persona.id if persona is not None else None
        persona = await self._answers.answering(who, turn.talk)
        turn.talk.on_switch(persona)
        await call.answer(200, {"persona": turn.name(persona)})


class _InFlight(NamedTuple):
    """A turn that somebody waits for."""

    id: str
    line: Line
    talk: Talk

    def name(self, persona: Persona | None) -> str:
        """How whoever answers is called; the platform's own assistant as the bridge has named it."""
        return persona.name if persona is not None else self.line.context.get("persona_name", "")

    def who(self, language: str) -> Who:
        """Whose turn it is."""
        return Who(
            uuid.UUID(self.line.tenant_id),
            self.talk.project_id,
            uuid.UUID(self.line.id.removeprefix("avb:")),
            # A cell that died may have begun the same turn before: that was used as well.
            f"{self.line.id}:{self.id}:{secrets.token_hex(4)}",
            language,
        )


class _Call:
    """One request under way: how to read and answer it."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.receive = receive
        self.headers: Headers = []
        """What every answer carries."""
        self.usage: Callable[[], Coroutine[Any, Any, None]] | None = None
        """Records the call, which is in the ledger before its answer begins."""
        self.metering: asyncio.Task[None] | None = None
        self.begun = False
        self._send = send

    def meter(self) -> None:
        """Let the call be recorded while its answer is worked on."""
        if self.usage is not None:
            self.metering, self.usage = asyncio.create_task(self.usage()), None

    async def begin(self, status: int, headers: Headers) -> None:
        """Raises `Unavailable` when the call cannot be metered; then nothing is answered yet."""
        self.meter()
        if self.metering is not None:
            metering, self.metering = self.metering, None
            await metering
        self.begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers + self.headers})

    async def write(self, body: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def answer(self, status: int, content: Any) -> None:
        """Answer with JSON, all at once."""
        body = _ENCODER.encode(content)
        length = b"%d" % len(body)
        await self.begin(status, [(b"content-type", b"application/json"), (b"content-length", length)])
        await self.write(body, False)

    async def refuse(self, error: AvbError) -> None:
        """Tell of an error, in the place of the answer."""
        status, headers, body = door.refusal(error, openai=True)
        try:
            await self.begin(status, [*headers, (b"content-length", b"%d" % len(body))])
        except AvbError as unmetered:
            status, headers, body = door.refusal(unmetered, openai=True)
            await self.begin(status, [*headers, (b"content-length", b"%d" % len(body))])
        await self.write(body, False)


class _Reply:
    """OpenAI's format of an answer."""

    def __init__(self, reply_id: str, model: str, usage: bool) -> None:
        self._id = reply_id
        self._model = model
        self._created = int(time.time())
        self._usage = usage
        # What all events of an answer have in common is encoded once.
        common = {"id": reply_id, "object": "chat.completion.chunk", "created": self._created, "model": model}
        self._head = b"data: " + _ENCODER.encode(common)[:-1]
        self._tail = b',"usage":null}\n\n' if usage else b"}\n\n"
        self._first = True

    def events(self, delta: Delta) -> bytes:
        """A piece of the answer as server-sent events; after the last one nothing follows."""
        content: Message = {}
        if self._first:
            content["role"] = "assistant"
            self._first = False
        if delta.tool_calls:
            content["tool_calls"] = delta.tool_calls
        if delta.text or not delta.finish:
            content["content"] = delta.text
        event = b'%s,"choices":[{"index":0,"delta":%s,"finish_reason":%s}]%s' % (
            self._head,
            _ENCODER.encode(content),
            _ENCODER.encode(delta.finish),
            self._tail,
        )
        if delta.finish is None:
            return event
        if self._usage:
            event += b'%s,"choices":[],"usage":%s}\n\n' % (self._head, _ENCODER.encode(_usage(delta.tokens)))
        return event + b"data: [DONE]\n\n"

    def whole(self, text: str, calls: list[Message], finish: str, tokens: Tokens | None) -> Message:
        """The whole answer."""
        message: Message = {"role": "assistant", "content": text if text or not calls else None}
        if calls:
            message["tool_calls"] = calls
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
            "usage": _usage(tokens),
        }


class _Ahead:
    """Pieces of an answer between who makes and who sends them: in one task each, so that neither waits for nothing.

    Whoever sends comes in the round after the pieces have come, and takes all that are there.
    """

    def __init__(self, deltas: AsyncGenerator[Delta], encode: Callable[[Delta], bytes]) -> None:
        self._pieces: list[bytes] = []
        self._there = asyncio.Event()
        self._room = asyncio.Event()
        self.making = asyncio.create_task(self._make(deltas, encode))
        self.making.add_done_callback(lambda _: self._there.set())

    async def take(self) -> bytes:
        """What has come since the last time; empty after the end. Raises why there is no more, once all is taken."""
        while not self._pieces and not self.making.done():
            self._there.clear()
            await self._there.wait()
        if not self._pieces:
            self.making.result()
        pieces, self._pieces = self._pieces, []
        self._room.set()
        return b"".join(pieces)

    @property
    def done(self) -> bool:
        """Whether all has been made and taken, and well."""
        return self.making.done() and not self._pieces and not self.making.cancelled() and not self.making.exception()

    async def _make(self, deltas: AsyncGenerator[Delta], encode: Callable[[Delta], bytes]) -> None:
        async with aclosing(deltas):
            async for delta in deltas:
                self._pieces.append(encode(delta))
                self._there.set()
                while len(self._pieces) >= _AHEAD:
                    self._room.clear()
                    await self._room.wait()


async def _stream(call: _Call, reply: _Reply, deltas: AsyncGenerator[Delta]) -> None:
    """Send an answer piece by piece."""
    ahead = _Ahead(deltas, reply.events)

    async def send() -> None:
        data = await ahead.take()
        await call.begin(200, [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")])
        while not ahead.done:
            await call.write(data, True)
            data = await ahead.take()
        await call.write(data, False)

    call.meter()  # after what is made has been set to work: the question goes out first
    await unless_gone(call.receive, ahead.making, send())


async def _send_whole(call: _Call, reply: _Reply, deltas: AsyncGenerator[Delta]) -> None:
    """Send an answer when it is complete."""

    async def collect() -> Message:
        texts: list[str] = []
        calls = Pieces()
        async with aclosing(deltas):
            async for delta in deltas:
                texts.append(delta.text)
                calls.add(delta.tool_calls or [])
                if delta.finish:
                    return reply.whole("".join(texts), calls.whole(), delta.finish, delta.tokens)
        raise AssertionError("an answer without an end")

    making = asyncio.create_task(collect())

    async def send() -> None:
        await call.answer(200, await making)

    call.meter()
    await unless_gone(call.receive, making, send())


async def unless_gone(receive: Receive, making: asyncio.Task[Any], sending: Awaitable[Value]) -> Value | None:
    """What `sending` returns, which sends what is made; making ends when the client goes away, and this is None."""
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        making.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await sending
    except asyncio.CancelledError:
        if not gone:
            raise
        return None
    finally:
        watching.cancel()
        making.cancel()
        # What was used is metered before this request is over, also when nobody waits for it any more.
        await asyncio.wait([making])
        if not making.cancelled():
            making.exception()


async def _guarded(call: _Call, serving: Awaitable[None]) -> None:
    """Serve, and answer what goes wrong in OpenAI's format."""
    try:
        await serving
    except _Gone:
        pass
    except Exception as error:
        if not isinstance(error, AvbError):
            log.error("a chat request failed unexpectedly: %s", unexpected(error))
            error = AvbError("Something went wrong on our side; try again.")
        if call.begun:
            _, _, body = door.refusal(error, openai=True)
            await call.write(b"data: " + body + b"\n\n", False)
        else:
            await call.refuse(error)
    finally:
        call.meter()
        if call.metering is not None:
            await asyncio.wait([call.metering])
            if not call.metering.cancelled():
                call.metering.exception()


async def _body(scope: Scope, receive: Receive) -> bytes:
    """The body of a request. Raises `TooLarge`."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and int(length) > MAX_BODY:
        raise _too_large()
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise _too_large()
        if not message.get("more_body"):
            return bytes(body)


def _decoded(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """What a body asks for. Raises `BadInput`, naming the field."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        said = str(error)
        if place := _AT.fullmatch(said):
            raise BadInput(f"{place[2]}: {place[1]}.", code="invalid_value", param=place[2]) from None
        field = _FIELD.search(said)
        raise BadInput(f"{said}.", code="invalid_value", param=field[1] if field else None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BadInput("The body is not JSON in UTF-8.", code="invalid_json") from None


def _check_method(given: str, expected: str) -> None:
    if given != expected:
        raise WrongMethod(f"Use {expected} here.")


def _too_large() -> TooLarge:
    return TooLarge(f"A request holds at most {MAX_BODY} bytes; shorten the conversation.")


def _api_call(grant: Grant, request_id: str) -> Usage:
    now = datetime.now(UTC)
    return Usage(request_id, grant.tenant_id, Metric.API_CALLS, 1, now, project_id=grant.project_id)


def _usage(tokens: Tokens | None) -> Message:
    read, written = (tokens.input, tokens.output) if tokens is not None else (0, 0)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
