"""One turn, measured: what the bridge adds, how fast a spoken one is answered, what sessions and the stack weigh.

    ./run bench turn            prints one JSON object per line

Everything runs against a real `avb up` in a process of its own with the offline engines. CPU is that of the node
process, from the operating system's own accounting; idle work (polling, canaries) is measured first and taken off.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from websockets.asyncio.client import connect

sys.path.insert(0, str(Path(__file__).parent))

from parts.node import Node, cpu
from parts.ovos import spoken
from parts.reports import percentile, report, tell

from agentvoicebox.bus_bridge import client

TURNS = 300
SPOKEN = 30
BUSY = 8
SESSIONS = 1000
TENANTS = 3
"""Among whom the sessions are shared: a plan has at most 500 at once."""
QUESTION = "what time is it"
SENTENCES = ("what time is it", "what day is it", "who am i talking to", "what is your name", "hello world")


class Admitted(Node):
    """A node with some tenants, and a key of each."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.keys: list[str] = []

    @property
    def key(self) -> str:
        return self.keys[0]

    def admit_all(self) -> None:
        self.keys = [self.admit(f"bench-{n}", "--voice", "slt") for n in range(TENANTS)]


class Direct:
    """A client straight on the cell's bus: the floor."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._session = f"bench:{uuid.uuid4().hex}"

    async def turn(self) -> float:
        """Seconds from utterance in to `speak` out."""
        nonce = uuid.uuid4().hex
        context = {
            "bench": nonce,
            "source": "bench",
            "destination": ["skills"],
            "session": {"session_id": self._session, "lang": "en-US", "blacklisted_skills": []},
        }
        data = {"utterances": [QUESTION], "lang": "en-US"}
        begin = time.perf_counter()
        await self._socket.send(json.dumps({"type": "recognizer_loop:utterance", "data": data, "context": context}))
        spoke = 0.0
        while True:
            message = json.loads(await self._socket.recv())
            if message["context"].get("bench") != nonce:
                continue
            if message["type"] == "speak":
                spoke = time.perf_counter() - begin
            elif message["type"] == "ovos.utterance.handled":
                return spoke


async def bridged_turn(session: client.Client) -> float:
    """Seconds from `response.create` to the first `response.delta`, which is the `speak`."""
    message = {"type": "response.create", "messages": [{"role": "user", "content": QUESTION}]}
    begin = time.perf_counter()
    await session.socket.send(json.dumps(message))
    spoke = 0.0
    while True:
        told = json.loads(await session.socket.recv())
        if told["type"] == "response.delta":
            spoke = time.perf_counter() - begin
        elif told["type"] == "response.done":
            return spoke


ECHO = """
import asyncio, socket, sys, uvicorn, uvloop
async def app(scope, receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] != "websocket.disconnect":
        await send({"type": "websocket.send", "text": message["text"]})
listening = socket.create_server(("127.0.0.1", 0))
listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
print(listening.getsockname()[1], flush=True)
config = uvicorn.Config(app, ws="websockets-sansio", ws_per_message_deflate=False, lifespan="off", log_config=None)
uvloop.run(uvicorn.Server(config).serve(sockets=[listening]))
"""


class Echo:
    """The floor: a bare uvicorn that sends back what it hears."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = f"ws://127.0.0.1:{self._process.stdout.readline().strip()}"

    def cpu(self) -> float:
        return cpu(self._process.pid)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


async def busy_turns(node: Admitted, idle: float) -> float:
    """Milliseconds of CPU of a turn while several sessions speak at once and the node is never cold."""
    async with AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(client.session(node.url, node.key, {"modality": "text"}))
            for _ in range(BUSY)
        ]
        for session in sessions:
            for _ in range(2):
                await session.socket.recv()
        before, begin = node.cpu(), time.perf_counter()

        async def speak(session: client.Client) -> None:
            for _ in range(TURNS // BUSY):
                await bridged_turn(session)

        await asyncio.gather(*(speak(session) for session in sessions))
        used = node.cpu() - before - idle * (time.perf_counter() - begin)
    return used * 1000 / (TURNS // BUSY * BUSY)


async def text_turns(node: Admitted) -> None:
    tell(f"{TURNS} text turns through the bridge, {TURNS} straight on the bus, {TURNS} bare echoes, in turn")
    echo = Echo()
    async with (
        connect(node.bus_url(), compression=None, max_size=None, proxy=None) as socket,
        connect(echo.url, compression=None, proxy=None) as bare,
        client.session(node.url, node.key, {"modality": "text"}) as session,
    ):
        for _ in range(2):
            await session.socket.recv()
        direct = Direct(socket)
        for _ in range(20):
            await direct.turn()
            await bridged_turn(session)
        idle_cpu, idle_begin = node.cpu(), time.perf_counter()
        await asyncio.sleep(5)
        idle = (node.cpu() - idle_cpu) / (time.perf_counter() - idle_begin)
        floor: list[float] = []
        bridged: list[float] = []
        cpu = seconds = echoes = 0.0
        for _ in range(10):
            floor += [await direct.turn() for _ in range(TURNS // 10)]
            before, begin = node.cpu(), time.perf_counter()
            bridged += [await bridged_turn(session) for _ in range(TURNS // 10)]
            cpu += node.cpu() - before
            pause = (time.perf_counter() - begin) / (TURNS // 10)
            seconds += time.perf_counter() - begin
            before = echo.cpu()
            for _ in range(TURNS // 10):
                await bare.send("x" * 200)
                await bare.recv()
                await asyncio.sleep(pause)
            echoes += echo.cpu() - before
    echo.stop()
    busy = await busy_turns(node, idle)
    added = (statistics.median(bridged) - statistics.median(floor)) * 1000
    report(
        "bridge.added_latency_p50",
        added,
        "ms",
        3.0,
        "the same turn straight on the bus",
        bridged_p50_ms=round(statistics.median(bridged) * 1000, 2),
        direct_p50_ms=round(statistics.median(floor) * 1000, 2),
        turns=len(bridged),
    )
    per_turn, per_echo = (cpu - idle * seconds) * 1000 / len(bridged), echoes * 1000 / len(bridged)
    report(
        "bridge.cpu_per_turn",
        per_turn,
        "ms",
        0.6,
        "a turn without a bridge; floor: the process is woken three times, as by three bare echoes at the same rhythm",
        bare_echo_ms=round(per_echo, 3),
        echoes_per_turn=round(per_turn / per_echo, 2),
        busy_ms=round(busy, 3),
        busy_sessions=BUSY,
        idle_cpu_percent=round(idle * 100, 2),
        turns=len(bridged),
    )


async def spoken_turns(node: Admitted) -> None:
    tell(f"{SPOKEN} spoken turns, in real time")
    size = int(16_000 * client.FRAME) * 2
    first: list[float] = []
    splits: list[dict[str, float]] = []
    async with client.session(node.url, node.key, {"input_rate": 16000}) as session:
        questions = [spoken(sentence) for sentence in SENTENCES]
        for number in range(SPOKEN + 3):
            pcm = questions[number % len(questions)]
            # `say` sends frame n at begin + n x FRAME: that is when the user stopped speaking.
            begin = time.monotonic()
            answer = await session.say(pcm, 16_000)
            assert answer.error is None, answer.error
            assert answer.first_audio_at is not None
            ended = begin + (len(pcm) // size) * client.FRAME
            if number >= 3:
                first.append((answer.first_audio_at - ended) * 1000)
                splits.append(answer.timings_ms)
            await asyncio.sleep(0.3)
    split = {
        stage: round(statistics.median(timings.get(stage, 0.0) for timings in splits), 1)
        for stage in ("vad", "stt", "core", "tts", "first_audio")
    }
    lag = round(statistics.median(first) - split["first_audio"], 1)
    detail = {"turns": len(first), "split_p50_ms": split | {"vad_lag_and_transport": lag}, "hangover_ms": 200}
    against = "true end of speech to first audio byte at the client"
    report("turn.first_audio_p50", statistics.median(first), "ms", 600, against, **detail)
    report("turn.first_audio_p95", percentile(first, 0.95), "ms", 800, against, **detail)


@asynccontextmanager
async def idle_sessions(node: Admitted, count: int) -> AsyncIterator[None]:
    sockets = []
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        for n in range(count):
            headers = {"Authorization": f"Bearer {node.keys[n % TENANTS]}"}
            made = (await http.post(f"{node.url}/api/v2/sessions", json={}, headers=headers)).json()
            socket = await connect(made["ws_url"], additional_headers=headers, compression=None, proxy=None)
            await socket.recv()
            await socket.recv()
            sockets.append(socket)
    yield
    await asyncio.gather(*(socket.close() for socket in sockets))


def resident(pid: int) -> float:
    """Kilobytes a process holds for itself, and its share of what it shares."""
    return psutil.Process(pid).memory_full_info().pss / 1024


async def idle_memory(node: Admitted) -> None:
    tell(f"{SESSIONS} idle sessions")
    # The first ones also warm up what all share: pools, caches, the allocator's arenas.
    async with idle_sessions(node, 100):
        before = resident(node.pid)
        async with idle_sessions(node, SESSIONS):
            after = resident(node.pid)
    report(
        "node.memory_per_idle_session",
        (after - before) / SESSIONS,
        "KB",
        40,
        "the node with 100 sessions connected",
        sessions=SESSIONS,
    )


def stack_memory(node: Admitted) -> None:
    members = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    rows: dict[str, float] = {}
    shared_twice = 0.0
    for member in members:
        shared_twice += member.memory_info().rss / 1024 / 1024
        words = " ".join(member.cmdline()) or member.name()
        name = next(
            (known for known in ("postgres", "messagebus", "core") if known in words),
            "node" if member.pid == node.pid else words,
        )
        rows[name] = rows.get(name, 0.0) + resident(member.pid) / 1024
    report(
        "stack.resident",
        sum(rows.values()),
        "MB",
        500,
        "all processes of avb up, proportional set size",
        processes={name: round(size, 1) for name, size in rows.items()},
        sum_of_rss=round(shared_twice, 1),
        engines="offline pair loaded",
    )


def demo(directory: Path) -> None:
    tell("the demo, twice")
    environ = {"PATH": os.environ["PATH"], "HOME": str(directory), "AVB_ENGINE": "offline"}
    command = [sys.executable, "-P", "-m", "agentvoicebox.admin_api.cli", "demo", "--json"]
    for _ in range(2):
        begin = time.time()
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
    turns = json.loads(done.stdout)["turns"]
    first = min(Path(turn["wav"]).stat().st_mtime for turn in turns) - begin
    report("demo.first_spoken_answer", first, "s", 15, "the second run", turns=len(turns))


async def rest(node: Admitted) -> None:
    """Wait until the node has nothing left to do."""
    while True:
        before = node.cpu()
        await asyncio.sleep(1)
        if node.cpu() - before < 0.03:
            return


async def measure(directory: Path) -> None:
    node = Admitted(directory)
    node.start()
    try:
        node.admit_all()
        stack_memory(node)
        # Before anything else leaves free memory behind that new sessions would fill.
        await idle_memory(node)
        await rest(node)
        await text_turns(node)
        await spoken_turns(node)
    finally:
        node.stop()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(measure(Path(name)))
        demo(Path(name))


if __name__ == "__main__":
    main()
