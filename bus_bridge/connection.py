"""One connected session: the shell that carries frames, engine work, bus messages and time to and from `Session`."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import aclosing, suppress
from typing import Any, Protocol

from agentvoicebox.bus_bridge import audio, native
from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.bus import Bus, Line
from agentvoicebox.bus_bridge.converse import Conversation
from agentvoicebox.bus_bridge.engines import Engines
from agentvoicebox.bus_bridge.models import SessionSettings
from agentvoicebox.bus_bridge.outbox import Outbox
from agentvoicebox.bus_bridge.session import ENGINE_SILENCE, Out, Session
from agentvoicebox.bus_bridge.vad import STREAMS, VadStream
from agentvoicebox.bus_bridge.wire import WireError
from agentvoicebox.config.errors import AvbError, unexpected
from agentvoicebox.tenancy.limits import SOCKET_AUDIO, SOCKET_MESSAGES, Budget

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

INLINE_AUDIO = 0.3
"""Seconds of audio whose speech detection is done on the spot; more goes to a thread, slice by slice."""

LONG_AUDIO = 5.0
"""Seconds of reply from which changing its rate is worth a thread."""

SLICE = 2.0
"""Seconds of audio in one such slice."""

NORMAL = 1000
INTERNAL = 1011


class Codec(Protocol):
    """A client protocol: frames to events and back, without I/O."""

    def opening(self, settings: SessionSettings) -> list[str]: ...
    def closing(self) -> list[str]: ...
    def decode(self, frame: str | bytes, settings: SessionSettings) -> list[Any]: ...
    def encode(self, told: ev.Told, settings: SessionSettings) -> list[str]: ...
    def problem(self, told: ev.Problem) -> str: ...


class Books(Protocol):
    """Where a connection writes down what happened; bound to one session of one tenant."""

    async def meter(self, key: str, stt_seconds: float, tts_seconds: float) -> None:
        """Returns once the usage has been committed. Raises `AvbError`."""
        ...

    def record(self, kind: str, content: dict[str, object]) -> None:
        """Append to the session's history, some time soon."""
        ...


class Connection:
    """Runs one session over one socket until either ends. `run` returns the close code that was used."""

    def __init__(
        self,
        session: Session,
        codec: Codec,
        line: Line,
        *,
        bus: Bus,
        engines: Engines,
        books: Books,
        tenant: uuid.UUID,
        conversation: Conversation,
        vad: str,
        languages: tuple[str, ...],
        receive: Receive,
        outbox: Outbox,
        spawn: Callable[[Awaitable[None]], asyncio.Task[None]],
    ) -> None:
        self._session = session
        self._codec = codec
        self._line = line
        self._bus = bus
        self._engines = engines
        self._books = books
        self._tenant = tenant
        self._conversation = conversation
        self._vad_name = vad
        self._receive_message = receive
        self._languages = languages
        self._outbox = outbox
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._began = self._heard_at = self._loop.time()
        self._messages = Budget(*SOCKET_MESSAGES)
        self._audio = Budget(*SOCKET_AUDIO)
        self._inlet: audio.Inlet | None = None
        self._vad: VadStream | None = None
        self.chosen: frozenset[str] = frozenset()
        """Fields of the settings that the client has chosen itself."""
        self._work: dict[str, asyncio.Task[None]] | None = None
        self._timer: asyncio.TimerHandle | None = None
        line.tell = self._note
        line.settle = self._settle

    @property
    def age(self) -> float:
        """Seconds since the client came."""
        return self._loop.time() - self._began

    @property
    def idle(self) -> float:
        """Seconds since the client sent something."""
        return self._loop.time() - self._heard_at

    async def run(self) -> int:
        """Serve the client until it leaves, ends the session, or `close` is called."""
        self._bus.open(self._line)
        code = NORMAL
        try:
            self._outbox.post(self._codec.opening(self._session.settings))
            self._outbox.settle()
            while True:
                message = await self._receive_message()
                if message["type"] == "websocket.disconnect":
                    code = int(message.get("code") or NORMAL)
                    break
                self._heard_at = self._loop.time()
                frame = message.get("text")
                await self._take(frame if frame is not None else message.get("bytes") or b"")
                self._settle()
                if rest := self._messages.spend(self._heard_at):
                    await self._rest(rest)
        finally:
            self._hear_last()
            self._outbox.discard()
        return code

    def hear(self, event: ev.Event) -> None:
        """Something happened: let the session decide what follows, and do it."""
        self._note(event)
        self._settle()

    def close(self, code: int, reason: str, problem: ev.Problem | None = None) -> None:
        """End the connection from our side, after telling the client why."""
        if problem is not None:
            self._outbox.post([self._codec.problem(problem)])
        self._outbox.close(code, reason)

    def _note(self, event: ev.Event) -> None:
        # "The answer has begun" waits for the next thing that happens: a frame by itself would cost a wake-up.
        self._outbox.press()
        self._follow(self._session.receive(event, self._loop.time()))

    def _settle(self) -> None:
        """Nothing more happens right now: send what there is to send, and set the timer."""
        self._arm()
        self._outbox.settle()

    # --- in -----------------------------------------------------------------------------------------------------------

    async def _take(self, frame: str | bytes) -> None:
        if self._outbox.closing:
            return
        try:
            wanted = self._codec.decode(frame, self._session.settings)
        except WireError as error:
            problem = ev.Problem(error.code, error.message, error.param, error.event_id)
            self._outbox.post([self._codec.problem(problem)])
            return
        for event in wanted:
            if isinstance(event, ev.AudioAppended):
                await self._listen(event.pcm)
                if rest := self._audio.spend(self._heard_at, len(event.pcm)):
                    await self._rest(rest)
            elif isinstance(event, native.Pinged):
                self._outbox.post([self._codec.pong()])  # type: ignore[attr-defined]
            elif isinstance(event, native.EndWanted):
                self._note(ev.Ended())
                self._outbox.post(self._codec.closing())
                self._outbox.close(NORMAL, "")
            elif isinstance(event, ev.SettingsWanted) and (problem_ := self._foreign(event)):
                self._outbox.post([self._codec.problem(problem_)])
            else:
                if isinstance(event, ev.SettingsWanted):
                    self.chosen = self.chosen.union(event.changes)
                self._note(event)

    async def _rest(self, seconds: float) -> None:
        """Read no more for a while from a client that sends too much, so that it has to wait too; nothing is lost."""
        self._settle()
        await self._outbox.rest(seconds)

    def _foreign(self, event: ev.SettingsWanted) -> ev.Problem | None:
        """A language that the assistant here does not speak."""
        language = event.changes.get("language")
        if language is None or language in self._languages:
            return None
        message = f"The assistant here speaks {', '.join(self._languages)}."
        return ev.Problem("invalid_value", message, "config.language", event.event_id)

    async def _listen(self, pcm: bytes) -> None:
        settings = self._session.settings
        inlet = self._inlet
        if inlet is None or inlet.rate != settings.input_format.rate:
            inlet = self._inlet = audio.Inlet(settings.input_format.rate)
        if settings.turn_detection is None:
            self._vad = None
        elif self._vad is None:
            self._vad = STREAMS[self._vad_name]()
        size = int(inlet.rate * SLICE) * 2
        if len(pcm) / 2 / inlet.rate <= INLINE_AUDIO:
            self._attend(*self._detect(inlet, self._vad, pcm))
            return
        for i in range(0, len(pcm), size):
            self._attend(*await asyncio.to_thread(self._detect, inlet, self._vad, pcm[i : i + size]))
            self._settle()

    @staticmethod
    def _detect(inlet: audio.Inlet, vad: VadStream | None, pcm: bytes) -> tuple[bytes, int, list[float] | None]:
        if vad is None:
            return inlet.take(pcm, 1), 0, None
        heard = inlet.take(pcm, vad.window)
        return heard, vad.window * 2, vad.probabilities(heard) if heard else []

    def _attend(self, heard: bytes, size: int, probabilities: list[float] | None) -> None:
        if probabilities is None:
            if heard:
                self._note(ev.Heard(heard))
            return
        for i, speech in enumerate(probabilities):
            self._note(ev.Heard(heard[i * size : (i + 1) * size], speech))

    # --- what follows -------------------------------------------------------------------------------------------------

    def _follow(self, out: list[Out]) -> None:
        for item in out:
            try:
                if isinstance(item, ev.Effect):
                    self._do(item)
                else:
                    self._tell(item)
            except Exception as error:
                # A client that was not told something would wait for it for ever. The rest is done all the same.
                if not self._outbox.closing:
                    log.error("%s of a session failed: %s", type(item).__name__, type(error).__name__)
                self._outbox.close(INTERNAL, "internal_error")

    def _tell(self, told: ev.Told) -> None:
        settings = self._session.settings
        if isinstance(told, ev.ReplyAudio):
            self._outbox.post_lazily(self._audio_frames(told, settings))
        else:
            if isinstance(told, ev.ReplyEnded):
                self._conversation.note(told)
            elif isinstance(told, ev.SettingsChanged):
                self._conversation.talk.instructions = settings.instructions
                self._conversation.talk.language = settings.language
            frames = self._codec.encode(told, settings)
            self._outbox.post(frames, pressing=not isinstance(told, ev.ReplyStarted))

    def _audio_frames(self, told: ev.ReplyAudio, settings: SessionSettings) -> Iterator[str]:
        for chunk in audio.chunks(told.pcm, told.rate):
            yield from self._codec.encode(ev.ReplyAudio(told.turn_id, chunk, told.rate), settings)

    def _do(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Transcribe():
                self._begin(f"stt:{effect.item_id}:{effect.attempt}", self._transcribe(effect))
            case ev.CancelTranscription():
                self._cancel(f"stt:{effect.item_id}:{effect.attempt}")
            case ev.Guess():
                self._begin(f"guess:{effect.item_id}", self._guess(effect))
            case ev.Ask():
                self._bus.ask(self._line, effect.turn_id, effect.text, effect.language)
            case ev.Converse():
                self._begin(f"talk:{effect.turn_id}", self._converse(effect))
            case ev.Return():
                self._conversation.calls.returned(effect.call_id, effect.output)
            case ev.Synthesize():
                self._begin(f"tts:{effect.turn_id}", self._synthesize(effect))
            case ev.CancelTurn():
                self._cancel(f"tts:{effect.turn_id}")
                self._cancel(f"talk:{effect.turn_id}")
                self._bus.drop(effect.turn_id)
            case ev.PlaybackEnded():
                self._bus.playback_ended(self._line, effect.turn_id)
            case ev.Meter():
                self._spawn(self._meter(effect))  # never cancelled: what was used is used
            case ev.Record():
                self._books.record(effect.kind, dict(effect.content))

    async def _transcribe(self, effect: ev.Transcribe) -> None:
        settings = self._session.settings
        try:
            heard = await self._engines.transcribe(effect.pcm, settings, self._tenant, deadline=ENGINE_SILENCE)
        except Exception as error:
            self.hear(ev.TranscriptionFailed(effect.item_id, effect.attempt, *_failure(error, "stt")))
            return
        self.hear(ev.Transcribed(effect.item_id, effect.attempt, heard.text))

    async def _guess(self, effect: ev.Guess) -> None:
        """A guess is a favour: what goes wrong with it is nobody's business."""
        text = None
        with suppress(AvbError):
            heard = await self._engines.transcribe(effect.pcm, self._session.settings, self._tenant, tentative=True)
            text = heard.text
        self.hear(ev.Guessed(effect.item_id, text))

    async def _converse(self, effect: ev.Converse) -> None:
        try:
            await self._conversation.answer(effect, self._session.settings, self.hear)
        except Exception as error:
            self.hear(ev.AskFailed(effect.turn_id, *_failure(error, "llm")))

    async def _synthesize(self, effect: ev.Synthesize) -> None:
        settings = self._session.settings
        rate = settings.output_format.rate
        outlet = audio.Outlet(rate)
        try:
            async with aclosing(
                self._engines.stream(effect.text, settings, self._tenant, deadline=ENGINE_SILENCE)
            ) as speech:
                async for piece in speech:
                    if piece.seconds > LONG_AUDIO:
                        pcm = await asyncio.to_thread(outlet.take, piece.pcm, piece.rate)
                    else:
                        pcm = outlet.take(piece.pcm, piece.rate)
                    if pcm:
                        self.hear(ev.Synthesized(effect.turn_id, effect.index, pcm, rate, more=True))
        except Exception as error:
            self.hear(ev.SynthesisFailed(effect.turn_id, effect.index, *_failure(error, "tts")))
            return
        # The work is done, so that the next piece of the same turn may take its place.
        if self._work is not None:
            self._work.pop(f"tts:{effect.turn_id}", None)
        self.hear(ev.Synthesized(effect.turn_id, effect.index, outlet.end(), rate))

    async def _meter(self, effect: ev.Meter) -> None:
        try:
            await self._books.meter(effect.key, effect.stt_seconds, effect.tts_seconds)
        except Exception as error:
            self.hear(ev.MeteringFailed(effect.key, *_failure(error, "store")))
            return
        self.hear(ev.Metered(effect.key))

    def _begin(self, name: str, work: Awaitable[None]) -> None:
        if self._work is None:
            self._work = {}
        task = self._work[name] = self._spawn(work)
        task.add_done_callback(lambda done: self._finished(name, done))

    def _finished(self, name: str, task: asyncio.Task[None]) -> None:
        if self._work is not None and self._work.get(name) is task:
            del self._work[name]
            self._work = self._work or None

    def _cancel(self, name: str) -> None:
        if self._work is not None and (task := self._work.pop(name, None)) is not None:
            task.cancel()

    # --- time ---------------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """See to it that the session hears of its deadline.

        Deadlines move with every message, and timers are dear: one that is armed stays, and rings early or for nothing
        now and then, rather than being moved each time.
        """
        deadline = self._session.deadline
        if deadline is None or (self._timer is not None and self._timer.when() <= deadline):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._timer = None
        deadline = self._session.deadline
        if deadline is not None and deadline <= self._loop.time():
            self.hear(ev.TimePassed())
        else:
            self._arm()

    def _hear_last(self) -> None:
        self._follow(self._session.receive(ev.Ended(), self._loop.time()))
        for task in list((self._work or {}).values()):
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._bus.hang_up(self._line)


def _failure(error: Exception, what: str) -> tuple[str, str]:
    """Code and message for the client; what we did not expect is logged by its kind, never by its words."""
    if isinstance(error, AvbError):
        return error.code, error.message
    if isinstance(error, TimeoutError):
        return f"{what}_timeout", f"There was no result within {ENGINE_SILENCE:.0f} s."
    log.error("unexpected failure of %s: %s", what, unexpected(error))
    return "internal_error", "Something went wrong on our side."
