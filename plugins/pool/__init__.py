"""Speech engines shared by all sessions of a process: loaded once for equal configuration, worked off the event loop.

The pool decides who is served when and by which engine: tenants take turns, engines that keep failing are left alone
and the next one of a tenant's order serves, and those used longest ago make room for others. The work itself is done by
a `Runner`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path

from agentvoicebox.config.errors import AvbError, BadInput, Unavailable
from agentvoicebox.plugins.breaker import Breaker
from agentvoicebox.plugins.pool.engine import at_rate, cancelled, expected, installed, when_cancelled
from agentvoicebox.plugins.pool.line import Crowded, Line, closing
from agentvoicebox.plugins.pool.memory import Memory
from agentvoicebox.plugins.pool.metrics import EngineMetrics, engine_of
from agentvoicebox.plugins.pool.runner import (
    RATE,
    EngineSpec,
    Heard,
    Loaded,
    Runner,
    Speech,
    Transcript,
    Utter,
    Voice,
)
from agentvoicebox.plugins.pool.threads import Threads
from agentvoicebox.plugins.spoken import Said, Spoken

__all__ = [
    "EngineMetrics",
    "EngineSpec",
    "Heard",
    "Loaded",
    "Pool",
    "Runner",
    "Speech",
    "Transcript",
    "Utter",
    "Voice",
    "cancelled",
    "when_cancelled",
]

MOST_LINES = 1_024
"""Engines that are remembered beyond those in use and in memory: how they failed, and what they hold when loaded."""

log = logging.getLogger(__name__)

Specs = EngineSpec | Sequence[EngineSpec]


class Pool:
    """The engines of one process. Cancelling a task that awaits one of its methods cancels the engine's work.

    `threads` is how many calls at once an engine does that can do any number of them; `memory` the bytes that engines
    may hold (half of the machine's by default); `spoken` what was said lately; `runner` what does the work, threads
    of this process by default. A runner that is given is closed by whoever made it, after the pool.

    All calls raise `AvbError`s: bad input as it is, and `Unavailable` with the codes `engine_missing`,
    `engine_failed`, `engine_timeout`, `engines_full` (no room in memory), `circuit_open` (it failed too often), `busy`
    (for tentative work) and `shutting_down`. Engines are given in the order in which they are tried; each but the
    last is given up early enough to leave the next ones their share of the time. What one engine refuses as bad input
    another may take (a language, a model), so that is raised only when no engine answers.
    """

    def __init__(
        self, threads: int = 0, *, memory: int = 0, spoken: Spoken | None = None, runner: Runner | None = None
    ) -> None:
        self._own = Threads(threads) if runner is None else None
        self._runner: Runner = self._own or runner  # type: ignore[assignment]
        self._spoken = spoken
        self._memory: Memory[EngineSpec] = Memory(memory or _half())
        self._lines: OrderedDict[EngineSpec, Line] = OrderedDict()
        self._metrics: dict[tuple[str, str, str], EngineMetrics] = {}
        self._rest = asyncio.Event()
        self._unloading: set[EngineSpec] = set()
        self._measuring = asyncio.Lock()
        self._trimming: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def load(self, spec: EngineSpec, *, pinned: bool = False) -> None:
        """Load an engine now rather than at its first use, however long it takes; a pinned one stays for good."""
        line = self._line(spec)
        if pinned:
            self._memory.pin(spec)
        await self._load(line)

    async def transcribe(
        self,
        specs: Specs,
        pcm: bytes,
        rate: int,
        language: str,
        *,
        tenant: str = "",
        deadline: float = 30.0,
        tentative: bool = False,
    ) -> Transcript:
        """What is said in 16-bit mono audio at `rate` Hz, within `deadline` seconds; `auto` finds the language.

        What is tentative gives way to all other work, and is refused (`busy`) where some waits.
        """
        if len(pcm) % 2:
            raise BadInput("16-bit audio has an even number of bytes: send whole samples.", code="audio_odd")
        if not math.isfinite(rate) or rate <= 0:
            raise BadInput("The sample rate of audio is a positive number of Hz.", code="audio_rate", param="rate")
        if not pcm:
            return Transcript("", None, 0.0)
        clock = asyncio.get_running_loop().time
        begin = clock()
        heard = Heard(pcm if rate == RATE else await asyncio.to_thread(at_rate, pcm, rate, RATE), language, tentative)
        failure: AvbError = _none()
        for spec, ends, last in _along(specs, begin + deadline):
            line = self._line(spec)
            try:
                with _counted(line, "", language):
                    line.give_way(heard)
                    async with self._call(line, ends, last, tentative=tentative):
                        found = await line.hear(heard, tenant, ends)
            except AvbError as error:
                failure = _worse(failure, error)
                if tentative and error.status >= 500:
                    raise
            else:
                line.metrics.answered("", clock() - begin, found.audio_seconds, confidence=found.confidence)
                return found
        raise failure

    async def speak(
        self,
        specs: Specs,
        text: str,
        language: str,
        voice: str = "auto",
        speed: float = 1.0,
        *,
        tenant: str = "",
        deadline: float = 30.0,
    ) -> Speech:
        """The whole of a text, said within `deadline` seconds.

        A voice that the engine does not have becomes its own choice; a text without a letter or digit is a moment of
        silence.
        """
        utter = _utter(text, language, voice, speed)
        async with aclosing(self._stream(specs, utter, tenant, deadline, None)) as stream:
            parts = [part async for part in stream]
        if not parts:
            return _SILENCE
        rate, engine = parts[0].rate, parts[0].engine
        return Speech(b"".join(at_rate(part.pcm, part.rate, rate) for part in parts), rate, engine)

    async def stream(
        self,
        specs: Specs,
        text: str,
        language: str,
        voice: str = "auto",
        speed: float = 1.0,
        *,
        tenant: str = "",
        deadline: float = 30.0,
    ) -> AsyncGenerator[Speech]:
        """The parts of what is said, the first one as early as the engine can; none later than `deadline` seconds
        after the call or the one before. Once it has begun to speak, no other engine goes on for one that fails.
        """
        utter = _utter(text, language, voice, speed)
        async with aclosing(self._stream(specs, utter, tenant, deadline, deadline)) as parts:
            async for part in parts:
                yield part

    async def voices(self, spec: EngineSpec) -> list[Voice]:
        """An engine's voices, as far as it tells."""
        # Past the breaker: that an engine can tell its voices says nothing of whether it can speak.
        async with self._held(self._line(spec), asyncio.get_running_loop().time() + _LISTING, last=True):
            return await self._runner.voices(spec)

    def metrics(self) -> list[EngineMetrics]:
        """What the engines have done since the start, and what they do now."""
        for each in self._metrics.values():
            each.waiting = each.working = each.loaded = each.memory = each.open = 0
        for spec, line in self._lines.items():
            each = line.metrics
            each.waiting += line.waiting
            each.working += line.working
            each.loaded += line.loaded is not None
            each.memory += self._memory.size(spec)
            each.open += line.breaker.state == "open"
        return list(self._metrics.values())

    def close(self) -> None:
        """Let the work at hand end, start no more, and forget all engines. May be called from another thread."""
        self._closed = True
        with suppress(RuntimeError):  # there is no loop any more
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._refuse)
        if self._own is not None:
            self._own.shutdown()

    def _refuse(self) -> None:
        for line in self._lines.values():
            line.close()
        self._rested()

    async def _stream(
        self, specs: Specs, utter: Utter, tenant: str, deadline: float, between: float | None
    ) -> AsyncGenerator[Speech]:
        if not any(map(str.isalnum, utter.text)):
            yield _SILENCE
            return
        clock = asyncio.get_running_loop().time
        failure: AvbError = _none()
        for spec, ends, last in _along(specs, clock() + deadline):
            line, heard, waited = self._line(spec), 0.0, 0.0
            asked = clock()
            try:
                with _counted(line, utter.voice, utter.language):
                    async with aclosing(self._say(line, utter, tenant, ends, between, last)) as parts:
                        async for part in parts:
                            heard += part.seconds
                            waited += clock() - asked
                            yield part
                            asked = clock()  # what the listener takes for itself is not the engine's
            except AvbError as error:
                if heard:
                    raise
                failure = _worse(failure, error)
            else:
                waited += clock() - asked
                line.metrics.answered(line.voice(utter.voice), waited, heard, len(utter.text))
                return
        raise failure

    async def _say(
        self, line: Line, utter: Utter, tenant: str, ends: float, between: float | None, last: bool
    ) -> AsyncGenerator[Speech]:
        """One engine's parts: those it has said of the same words to the same tenant, or else new ones."""
        said = Said(tenant, line.spec, utter.voice, utter.speed, utter.language, utter.text)
        kept = self._spoken.get(said) if self._spoken is not None else None
        for part in kept or ():
            yield part
        if kept is not None:
            return
        parts = []
        async with self._call(line, ends, last), aclosing(line.say(utter, tenant, ends, between)) as stream:
            async for part in stream:
                parts.append(part)
                yield part
        if self._spoken is not None:
            self._spoken.put(said, parts)

    @asynccontextmanager
    async def _call(self, line: Line, ends: float, last: bool, *, tentative: bool = False) -> AsyncIterator[None]:
        """While an engine is asked for something: it is loaded and stays so, and how it does is noted."""
        line.breaker.admit()
        try:
            async with self._held(line, ends, last):
                try:
                    yield
                except AvbError as error:
                    # Guesses have neither time nor second tries: that they fail is no sign of an ill engine.
                    if _fault(error) and not tentative:
                        line.breaker.failed()
                    raise
                line.breaker.succeeded()
        finally:
            line.breaker.undecided()

    @asynccontextmanager
    async def _held(self, line: Line, ends: float, last: bool) -> AsyncIterator[None]:
        """While it lasts an engine is loaded, and stays so."""
        line.users += 1
        self._memory.touch(line.spec)
        try:
            await self._ready(line, ends, last)
            yield
        finally:
            line.users -= 1
            self._rested()

    async def _ready(self, line: Line, ends: float, last: bool) -> None:
        if line.loaded is not None:
            return
        try:
            async with asyncio.timeout_at(ends):
                load = self._loading(line)
                if not last:
                    await asyncio.wait([load], timeout=ROOM)
                    if not load.done() and not line.starting:
                        raise _full(line.spec)
                await asyncio.shield(load)
        except TimeoutError:
            if line.starting:
                line.breaker.failed()
            raise Unavailable(
                f"The speech engine {line.spec.plugin} was not loaded in time: try again in a moment.",
                code="engine_timeout",
            ) from None

    async def _load(self, line: Line) -> None:
        if line.loaded is None:
            # One caller that leaves must not take the engine from the others that wait for the same load.
            await asyncio.shield(self._loading(line))

    def _loading(self, line: Line) -> asyncio.Task[None]:
        """What loads it."""
        if line.loading is None or line.loading.done():
            line.loading = asyncio.create_task(self._start(line))
            line.loading.add_done_callback(_looked_at)
        return line.loading

    async def _start(self, line: Line) -> None:
        size = line.size or await asyncio.to_thread(expected, line.spec)
        self._memory.check(line.spec, size)
        async with nullcontext() if size else self._alone():
            await self._room(size)
            await self._begin(line, size)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """For what nobody knows the size of: many at once would be too much before any of them is measured. Who loads
        for long, as from the network, does not keep the others for ever.
        """
        async with AsyncExitStack() as stack:
            with suppress(TimeoutError):
                async with asyncio.timeout(ALONE):
                    await stack.enter_async_context(self._measuring)
            yield

    async def _begin(self, line: Line, size: int) -> None:
        spec = line.spec
        self._memory.hold(spec, size)
        line.starting = True
        try:
            loaded = await self._runner.load(spec)
        except Exception as error:
            told = line.told(error)
            if _fault(told):
                line.breaker.failed()
            if told is error:
                raise
            raise told from error
        finally:
            line.starting = False
            self._memory.forget(spec)
            self._rested()
        try:
            self._memory.check(spec, loaded.memory)
        except AvbError:
            await self._runner.unload(spec)
            raise
        finally:
            line.size = loaded.memory
        self._memory.hold(spec, loaded.memory)
        line.loaded, line.breaker = loaded, Breaker()
        self._rested()

    async def _room(self, size: int) -> None:
        """Return when so many bytes more fit."""
        while not self._closed:
            # One after the other: what somebody else unloads is room already, only not yet.
            leaving = None if self._unloading else self._memory.leaving(size, self._busy)
            if leaving is None:
                await self._rest.wait()
            elif not leaving:
                return
            else:
                for spec in leaving:
                    await self._unload(spec)
        raise closing()

    def _busy(self, spec: EngineSpec) -> bool:
        return self._lines[spec].busy

    async def _unload(self, spec: EngineSpec) -> None:
        line = self._lines[spec]
        if line.busy or line.loaded is None:
            return
        line.loaded = None
        self._unloading.add(spec)
        try:
            await self._runner.unload(spec)
        except AvbError as error:
            log.warning("engine %s was not unloaded: %s", spec.plugin, error.code)
        finally:
            self._unloading.discard(spec)
            self._memory.forget(spec)
            self._rested()

    def _rested(self) -> None:
        """Something has come to rest: whoever waits for room looks again, and what is too much goes."""
        self._rest.set()
        self._rest = asyncio.Event()
        if self._memory.held > self._memory.most and (self._trimming is None or self._trimming.done()):
            self._trimming = asyncio.create_task(self._trim())

    async def _trim(self) -> None:
        with suppress(Unavailable):  # nothing is unloaded any more: the pool is closed
            await self._room(0)

    def _line(self, spec: EngineSpec) -> Line:
        if self._closed:
            raise closing()
        line = self._lines.get(spec)
        if line is None:
            self._loop = asyncio.get_running_loop()
            self._prune()
            key = engine_of(spec, self._metrics, installed(spec.kind))
            metrics = self._metrics.setdefault(key, EngineMetrics(*key))
            line = self._lines[spec] = Line(spec, self._runner, metrics, self._rested)
        self._lines.move_to_end(spec)
        return line

    def _prune(self) -> None:
        idle = (spec for spec, line in self._lines.items() if not line.busy and not self._memory.size(spec))
        for spec in list(islice(idle, max(0, len(self._lines) - MOST_LINES))):
            del self._lines[spec]


_SILENCE = Speech(bytes(3_200), RATE)

ROOM = 1.0
"""Seconds that a call waits for room in memory where another engine can be asked."""

ALONE = 10.0
"""Seconds that an engine of unknown size waits for another one to be loaded."""

_LISTING = 30.0
"""Seconds within which an engine has to be loaded when its voices are asked for."""


def _along(specs: Specs, until: float) -> Iterator[tuple[EngineSpec, float, bool]]:
    """The engines in their order, each with the end of its share of the time that is left; whether it is the last."""
    order = [specs] if isinstance(specs, EngineSpec) else specs
    clock = asyncio.get_running_loop().time
    for number, spec in enumerate(order):
        now = clock()
        yield spec, now + (until - now) / (len(order) - number), number == len(order) - 1


def _worse(known: AvbError, error: AvbError) -> AvbError:
    """Of two engines' errors the one that is told: what was wrong with the input, as trying again does not mend it."""
    return known if known.status < 500 else error


def _fault(error: AvbError) -> bool:
    """Whether an error says that its engine is ill."""
    return error.status >= 500 and not isinstance(error, Crowded)


def _looked_at(load: asyncio.Task[None]) -> None:
    """Whoever waited for it may have left: nobody else wants to know how it ended."""
    if not load.cancelled():
        load.exception()


@contextmanager
def _counted(line: Line, voice: str, language: str) -> Iterator[None]:
    """A call of an engine, however it ends."""
    try:
        yield
    except AvbError as error:
        line.metrics.failed(error.code)
        raise
    finally:
        line.metrics.asked(line.voice(voice), language)


def _utter(text: str, language: str, voice: str, speed: float) -> Utter:
    if not math.isfinite(speed) or speed <= 0:
        raise BadInput("The speed of a voice is a number, 0.5 to 2.0.", code="bad_speed", param="speed")
    return Utter(text, language, voice, speed)


def _full(spec: EngineSpec) -> Unavailable:
    return Crowded(
        f"There is no room for the speech engine {spec.plugin} while others are at work: try again in a moment.",
        code="engines_full",
    )


def _none() -> Unavailable:
    return Unavailable("No speech engine is chosen: name at least one.", code="engine_missing")


def _half() -> int:
    """Half of the memory that this process may use, in bytes."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # "max", or not Linux
        most = min(most, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return most // 2
