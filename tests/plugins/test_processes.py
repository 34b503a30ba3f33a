"""Engines in real processes, some of which are killed in the middle of their work."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentvoicebox.config.errors import BadInput, RateLimited, Unavailable
from agentvoicebox.plugins.pool import EngineSpec, Heard, Pool, Speech, Transcript, Utter, Voice, processes
from agentvoicebox.plugins.pool.processes import Processes

MADE = Path(__file__).parent / "made"
POISON, REFUSED, LIMITED, HANGING = 13, 14, 15, 16
FLITE = EngineSpec("tts", "agentvoicebox-tts-flite")
SPHINX = EngineSpec("stt", "agentvoicebox-stt-sphinx")

Say = Callable[..., tuple[bytes, int]]


class Stage:
    """What the engines of a test tell, and what they are allowed; see `made/made_engines.py`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ear = EngineSpec("stt", "made-ear", (("directory", str(directory)),))
        self.voice = EngineSpec("tts", "made-voice", (("directory", str(directory)),))
        self.deadly = EngineSpec("stt", "made-ear", (("deadly", True), ("directory", str(directory))))

    def pids(self, what: str) -> list[int]:
        """The processes that told it."""
        return [int(path.name.rsplit("-", 1)[1]) for path in self.directory.glob(f"{what}-*")]

    async def told(self, what: str, count: int = 1) -> list[int]:
        """Wait until so many processes have told it."""
        async with asyncio.timeout(120):
            while len(pids := self.pids(what)) < count:
                await asyncio.sleep(0.005)
        return pids

    def allow(self, name: str) -> None:
        (self.directory / name).touch()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def path() -> Any:
    """The processes find the engines of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(MADE))
        yield


@pytest.fixture(scope="module")
async def runner(path: None) -> AsyncIterator[Processes]:
    """Two processes for most tests of this module; those that are killed are replaced."""
    made = Processes(2)
    yield made
    await made.close()


def number(of: int) -> Heard:
    return Heard(of.to_bytes(2, "little") + bytes(318), "en-US")


async def hear(runner: Processes, spec: EngineSpec, of: int) -> tuple[int, int]:
    [found] = await runner.transcribe(spec, [number(of)])
    assert isinstance(found, Transcript)
    heard, pid = found.text.split()
    return int(heard), int(pid)


async def both(runner: Processes) -> None:
    """Returns when no process is at work, and none is missing."""
    await runner.start()
    async with asyncio.timeout(120):
        while len(runner._live()) < 2 or any(child.busy() for child in runner._live()):
            await asyncio.sleep(0.01)


async def dead(pid: int) -> None:
    async with asyncio.timeout(60):
        while psutil.pid_exists(pid):
            await asyncio.sleep(0.01)


def kill(pid: int) -> None:
    assert pid != os.getpid()
    os.kill(pid, signal.SIGKILL)


async def test_real_engines_speak_and_hear_in_a_pool(runner: Processes, say: Say) -> None:
    pool = Pool(runner=runner)
    for spec in (FLITE, SPHINX):
        await pool.load(spec)  # however long it takes until the processes are there
    speech = await pool.speak(FLITE, "what time is it", "en-US", "slt")
    assert speech.rate == 16_000
    pcm, rate = say("what time is it")
    transcript = await pool.transcribe(SPHINX, pcm, rate, "en-US")
    assert transcript.text == "what time is it"
    assert transcript.engine == SPHINX.plugin
    assert Voice("rms", "en-US", "") in [Voice(each.name, each.language, "") for each in await pool.voices(FLITE)]
    await runner.unload(SPHINX)


async def test_an_engine_is_in_every_process_and_counts_so_often(runner: Processes, stage: Stage) -> None:
    await both(runner)
    loaded = await runner.load(stage.ear)
    assert loaded.parallel == 8
    assert len(set(stage.pids("loaded"))) == 2
    assert (await runner.load(stage.ear)).parallel == 8
    assert len(stage.pids("loaded")) == 2


async def test_work_goes_to_whoever_is_least_busy(runner: Processes, stage: Stage) -> None:
    await both(runner)
    await runner.load(stage.ear)
    jobs = [asyncio.create_task(hear(runner, stage.ear, of)) for of in (1, 2)]
    assert len({*await stage.told("begin-1"), *await stage.told("begin-2")}) == 2
    stage.allow("all")
    assert [of for of, _ in await asyncio.gather(*jobs)] == [1, 2]


async def test_parts_come_as_they_are_said(runner: Processes, stage: Stage) -> None:
    await runner.load(stage.voice)
    async with aclosing(runner.stream(stage.voice, Utter("one Two", "en-US"))) as parts:
        assert await anext(parts) == Speech(b"one ", 16_000, "made-voice")
        stage.allow("go-Two")
        assert [part.pcm async for part in parts] == [b"Two "]


async def test_a_killed_process_costs_nobody_his_answer(
    runner: Processes, stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    await both(runner)
    await runner.load(stage.ear)
    jobs = [asyncio.create_task(hear(runner, stage.ear, of)) for of in (1, 2, 3, 4)]
    victim = (await stage.told("begin-1"))[0]
    for of in (2, 3, 4):
        await stage.told(f"begin-{of}")
    kill(victim)
    [again] = {*await stage.told("begin-1", 2)} - {victim}
    stage.allow("all")
    found = await asyncio.gather(*jobs)
    assert [of for of, _ in found] == [1, 2, 3, 4]
    assert {pid for _, pid in found} == {again}
    # Another process has taken its place, with the same engines.
    [_] = {*await stage.told("loaded", 3)} - {victim, again}


async def test_killed_in_the_middle_of_a_stream_nothing_is_missing_or_said_twice(
    runner: Processes, stage: Stage
) -> None:
    await runner.load(stage.voice)
    heard = []
    async with aclosing(runner.stream(stage.voice, Utter("one two Three four", "en-US"))) as parts:
        heard += [(await anext(parts)).pcm, (await anext(parts)).pcm]
        third = asyncio.ensure_future(anext(parts))
        victim = (await stage.told("begin-2"))[0]
        kill(victim)
        await stage.told("begin-2", 2)
        stage.allow("all")
        heard += [(await third).pcm, *[part.pcm async for part in parts]]
    assert heard == [b"one ", b"two ", b"Three ", b"four"]


async def test_what_kills_two_processes_is_an_error_and_no_third_is_tried(runner: Processes, stage: Stage) -> None:
    await runner.load(stage.ear)
    with pytest.raises(Unavailable, match="ended its process") as caught:
        await runner.transcribe(stage.ear, [number(POISON)])
    assert caught.value.code == "engine_failed"
    assert len(stage.pids(f"begin-{POISON}")) == 2
    stage.allow("all")
    assert (await hear(runner, stage.ear, 1))[0] == 1


async def test_an_engine_that_kills_when_it_is_loaded_is_an_error(runner: Processes, stage: Stage) -> None:
    stage.allow("all")
    await runner.load(stage.ear)
    with pytest.raises(Unavailable, match="ended its process"):
        await runner.load(stage.deadly)
    assert (await hear(runner, stage.ear, 1))[0] == 1
    with pytest.raises(Unavailable, match="not installed") as caught:
        await runner.load(EngineSpec("stt", "no-such-engine"))
    assert caught.value.code == "engine_missing"


async def test_errors_arrive_as_what_they_were(runner: Processes, stage: Stage) -> None:
    stage.allow("all")
    await runner.load(stage.ear)
    fine, refused, limited = [(await runner.transcribe(stage.ear, [number(of)]))[0] for of in (1, REFUSED, LIMITED)]
    assert isinstance(fine, Transcript)
    assert isinstance(refused, BadInput)
    assert (refused.code, refused.message, refused.param) == ("unsupported_language", "Not this one.", "language")
    assert isinstance(limited, RateLimited)
    assert limited.retry_after == 7.5


async def test_cancelling_reaches_the_engine_and_returns_when_it_is_at_rest(runner: Processes, stage: Stage) -> None:
    await runner.load(stage.ear)
    job = asyncio.create_task(hear(runner, stage.ear, 5))
    await stage.told("begin-5")
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert len(stage.pids("cancelled-5")) == 1
    await runner.load(stage.voice)
    async with aclosing(runner.stream(stage.voice, Utter("one Two", "en-US"))) as parts:
        await anext(parts)
        await stage.told("begin-1")
    assert len(stage.pids("cancelled-1")) == 1


async def test_cancelled_at_once_nothing_is_left_waiting(runner: Processes, stage: Stage) -> None:
    await runner.load(stage.ear)
    for _ in range(20):
        job = asyncio.create_task(hear(runner, stage.ear, 6))
        await asyncio.sleep(0)
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
    await both(runner)  # one that an earlier test has killed may still be loading what the others have


async def test_a_process_whose_engine_goes_on_for_nobody_is_replaced(
    runner: Processes, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PATIENCE", 0.05)
    await runner.load(stage.ear)
    job = asyncio.create_task(runner.transcribe(stage.ear, [number(HANGING)]))
    [victim] = await stage.told(f"begin-{HANGING}")
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    await dead(victim)
    await both(runner)
    stage.allow("all")
    assert (await hear(runner, stage.ear, 1))[0] == 1
    assert len(stage.pids(f"begin-{HANGING}")) == 1


async def test_a_killed_process_leaves_no_files_behind(runner: Processes, stage: Stage) -> None:
    await runner.load(stage.ear)
    job = asyncio.create_task(hear(runner, stage.ear, 1))
    victim = (await stage.told("begin-1"))[0]
    [child] = [each for each in runner._children if each._process.pid == victim]
    directory = Path(str(child._directory.result()))
    assert directory in directory.parent.iterdir()
    kill(victim)
    await child.gone()
    assert directory not in directory.parent.iterdir()
    stage.allow("all")
    await job


async def test_unloaded_everywhere(runner: Processes, stage: Stage) -> None:
    await runner.load(stage.ear)
    await runner.unload(stage.ear)
    assert not any(stage.ear in (*child.engines, *child._loads) for child in runner._children)
    await runner.load(stage.ear)


async def test_processes_end_when_closed_and_serve_nobody_then(stage: Stage) -> None:
    runner = Processes(1)
    await runner.load(stage.ear)
    [pid] = await stage.told("loaded")
    job = asyncio.create_task(hear(runner, stage.ear, 1))
    await stage.told("begin-1")
    closing = asyncio.create_task(runner.close())
    stage.allow("all")
    assert await job == (1, pid)
    await closing
    assert not psutil.pid_exists(pid)
    with pytest.raises(Unavailable):
        await runner.load(stage.ear)


async def test_processes_end_with_whoever_started_them_even_in_the_middle_of_work(stage: Stage) -> None:
    script = f"""
import asyncio
from agentvoicebox.plugins.pool import EngineSpec, Heard
from agentvoicebox.plugins.pool.processes import Processes
async def main():
    runner, spec = Processes(1), EngineSpec("stt", "made-ear", (("directory", {str(stage.directory)!r}),))
    await runner.load(spec)
    await runner.transcribe(spec, [Heard(bytes(320), "en-US")])
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-P", "-c", script, stderr=subprocess.DEVNULL)
    [pid] = await stage.told("begin-0")
    assert pid != parent.pid
    parent.kill()
    await parent.wait()
    await dead(pid)


async def test_processes_that_do_not_begin_are_an_error(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    for executable in ("/bin/false", "/no/such/python"):
        monkeypatch.setattr(sys, "executable", executable)
        runner = Processes(2)
        with pytest.raises(Unavailable, match="no processes"):
            await runner.load(stage.ear)
        await runner.close()
