"""The pool of engines: what it adds to a call of an engine, and how long one tenant makes another wait.

The engine is a plugin whose work is a sleep of 5 ms. It is called bare, bare in a thread, and through the pool, in
turn, on uvloop as in the node. Of each call the time inside of the plugin's work is taken off, which varies more than
what is measured; the overhead is what a call through the pool has left over the median of bare ones, its p95 the median
of those of several rounds. What a bare call in a thread has left is told too: less cannot be had without stopping the
loop.

For fairness one tenant asks a hundred times at once and then another once: counted is how many of the first one's jobs
begin after the other has asked and before it is served.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvloop
from ovos_plugin_manager.templates.stt import STT
from ovos_plugin_manager.utils.audio import AudioData
from parts.reports import percentile, report

from agentvoicebox.plugins.pool import EngineSpec, Pool, engine

WORK = 0.005
ROUNDS, CALLS = 7, 100
QUEUED = 100
AUDIO = bytes(32_000)


class Sleeper(STT):  # type: ignore[misc]
    """Sleeps, and remembers for whom: its audio begins with a number."""

    begun: list[int]
    inside = 0.0
    """Seconds that its last work took."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        Sleeper.begun = []

    def execute(self, audio: Any, language: str | None = None) -> str:
        """Nothing is heard."""
        begin = time.perf_counter()
        Sleeper.begun.append(audio.frame_data[0])
        time.sleep(WORK)
        Sleeper.inside = time.perf_counter() - begin
        return ""


async def measure() -> None:
    """Print one JSON line each."""
    await asyncio.to_thread(uvloop.run, _measure())


async def _measure() -> None:
    with installed("bench-sleeper", Sleeper):
        pool = Pool()
        try:
            await overhead(pool)
            await fairness(pool)
        finally:
            await asyncio.to_thread(pool.close)


@contextmanager
def installed(name: str, plugin: Any) -> Iterator[None]:
    """A plugin of that name, beside those that are installed."""
    real = engine.plugin_class
    engine.plugin_class = lambda kind, wanted: plugin if wanted == name else real(kind, wanted)
    try:
        yield
    finally:
        engine.plugin_class = real


async def overhead(pool: Pool) -> None:
    spec, bare = EngineSpec("stt", "bench-sleeper"), Sleeper()
    await pool.load(spec)
    direct, threaded, pooled, cpu = [], [], [], []
    loop = asyncio.get_running_loop()
    for _ in range(ROUNDS * CALLS):
        begin = time.perf_counter()
        bare.transcribe(AudioData(AUDIO, 16_000, 2), "en-US")
        direct.append(time.perf_counter() - begin - Sleeper.inside)
        begin = time.perf_counter()
        await loop.run_in_executor(None, bare.transcribe, AudioData(AUDIO, 16_000, 2), "en-US")
        threaded.append(time.perf_counter() - begin - Sleeper.inside)
        begin, used = time.perf_counter(), time.process_time()
        await pool.transcribe(spec, AUDIO, 16_000, "en-US", tenant="a")
        pooled.append(time.perf_counter() - begin - Sleeper.inside)
        cpu.append(time.process_time() - used)
    floor = statistics.median(direct)
    report(
        "speech.pool.overhead",
        (p95(pooled) - floor) * 1e3,
        "ms",
        1.0,
        "the bare engine call",
        median_ms=round((statistics.median(pooled) - floor) * 1e3, 3),
        cpu_ms=round(statistics.median(cpu) * 1e3, 3),
        bare_median_ms=round(floor * 1e3, 3),
        bare_thread_median_ms=round(statistics.median(threaded) * 1e3, 3),
        bare_thread_p95_ms=round(p95(threaded) * 1e3, 3),
        bare_p95_ms=round(p95(direct) * 1e3, 3),
        calls=ROUNDS * CALLS,
        load=round(os.getloadavg()[0], 1),
    )


def p95(seconds: list[float]) -> float:
    return statistics.median(percentile(seconds[at : at + CALLS], 0.95) for at in range(0, len(seconds), CALLS))


async def fairness(pool: Pool) -> None:
    spec = EngineSpec("stt", "bench-sleeper", (("fair", True),))
    await pool.load(spec)
    asked = [asyncio.create_task(pool.transcribe(spec, b"\1" + AUDIO[1:], 16_000, "en-US", tenant="a"))]
    while not Sleeper.begun:
        await asyncio.sleep(0)
    asked += [
        asyncio.create_task(pool.transcribe(spec, b"\1" + AUDIO[1:], 16_000, "en-US", tenant="a"))
        for _ in range(QUEUED)
    ]
    await asyncio.sleep(0)
    before = len(Sleeper.begun)
    begin = time.perf_counter()
    await pool.transcribe(spec, b"\2" + AUDIO[1:], 16_000, "en-US", tenant="b")
    waited = time.perf_counter() - begin
    await asyncio.gather(*asked)
    report(
        "speech.pool.fairness",
        Sleeper.begun.index(2) - before,
        "jobs",
        1.0,
        f"first come, first served: {QUEUED}",
        waited_ms=round(waited * 1e3, 2),
        job_ms=WORK * 1e3,
    )
