"""`avb worker` as an operator runs it, on a real Redis."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import psutil
import pytest

from agentvoicebox.admin_api import cli
from agentvoicebox.plugins.pool import EngineSpec, Pool
from agentvoicebox.plugins.pool.streams import Streams

FLITE = EngineSpec("tts", "agentvoicebox-tts-flite")

Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture
async def start(redis_url: str) -> AsyncIterator[Start]:
    """Starts `avb worker`, and returns it when it is ready."""
    made = []

    async def start(*flags: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "agentvoicebox.admin_api.cli", "worker", "--redis", redis_url, *flags),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
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


async def test_it_works_until_it_is_told_to_stop_and_leaves_no_process(start: Start, redis_url: str) -> None:
    worker = await start("--kinds", "tts", "--processes", "1")
    node = Streams(redis_url, patience=60)
    pool = Pool(runner=node)
    speech = await pool.speak(FLITE, "It is noon.", "en-US")
    assert speech.engine == FLITE.plugin
    engines = psutil.Process(worker.pid).children()
    assert len(engines) == 1
    worker.send_signal(signal.SIGTERM)
    out, told = await worker.communicate()
    assert worker.returncode == 0
    assert out == b""
    assert b"takes tts work" in told
    assert b"finishing the work at hand" in told
    assert not any(each.is_running() for each in engines)
    pool.close()
    await node.close()


async def test_killed_it_leaves_no_process(start: Start) -> None:
    worker = await start("--processes", "2")
    async with asyncio.timeout(30):
        while len(engines := psutil.Process(worker.pid).children()) < 2:
            await asyncio.sleep(0.02)
    assert os.getpid() not in [worker.pid, *(each.pid for each in engines)]
    worker.kill()
    await worker.wait()
    async with asyncio.timeout(30):
        while any(each.is_running() for each in engines):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--redis"),
        (["--redis", "https://host"], "redis"),
        (["--redis", "redis://host", "--kinds", "stt,llm"], "--kinds"),
        (["--redis", "redis://host", "--kinds", ","], "--kinds"),
        (["--redis", "redis://host", "--processes", "0"], "speech_processes"),
        (["--redis", "redis://host", "--processes", "many"], "speech_processes"),
    ],
)
def test_wrong_input_is_one_line(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AVB_REDIS", raising=False)
    assert cli.main(["worker", *flags]) == 2
    out, told = capsys.readouterr()
    assert out == ""
    assert said in told
    assert told.count("\n") == 1


async def test_without_a_redis_it_says_so_and_ends(redis_url: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "agentvoicebox.admin_api.cli", "worker", "--redis", f"{redis_url}.not"),
        *("--processes", "1"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, told = await process.communicate()
    assert (process.returncode, out) == (1, b"")
    assert b"Redis does not answer" in told
    assert b"Traceback" not in told
