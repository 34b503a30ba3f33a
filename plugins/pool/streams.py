"""Engines on other machines: nodes put work into Redis Streams, and workers (`avb worker`) take it out.

There is one stream for ears and one for voices (`avb:stt`, `avb:tts`), each read by all workers as one consumer group,
and one for the answers to each node. A worker holds a claim on what it works on, and renews it all the time. What
nobody has renewed for some seconds is taken over by another worker; what three workers have not brought to an end is
given up. An answer goes out in the same transaction in which the work is removed. Should two workers have done the
same, as when one was thought dead, the node takes each part of the answer once, by its number.

To cancel, a node removes the work: who works on it finds his claim gone. Work that no worker has begun within a minute
is not begun any more. Utterances lie in Redis for as long as they wait, so it must be as trusted as the nodes are.
Engines whose configuration holds a key work on the node itself: they are services elsewhere, and no secret lies in
Redis. One Redis serves (with replicas and Sentinel, if you like), not a sharded one: transactions span its keys.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from agentvoicebox.config.errors import AvbError, Unavailable
from agentvoicebox.config.tasks import begin, end
from agentvoicebox.plugins.pool import entries, wire
from agentvoicebox.plugins.pool.entries import AGAIN, AWAY, BEGIN, BLOCK, GROUP, KINDS, SEEN, present, stream
from agentvoicebox.plugins.pool.line import Crowded, closing
from agentvoicebox.plugins.pool.runner import (
    EngineSpec,
    Heard,
    Loaded,
    Runner,
    Speech,
    Transcript,
    Utter,
    Voice,
    elsewhere,
)
from agentvoicebox.plugins.pool.threads import Threads

PATIENCE = 2.0
"""Seconds that work waits for a worker where there is none."""
MOST = 1_000
"""Pieces of work that may wait in a stream: more is refused, so that Redis does not fill with what nobody will hear."""

_UNREAD = 60
"""Seconds after which the answers to a node that has died are removed."""
_TOUCH = 10.0

# Add work, unless too much waits.
_PUT = """
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then return false end
return redis.call('XADD', KEYS[1], '*', unpack(ARGV, 2))
"""

# Count who was heard of lately; whoever was not is forgotten.
_COUNT = """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', redis.call('TIME')[1] - ARGV[1])
return redis.call('ZCARD', KEYS[1])
"""

log = logging.getLogger(__name__)


class Streams:
    """A `Runner`. What it needs of Redis it begins at its first use, and begins again after Redis was away.

    `models` is this node's directory of models, which the workers have elsewhere. Beyond what engines raise, calls
    raise `Unavailable` with the codes `no_worker`, `queue_full`, `queue_unavailable` (Redis does not answer) and
    `job_given_up` (three workers have died of it).
    """

    def __init__(self, url: str, *, models: Path | None = None, patience: float = PATIENCE, most: int = MOST) -> None:
        self._redis = entries.connected(url)
        self._models, self._patience, self._most = models, patience, most
        self._put = self._redis.register_script(_PUT)
        self._counted = self._redis.register_script(_COUNT)
        self._answers_at = f"avb:answers:{uuid.uuid4().hex}"
        self._jobs: dict[str, _Job] = {}
        """What has no last answer yet."""
        self._workers = dict.fromkeys(KINDS, 0)
        self._there = dict.fromkeys(KINDS, 0.0)
        """When there was a worker last."""
        self._here: Runner | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def load(self, spec: EngineSpec) -> Loaded:
        """Have a worker load an engine, to see that one can; the others load it when it is their turn."""
        if elsewhere(spec):
            return await self._local().load(spec)
        answer = await self._only(wire.Load(wire.outgoing(spec, self._models)))
        if not isinstance(answer, wire.Ready):
            raise _nonsense(spec)
        with suppress(*AWAY):
            await self._count()
        return _Shared(answer.loaded, lambda: self._workers[spec.kind])

    async def unload(self, spec: EngineSpec) -> None:
        """Nothing: it takes no memory here, and each worker sees to its own."""
        if elsewhere(spec):
            await self._local().unload(spec)

    async def transcribe(self, spec: EngineSpec, jobs: list[Heard]) -> list[Transcript | AvbError]:
        """What each of the jobs says, in their order."""
        if elsewhere(spec):
            return await self._local().transcribe(spec, jobs)
        answer = await self._only(wire.Hear(wire.outgoing(spec, self._models), jobs))
        if not isinstance(answer, wire.Understood):
            raise _nonsense(spec)
        return [each.error() if isinstance(each, wire.Failure) else each for each in answer.answers]

    async def stream(self, spec: EngineSpec, utter: Utter) -> AsyncGenerator[Speech]:
        """The parts of what is said, as they come."""
        if elsewhere(spec):
            async with aclosing(self._local().stream(spec, utter)) as parts:
                async for part in parts:
                    yield part
            return
        async with aclosing(self._ask(wire.Say(wire.outgoing(spec, self._models), utter))) as answers:
            async for answer in answers:
                if isinstance(answer, wire.Part):
                    yield answer.speech

    async def voices(self, spec: EngineSpec) -> list[Voice]:
        """The engine's voices."""
        if elsewhere(spec):
            return await self._local().voices(spec)
        answer = await self._only(wire.ListVoices(wire.outgoing(spec, self._models)))
        if not isinstance(answer, wire.Voices):
            raise _nonsense(spec)
        return answer.voices

    async def close(self) -> None:
        """Let nobody work for this node any more, and leave nothing of it in Redis."""
        self._closed = True
        left = list(self._jobs.values())
        self._jobs.clear()
        for job in left:
            job.answers.put_nowait(wire.Failure.of(closing()))
            self._spawn(self._withdraw(job))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await end(*self._loops)
        with suppress(*AWAY):
            await self._redis.delete(self._answers_at)
        await entries.disconnect(self._redis)
        if self._here is not None:
            await self._here.close()

    def _local(self) -> Runner:
        """Where engines with a secret work."""
        if self._here is None:
            self._here = Threads()
        return self._here

    # --- one piece of work --------------------------------------------------------------------------------------------

    async def _only(self, ask: wire.Ask) -> wire.Answer:
        async with aclosing(self._ask(ask)) as answers:
            async for answer in answers:
                return answer
        raise _nonsense(ask.spec)

    async def _ask(self, ask: wire.Ask) -> AsyncGenerator[wire.Answer]:
        """What a worker answers; the last one is anything but a `Part`. Raises `AvbError`."""
        if self._closed:
            raise closing()
        if not self._loops:
            self._loops = [begin(self._listen(), "speech answers"), begin(self._watch(), "speech workers")]
        job = _Job(ask)
        job.adding = asyncio.create_task(self._add(job))
        self._jobs[job.id] = job
        try:
            await asyncio.shield(job.adding)
            while True:
                answer = await job.answers.get()
                if isinstance(answer, wire.Failure):
                    raise answer.error()
                yield answer
                if not isinstance(answer, wire.Part):
                    return
        finally:
            if self._jobs.pop(job.id, None):
                self._spawn(self._withdraw(job))

    async def _add(self, job: _Job) -> None:
        """Put work into its stream. Raises `Unavailable`."""
        given = {"job": job.id, "to": self._answers_at, "by": job.begin_by, "ask": job.data}
        try:
            fields = [each for pair in given.items() for each in pair]
            entry = await self._put([stream(job.kind)], [self._most, *fields])
        except AWAY as error:
            raise Crowded(
                "Speech workers cannot be reached, for Redis does not answer: start it, or set AVB_SPEECH=threads.",
                code="queue_unavailable",
            ) from error
        if entry is None:
            raise Crowded("Too much waits for speech workers: start more of them with `avb worker`.", code="queue_full")
        job.entry = entry

    async def _withdraw(self, job: _Job) -> None:
        """Have nobody begin it, or go on with it."""
        if job.adding is not None:
            await asyncio.wait([job.adding])
            if not job.adding.cancelled():
                job.adding.exception()
        if job.entry is not None:
            with suppress(*AWAY):
                async with self._redis.pipeline(transaction=True) as pipe:
                    pipe.xack(stream(job.kind), GROUP, job.entry)
                    pipe.xdel(stream(job.kind), job.entry)
                    await pipe.execute()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- all answers --------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        """Hand over what workers answer. After Redis was away, see to it that all work is there again."""
        last, touched, away = "0", 0.0, True
        while not self._closed:  # which is looked at, as redis-py sometimes takes a cancellation for its own time-out
            try:
                if away or time.monotonic() - touched > _TOUCH:
                    touched = time.monotonic()
                    if not await self._redis.expire(self._answers_at, _UNREAD):
                        away, last = True, await self._make()
                block = None if away else int(BLOCK * 1000)
                found = entries.entries(await self._redis.xread({self._answers_at: last}, count=100, block=block))
                for entry, fields in found:
                    self._hear(fields)
                    last = entry.decode()
                if found:
                    # What has arrived is nobody's business any more.
                    await self._redis.xtrim(self._answers_at, minid=_after(last), approximate=False)
                elif away:
                    await self._restore()
                    away = False
            except AWAY as error:
                if not away:
                    log.warning("Redis is away, and with it the speech workers: %s", type(error).__name__)
                away = True
                await asyncio.sleep(AGAIN)

    async def _make(self) -> str:
        """Make the stream of answers, which workers do not, as the node may have gone. Returns where to go on."""
        made = await self._redis.xadd(self._answers_at, {"job": "", "answer": ""})
        await self._redis.expire(self._answers_at, _UNREAD)
        return str(made.decode())

    async def _restore(self) -> None:
        """Put work that waits for an answer into Redis again, if it has forgotten it."""
        for job in list(self._jobs.values()):
            if job.entry is None or await self._redis.xrange(stream(job.kind), job.entry, job.entry):
                continue
            job.again = True
            with suppress(AvbError):
                await self._add(job)

    def _hear(self, fields: dict[bytes, bytes]) -> None:
        job = self._jobs.get(fields[b"job"].decode())
        if job is None:  # it has its answer, or nobody wants one
            return
        try:
            answer = wire.read_answer(fields[b"answer"])
        except wire.Unreadable:
            answer = wire.Failure.of(
                Unavailable("A speech worker has another version: update it.", code="engine_failed")
            )
        if isinstance(answer, wire.Part):
            if answer.number < job.parts:
                return
            job.parts += 1
        if isinstance(answer, wire.Part | wire.Done) and job.missing(answer):
            answer = wire.Failure.of(Unavailable("Parts of what was said are lost: try again.", code="engine_failed"))
        job.answers.put_nowait(answer)
        if not isinstance(answer, wire.Part):
            del self._jobs[job.id]
            if job.again:  # the first may have been answered, and the second still wait
                self._spawn(self._withdraw(job))

    async def _watch(self) -> None:
        """Refuse what waits where there is no worker, rather than keep it waiting."""
        while not self._closed:
            await asyncio.sleep(self._patience / 2)
            now = time.monotonic()
            try:
                await self._count()
            except AWAY:
                # When it is back, it has to hear of its workers first.
                self._there = dict.fromkeys(KINDS, now)
                continue
            for job in list(self._jobs.values()):
                missed = now - max(job.asked, self._there[job.kind])
                if not self._workers[job.kind] and not job.parts and missed > self._patience:
                    del self._jobs[job.id]
                    self._spawn(self._withdraw(job))
                    job.answers.put_nowait(wire.Failure.of(_no_worker(job.kind)))

    async def _count(self) -> None:
        """Find out how many workers there are."""
        for kind in KINDS:
            self._workers[kind] = await self._counted([present(kind)], [SEEN])
            if self._workers[kind]:
                self._there[kind] = time.monotonic()


class _Job:
    """Something to do, and what has come of it so far."""

    def __init__(self, ask: wire.Ask) -> None:
        self.id = uuid.uuid4().hex
        self.kind = ask.spec.kind
        self.data = wire.encode(ask)
        self.begin_by = time.time() + BEGIN
        self.asked = time.monotonic()
        self.adding: asyncio.Task[None] | None = None
        self.entry: bytes | None = None
        self.again = False
        """Whether it was put into Redis more than once."""
        self.parts = 0
        self.answers: asyncio.Queue[wire.Answer] = asyncio.Queue()

    def missing(self, answer: wire.Part | wire.Done) -> bool:
        """Whether something is missing before this."""
        return self.parts < (answer.number + 1 if isinstance(answer, wire.Part) else answer.parts)


class _Shared(Loaded):
    """An engine of all workers: the more there are, the more it does at once."""

    def __init__(self, one: Loaded, workers: Callable[[], int]) -> None:
        # Its memory is theirs, and what one of them does in one call is for it to decide.
        for name, value in (("memory", 0), ("batch", 1), ("voices", one.voices), ("_one", one), ("_workers", workers)):
            object.__setattr__(self, name, value)

    @property
    def parallel(self) -> int:
        one: Loaded = self._one  # type: ignore[attr-defined]
        workers: int = self._workers()  # type: ignore[attr-defined]
        return max(1, workers) * one.parallel * one.batch


def _after(entry: str) -> str:
    """The id that may follow directly."""
    stamp, _, number = entry.partition("-")
    return f"{stamp}-{int(number) + 1}"


def _no_worker(kind: str) -> Unavailable:
    return Crowded(  # a worker that is started anew is no fault of the engine
        f"No speech worker is there for {kind}: start one with `avb worker --kinds {kind}`, on this Redis.",
        code="no_worker",
    )


def _nonsense(spec: EngineSpec) -> Unavailable:
    return Unavailable(f"What came back from the speech engine {spec.plugin} is no answer.", code="engine_failed")
