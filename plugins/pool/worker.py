"""Who does the work that nodes put into Redis Streams; `streams` says how."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from redis.exceptions import ResponseError

from agentvoicebox.config.errors import AvbError, Unavailable
from agentvoicebox.config.tasks import begin, end
from agentvoicebox.plugins.pool import Pool, entries, wire
from agentvoicebox.plugins.pool.entries import AGAIN, AWAY, BLOCK, GROUP, KINDS, stream
from agentvoicebox.plugins.pool.runner import RATE, EngineSpec, Heard, Loaded, Runner, Transcript

T = TypeVar("T")

LEASE = 5.0
"""Seconds after which a claim that was not renewed is somebody else's."""
DELIVERIES = 3
"""Workers that may fail to bring the same work to an end."""

_WORK = 120.0
"""Seconds for an utterance, or between two parts of speech; nodes wait shorter."""
_FORGOTTEN = 3_600.0
"""Seconds after which the group forgets a worker that was killed."""
_MOST_UNREAD = 10_000
"""Answers that may wait for one node."""

# Say that a worker is there, and renew its claims; returns those that are not its own any more.
_RENEW = """
redis.call('ZADD', KEYS[2], redis.call('TIME')[1], ARGV[2])
local lost = {}
for i = 3, #ARGV do
    local held = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1)
    if held[1] and held[1][2] == ARGV[2] then
        redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
    else
        lost[#lost + 1] = ARGV[i]
    end
end
return lost
"""

log = logging.getLogger(__name__)


class Worker:
    """Takes work out of Redis Streams and has it done by a runner, through a pool of its own.

    It takes no more at once than its engines can do, and tells nobody but Redis where it is. `name` must be its own.
    The runner is closed by whoever made it.
    """

    def __init__(
        self,
        url: str,
        runner: Runner,
        *,
        name: str = "",
        kinds: Sequence[str] = KINDS,
        models: Path | None = None,
        memory: int = 0,
        lease: float = LEASE,
    ) -> None:
        self.name = name or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._redis = entries.connected(url)
        self._renew = self._redis.register_script(_RENEW)
        self._runner, self._models, self._lease = runner, models, lease
        self._pool = Pool(memory=memory, runner=runner)
        self._hands = {kind: _Hand() for kind in kinds}
        self._loaded: dict[EngineSpec, Loaded] = {}
        self._stopping = asyncio.Event()
        self._away = self._ended = False

    async def run(self, ready: Callable[[], None]) -> None:
        """Work until `stop` is called, and bring to an end what is at hand then; `ready` is called when it begins.

        Raises `Unavailable` when Redis does not answer at first; later on it is waited for.
        """
        try:
            for kind in self._hands:
                await self._join(kind)
        except AWAY as error:
            await entries.disconnect(self._redis)
            raise Unavailable(
                f"Redis does not answer ({type(error).__name__}): start it, or name another one with --redis.",
                code="queue_unavailable",
            ) from error
        renewing = begin(self._renewing(), "claims")
        ready()
        try:
            await asyncio.gather(*map(self._take, self._hands))
            while works := [work for hand in self._hands.values() for work in hand.works.values()]:
                await asyncio.wait(works)
        finally:
            self._ended = True
            await end(renewing)
            await self._leave()

    def stop(self) -> None:
        """Take no more work."""
        self._stopping.set()
        for hand in self._hands.values():
            hand.changed.set()

    async def _join(self, kind: str) -> None:
        try:
            await self._redis.xgroup_create(stream(kind), GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        await self._renewed(kind)

    async def _renewed(self, kind: str) -> list[bytes]:
        """Say that this worker is there, and renew its claims; returns those that it has lost."""
        names = [stream(kind), entries.present(kind)]
        lost: list[bytes] = await self._renew(names, [GROUP, self.name, *self._hands[kind].works])
        return lost

    async def _leave(self) -> None:
        self._pool.close()
        for kind in self._hands:
            with suppress(*AWAY):
                await self._redis.zrem(entries.present(kind), self.name)
                await self._forget(kind, lambda each: each["name"] == self.name.encode())
        await entries.disconnect(self._redis)

    # --- taking -------------------------------------------------------------------------------------------------------

    async def _take(self, kind: str) -> None:
        """Take new work whenever there is a place for it."""
        hand = self._hands[kind]
        while not self._stopping.is_set():
            if not hand.free:
                hand.changed.clear()
                await hand.changed.wait()
                continue
            try:
                found = await self._redis.xreadgroup(
                    GROUP, self.name, {stream(kind): ">"}, count=hand.free, block=int(BLOCK * 1000)
                )
            except AWAY as error:
                await self._regain(kind, error)
                continue
            self._away = False
            for entry, fields in entries.entries(found):
                self._begin(kind, entry, self._do(kind, entry, fields))

    async def _regain(self, kind: str, error: Exception) -> None:
        """Wait a moment for Redis; where it has forgotten the group, make it again."""
        with suppress(*AWAY):
            if isinstance(error, ResponseError):
                await self._join(kind)
                return
        if not self._away:
            log.warning("Redis does not answer (%s): waiting for it.", type(error).__name__)
        self._away = True
        await asyncio.sleep(AGAIN)

    def _begin(self, kind: str, entry: bytes, work: Coroutine[Any, Any, None]) -> None:
        hand = self._hands[kind]
        task = hand.works[entry] = asyncio.create_task(work)

        def ended(_: asyncio.Task[None]) -> None:
            del hand.works[entry]
            hand.changed.set()
            if not task.cancelled() and (error := task.exception()):
                log.error("speech work was not answered: %s", type(error).__name__)

        task.add_done_callback(ended)

    async def _renewing(self) -> None:
        """Keep the claims on what is at hand, and take over what others have left."""
        rounds = 0
        while not self._ended:  # which is looked at, as redis-py sometimes takes a cancellation for its own time-out
            await asyncio.sleep(self._lease / 5)
            rounds += 1
            for kind, hand in self._hands.items():
                try:
                    for lost in await self._renewed(kind):
                        # It was taken over, or nobody waits for it any more.
                        if lost in hand.works:
                            hand.works[lost].cancel()
                    if hand.free and not self._stopping.is_set():
                        await self._take_over(kind, hand.free)
                    if rounds % 300 == 1:
                        await self._forget(kind, lambda each: each["idle"] > _FORGOTTEN * 1000)
                except ResponseError:  # it has forgotten all, so what is at hand is begun anew elsewhere
                    for work in hand.works.values():
                        work.cancel()
                except AWAY:
                    pass  # whoever takes work says so
                except Exception:
                    log.exception("speech claims not renewed")

    async def _take_over(self, kind: str, free: int) -> None:
        idle = int(self._lease * 1000)
        left = await self._redis.xpending_range(stream(kind), GROUP, "-", "+", free, idle=idle)
        for each in left:
            if each["message_id"] in self._hands[kind].works:
                continue
            # Only one of all workers that try gets it.
            claimed = await self._redis.xclaim(stream(kind), GROUP, self.name, idle, [each["message_id"]])
            for entry, fields in claimed:
                log.warning("A worker has left work behind: it goes on here.")
                given_up = each["times_delivered"] >= DELIVERIES
                self._begin(kind, entry, (self._give_up if given_up else self._do)(kind, entry, fields))

    async def _forget(self, kind: str, gone: Callable[[dict[str, Any]], bool]) -> None:
        """Have the group forget workers; not those that have left work behind, which would be forgotten with them."""
        for each in await self._redis.xinfo_consumers(stream(kind), GROUP):
            if gone(each) and not each["pending"]:
                await self._redis.xgroup_delconsumer(stream(kind), GROUP, each["name"])

    # --- doing --------------------------------------------------------------------------------------------------------

    async def _do(self, kind: str, entry: bytes, fields: dict[bytes, bytes]) -> None:
        """Do one piece of work, and answer."""
        last: wire.Answer = wire.Done()
        try:
            if time.time() > float(fields[b"by"]):
                raise Unavailable("No speech worker had time for this: start more of them.", code="engine_timeout")
            async with aclosing(self._answers(wire.read_ask(fields[b"ask"]))) as answers:
                async for last in answers:
                    if isinstance(last, wire.Part):
                        await self._persist(partial(self._say, fields, last))
        except AvbError as error:
            last = wire.Failure.of(error)
        except wire.Unreadable:
            last = wire.Failure.of(
                Unavailable(f"The speech worker {self.name} has another version: update it.", code="engine_failed")
            )
        except _Unheard:
            pass  # and so is the end of it
        except Exception as error:
            log.error("speech work failed: %s", type(error).__name__)
            last = wire.Failure.of(Unavailable("The speech worker failed: see its log.", code="engine_failed"))
        await self._persist(partial(self._finish, kind, entry, fields, last))

    async def _give_up(self, kind: str, entry: bytes, fields: dict[bytes, bytes]) -> None:
        error = Unavailable(
            f"{DELIVERIES} speech workers have died of this: choose another engine.", code="job_given_up"
        )
        await self._persist(partial(self._finish, kind, entry, fields, wire.Failure.of(error)))

    async def _answers(self, ask: wire.Ask) -> AsyncGenerator[wire.Answer]:
        spec = wire.incoming(ask.spec, self._models)
        loaded = await self._learn(spec)
        if isinstance(ask, wire.Load):
            yield wire.Ready(loaded)
        elif isinstance(ask, wire.Hear):
            yield wire.Understood(list(await asyncio.gather(*(self._hear(spec, heard) for heard in ask.jobs))))
        elif isinstance(ask, wire.ListVoices):
            yield wire.Voices(await self._pool.voices(spec))
        elif isinstance(ask, wire.Say):
            said, count = ask.utter, 0
            parts = self._pool.stream(spec, said.text, said.language, said.voice, said.speed, deadline=_WORK)
            async with aclosing(parts):
                async for speech in parts:
                    yield wire.Part(count, speech)
                    count += 1
            yield wire.Done(count)

    async def _learn(self, spec: EngineSpec) -> Loaded:
        """Load an engine if it is not, and find out how much it does at once: so much work is taken for it."""
        if spec not in self._loaded:
            await self._pool.load(spec)
            self._loaded[spec] = loaded = await self._runner.load(spec)
            hand = self._hands[spec.kind]
            hand.places = max(hand.places, loaded.parallel * loaded.batch)
            hand.changed.set()
        return self._loaded[spec]

    async def _hear(self, spec: EngineSpec, heard: Heard) -> Transcript | wire.Failure:
        try:
            return await self._pool.transcribe(
                spec, heard.pcm16k, RATE, heard.language, deadline=_WORK, tentative=heard.tentative
            )
        except AvbError as error:
            return wire.Failure.of(error)

    async def _say(self, fields: dict[bytes, bytes], part: wire.Part) -> None:
        if await _answer(self._redis, fields, part) is None:
            raise _Unheard

    async def _finish(self, kind: str, entry: bytes, fields: dict[bytes, bytes], last: wire.Answer) -> None:
        async with self._redis.pipeline(transaction=True) as pipe:
            _answer(pipe, fields, last)
            pipe.xack(stream(kind), GROUP, entry)
            pipe.xdel(stream(kind), entry)
            await pipe.execute()

    async def _persist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call until Redis answers. What it has forgotten meanwhile ends this work by its claim."""
        while True:
            try:
                return await call()
            except ResponseError:
                raise
            except AWAY:
                await asyncio.sleep(AGAIN)


class _Hand:
    """What a worker does of one kind."""

    def __init__(self) -> None:
        self.places = max(2, os.cpu_count() or 2)
        self.works: dict[bytes, asyncio.Task[None]] = {}
        self.changed = asyncio.Event()

    @property
    def free(self) -> int:
        return max(0, self.places - len(self.works))


class _Unheard(Exception):
    """There is nobody to whom the answer could be given."""


def _answer(redis: Any, fields: dict[bytes, bytes], answer: wire.Answer) -> Any:
    """Answer a node, if it is still there."""
    return redis.xadd(
        fields[b"to"].decode(),
        {"job": fields[b"job"], "answer": wire.encode(answer)},
        maxlen=_MOST_UNREAD,
        approximate=True,
        nomkstream=True,
    )
