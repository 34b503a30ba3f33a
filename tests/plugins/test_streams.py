"""Work for engines in a real Redis, and real workers, some of which are killed in the middle of it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from redis.asyncio import Redis

from agentvoicebox.config.errors import BadInput, RateLimited, Unavailable
from agentvoicebox.plugins.breaker import FAILURES
from agentvoicebox.plugins.pool import EngineSpec, Heard, Pool, Transcript, Utter, streams, wire
from agentvoicebox.plugins.pool.line import Crowded
from agentvoicebox.plugins.pool.streams import Streams
from agentvoicebox.plugins.pool.threads import Threads
from agentvoicebox.plugins.pool.worker import Worker

MADE = Path(__file__).parent / "made"
POISON, REFUSED, LIMITED = 13, 14, 15
FLITE = EngineSpec("tts", "agentvoicebox-tts-flite")
LEASE = 0.5
"""Of workers that are alone, so that nobody can take them for dead on a machine that stalls."""
LONG = 5.0
"""Of workers that have others beside them; what a dead one has left need not be waited for, see `left_behind`."""

WORKER = """
import asyncio, sys
from pathlib import Path
from agentvoicebox.plugins.pool import threads
from agentvoicebox.plugins.pool.threads import Threads
from agentvoicebox.plugins.pool.worker import Worker
threads._MEMORY = Path(sys.argv[3])  # where the files of those that are killed are removed with the test's
async def main():
    await Worker(sys.argv[1], Threads(4), lease=float(sys.argv[2])).run(lambda: print("ready", flush=True))
asyncio.run(main())
"""

NewNode = Callable[..., Awaitable[Streams]]
Start = Callable[..., Awaitable[Any]]


class Server:
    """A Redis of the tests' own, which keeps nothing on disk: stopped and started again, it has forgotten all."""

    def __init__(self, directory: str) -> None:
        self._socket = f"{directory}/r.sock"
        self.url = f"unix://{self._socket}"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", self._socket, "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL,
        )
        while True:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.connect(self._socket)
                return
            assert self._process.poll() is None, "redis-server did not start."
            time.sleep(0.01)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        os.unlink(self._socket)


class Stage:
    """What the engines of a test tell, and what they are allowed; see `made/made_engines.py`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ear = EngineSpec("stt", "made-ear", (("directory", str(directory)),))
        self.voice = EngineSpec("tts", "made-voice", (("directory", str(directory)),))

    def pids(self, what: str) -> list[int]:
        """The processes that told it."""
        return [int(path.name.rsplit("-", 1)[1]) for path in self.directory.glob(f"{what}-*")]

    async def told(self, what: str, count: int = 1) -> list[int]:
        """Wait until so many processes have told it."""
        await until(lambda: len(self.pids(what)) >= count)
        return self.pids(what)

    def allow(self, name: str) -> None:
        (self.directory / name).touch()


async def until(condition: Callable[[], Any]) -> None:
    """Returns when it holds."""
    async with asyncio.timeout(60):
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.01)


async def left_behind(redis: Redis, kind: str, pid: int) -> None:
    """What that worker holds has not been renewed for longer than any lease."""
    held = await redis.xpending_range(f"avb:{kind}", "workers", "-", "+", 100)
    for each in held:
        if f"-{pid}-" in each["consumer"].decode():
            which = (f"avb:{kind}", "workers", each["consumer"], 0, [each["message_id"]])
            await redis.xclaim(*which, idle=60_000, justid=True)


def number(of: int) -> Heard:
    return Heard(of.to_bytes(2, "little") + bytes(318), "en-US")


async def hear(node: Streams, spec: EngineSpec, of: int) -> tuple[int, int]:
    [found] = await node.transcribe(spec, [number(of)])
    assert isinstance(found, Transcript)
    heard, pid = found.text.split()
    return int(heard), int(pid)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="avb-redis-") as directory:  # a socket's path must be short
        made = Server(directory)
        yield made
        made.stop()


@pytest.fixture
async def redis(server: Server) -> AsyncIterator[Redis]:
    """To look into it, and to empty it."""
    made = Redis.from_url(server.url, protocol=2)
    await made.flushall()
    yield made
    await made.aclose()


@pytest.fixture
async def new_node(server: Server, redis: Redis) -> AsyncIterator[NewNode]:
    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> Streams:
            made = Streams(server.url, **options)
            stack.push_async_callback(made.close)
            return made

        yield make


@pytest.fixture
async def node(new_node: NewNode) -> Streams:
    return await new_node()


@pytest.fixture
async def start_process(server: Server, redis: Redis, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Start]:
    """Starts a worker in a process of its own, and returns it when it takes work."""
    made, files = [], tmp_path_factory.mktemp("files")

    async def start(lease: float = LONG) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", WORKER, server.url, str(lease), str(files)),
            env={**os.environ, "PYTHONPATH": str(MADE)},
            stdout=asyncio.subprocess.PIPE,
        )
        made.append(process)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in made:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@pytest.fixture
async def start_worker(server: Server, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Starts a worker in this process."""
    monkeypatch.setattr("agentvoicebox.plugins.pool.worker.BLOCK", 0.1)
    monkeypatch.syspath_prepend(str(MADE))
    async with AsyncExitStack() as stack:

        async def start(**options: Any) -> Worker:
            runner, ready = Threads(4), asyncio.Event()
            worker = Worker(server.url, runner, **{"lease": LEASE, **options})
            running = asyncio.create_task(worker.run(ready.set))

            async def end() -> None:
                worker.stop()
                await running
                await runner.close()

            stack.push_async_callback(end)
            await ready.wait()
            return worker

        yield start


async def test_a_real_engine_speaks_on_a_worker(node: Streams, start_worker: Start) -> None:
    await start_worker()
    pool = Pool(runner=node)
    speech = await pool.speak(FLITE, "It is noon.", "en-US", "rms", 1.0)
    assert (speech.rate, speech.engine) == (16_000, FLITE.plugin)
    assert speech.seconds > 0.5
    assert "rms" in [each.name for each in await pool.voices(FLITE)]
    pool.close()


async def test_each_node_has_its_answers(new_node: NewNode, start_worker: Start, stage: Stage, redis: Redis) -> None:
    await start_worker()
    stage.allow("all")
    nodes = [await new_node() for _ in range(2)]
    jobs = [hear(node, stage.ear, 100 * which + of) for which, node in enumerate(nodes) for of in range(20, 30)]
    found = await asyncio.gather(*jobs)
    assert [of for of, _ in found] == [*range(20, 30), *range(120, 130)]
    # Nothing that anybody has said is left.
    assert await redis.xlen("avb:stt") == 0
    for key in await redis.keys("avb:answers:*"):
        await until(lambda key=key: _empty(redis, key))


async def _empty(redis: Redis, key: bytes) -> bool:
    return bool(await redis.xlen(key) == 0)


async def test_errors_arrive_as_what_they_were(node: Streams, start_worker: Start, stage: Stage) -> None:
    await start_worker()
    stage.allow("all")
    fine, refused, limited = await node.transcribe(stage.ear, [number(1), number(REFUSED), number(LIMITED)])
    assert isinstance(fine, Transcript)
    assert isinstance(refused, BadInput)
    assert (refused.code, refused.message, refused.param) == ("unsupported_language", "Not this one.", "language")
    assert isinstance(limited, RateLimited)
    assert limited.retry_after == 7.5
    with pytest.raises(Unavailable, match="not installed") as caught:
        await node.load(EngineSpec("tts", "no-such-engine"))
    assert caught.value.code == "engine_missing"


async def test_as_many_places_as_the_workers_have_together(node: Streams, start_worker: Start, stage: Stage) -> None:
    await start_worker()
    loaded = await node.load(stage.ear)
    assert (loaded.parallel, loaded.batch, loaded.memory) == (4, 1, 0)
    await start_worker()
    await until(lambda: loaded.parallel == 8)


async def test_without_a_worker_it_is_said_how_to_start_one(new_node: NewNode, stage: Stage, redis: Redis) -> None:
    node = await new_node(patience=0.1)
    with pytest.raises(Unavailable, match="avb worker --kinds stt") as caught:
        await node.load(stage.ear)
    assert caught.value.code == "no_worker"
    await until(lambda: _empty(redis, b"avb:stt"))


async def test_a_killed_worker_costs_nobody_his_answer(
    node: Streams, start_process: Start, stage: Stage, redis: Redis
) -> None:
    workers = {process.pid: process for process in await asyncio.gather(start_process(), start_process())}
    jobs = [asyncio.create_task(hear(node, stage.ear, of)) for of in (1, 2, 3, 4)]
    victim = (await stage.told("begin-1"))[0]
    for of in (2, 3, 4):
        await stage.told(f"begin-{of}")
    dead = workers.pop(victim)
    dead.kill()
    await dead.wait()
    await left_behind(redis, "stt", victim)
    [other] = workers
    assert set(await stage.told("begin-1", 2)) == {victim, other}
    stage.allow("all")
    found = await asyncio.gather(*jobs)
    assert [of for of, _ in found] == [1, 2, 3, 4]
    assert {pid for _, pid in found} == {other}


async def test_killed_in_the_middle_of_a_stream_nothing_is_missing_or_said_twice(
    node: Streams, start_process: Start, stage: Stage
) -> None:
    first = await start_process(LEASE)
    async with aclosing(node.stream(stage.voice, Utter("one two Three four", "en-US"))) as parts:
        heard = [(await anext(parts)).pcm, (await anext(parts)).pcm]
        await stage.told("begin-2")
        first.kill()
        await start_process(LEASE)
        await stage.told("begin-2", 2)
        stage.allow("all")
        heard += [part.pcm async for part in parts]
    assert heard == [b"one ", b"two ", b"Three ", b"four"]


async def test_one_that_was_only_thought_dead_answers_to_nobody(
    node: Streams, start_process: Start, stage: Stage, redis: Redis
) -> None:
    workers = {process.pid: process for process in await asyncio.gather(start_process(), start_process())}
    async with aclosing(node.stream(stage.voice, Utter("one Two three", "en-US"))) as parts:
        heard = [(await anext(parts)).pcm]
        [asleep] = await stage.told("begin-1")
        workers[asleep].send_signal(signal.SIGSTOP)
        while psutil.Process(asleep).status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.001)
        await left_behind(redis, "tts", asleep)
        await stage.told("begin-1", 2)
        stage.allow("all")
        heard += [part.pcm async for part in parts]
    workers[asleep].send_signal(signal.SIGCONT)
    assert heard == [b"one ", b"Two ", b"three "]
    # It works on, among the others.
    found = await asyncio.gather(*(hear(node, stage.ear, of) for of in range(20, 40)))
    assert [of for of, _ in found] == list(range(20, 40))
    await until(lambda: _nothing_pending(redis, "avb:tts"))


async def _nothing_pending(redis: Redis, key: str) -> bool:
    return bool((await redis.xpending(key, "workers"))["pending"] == 0)


async def test_what_has_killed_three_workers_is_given_up(
    node: Streams, start_process: Start, stage: Stage, redis: Redis
) -> None:
    workers = await asyncio.gather(*(start_process() for _ in range(4)))
    asked = asyncio.create_task(node.transcribe(stage.ear, [number(POISON)]))
    buried: set[int] = set()
    for count in (1, 2, 3):
        for dead in set(await stage.told(f"begin-{POISON}", count)) - buried:
            await next(process for process in workers if process.pid == dead).wait()
            await left_behind(redis, "stt", dead)
            buried.add(dead)
    with pytest.raises(Unavailable) as caught:
        await asked
    assert caught.value.code == "job_given_up"
    assert len(stage.pids(f"begin-{POISON}")) == 3
    stage.allow("all")
    [alive] = {process.pid for process in workers} - set(stage.pids(f"begin-{POISON}"))
    assert await hear(node, stage.ear, 1) == (1, alive)


async def test_cancelled_before_it_was_begun_nobody_begins_it(
    new_node: NewNode, start_worker: Start, stage: Stage, redis: Redis
) -> None:
    node = await new_node(patience=60)
    job = asyncio.create_task(hear(node, stage.ear, 1))
    await until(lambda: redis.xlen("avb:stt"))
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    await until(lambda: _empty(redis, b"avb:stt"))
    await start_worker()
    stage.allow("all")
    assert (await hear(node, stage.ear, 2))[0] == 2
    assert stage.pids("begin-1") == []


async def test_cancelled_afterwards_the_engine_stops(
    node: Streams, start_worker: Start, stage: Stage, redis: Redis
) -> None:
    await start_worker()
    job = asyncio.create_task(hear(node, stage.ear, 1))
    await stage.told("begin-1")
    job.cancel()
    await stage.told("cancelled-1")
    async with aclosing(node.stream(stage.voice, Utter("one two Three", "en-US"))) as parts:
        await anext(parts)
        await stage.told("begin-2")
    await stage.told("cancelled-2")
    await until(lambda: _empty(redis, b"avb:tts"))


async def test_redis_forgets_all_and_all_is_answered(
    new_node: NewNode, start_worker: Start, stage: Stage, server: Server
) -> None:
    node = await new_node(patience=60)
    await start_worker()
    jobs = [asyncio.create_task(hear(node, stage.ear, of)) for of in (1, 2)]
    for of in (1, 2):
        await stage.told(f"begin-{of}")
    server.stop()
    refused = asyncio.create_task(hear(node, stage.ear, 3))
    with pytest.raises(Unavailable) as caught:
        await refused
    assert caught.value.code == "queue_unavailable"
    server.start()
    await stage.told("cancelled-1")
    stage.allow("all")
    assert [of for of, _ in await asyncio.gather(*jobs)] == [1, 2]
    assert (await hear(node, stage.ear, 4))[0] == 4


async def test_a_redis_that_has_not_heard_of_its_workers_yet_costs_nobody_his_answer(
    new_node: NewNode, start_worker: Start, stage: Stage, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was started anew: workers tell of themselves every second, which is too late for what is old."""
    clock = SimpleNamespace(now=1_000.0)
    monkeypatch.setattr(streams, "time", SimpleNamespace(monotonic=lambda: clock.now, time=time.time))
    node = await new_node(patience=0.1)
    await start_worker(lease=1_000.0)
    job = asyncio.create_task(hear(node, stage.ear, 1))
    await stage.told("begin-1")
    clock.now += 100
    await redis.zadd("avb:stt:workers", {"one that is always there": time.time() + 1_000})
    await until(lambda: node._there["stt"] == clock.now)
    await redis.delete("avb:stt:workers")
    await until(lambda: not node._workers["stt"])
    await asyncio.sleep(0.2)
    refused = job.done()
    stage.allow("all")
    assert not refused
    assert (await job)[0] == 1


async def test_a_worker_that_is_stopped_finishes_what_it_has_and_takes_no_more(
    new_node: NewNode, start_worker: Start, stage: Stage, redis: Redis
) -> None:
    node, hasty = await new_node(), await new_node(patience=0.1)
    worker = await start_worker(name="only")
    job = asyncio.create_task(hear(node, stage.ear, 1))
    await stage.told("begin-1")
    worker.stop()
    stage.allow("all")
    assert (await job)[0] == 1
    await until(lambda: _forgotten(redis))
    with pytest.raises(Unavailable) as caught:
        await hasty.load(stage.ear)
    assert caught.value.code == "no_worker"


async def _forgotten(redis: Redis) -> bool:
    return not await redis.xinfo_consumers("avb:stt", "workers")


async def test_workers_or_a_redis_that_start_anew_are_no_fault_of_the_engine(
    new_node: NewNode, start_worker: Start, stage: Stage
) -> None:
    node = await new_node(patience=0.05)
    pool = Pool(runner=node)
    for _ in range(FAILURES + 1):
        with pytest.raises(Crowded) as caught:
            await pool.transcribe(stage.ear, number(1).pcm16k, 16_000, "en-US")
        assert caught.value.code == "no_worker"
    await start_worker()
    stage.allow("all")
    assert (await pool.transcribe(stage.ear, number(1).pcm16k, 16_000, "en-US")).text.startswith("1 ")
    pool.close()
    away = Streams("unix:///no/such/socket")
    with pytest.raises(Crowded) as caught:
        await away.load(stage.ear)
    assert caught.value.code == "queue_unavailable"
    await away.close()


async def test_too_much_is_refused_rather_than_kept(new_node: NewNode, stage: Stage, redis: Redis) -> None:
    node = await new_node(most=2, patience=60)
    jobs = [asyncio.create_task(node.transcribe(stage.ear, [number(of)])) for of in (1, 2)]
    await until(lambda: _length(redis, 2))
    with pytest.raises(Crowded) as caught:
        await node.transcribe(stage.ear, [number(3)])
    assert caught.value.code == "queue_full"
    for job in jobs:
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=True)


async def _length(redis: Redis, count: int) -> bool:
    return bool(await redis.xlen("avb:stt") == count)


@pytest.mark.parametrize(
    ("by", "ask", "code"),
    [(-1.0, None, "engine_timeout"), (60.0, b"from another time", "engine_failed")],
)
async def test_what_is_late_or_unreadable_is_not_begun_and_answered(
    start_worker: Start, stage: Stage, redis: Redis, by: float, ask: bytes | None, code: str
) -> None:
    await start_worker()
    await redis.xadd("answers", {"first": ""})
    ask = ask or wire.encode(wire.Hear(stage.ear, [number(1)]))
    await redis.xadd("avb:stt", {"job": "j", "to": "answers", "by": time.time() + by, "ask": ask})
    [[_, [_, (_, fields)]]] = await _two(redis)
    failure = wire.read_answer(fields[b"answer"])
    assert isinstance(failure, wire.Failure)
    assert failure.code == code
    assert stage.pids("begin-1") == []
    assert await redis.xlen("avb:stt") == 0


async def _two(redis: Redis) -> Any:
    await until(lambda: _answered(redis))
    return await redis.xread({"answers": "0"})


async def _answered(redis: Redis) -> bool:
    return bool(await redis.xlen("answers") == 2)


async def test_a_model_lies_elsewhere_on_the_worker(new_node: NewNode, start_worker: Start, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (there / "ear").mkdir(parents=True)
    (there / "ear" / "all").touch()
    node = await new_node(models=here)
    await start_worker(models=there)
    spec = EngineSpec("stt", "made-ear", (("directory", str(here / "ear")),))
    assert await hear(node, spec, 5) == (5, os.getpid())
    assert list((there / "ear").glob("begin-5-*"))
    away = EngineSpec("stt", "made-ear", (("directory", f"{here}/../there"),))
    with pytest.raises(BadInput):
        await node.load(away)


async def test_an_engine_with_a_key_works_here_and_its_key_stays_here(node: Streams, redis: Redis) -> None:
    spec = EngineSpec("tts", FLITE.plugin, (("key", "a secret"), ("voice", "rms")))
    await node.load(spec)
    assert {part.rate async for part in node.stream(spec, Utter("It is noon.", "en-US"))} == {16_000}
    assert await node.voices(spec)
    assert await redis.keys("*") == []
    await node.unload(spec)


async def test_a_node_that_is_closed_leaves_nothing(
    server: Server, start_worker: Start, stage: Stage, redis: Redis
) -> None:
    node = Streams(server.url)
    await start_worker()
    job = asyncio.create_task(hear(node, stage.ear, 1))
    await stage.told("begin-1")
    await node.close()
    with pytest.raises(Crowded):
        await job
    await stage.told("cancelled-1")
    assert not await redis.keys("avb:answers:*")
    assert await redis.xlen("avb:stt") == 0


def test_an_address_that_is_none_is_told_without_its_password() -> None:
    with pytest.raises(BadInput) as caught:
        Streams("redis://:secret@host:port")
    assert "secret" not in caught.value.message


def test_engines_travel_as_what_they_are(tmp_path: Path) -> None:
    spec = EngineSpec(
        "stt", "x", (("model", str(tmp_path / "m" / "base")), ("other", "base"), ("many", (1, 2.5, (True, None))))
    )
    sent = wire.outgoing(spec, tmp_path / "m")
    assert dict(sent.config)["model"] == "models:base"
    asked = wire.read_ask(wire.encode(wire.Load(sent)))
    assert wire.incoming(asked.spec, tmp_path / "n") == EngineSpec(
        "stt", "x", (("model", str(tmp_path / "n" / "base")), ("other", "base"), ("many", (1, 2.5, (True, None))))
    )
    assert hash(wire.incoming(asked.spec, tmp_path))
    # The names of config.errors that nobody knows here are errors all the same.
    assert wire.Failure("Surprise", "surprise", "A surprise.").error().code == "surprise"
