"""One connected session: the shell that carries frames, engine work, bus messages and time to and from `Session`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from agentvoicebox.bus_bridge import audio, native
from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.bus import Bus, Line
from agentvoicebox.bus_bridge.engines import Engines
from agentvoicebox.bus_bridge.models import SessionSettings
from agentvoicebox.bus_bridge.session import Out, Session
from agentvoicebox.bus_bridge.vad import STREAMS, VadStream
from agentvoicebox.bus_bridge.wire import WireError
from agentvoicebox.config.errors import AvbError

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

INLINE_AUDIO = 0.3
"""Seconds of audio whose speech detection is done on the spot; more goes to a thread, slice by slice."""

SLICE = 2.0
"""Seconds of audio in one such slice."""

MAX_OUTBOX = 16 * 1024 * 1024
"""Bytes waiting for a client that does not read, beyond which it is disconnected."""

SLOW_CONSUMER = 1013
NORMAL = 1000


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
        vad: str,
        receive: Receive,
        send: Send,
        write_frames: Callable[[list[str]], bool] | None,
        spawn: Callable[[Awaitable[None]], asyncio.Task[None]],
    ) -> None:
        self._session = session
        self._codec = codec
        self._line = line
        self._bus = bus
        self._engines = engines
        self._books = books
        self._vad_name = vad
        self._receive_message = receive
        self._send_message = send
        self._write_frames = write_frames
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._inlet: audio.Inlet | None = None
        self._vad: VadStream | None = None
        self._work: dict[str, asyncio.Task[None]] | None = None
        self._outbox: list[str] | None = None
        self._outbox_bytes = 0
        self._pressing = False
        self._flushing = False
        self._timer: asyncio.TimerHandle | None = None
        self._closing: tuple[int, str] | None = None
        line.tell = self._note
        line.settle = self._settle

    async def run(self) -> int:
        """Serve the client until it leaves, ends the session, or `close` is called."""
        self._bus.open(self._line)
        try:
            self._post(self._codec.opening(self._session.settings))
            await self._flush()
            while self._closing is None:
                message = await self._receive_message()
                if message["type"] == "websocket.disconnect":
                    return int(message.get("code") or NORMAL)
                frame = message.get("text")
                await self._take(frame if frame is not None else message.get("bytes") or b"")
                if self._pressing and not self._write():
                    await self._flush()
            return self._closing[0]
        finally:
            self._hear_last()

    def hear(self, event: ev.Event) -> None:
        """Something happened: let the session decide what follows, and do it."""
        self._note(event)
        self._settle()

    def _note(self, event: ev.Event) -> None:
        # "The answer has begun" waits for the next thing that happens: a frame by itself would cost a wake-up.
        waiting = bool(self._outbox)
        self._follow(self._session.receive(event, self._loop.time()))
        self._pressing = self._pressing or waiting

    def _settle(self) -> None:
        """Nothing more happens right now: send what there is to send, and set the timer."""
        self._arm()
        if self._pressing and not self._flushing and not self._write():
            self._spawn(self._flush())

    def close(self, code: int, reason: str, problem: ev.Problem | None = None) -> None:
        """End the connection from our side, after telling the client why."""
        if self._closing is not None:
            return
        if problem is not None:
            self._post([self._codec.problem(problem)])
        self._closing = (code, reason)
        self._spawn(self._flush())

    # --- in -----------------------------------------------------------------------------------------------------------

    async def _take(self, frame: str | bytes) -> None:
        try:
            wanted = self._codec.decode(frame, self._session.settings)
        except WireError as error:
            problem = ev.Problem(error.code, error.message, error.param, error.event_id)
            self._post([self._codec.problem(problem)])
            return
        for event in wanted:
            if isinstance(event, ev.AudioAppended):
                await self._listen(event.pcm)
            elif isinstance(event, native.Pinged):
                self._post([self._codec.pong()])  # type: ignore[attr-defined]
            elif isinstance(event, native.EndWanted):
                self._follow(self._session.receive(ev.Ended(), self._loop.time()))
                self._post(self._codec.closing())
                self._closing = (NORMAL, "")
            else:
                self.hear(event)

    async def _listen(self, pcm: bytes) -> None:
        settings = self._session.settings
        inlet = self._inlet
        if inlet is None or inlet.rate != settings.input_format.rate:
            inlet = self._inlet = audio.Inlet(settings.input_format.rate)
        if settings.turn_detection is None:
            self._vad = None
            if heard := inlet.take(pcm, 1):
                self.hear(ev.Heard(heard))
            return
        if self._vad is None:
            self._vad = STREAMS[self._vad_name]()
        if len(pcm) / 2 / inlet.rate <= INLINE_AUDIO:
            self._attend(*self._detect(inlet, self._vad, pcm))
            return
        size = int(inlet.rate * SLICE) * 2
        for i in range(0, len(pcm), size):
            self._attend(*await asyncio.to_thread(self._detect, inlet, self._vad, pcm[i : i + size]))
            await self._flush()

    @staticmethod
    def _detect(inlet: audio.Inlet, vad: VadStream, pcm: bytes) -> tuple[bytes, int, list[float]]:
        heard = inlet.take(pcm, vad.window)
        return heard, vad.window * 2, vad.probabilities(heard) if heard else []

    def _attend(self, heard: bytes, size: int, probabilities: list[float]) -> None:
        for i, speech in enumerate(probabilities):
            self.hear(ev.Heard(heard[i * size : (i + 1) * size], speech))

    # --- what follows -------------------------------------------------------------------------------------------------

    def _follow(self, out: list[Out]) -> None:
        for item in out:
            if isinstance(item, ev.Effect):
                self._do(item)
            else:
                self._tell(item)

    def _tell(self, told: ev.Told) -> None:
        settings = self._session.settings
        if isinstance(told, ev.ReplyAudio):
            rate = settings.output_format.rate
            for chunk in audio.chunks(audio.resample(told.pcm, told.rate, rate), rate):
                self._post(self._codec.encode(ev.ReplyAudio(told.turn_id, chunk, rate), settings))
            return
        self._post(self._codec.encode(told, settings), pressing=not isinstance(told, ev.ReplyStarted))

    def _do(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Transcribe():
                self._begin(f"stt:{effect.item_id}:{effect.attempt}", self._transcribe(effect))
            case ev.CancelTranscription():
                self._cancel(f"stt:{effect.item_id}:{effect.attempt}")
            case ev.Ask():
                self._bus.ask(self._line, effect.turn_id, effect.text, effect.language)
            case ev.Synthesize():
                self._begin(f"tts:{effect.turn_id}", self._synthesize(effect))
            case ev.CancelTurn():
                self._cancel(f"tts:{effect.turn_id}")
                self._bus.drop(effect.turn_id)
            case ev.PlaybackEnded():
                self._bus.playback_ended(self._line, effect.turn_id)
            case ev.Meter():
                self._spawn(self._meter(effect))  # never cancelled: what was used is used
            case ev.Record():
                self._books.record(effect.kind, dict(effect.content))

    async def _transcribe(self, effect: ev.Transcribe) -> None:
        try:
            text = await self._engines.transcribe(effect.pcm, effect.language)
        except AvbError as error:
            self.hear(ev.TranscriptionFailed(effect.item_id, effect.attempt, error.code, error.message))
            return
        self.hear(ev.Transcribed(effect.item_id, effect.attempt, text))

    async def _synthesize(self, effect: ev.Synthesize) -> None:
        try:
            speech = await self._engines.speak(effect.text, self._session.settings)
        except AvbError as error:
            self.hear(ev.SynthesisFailed(effect.turn_id, effect.index, error.code, error.message))
            return
        # The work is done, so that the next piece of the same turn may take its place.
        if self._work is not None:
            self._work.pop(f"tts:{effect.turn_id}", None)
        self.hear(ev.Synthesized(effect.turn_id, effect.index, speech.pcm, speech.rate))

    async def _meter(self, effect: ev.Meter) -> None:
        try:
            await self._books.meter(effect.key, effect.stt_seconds, effect.tts_seconds)
        except AvbError as error:
            self.hear(ev.MeteringFailed(effect.key, error.code, error.message))
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

    # --- out ----------------------------------------------------------------------------------------------------------

    def _post(self, frames: list[str], *, pressing: bool = True) -> None:
        if not frames or self._closing is not None:
            return
        self._pressing = self._pressing or pressing
        if self._outbox is None:
            self._outbox = []
        self._outbox.extend(frames)
        self._outbox_bytes += sum(len(frame) for frame in frames)
        if self._outbox_bytes > MAX_OUTBOX:
            log.warning("a client does not read what it is sent and was disconnected")
            self._outbox.clear()
            self.close(SLOW_CONSUMER, "slow consumer")

    def _write(self) -> bool:
        """Send what is waiting right now, if the server can do that and the client keeps up."""
        if self._write_frames is None or self._closing is not None or not self._write_frames(self._outbox or []):
            return False
        self._sent()
        return True

    def _sent(self) -> None:
        self._outbox = None
        self._outbox_bytes = 0
        self._pressing = False

    async def _flush(self) -> None:
        """Send what is waiting; one at a time, so that frames keep their order."""
        if self._flushing:
            return
        self._flushing = True
        try:
            while self._outbox:
                frames = self._outbox
                self._sent()
                for frame in frames:
                    await self._send_message({"type": "websocket.send", "text": frame})
            if self._closing is not None:
                code, reason = self._closing
                await self._send_message({"type": "websocket.close", "code": code, "reason": reason})
        except (OSError, RuntimeError):
            # The client has gone; `run` hears of it as a disconnect.
            if self._outbox is not None:
                self._outbox.clear()
        finally:
            self._flushing = False

    def _hear_last(self) -> None:
        self._follow(self._session.receive(ev.Ended(), self._loop.time()))
        for task in list((self._work or {}).values()):
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self._bus.hang_up(self._line)
