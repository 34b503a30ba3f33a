"""What the persona costs others, and how soon its first sentence is heard.

`speech.persona_waiting`: a real cell and the bridge's bus; the model is a server here. One tenant asks a skill every 40
ms or so, in turn alone, while the sessions of another wait for the persona (its model never answers), and while some of
them ask and are answered: ten questions a second, two seconds each, so that a hundred wait at any moment. Time is from
`ask` to the skill's `speak`; idle rounds come before and after, in the same run.

`speech.persona_first_audio`: a whole `avb up` in a process of its own with flite, a websocket client, and a model (a
server in the client's process) that writes a word every ten milliseconds. Time is from the model's sending of the last
piece of its first sentence to the first audio frame at the client's socket: through the provider's SDK, the chat door,
core, the bridge, the pool and flite.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from parts.reports import percentile, report, tell

from agentvoicebox.bus_bridge import client
from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.bus import Bus, Line
from agentvoicebox.bus_bridge.cells import Cell
from agentvoicebox.config import ovos

WAITING = 100
RATE = 10
"""Questions a second, of sessions among those that wait."""
MODEL = 2.0
"""Seconds that the model takes."""
TURNS = 250
GAP = (0.02, 0.06)
"""Seconds between two turns of the skill."""
ANSWERS = 60
WORDS = (
    ("Blue", "Small", "Most", "Some", "Many"),
    ("birds", "lakes", "stones", "kites", "engines"),
    ("turn", "go", "look", "seem", "grow"),
    ("warm in the autumn", "north by evening", "rather old today"),
)
"""A first sentence takes one of each; no two of a run are the same, or the second would come from the audio cache."""
REST = " It has been known for a long time, and many books were written on it."
WORD = 0.01
"""Seconds between two pieces of the model's answer."""

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class Model:
    """A language model's server: it thinks for as long as the question says, then writes word by word."""

    def __init__(self) -> None:
        self.url = ""
        self.waiting = 0
        self.sentence_at = 0.0
        """When the last piece of the latest first sentence was sent, by `time.monotonic`."""
        self.closing = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = next(line for line in head.split("\r\n") if line.startswith("content-length"))
            question = json.loads(await reader.readexactly(int(length.split(":")[1])))["messages"][-1]["content"]
            writer.write(HEAD)
            self.waiting += 1
            if "never" in question:
                await self.closing.wait()
            elif "slowly" in question:
                await asyncio.sleep(MODEL)
                self._write(writer, "I have thought. It is so.")
            else:
                await self._answer(writer, _sentence(int(question.rpartition(" ")[2])))
            self.waiting -= 1
            writer.write(b"data: [DONE]\n\n")
        writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, sentence: str) -> None:
        for piece in _pieces(sentence):
            await asyncio.sleep(WORD)
            self._write(writer, piece)
        self.sentence_at = time.monotonic()
        for piece in _pieces(REST):
            await asyncio.sleep(WORD)
            self._write(writer, piece)

    @staticmethod
    def _write(writer: asyncio.StreamWriter, text: str) -> None:
        event = {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "local",
            "choices": [{"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}],
        }
        writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")


def _sentence(number: int) -> str:
    chosen = []
    for words in WORDS:
        number, at = divmod(number, len(words))
        chosen.append(words[at])
    return f"{' '.join(chosen)}."


def _pieces(text: str) -> list[str]:
    """A text as models write it: words with the space before them, the full stop by itself."""
    words = text.removesuffix(".").split(" ")
    return [words[0], *(f" {word}" for word in words[1:]), "."]


@asynccontextmanager
async def serving() -> AsyncIterator[Model]:
    model = Model()
    server = await asyncio.start_server(model.serve, ovos.HOST, 0)
    model.url = f"http://{ovos.HOST}:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield model
    finally:
        model.closing.set()
        server.close()
        await server.wait_closed()


class Caller:
    """A session on the bridge's bus."""

    def __init__(self, bus: Bus, name: str, tenant: str) -> None:
        self.line = Line(name, tenant, context={"tenant_name": tenant, "persona_name": "P"})
        self.told: asyncio.Queue[ev.Event] = asyncio.Queue()
        self.line.tell = self.told.put_nowait
        self._bus = bus
        self._asked = 0
        bus.open(self.line)

    def ask(self, text: str) -> None:
        self._asked += 1
        self._bus.ask(self.line, f"{self.line.id}-{self._asked}", text, "en-US")

    async def turn(self, text: str) -> float:
        """Seconds until the answer is heard; returns when the turn has ended."""
        begin, spoke = time.perf_counter(), 0.0
        self.ask(text)
        async with asyncio.timeout(30):
            while not isinstance(event := await self.told.get(), ev.Handled):
                if isinstance(event, ev.Spoke):
                    spoke = spoke or time.perf_counter() - begin
        return spoke


async def _turns(caller: Caller, turns: int = TURNS) -> list[float]:
    """Milliseconds of turns of a skill, one after the other."""
    found = []
    for _ in range(turns):
        await asyncio.sleep(random.uniform(*GAP))
        found.append(await caller.turn("what time is it") * 1000)
    return found


async def _ask_on(callers: list[Caller]) -> None:
    """Sessions ask, `RATE` a second together, and are answered."""
    asking: set[asyncio.Task[float]] = set()
    number = 0
    try:
        while True:
            await asyncio.sleep(random.expovariate(RATE))
            asking.add(asyncio.create_task(callers[number % len(callers)].turn("think slowly of colorless ideas")))
            number += 1
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def waiting(directory: Path) -> None:
    """Another tenant's skill turn, idle and with a hundred answers waited for."""
    async with serving() as model:
        cell = Cell("bench", directory, ["en-us"], ovos.Node(model.url, "key"))
        await cell.start()
        bus = Bus()
        try:
            await bus.connect(cell.url)
            quick = Caller(bus, "quick", "t-quick")
            await _turns(quick, 50)
            tell(f"{TURNS} turns of a skill, four times: idle, {WAITING} waiting, {RATE}/s arriving, idle")
            idle = await _turns(quick)
            answered = int(RATE * MODEL)
            callers = [Caller(bus, f"waits-{number}", "t-busy") for number in range(WAITING)]
            for caller in callers:
                caller.ask("never mind colorless ideas")
            while model.waiting < WAITING:
                await asyncio.sleep(0.05)
            held = await _turns(quick)
            for caller in callers[:answered]:
                bus.hang_up(caller.line)
            # More sessions than answers at a time, so that each has ended when it asks again.
            others = [Caller(bus, f"asks-{number}", "t-busy") for number in range(4 * answered)]
            arriving = asyncio.create_task(_ask_on(others))
            await asyncio.sleep(MODEL)
            arrived = await _turns(quick)
            arriving.cancel()
            await asyncio.gather(arriving, return_exceptions=True)
            for caller in callers[answered:] + others:
                bus.hang_up(caller.line)
            await asyncio.sleep(1)
            idle += await _turns(quick)
        finally:
            await bus.close()
            await cell.stop()
    base = percentile(idle, 0.95)
    for name, found in (("persona_waiting", held), ("persona_arriving", arrived)):
        report(
            f"speech.{name}",
            percentile(found, 0.95) - base,
            "ms",
            10.0,
            "p95 of the same skill turn with nobody waiting, before and after",
            idle_p95_ms=round(base, 2),
            loaded_p95_ms=round(percentile(found, 0.95), 2),
            idle_p50_ms=round(statistics.median(idle), 2),
            loaded_p50_ms=round(statistics.median(found), 2),
            waiting=WAITING,
            arrivals_per_second=RATE if found is arrived else 0,
            turns=len(found),
        )


def _avb(environ: dict[str, str], *arguments: str) -> Any:
    command = [sys.executable, "-P", "-m", "agentvoicebox.admin_api.cli", *arguments, "--json"]
    return json.loads(subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout)


def _flite(directory: Path, sentence: str) -> float:
    """Milliseconds of flite alone, for the whole sentence."""
    begin = time.perf_counter()
    command = ["flite", "-voice", "slt", "-o", str(directory / "bare.wav")]
    subprocess.run(command, input=sentence.encode(), check=True)
    return (time.perf_counter() - begin) * 1000


async def first_audio(directory: Path) -> None:
    """From the end of the model's first sentence to its first audio at the client."""
    async with serving() as model:
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "AVB_DATA": str(directory / "data"),
            "AVB_ENGINE": "offline",
            "AVB_COMPATIBLE_URL": model.url,
            "AVB_COMPATIBLE_KEY": "local",
        }
        command = [sys.executable, "-P", "-m", "agentvoicebox.admin_api.cli", "up", "--port", "0"]
        node = await asyncio.create_subprocess_exec(*command, env=environ, stdout=subprocess.PIPE)
        try:
            assert node.stdout is not None
            url = (await node.stdout.readline()).decode().split()[1]
            tenant = (
                "tenant",
                "create",
                "--slug",
                "bench",
                "--name",
                "Bench",
                "--voice",
                "slt",
                "--tier",
                "enterprise",
            )
            await asyncio.to_thread(_avb, environ, *tenant)
            key = ("key", "create", "--tenant", "bench", "--name", "bench", "--rate-class", "unlimited")
            made = await asyncio.to_thread(_avb, environ, *key)
            tell(f"{ANSWERS} answers of a model, spoken by flite")
            found, bare = [], []
            async with client.session(url, made["key"]) as session:
                for number in range(ANSWERS + 5):
                    answer = await session.write(f"colorless green ideas number {number}")
                    assert answer.error is None, answer.error
                    assert answer.first_audio_at is not None, answer.text
                    assert answer.text.startswith(_sentence(number)), answer.text
                    if number >= 5:
                        found.append((answer.first_audio_at - model.sentence_at) * 1000)
                        bare.append(await asyncio.to_thread(_flite, directory, _sentence(number)))
        finally:
            node.terminate()
            await node.wait()
    report(
        "speech.persona_first_audio",
        percentile(found, 0.95),
        "ms",
        60.0,
        "the model's sending of the last piece of its first sentence",
        p50_ms=round(statistics.median(found), 2),
        answers=len(found),
        bare_flite_p50_ms=round(statistics.median(bare), 2),
        bare_flite_p95_ms=round(percentile(bare, 0.95), 2),
        longest_sentence=max(len(_sentence(number)) for number in range(ANSWERS + 5)),
        piece_every_ms=WORD * 1000,
    )


async def measure() -> None:
    """Print both measurements."""
    with tempfile.TemporaryDirectory(prefix="avb-bench-") as name:
        await waiting(Path(name) / "cell")
        (Path(name) / "node").mkdir()
        await first_audio(Path(name) / "node")
