"""A cell starts, says what it waits for, is watched, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest

from agentvoicebox.bus_bridge import cells
from agentvoicebox.bus_bridge.cells import Cell
from agentvoicebox.config import ovos
from agentvoicebox.config.errors import Unavailable


def _living(directory: Path) -> list[int]:
    """Processes that work in a cell's directory."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(directory):
                found.append(process.pid)
    return found


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came about"
        time.sleep(0.05)


class Story:
    """What the supervisor tells, to be waited for."""

    def __init__(self) -> None:
        self.lost: asyncio.Queue[str] = asyncio.Queue()
        self.ready: asyncio.Queue[str] = asyncio.Queue()


@asynccontextmanager
async def _kept(cell: Cell) -> AsyncIterator[Story]:
    story = Story()
    task = asyncio.create_task(
        cells.keep(cell, cell.answers, lost=story.lost.put_nowait, ready=story.ready.put_nowait, every=0.2)
    )
    try:
        async with asyncio.timeout(240):
            yield story
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def spare(tmp_path: Path) -> AsyncIterator[Cell]:
    """A cell of the test's own, not started, to do harm to."""
    cell = Cell("spare", tmp_path / "spare", ["en-us"])
    yield cell
    await cell.stop(grace=0)
    _until(lambda: _living(cell.directory) == [])


def test_it_says_what_it_waits_for(cell: Cell, steps: list[str]) -> None:
    assert steps[:2] == ["waiting for messagebus", "waiting for core"]
    assert steps[-1] == "waiting for the first turn"
    skills = {"date-time", "hello-world", "count", "parrot", "fallback-unknown", "account"}
    assert {step.removeprefix("loading skills: ") for step in steps[2:-1]} == skills


def test_nobody_else_can_read_what_is_in_it(cell: Cell) -> None:
    directories = (cell.directory, cell.directory / "tmp" / "combo_locks")
    secret = (*directories, *(cell.directory / "logs").iterdir(), *(cell.directory / "config").rglob("*.conf"))
    assert len(secret) > 4
    assert not [path for path in secret if stat.S_IMODE(path.stat().st_mode) & 0o077]


async def test_only_plugins_of_the_pipeline_are_loaded(bus) -> None:
    """Stock core loads all that are installed, among them its own persona, which is one for all tenants."""
    await bus.send("persona:list", {}, {"session": {"session_id": "nobody"}})
    turn = await bus.say("count to one")  # which takes a while
    assert "speak" not in [other["type"] for other in turn.others]


async def test_the_canary_is_answered(cell: Cell) -> None:
    assert await asyncio.wait_for(cell.answers(), 30)


async def test_a_tenant_cannot_be_the_canary(bus) -> None:
    turn = await bus.say(ovos.CANARY_UTTERANCE)
    assert "avb.canary" not in turn.types
    assert turn.spoken


async def test_losses_are_noticed_and_made_good(spare: Cell, connect) -> None:
    """Killed or hung: each time the cell comes back at a new address, and the old one is gone."""
    await spare.start()
    async with _kept(spare) as story:
        for number, reason in (
            (signal.SIGKILL, "core was ended by SIGKILL"),
            (signal.SIGSTOP, "core did not answer within 2.5 s"),
        ):
            before, url = spare.pids, spare.url
            os.kill(before["core"], number)
            assert await story.lost.get() == reason
            assert await story.ready.get() == spare.url != url
            assert not set(before.values()) & set(_living(spare.directory))
            async with connect(spare.url) as bus:
                assert (await bus.say("who are you")).skill == "skill-account.agentvoicebox"
    assert story.lost.empty()


async def test_what_cannot_be_started_again_is_tried_again(spare: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    await spare.start()
    async with _kept(spare) as story:
        with monkeypatch.context() as broken:
            broken.setattr(ovos, "PIPELINE", (*ovos.PIPELINE, "no-such-plugin"))
            os.kill(spare.pids["messagebus"], signal.SIGTERM)
            assert await story.lost.get() == "messagebus ended with exit code 0"
            assert "no-such-plugin is not installed" in await story.lost.get()
            assert spare.pids == {}
        await story.ready.get()
        assert await spare.answers()


@pytest.fixture
def import_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a module of this name and text in front of all others, in the processes of a cell."""

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        real = ovos.environment
        monkeypatch.setattr(ovos, "environment", lambda *given: real(*given) | {"PYTHONPATH": str(tmp_path)})

    return write


async def test_stop_leaves_nothing_and_start_begins_anew(spare: Cell, import_first) -> None:
    import_first("sitecustomize", "import subprocess; subprocess.Popen(['sleep', '600'])")
    await spare.start()
    url = spare.url
    assert len(_living(spare.directory)) == 4
    assert set(spare.pids.values()) < set(_living(spare.directory))
    await spare.stop()
    _until(lambda: _living(spare.directory) == [])  # a grandchild's end is awaited by nobody
    assert (spare.pids, spare.url) == ({}, "")
    assert not await spare.answers()
    assert await spare.died() == "the cell is not running"
    await spare.stop()
    await spare.start()
    assert spare.url != url


async def test_a_start_that_is_given_up_leaves_nothing(spare: Cell) -> None:
    begun = asyncio.Event()
    start = asyncio.create_task(spare.start(lambda step: begun.set()))
    await begun.wait()
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert _living(spare.directory) == []


PARENT = """
    import asyncio, json, sys, websockets
    from pathlib import Path
    from agentvoicebox.bus_bridge.cells import Cell

    async def main():
        cell = Cell("orphan", Path(sys.argv[1]), ["en-us"])
        await cell.start()
        async with websockets.connect(cell.url, proxy=None) as bus:
            for number in range(70):  # more than core has threads: it is busy for good, and deaf to SIGTERM
                session = {"session_id": f"s{number}"}
                data, context = {"utterances": ["count to infinity"]}, {"session": session}
                await bus.send(json.dumps({"type": "recognizer_loop:utterance", "data": data, "context": context}))
            counting = set()
            while len(counting) < 60:
                message = json.loads(await bus.recv())
                if message["type"] == "speak":
                    counting.add(message["context"]["session"]["session_id"])
        print("ready", flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has started a cell in `tmp_path`/orphan, whose core is deadlocked."""
    command = [sys.executable, "-c", textwrap.dedent(PARENT), str(tmp_path / "orphan")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_killed_parent_leaves_no_orphans(tmp_path: Path, parent: subprocess.Popen[str]) -> None:
    assert len(_living(tmp_path / "orphan")) == 2
    parent.kill()
    parent.wait()
    _until(lambda: _living(tmp_path / "orphan") == [])


async def test_a_core_that_fails_at_start_is_named_with_its_last_words(spare: Cell) -> None:
    log = spare.directory / "logs" / "skills.log"
    log.mkdir(parents=True)
    with pytest.raises(Unavailable) as failure:
        await spare.start()
    assert failure.value.code == "cell_failed"
    assert "Cell spare cannot be started: core ended with exit code 1." in failure.value.message
    assert f"{spare.directory / 'logs' / 'core.errors'} is: IsADirectoryError" in failure.value.message
    assert _living(spare.directory) == []


async def test_a_bus_that_fails_at_start_is_named_with_its_last_words(spare: Cell, import_first) -> None:
    import_first("ovos_messagebus", "raise ImportError('not for this machine')")
    with pytest.raises(Unavailable, match=r"messagebus.*exit code 1.*\.errors is: .*not for this machine") as failure:
        await spare.start()
    assert failure.value.code == "cell_failed"
    assert _living(spare.directory) == []


async def test_a_start_without_end_is_given_up(spare: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "_START", 0.2)
    with pytest.raises(Unavailable, match="not ready after") as failure:
        await spare.start()
    assert failure.value.code == "cell_failed"
    assert _living(spare.directory) == []


async def test_a_missing_plugin_is_named_with_the_remedy(spare: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ovos, "PIPELINE", (*ovos.PIPELINE, "no-such-plugin-high"))
    with pytest.raises(Unavailable, match="no-such-plugin is not installed: pip install"):
        await spare.start()
    assert not spare.directory.exists()


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Unavailable, match="file") as failure:
        await Cell("spare", tmp_path / "file" / "cell", ["en-us"]).start()
    assert failure.value.code == "cell_failed"
