"""What waits for one engine, and what the engine does: jobs come in, have their turn, and are answered.

A `Line` starts work as soon as one of the engine's places is free, with as many waiting jobs as the engine takes at
once; a lone job never waits for company. A place is free again when the engine is at rest, which may be later than its
caller left.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeAlias

from agentvoicebox.config.errors import AvbError, Unavailable
from agentvoicebox.plugins.breaker import Breaker
from agentvoicebox.plugins.pool.metrics import OTHER, EngineMetrics
from agentvoicebox.plugins.pool.queue import Queue
from agentvoicebox.plugins.pool.runner import EngineSpec, Heard, Loaded, Runner, Speech, Transcript, Utter

log = logging.getLogger(__name__)

MOST_AUDIO = 256 * 1024**2
"""Bytes of one answer, an hour and a half of speech: an engine that never ends would fill the memory."""


class Crowded(Unavailable):
    """A call was not answered for reasons that say nothing of the engine: others were before it."""


class _Job:
    """Something to do for a tenant, until it is settled or its caller has gone."""

    def __init__(self, tenant: str, answered: int) -> None:
        self.tenant = tenant
        self.answered = answered
        """How much the engine had done when this came."""
        self.work: asyncio.Task[None] | None = None
        """What does it; None while it waits."""
        self.company: Sequence[_AnyJob] = ()
        """All that are done in one call, this one included."""
        self.gone = False


class _Hearing(_Job):
    def __init__(self, tenant: str, answered: int, heard: Heard) -> None:
        super().__init__(tenant, answered)
        self.heard = heard
        self.answer: asyncio.Future[Transcript] = asyncio.get_running_loop().create_future()

    def settle(self, answer: Transcript | AvbError) -> None:
        if self.gone or self.answer.done():
            return
        if isinstance(answer, AvbError):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)


class _Saying(_Job):
    def __init__(self, tenant: str, answered: int, utter: Utter) -> None:
        super().__init__(tenant, answered)
        self.utter = utter
        # Without bound: an engine must not be kept by who listens slowly, others wait for it. A text bounds its audio.
        self.parts: asyncio.Queue[Speech | AvbError | None] = asyncio.Queue()

    def settle(self, answer: AvbError | None) -> None:
        self.parts.put_nowait(answer)


_AnyJob: TypeAlias = _Hearing | _Saying


class Line:
    """One engine's. Whoever calls `hear` or `say` has seen to it that the engine is loaded and stays so."""

    def __init__(self, spec: EngineSpec, runner: Runner, metrics: EngineMetrics, rested: Callable[[], None]) -> None:
        self.spec = spec
        self.metrics = metrics
        self.breaker = Breaker()
        self.loaded: Loaded | None = None
        self.loading: asyncio.Task[None] | None = None
        self.starting = False
        """Whether the runner loads it at this moment, rather than waiting for room."""
        self.size = 0
        """Bytes it had when it was loaded last."""
        self.users = 0
        """Calls that are under way, loading included."""
        self.closed = False
        self._runner = runner
        self._rested = rested
        self._queue: Queue[_AnyJob] = Queue()
        self._works: dict[asyncio.Task[None], bool] = {}
        """What it does, and whether that is tentative."""
        self._answered = 0
        self._starting = False
        """Whether the places are looked at in the next round of the loop."""

    @property
    def busy(self) -> bool:
        """Whether somebody needs it, it is still at work for somebody who has left, or it is being loaded."""
        return bool(self.users or self._works or (self.loading and not self.loading.done()))

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._queue)

    @property
    def working(self) -> int:
        """Places of the engine that are taken."""
        return len(self._works)

    def voice(self, wanted: str) -> str:
        """What a voice is counted as: what the engine does not have is no label."""
        known = self.loaded.voices if self.loaded else ()
        return wanted if wanted in ("", "auto", *known) else OTHER

    async def hear(self, heard: Heard, tenant: str, ends: float) -> Transcript:
        """What is said in it, before the loop's clock shows `ends`. Raises `AvbError`."""
        self.give_way(heard)
        job = _Hearing(tenant, self._answered, heard)
        self._enter(job)
        try:
            async with asyncio.timeout_at(ends):
                return await job.answer
        except TimeoutError:
            raise self._late(job) from None
        finally:
            self._leave(job)

    async def say(self, utter: Utter, tenant: str, ends: float, between: float | None) -> AsyncGenerator[Speech]:
        """The parts of what is said, the first one before `ends`, each further one within `between` seconds of being
        asked for; None: all of them before `ends`. Raises `AvbError`.
        """
        job = _Saying(tenant, self._answered, utter)
        self._enter(job)
        try:
            while (part := await self._next(job, ends)) is not None:
                yield part
                if between is not None:
                    ends = asyncio.get_running_loop().time() + between
        finally:
            self._leave(job)

    def give_way(self, heard: Heard) -> None:
        """Raise `Unavailable` with the code `busy` if this is tentative, and anything else waits."""
        if heard.tentative and self._queue.certain:
            raise _busy(self.spec)

    def close(self) -> None:
        """Start nothing more, and tell all who wait."""
        self.closed = True
        while jobs := self._queue.take(1):
            jobs[0].settle(closing())

    def _enter(self, job: _AnyJob) -> None:
        if self.closed:
            raise closing()
        (self._queue.tentative if _tentative(job) else self._queue.certain).add(job.tenant, job)
        if not self._starting:
            # In the next round of the loop: those who were answered together ask again together, and so share a call.
            self._starting = True
            asyncio.get_running_loop().call_soon(self._start_soon)

    def _start_soon(self) -> None:
        self._starting = False
        self.start()
        if self._queue.certain:
            # What somebody may be about to say is old by the time that all these have been answered.
            while (guess := self._queue.tentative.next()) is not None:
                guess.settle(_busy(self.spec))

    def _leave(self, job: _AnyJob) -> None:
        """Its caller has its answer, or wants none."""
        job.gone = True
        if isinstance(job, _Hearing) and job.answer.done() and not job.answer.cancelled():
            job.answer.exception()  # looked at, in case that its caller left in the same moment
        if job.work is None:
            self._queue.certain.drop(job.tenant, job)
            self._queue.tentative.drop(job.tenant, job)
        elif not job.work.done() and all(each.gone for each in job.company):
            job.work.cancel()

    def _late(self, job: _AnyJob) -> Unavailable:
        # It is the engine's fault if it had the job, or has done nothing at all since the job came.
        fault = job.work is not None or self._answered == job.answered
        return (Unavailable if fault else Crowded)(
            f"The speech engine {self.spec.plugin} did not answer in time: try again, or choose another engine.",
            code="engine_timeout",
        )

    def start(self) -> None:
        """Give each free place of the engine the jobs whose turn it is."""
        while self.loaded and not self.closed and (jobs := self._turn(self.loaded)):
            work = asyncio.create_task(self._do(jobs))
            self._works[work] = _tentative(jobs[0])
            for job in jobs:
                job.work, job.company = work, jobs
            work.add_done_callback(partial(self._ended, jobs))

    def _turn(self, loaded: Loaded) -> list[_AnyJob]:
        """What a free place does next; nothing where none is free, or nothing waits for it.

        Free places share what waits: two that hear two each are done before one that hears all four.
        """
        free, waiting = loaded.parallel - len(self._works), len(self._queue.certain)
        if not waiting:
            waiting = len(self._queue.tentative)
            # One place of several never guesses: a whole utterance need not wait until guesses at others are made.
            free = min(free, max(1, loaded.parallel - 1) - sum(self._works.values()))
        return self._queue.take(min(loaded.batch, math.ceil(waiting / free))) if free > 0 else []

    async def _do(self, jobs: list[_AnyJob]) -> None:
        hearings = [job for job in jobs if isinstance(job, _Hearing)]
        if hearings:
            await self._hear(hearings)
        for job in jobs:
            if isinstance(job, _Saying):
                await self._say(job)

    async def _hear(self, jobs: list[_Hearing]) -> None:
        answers: Sequence[Transcript | AvbError]
        try:
            answers = await self._runner.transcribe(self.spec, [job.heard for job in jobs])
        except Exception as error:
            answers = [self.told(error)] * len(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            job.settle(answer)

    async def _say(self, job: _Saying) -> None:
        end, size = None, 0
        try:
            async with aclosing(self._runner.stream(self.spec, job.utter)) as parts:
                async for part in parts:
                    size += len(part.pcm)
                    if size > MOST_AUDIO:
                        raise OverflowError("speech without end")
                    if part.pcm:
                        job.parts.put_nowait(part)
        except Exception as error:
            end = self.told(error)
        job.settle(end)

    def told(self, error: Exception) -> AvbError:
        """Any failure of a runner, as callers are told."""
        if isinstance(error, AvbError):
            return error
        log.warning("engine %s failed: %s", self.spec.plugin, type(error).__name__)
        return Unavailable(
            f"The speech engine {self.spec.plugin} failed ({type(error).__name__}): try again, or choose another one.",
            code="engine_failed",
        )

    def _ended(self, jobs: list[_AnyJob], work: asyncio.Task[None]) -> None:
        del self._works[work]
        self._answered += 1
        if work.cancelled():  # because nobody waits any more, or because the threads end
            for job in jobs:
                job.settle(closing())
        self.start()
        self._rested()

    async def _next(self, job: _Saying, ends: float) -> Speech | None:
        try:
            async with asyncio.timeout_at(ends):
                part = await job.parts.get()
        except TimeoutError:
            raise self._late(job) from None
        if isinstance(part, AvbError):
            raise part
        return part


def _tentative(job: _AnyJob) -> bool:
    return isinstance(job, _Hearing) and job.heard.tentative


def closing() -> Unavailable:
    """What callers are told when the pool is closed."""
    return Crowded("The speech engines are shutting down: try again in a moment.", code="shutting_down")


def _busy(spec: EngineSpec) -> Unavailable:
    return Crowded(
        f"The speech engine {spec.plugin} has no time for tentative transcripts: wait for the final one.", code="busy"
    )
