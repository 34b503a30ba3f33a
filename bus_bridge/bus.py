"""The node's one connection to a cell's messagebus: it carries every session's turns and keeps them apart.

A message reaches a session only when three top-level context keys and the OVOS session in it agree: `avb_session`,
`tenant_id`, `avb_turn`, and `session.session_id`. What lacks one, or carries the session "default", goes to nobody.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidState, WebSocketException
from websockets.frames import Frame, Opcode

from agentvoicebox.bus_bridge import cells
from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.turnstile import Turnstile
from agentvoicebox.config.errors import Unavailable, unexpected
from agentvoicebox.config.tasks import begin

log = logging.getLogger(__name__)

MATCHING = 2.0
"""Seconds after which a turn no longer keeps others out of matching, whatever it is doing."""

GATHER = "?gather=1"
"""Query of the bridge's connection: it hears messages of turns only, several to a frame, one JSON object a line."""

MAX_TEXT = 16_000
"""Characters of one utterance. A bus of stock OVOS drops whoever sends it more than it takes in one message."""

MOST_ABANDONED = 8
"""Cancelled turns of one tenant that core may still be working on: its threads are everybody's."""

ABANDONED = 300.0
"""Seconds for which a cancelled turn counts as one that core works on, unless core ends it before."""

MAX_MESSAGE = 4 * 1024 * 1024
"""Bytes of one bus message; there is no audio on this bus."""

_NOTHING = "-"


class _Session(msgspec.Struct):
    session_id: str = ""


class _State(msgspec.Struct, omit_defaults=True):
    """What OVOS keeps in its session from turn to turn; everything else of it is set here, afresh, for every turn."""

    active_skills: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    utterance_states: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    context: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Context(msgspec.Struct):
    session: msgspec.Raw = msgspec.Raw(b"{}")
    avb_session: str = ""
    avb_turn: str = ""
    tenant_id: str = ""


class _Message(msgspec.Struct):
    type: str
    context: _Context = msgspec.field(default_factory=_Context)
    data: msgspec.Raw = msgspec.Raw(b"{}")


class _Speak(msgspec.Struct):
    utterance: str = ""
    expect_response: bool = False
    meta: msgspec.Raw = msgspec.Raw(b"{}")


class _Meta(msgspec.Struct):
    """What of a skill's `meta`, which may be anything, is meant for us."""

    avb: str = ""


_MESSAGE = msgspec.json.Decoder(_Message)
_SPEAK = msgspec.json.Decoder(_Speak)
_META = msgspec.json.Decoder(_Meta)
_SESSION = msgspec.json.Decoder(_Session)
_STATE = msgspec.json.Decoder(_State)
_ENCODER = msgspec.json.Encoder()


class _Abandoned:
    """Turns that core has not ended although nobody waits for them any more, by tenant."""

    def __init__(self) -> None:
        self._turns: dict[str, tuple[str, float]] = {}

    def __contains__(self, turn_id: str) -> bool:
        return turn_id in self._turns

    def count(self, tenant_id: str) -> int:
        # Core does not end every turn by itself (the reply to a skill's question is not): none counts for ever.
        now = time.monotonic()
        self._turns = {turn_id: entry for turn_id, entry in self._turns.items() if entry[1] > now}
        return sum(tenant == tenant_id for tenant, _ in self._turns.values())

    def add(self, turn_id: str, tenant_id: str) -> None:
        self._turns[turn_id] = (tenant_id, time.monotonic() + ABANDONED)

    def remove(self, turn_id: str) -> None:
        self._turns.pop(turn_id, None)

    def clear(self) -> None:
        self._turns.clear()


class _Connection(ClientConnection):
    """Hands every message over as it is read: a queue and a task in between would cost more than the message."""

    hear: Callable[[bytes], None] | None = None

    def process_event(self, event: Any) -> None:
        if self.hear is not None and isinstance(event, Frame) and event.opcode is Opcode.TEXT and event.fin:
            self.hear(bytes(event.data))
        else:
            super().process_event(event)

    def write(self, frame: bytes) -> None:
        """Send a text frame now. A bus that does not read is found out by the canary, not by waiting here."""
        self.protocol.send_text(frame)
        self.send_data()


def _tell(line: Line, event: ev.Event) -> None:
    """Tell a line; its trouble is not the others'."""
    try:
        line.tell(event)
        line.settle()
    except Exception as error:
        log.error("a session could not go on: %s", unexpected(error))


def _later(line: Line, event: ev.Event) -> None:
    """Tell a line in the next round: whoever asks is in the middle of something."""
    asyncio.get_running_loop().call_soon(_tell, line, event)


def _is_apology(meta: msgspec.Raw) -> bool:
    """Whether what is said is why there is no answer; our persona says so."""
    if b'"avb"' not in bytes(meta):
        return False
    try:
        return _META.decode(meta).avb == "apology"
    except msgspec.MsgspecError:
        return False


def _ignore(event: ev.Event) -> None:
    """A line that nobody listens to yet."""


def _nothing() -> None:
    """As `_ignore`."""


class Line:
    """One session's line to core.

    `tell` receives the session's events, and `settle` the word that no more come at this moment. `context` holds
    further top-level context keys (strings) that every message of this session carries, `disabled_skills` the skills
    that must not answer. `talk` is the session's conversation, for whoever answers a turn in the name of its persona.
    """

    __slots__ = (
        "asker",
        "context",
        "disabled_skills",
        "id",
        "language",
        "settle",
        "state",
        "talk",
        "tell",
        "tenant_id",
        "turn_id",
    )

    def __init__(
        self,
        session_id: str,
        tenant_id: str,
        *,
        context: dict[str, str],
        disabled_skills: tuple[str, ...] = (),
    ) -> None:
        self.id = f"avb:{session_id}"
        self.tenant_id = tenant_id
        self.tell: Callable[[ev.Event], None] = _ignore
        self.settle: Callable[[], None] = _nothing
        self.context = context
        self.disabled_skills = disabled_skills
        self.talk: object | None = None
        self.language = "en-US"
        self.turn_id = ""
        """The turn that was asked last; its messages change the OVOS session, and those of `asker`."""
        self.asker = ""
        """The turn whose handler has asked something back, and goes on under its id once it has the reply."""
        self.state: bytes | None = None
        """The OVOS session as the last message of a turn returned it."""


class Bus:
    """The connection to one cell: `connect` when it is ready, `lose` when it is gone; lines stay open over both."""

    def __init__(self) -> None:
        self._socket: _Connection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._lines: dict[str, Line] = {}
        self._turns: dict[str, Line] = {}
        self._turnstile = Turnstile()
        self._impatient: asyncio.TimerHandle | None = None
        self._abandoned = _Abandoned()
        self._canaries: dict[str, asyncio.Future[None]] = {}

    @property
    def connected(self) -> bool:
        """Whether the cell can be asked."""
        return self._socket is not None

    async def connect(self, url: str) -> None:
        """Connect to a cell's messagebus. Raises `Unavailable`."""
        await self.close()
        try:
            # Frames are small and local: compression and pings would only cost.
            socket = await connect(
                url + GATHER,
                compression=None,
                max_size=MAX_MESSAGE,
                ping_interval=None,
                proxy=None,
                open_timeout=5,
                create_connection=_Connection,
            )
        except (OSError, TimeoutError, WebSocketException) as error:
            raise Unavailable(f"The messagebus does not answer: {error}.", code="cell_unavailable") from error
        assert isinstance(socket, _Connection)
        socket.hear = self._hear
        self._socket = socket
        self._reader = begin(self._read(socket), "messagebus")

    async def close(self) -> None:
        """Leave the bus; turns in flight fail."""
        socket, reader = self._socket, self._reader
        self.lose("The assistant is shutting down.")
        self._reader = None
        if socket is not None:
            await socket.close()
        if reader is not None:
            await asyncio.gather(reader, return_exceptions=True)

    def lose(self, reason: str) -> None:
        """The cell is gone: every turn in flight fails now, instead of waiting for an answer that cannot come."""
        self._socket = None
        self._turnstile.clear()
        self._abandoned.clear()
        turns, self._turns = self._turns, {}
        for turn_id, line in turns.items():
            line.state = None  # its dialogue died with the cell
            _tell(line, ev.AskFailed(turn_id, "cell_lost", f"{reason} Please say it again in a few seconds."))
        for canary in self._canaries.values():
            if not canary.done():
                canary.cancel()

    def open(self, line: Line) -> None:
        """From now on the line hears what is meant for it."""
        self._lines[line.id] = line

    def hang_up(self, line: Line) -> None:
        """The session is over; core forgets it."""
        if self._lines.pop(line.id, None) is None:
            return
        for turn_id in [t for t, other in self._turns.items() if other is line]:
            self.drop(turn_id)
        if line.turn_id:
            self._forget(line.id, line.tenant_id, line.turn_id)

    def ask(self, line: Line, turn_id: str, text: str, language: str) -> None:
        """Put an utterance to core, when the line's tenant has its turn."""
        if self._socket is None:
            message = "The assistant is restarting; please say it again in a few seconds."
            _later(line, ev.AskFailed(turn_id, "cell_unavailable", message))
            return
        refusal = None
        if len(text) > MAX_TEXT:
            refusal = ev.AskFailed(turn_id, "too_long", f"At most {MAX_TEXT} characters can be answered.")
        elif self._abandoned.count(line.tenant_id) >= MOST_ABANDONED:
            message = "Too many answers that were cancelled are still being worked on; wait until they have ended."
            refusal = ev.AskFailed(turn_id, "too_many_turns", message)
        if refusal is not None:
            _later(line, refusal)
            return
        self._turns[turn_id] = line
        line.turn_id = turn_id
        line.language = language
        self._turnstile.enter(line.tenant_id, turn_id, lambda: self._put(line, turn_id, text))
        if self._impatient is None and self._turnstile.waiting:
            self._impatient = asyncio.get_running_loop().call_later(MATCHING, self._release, self._turnstile.inside)

    def drop(self, turn_id: str) -> None:
        """Nobody wants the rest of this turn; what core still says of it is not heard.

        Only the persona is told to stop: stock skills that cannot stop one session stop all of them.
        """
        line = self._turns.pop(turn_id, None)
        waited = self._turnstile.leave(turn_id)
        if line is not None and not waited:
            self._abandoned.add(turn_id, line.tenant_id)
            # Whoever works on it: we are not told. An OVOS session in it would come back to core's memory.
            keys = {"avb_session": line.id, "tenant_id": line.tenant_id}
            self._send({"type": "avb.persona.cancel", "data": {"turn": turn_id}, "context": keys})

    def turn(self, turn_id: str) -> Line | None:
        """The line whose turn this is, while an answer to it is wanted; None for every other turn."""
        return self._turns.get(turn_id)

    def playback_ended(self, line: Line, turn_id: str) -> None:
        """Tell skills that wait for it that what they said has been played."""
        if self._socket is not None:
            context = self._context(line, turn_id)
            self._send({"type": "recognizer_loop:audio_output_end", "data": {}, "context": context})

    async def canary(self) -> bool:
        """Whether core takes an utterance through its whole matching path and back. Waits without limit."""
        if self._socket is None:
            return False
        nonce = uuid.uuid4().hex
        self._canaries[nonce] = asyncio.get_running_loop().create_future()
        self._send(cells.question(nonce))
        try:
            await self._canaries[nonce]
        except asyncio.CancelledError:  # of the canary, when the cell is lost, or of this
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            return False
        finally:
            del self._canaries[nonce]
        return True

    # --- out ----------------------------------------------------------------------------------------------------------

    def _put(self, line: Line, turn_id: str, text: str) -> None:
        data = {"utterances": [text], "lang": line.language}
        context = self._context(line, turn_id)
        self._send({"type": "recognizer_loop:utterance", "data": data, "context": context})

    def _release(self, inside: frozenset[str]) -> None:
        """Let others in although these have not come out: whatever they do, matching is long over."""
        self._impatient = None
        for turn_id in inside:
            self._turnstile.leave(turn_id)
        if self._turnstile.waiting:
            self._impatient = asyncio.get_running_loop().call_later(MATCHING, self._release, self._turnstile.inside)

    def _forget(self, session_id: str, tenant_id: str, turn_id: str) -> None:
        """Let core forget a session: by itself it remembers each for ever."""
        keys = {"avb_session": session_id, "avb_turn": turn_id, "tenant_id": tenant_id}
        context = {**keys, "session": {"session_id": session_id}}
        self._send({"type": "avb.session.forget", "data": {"session_id": session_id}, "context": context})

    def _context(self, line: Line, turn_id: str) -> dict[str, Any]:
        session: dict[str, Any] = {
            "session_id": line.id,
            "lang": line.language,
            "site_id": "avb",
            # An empty list would be taken for none at all, and replaced by one that all sessions share.
            "blacklisted_skills": list(line.disabled_skills) or [_NOTHING],
            "blacklisted_intents": [_NOTHING],
        }
        if line.state is not None:
            before = _STATE.decode(line.state)
            carried = {
                "active_skills": before.active_skills,
                "utterance_states": before.utterance_states,
                "context": before.context,
            }
            session.update({name: value for name, value in carried.items() if value is not msgspec.UNSET})
        return {
            **line.context,
            "avb_session": line.id,
            "avb_turn": turn_id,
            "tenant_id": line.tenant_id,
            "source": "agentvoicebox",
            "destination": ["skills"],
            "session": session,
        }

    def _send(self, message: dict[str, Any]) -> None:
        if self._socket is None:
            return
        try:
            self._socket.write(_ENCODER.encode(message))
        except (InvalidState, OSError):
            # In the next round: whoever asks is in the middle of something.
            asyncio.get_running_loop().call_soon(self.lose, "The assistant has stopped.")

    # --- in -----------------------------------------------------------------------------------------------------------

    async def _read(self, socket: ClientConnection) -> None:
        """Wait for the end of the connection; messages in pieces, which a bus does not send, would come this way."""
        try:
            while True:
                self._hear(await socket.recv(decode=False))
        except ConnectionClosed:
            if self._socket is socket:
                self.lose("The assistant has stopped.")

    def _hear(self, frame: bytes) -> None:
        told: set[Line] = set()
        for message in frame.split(b"\n"):
            if b'"avb_turn"' in message:
                try:
                    if (line := self._route(message)) is not None:
                        told.add(line)
                except Exception as error:  # one session's trouble is not the others'
                    log.error("a bus message could not be delivered: %s", unexpected(error))
            elif self._canaries and b'"avb_canary"' in message:
                self._hear_canary(message)
        for line in told:
            try:
                line.settle()
            except Exception as error:
                log.error("a session could not go on: %s", unexpected(error))

    def _route(self, frame: bytes) -> Line | None:
        try:
            message = _MESSAGE.decode(frame)
            context = message.context
            line = self._lines.get(context.avb_session)
            if context.avb_turn in self._abandoned:
                self._end_abandoned(message)
                return None
            if (
                line is None
                or context.tenant_id != line.tenant_id
                or not context.avb_turn
                or _SESSION.decode(context.session).session_id != line.id
            ):
                return None
            self._deliver(line, context.avb_turn, message)
        except msgspec.MsgspecError:
            log.warning("a bus message with our keys was not understood and went to nobody")
            return None
        return line

    def _end_abandoned(self, message: _Message) -> None:
        context = message.context
        if message.type == "ovos.utterance.handled":
            self._abandoned.remove(context.avb_turn)
            if context.avb_session not in self._lines:
                # The session was over before its turn, which has brought it back to core's memory.
                self._forget(context.avb_session, context.tenant_id, context.avb_turn)

    def _deliver(self, line: Line, turn_id: str, message: _Message) -> None:
        kind = message.type
        if kind in ("recognizer_loop:utterance", "recognizer_loop:audio_output_end"):
            return  # our own voice coming back
        if turn_id in (line.turn_id, line.asker):
            line.state = bytes(message.context.session)
        if kind == "speak":
            self._turnstile.leave(turn_id)
            said = _SPEAK.decode(message.data)
            if said.expect_response:
                self._turns.pop(turn_id, None)
                if turn_id == line.asker:
                    self._end_reply(line)
                line.asker = turn_id
            line.tell(ev.Spoke(turn_id, said.utterance, said.expect_response, _is_apology(said.meta)))
        elif kind == "mycroft.skill.handler.start":
            self._turnstile.leave(turn_id)
            line.tell(ev.SkillStarted(turn_id))
        elif kind == "ovos.utterance.handled":
            self._turns.pop(turn_id, None)
            self._turnstile.leave(turn_id)
            if turn_id == line.asker:
                line.asker = ""
                self._end_reply(line)
            line.tell(ev.Handled(turn_id))
        elif turn_id in self._turns:
            line.tell(ev.Progressed(turn_id))

    def _end_reply(self, line: Line) -> None:
        """The reply to a question is done with: core does not end it, but what has asked."""
        self._turns.pop(line.turn_id, None)
        if line.turn_id in self._turnstile.inside:
            self._turnstile.leave(line.turn_id)

    def _hear_canary(self, frame: bytes) -> None:
        try:
            message = msgspec.json.decode(frame)
            for nonce, canary in self._canaries.items():
                if cells.is_answer(message, nonce) and not canary.done():
                    canary.set_result(None)
        except (msgspec.MsgspecError, KeyError, TypeError):
            return
