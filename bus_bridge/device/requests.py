"""What the node does when a device asks for something: listens, speaks, answers, tells.

What a request uses is in the ledger before its end is told, once, by an id that belongs to the request.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Protocol

import msgspec

from agentvoicebox.bus_bridge import about
from agentvoicebox.bus_bridge.answers import Answers, Who
from agentvoicebox.bus_bridge.device import house, reports
from agentvoicebox.bus_bridge.device.hearing import Hearing
from agentvoicebox.bus_bridge.device.house import Manner
from agentvoicebox.bus_bridge.device.protocol import Request
from agentvoicebox.bus_bridge.engines import CLOUD, Engines
from agentvoicebox.bus_bridge.models import BYTES_PER_SECOND
from agentvoicebox.bus_bridge.session import ENGINE_SILENCE
from agentvoicebox.bus_bridge.talk import Talk
from agentvoicebox.bus_bridge.turns import sentences
from agentvoicebox.bus_bridge.vad import STREAMS, VadStream
from agentvoicebox.config.errors import AvbError, BadInput, unexpected
from agentvoicebox.plugins.device import wire
from agentvoicebox.plugins.pool import Transcript
from agentvoicebox.tenancy import devices
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.limits import Budget
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import Metric, Persona

log = logging.getLogger(__name__)

LONGEST_TEXT = 8_000
"""Characters that are spoken, or asked, at once."""

MOST_MESSAGES = 200

CHUNK = 0.1
"""Seconds of audio in one frame: what else the socket carries goes in between."""

ENOUGH = 1024 * 1024
"""Bytes that wait for a device before its engine waits too."""

PACE = (10.0, 100.0)
"""Questions a second, and at once, with which one device may go to the store; whoever has more waits."""

SILENT = 30.0
"""Seconds after which a device that sends neither audio nor the end of it is not waited for any longer."""

PATIENCE: dict[type[wire.Said], float] = {
    **{wire.Listen: 180.0, wire.Speak: 600.0, wire.Ask: 120.0},
    **{wire.About: 10.0, wire.Choose: 10.0, wire.Report: 15.0},
}
"""Seconds that a request may take in all."""

_INLINE = 0.3
"""Seconds of audio whose speech detection is done on the spot; more goes to a thread ..."""
_SLICE = 2.0
"""... so much at once."""


class Told(Protocol):
    """Where the answer to one request goes."""

    def tell(self, *said: wire.Said) -> None:
        """Send these, unless nobody wants them any more."""
        ...

    def play(self, frames: Sequence[bytes]) -> None:
        """Send frames of audio."""
        ...

    async def room(self, most: int) -> None:
        """Wait until no more than `most` bytes wait for the device."""
        ...


@dataclass(frozen=True, slots=True)
class Desk:
    """What the node has to serve devices with."""

    database: Database
    engines: Engines
    answers: Answers
    ledger: Ledger
    vad: str


@dataclass(slots=True, eq=False)
class Station:
    """One device that is connected here, with all its sockets."""

    tenant_id: uuid.UUID
    device_id: uuid.UUID
    project_id: uuid.UUID | None
    talk: Talk
    manner: Manner
    pace: Budget = field(default_factory=lambda: Budget(*PACE))


class _Message(msgspec.Struct, forbid_unknown_fields=False):
    """One of a conversation that a device brings along."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, msgspec.Meta(max_length=wire.LARGEST_FRAME)]


_Messages = Annotated[list[_Message], msgspec.Meta(min_length=1, max_length=MOST_MESSAGES)]


@dataclass(slots=True, eq=False)
class Work:
    """One request of a device's, being done. `key` names it for good, among all requests of all devices."""

    desk: Desk
    station: Station
    told: Told
    key: str

    async def do(self, asked: Request) -> None:
        """Do what is asked, and tell the end of it: also when it goes wrong."""
        try:
            async with asyncio.timeout(PATIENCE[type(asked)]):
                if isinstance(asked, wire.About | wire.Choose | wire.Report):
                    await asyncio.sleep(self.station.pace.spend(asyncio.get_running_loop().time()))
                match asked:
                    case wire.Speak():
                        await self._speak(asked)
                    case wire.Ask():
                        await self._ask(asked)
                    case wire.About():
                        await self._about(asked)
                    case wire.Choose():
                        await self._choose(asked)
                    case wire.Report():
                        await self._report(asked)
        except Exception as error:
            self.told.tell(problem(asked.id, error))

    async def _speak(self, asked: wire.Speak) -> None:
        text = _checked(asked.text)
        settings = house.speaking(self.station.manner.settings, asked.language, self.desk.engines.settings.languages)
        if asked.voice and any(each.name == asked.voice for each in await self.desk.engines.voices()):
            settings = dataclasses.replace(settings, voice=asked.voice)
        rate, used = 0, 0.0
        try:
            for piece in sentences(text, settings.language):
                stream = self.desk.engines.stream(piece, settings, self.station.tenant_id, deadline=ENGINE_SILENCE)
                async with aclosing(stream) as speech:
                    async for part in speech:
                        used += part.seconds
                        if part.rate != rate:
                            rate = part.rate
                            self.told.tell(wire.Sound(asked.id, rate))
                        size = int(rate * CHUNK) * 2
                        pcm = part.pcm
                        self.told.play([wire.audio(asked.id, pcm[i : i + size]) for i in range(0, len(pcm), size)])
                        await self.told.room(ENOUGH)
        finally:
            await self.meter("tts", Metric.TTS_AUDIO_SECONDS, used)
        self.told.tell(wire.Done(asked.id))

    async def _ask(self, asked: wire.Ask) -> None:
        station, answers = self.station, self.desk.answers
        spoken = house.speaking(station.manner.settings, asked.language, self.desk.engines.settings.languages).language
        who = Who(station.tenant_id, station.project_id, None, self.key, spoken)
        said = ""
        try:
            if asked.messages is None:
                deltas = answers.answer_turn(who, station.talk, _checked(asked.text))
            else:
                messages = _read(asked.messages)
                deltas = answers.stream(who, await answers.answering(who, station.talk), messages)
            async with aclosing(deltas):
                async for delta in deltas:
                    if delta.text:
                        said += delta.text
                        self.told.tell(wire.Text(asked.id, delta.text))
        finally:
            if asked.messages is None:  # also of an answer that broke off: so far it was heard
                station.talk.note(asked.text, said)
        self.told.tell(wire.Done(asked.id))

    async def _about(self, asked: wire.About) -> None:
        station, choices = self.station, self.station.manner.choices
        found = await about.tell(
            self.desk.database,
            self.desk.answers,
            station.tenant_id,
            station.project_id,
            None,
            choices.persona,
            choices.language,
            asked.skill,
        )
        self.told.tell(wire.Told(asked.id, found))

    async def _choose(self, asked: wire.Choose) -> None:
        station, answers = self.station, self.desk.answers
        persona: Persona | None
        if asked.persona:
            language = station.manner.choices.language
            persona = await answers.heard(station.tenant_id, asked.persona[:200], language)
            station.talk.persona = persona.id
        else:
            persona = await answers.persona(station.tenant_id, station.project_id)
            station.talk.persona = None
        station.talk.on_switch(persona)
        self.told.tell(wire.Told(asked.id, {"persona": station.manner.choices.persona}))

    async def _report(self, asked: wire.Report) -> None:
        if len(asked.events) > wire.MOST_EVENTS:
            raise BadInput(f"One report has at most {wire.MOST_EVENTS} events.", code="too_many_events", param="events")
        station = self.station
        events, bad = reports.read(asked.events)
        if bad:
            log.warning("%d events that device %s reports make no sense and are passed over", bad, station.device_id)
        if events:
            await devices.record(self.desk.database, station.tenant_id, station.device_id, events)
        self.told.tell(wire.Done(asked.id))

    async def meter(self, part: str, metric: Metric, seconds: float) -> None:
        """Return once the ledger holds it; being cancelled takes nothing back. Raises `Unavailable`."""
        if seconds > 0:
            station = self.station
            used = Usage(
                f"{self.key}:{part}",
                station.tenant_id,
                metric,
                seconds,
                datetime.now(UTC),
                project_id=station.project_id,
            )
            await self.desk.ledger.record([used])


class Listening:
    """A request to listen, while its audio comes.

    When somebody has spoken and pauses, what there is so far is recognised on suspicion that it is all. That counts if
    nobody has spoken since when the device says that it was; else the whole is recognised then.
    """

    def __init__(self, work: Work, asked: wire.Listen) -> None:
        self._work = work
        self._asked = asked
        desk = work.desk
        self._vad: VadStream = STREAMS[desk.vad]()
        self._hearing = Hearing(self._vad.window, partials=asked.partials)
        self._settings = house.speaking(work.station.manner.settings, asked.language, desk.engines.settings.languages)
        # Who is paid for every second that it hears is asked once.
        self._hasty = self._settings.stt[0] not in (*CLOUD, *CLOUD.values())
        self._news = asyncio.Event()
        self._finished = False
        self._early: asyncio.Task[Transcript] | None = None
        self._pause = 0
        """The pause at which that began."""
        self._guess: asyncio.Task[Transcript] | None = None
        self._told_partials = False

    def hear(self, pcm: bytes) -> None:
        """More audio."""
        self._hearing.audio += pcm
        self._news.set()

    def finish(self) -> None:
        """That was all of it."""
        self._finished = True
        self._news.set()

    async def do(self) -> None:
        """Listen until the end, and tell what was understood."""
        number, told = self._asked.id, self._work.told
        metered = False
        try:
            async with asyncio.timeout(PATIENCE[wire.Listen]):
                await self._attend()
                heard = await self._understand()
            metered = True
            await self._meter()
            told.tell(
                wire.Transcript(number, heard.text.strip(), heard.language, heard.confidence, engine=heard.engine)
            )
        except Exception as error:
            told.tell(problem(number, error))
        finally:
            self._drop(self._guess)
            self._drop(self._early)
            if self._told_partials and not metered:  # who has read what was said so far has had it recognised
                with suppress(AvbError):
                    await self._meter()

    async def _meter(self) -> None:
        await self._work.meter("stt", Metric.STT_AUDIO_SECONDS, self._hearing.seconds)

    async def _attend(self) -> None:
        """Follow what is said until there is no more."""
        while not self._finished:
            async with asyncio.timeout(SILENT):
                await self._news.wait()
            self._news.clear()
            while not self._finished and (windows := self._hearing.fresh(_SLICE)):
                await self._judge(windows)
                self._follow()

    async def _judge(self, windows: bytes) -> None:
        if len(windows) <= _INLINE * BYTES_PER_SECOND:
            self._hearing.judge(self._vad.probabilities(windows))
        else:
            self._hearing.judge(await asyncio.to_thread(self._vad.probabilities, windows))

    def _follow(self) -> None:
        """Begin what is worth beginning now, and end what is in vain."""
        hearing = self._hearing
        if hearing.pause != self._pause:
            self._drop(self._early)
            self._early = None
        if not hearing.pause:
            if hearing.partials is not None and hearing.partials.due(hearing.spoken):
                self._guess = self._recognise(tentative=True)
                self._guess.add_done_callback(self._guessed)
        elif self._early is None and self._hasty:
            self._pause = hearing.pause
            self._early = self._recognise()

    def _recognise(self, *, tentative: bool = False) -> asyncio.Task[Transcript]:
        desk, pcm = self._work.desk, bytes(self._hearing.audio)
        return asyncio.create_task(
            desk.engines.transcribe(
                pcm, self._settings, self._work.station.tenant_id, tentative=tentative, deadline=ENGINE_SILENCE
            )
        )

    def _guessed(self, guess: asyncio.Task[Transcript]) -> None:
        """A guess is a favour: what goes wrong with it is nobody's business."""
        if guess.cancelled() or self._finished:
            return
        text = None if guess.exception() is not None else guess.result().text
        if certain := self._hearing.guessed(text):
            self._told_partials = True
            self._work.told.tell(wire.Partial(self._asked.id, certain))

    async def _understand(self) -> Transcript:
        self._drop(self._guess)
        if self._early is not None:
            while windows := self._hearing.fresh(_SLICE):
                await self._judge(windows)
            if rest := self._hearing.rest():
                await self._judge(rest)
            if self._hearing.pause == self._pause:
                with suppress(AvbError):
                    return await self._early
            self._drop(self._early)
        return await self._recognise_all()

    async def _recognise_all(self) -> Transcript:
        self._early = self._recognise()
        return await self._early

    @staticmethod
    def _drop(task: asyncio.Task[Transcript] | None) -> None:
        if task is not None:
            task.cancel()
            task.add_done_callback(_looked_at)


def problem(number: int, error: Exception) -> wire.Problem:
    """What a device is told of it; what we did not expect is logged by its kind, never by its words."""
    if isinstance(error, AvbError):
        return wire.Problem(number, error.code, error.message)
    if isinstance(error, TimeoutError):
        return wire.Problem(number, "timeout", "This took too long, and was given up.")
    log.error("a device's request failed unexpectedly: %s", unexpected(error))
    return wire.Problem(number, "internal_error", "Something went wrong on our side.")


def _checked(text: str) -> str:
    if not text.strip():
        raise BadInput("There is no text.", param="text")
    if len(text) > LONGEST_TEXT:
        raise BadInput(f"A text has at most {LONGEST_TEXT} characters.", code="text_too_long", param="text")
    return text


def _read(messages: list[Any]) -> list[dict[str, Any]]:
    try:
        found = msgspec.convert(messages, _Messages)
    except msgspec.ValidationError as error:
        raise BadInput(f"messages: {error}.", param="messages") from error
    if found[-1].role != "user":
        raise BadInput("The last of the messages must be what the user said.", param="messages")
    return [{"role": each.role, "content": each.content} for each in found]


def _looked_at(task: asyncio.Task[Transcript]) -> None:
    if not task.cancelled():
        task.exception()
