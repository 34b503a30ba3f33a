"""Which engines stay in memory: those used last, as many as the budget holds."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ovos_plugin_manager.templates.stt import STT

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins.breaker import FAILURES
from agentvoicebox.plugins.pool import EngineSpec, Loaded, Pool, engine
from agentvoicebox.plugins.pool.memory import LEAST

MIB = 1024**2
AUDIO = bytes(320)


class Sized(STT):
    """Says how much it holds, and is told by name."""

    loads: ClassVar[list[str]] = []
    shut: ClassVar[list[str]] = []
    alive: ClassVar[weakref.WeakSet[Sized]]
    started: ClassVar[threading.Event]
    gate: ClassVar[threading.Event]

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.memory = self.config["size"] * MIB
        Sized.loads.append(self.config["name"])
        Sized.alive.add(self)

    def execute(self, audio: Any, language: str | None = None) -> str:
        if self.config.get("slow"):
            Sized.started.set()
            Sized.gate.wait(60)
        return str(self.config["name"])

    def shutdown(self) -> None:
        Sized.shut.append(self.config["name"])
        if self.config.get("lingers"):
            Sized.started.set()
            Sized.gate.wait(60)
        raise ValueError("which harms nobody")


class Fat(STT):
    """Takes memory without saying so."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.weights = b"\1" * (64 * MIB)

    def execute(self, audio: Any, language: str | None = None) -> str:
        return "fat"


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"sized": Sized, "fat": Fat}
    monkeypatch.setattr(engine, "plugin_class", lambda kind, name: found.get(name))
    Sized.loads, Sized.shut, Sized.alive = [], [], weakref.WeakSet()
    Sized.started, Sized.gate = threading.Event(), threading.Event()


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    made = Pool(memory=100 * MIB)
    yield made
    Sized.gate.set()
    await asyncio.to_thread(made.close)


def sized(name: str, size: int = 40, **more: Any) -> EngineSpec:
    return EngineSpec("stt", "sized", tuple(sorted({"name": name, "size": size, **more}.items())))


async def hear(pool: Pool, spec: EngineSpec | tuple[EngineSpec, ...], **more: Any) -> str:
    return (await pool.transcribe(spec, AUDIO, 16_000, "en-US", **more)).text


async def loaded(pool: Pool, count: int) -> None:
    """Return when so many engines are in memory, and none is leaving it."""
    async with asyncio.timeout(30):
        while True:
            found = pool.metrics()
            if sum(each.loaded for each in found) == count and sum(each.memory for each in found) <= 100 * MIB:
                return
            await asyncio.sleep(0.001)


async def test_the_one_used_longest_ago_makes_room_and_comes_back_when_it_is_needed(pool: Pool):
    a, b, c = sized("a"), sized("b"), sized("c")
    for spec in (a, b, a, c):
        await hear(pool, spec)
    await loaded(pool, 2)
    assert Sized.shut == ["b"]
    gc.collect()
    assert {each.config["name"] for each in Sized.alive} == {"a", "c"}, "nothing holds on to it"
    assert await hear(pool, b) == "b"
    await loaded(pool, 2)
    assert (Sized.loads, Sized.shut) == (["a", "b", "c", "b"], ["b", "a"])
    assert sum(each.memory for each in pool.metrics()) == 80 * MIB


async def test_what_is_being_unloaded_is_room_already(pool: Pool):
    lingering = sized("lingering", lingers=True)
    for spec in (lingering, sized("a"), sized("b")):
        await hear(pool, spec)
    assert await asyncio.to_thread(Sized.started.wait, 30)
    again = asyncio.create_task(hear(pool, lingering))
    assert await hear(pool, sized("b")) == "b", "nobody waits for it who needs no room"
    assert (Sized.shut, again.done()) == (["lingering"], False)
    Sized.gate.set()
    assert await again == "lingering"
    await loaded(pool, 2)
    assert Sized.shut == ["lingering", "a"], "no more has left than needed"


async def test_a_pinned_one_stays_and_those_that_cannot_fit_beside_it_say_so(pool: Pool):
    await pool.load(sized("a"), pinned=True)
    for name in "bcd":
        await hear(pool, sized(name))
    await loaded(pool, 2)
    assert Sized.shut == ["b", "c"]
    large = sized("large", 61)
    with pytest.raises(Unavailable, match="AVB_SPEECH_MEMORY") as caught:
        await hear(pool, large)
    assert caught.value.code == "engines_full"
    assert await hear(pool, sized("a")) == "a"
    with pytest.raises(Unavailable, match="AVB_SPEECH_MEMORY"):
        await hear(pool, large)
    assert Sized.loads.count("large") == 1, "that it is too large is known by now"
    assert Sized.shut.count("large") == 1


async def test_one_in_use_is_waited_for(pool: Pool):
    busy, known = sized("busy", 60, slow=True), sized("known", 50)
    await hear(pool, known)
    work = asyncio.create_task(hear(pool, busy))
    assert await asyncio.to_thread(Sized.started.wait, 30)
    await loaded(pool, 1)
    assert Sized.shut == ["known"]
    with pytest.raises(Unavailable) as caught:
        await hear(pool, known, deadline=0.05)
    assert caught.value.code == "engine_timeout"
    waiting = asyncio.create_task(hear(pool, known))
    other = asyncio.create_task(hear(pool, sized("small", 10)))
    assert await other == "small", "what fits need not wait"
    assert (waiting.done(), work.done(), Sized.shut) == (False, False, ["known"])
    Sized.gate.set()
    assert (await work, await waiting) == ("busy", "known")
    assert Sized.shut == ["known", "busy"]


async def test_where_another_engine_can_be_asked_room_is_not_waited_for_long(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("agentvoicebox.plugins.pool.ROOM", 0.01)
    busy, known, small = sized("busy", 60, slow=True), sized("known", 50), sized("small", 10)
    await hear(pool, known)
    work = asyncio.create_task(hear(pool, busy))
    assert await asyncio.to_thread(Sized.started.wait, 30)
    await loaded(pool, 1)
    for _ in range(FAILURES + 1):
        assert await hear(pool, (known, small)) == "small"
    assert pool._lines[known].breaker.state == "closed", "it is not the engine that has no room"
    assert sum(each.failures.get("engines_full", 0) for each in pool.metrics()) == FAILURES + 1
    Sized.gate.set()
    assert (await work, await hear(pool, known)) == ("busy", "known")


async def test_engines_of_unknown_size_are_loaded_one_at_a_time_but_none_waits_for_ever(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
):
    begun: list[str] = []
    gate = asyncio.Event()

    async def load(spec: EngineSpec) -> Loaded:
        begun.append(spec.plugin)
        await gate.wait()
        return Loaded()

    monkeypatch.setattr(pool._runner, "load", load)
    monkeypatch.setattr("agentvoicebox.plugins.pool.ALONE", 1_000.0)
    cloud = EngineSpec("stt", "cloud", (("key", "k"),))
    loads = [asyncio.create_task(pool.load(EngineSpec("stt", "fat", (("number", n),)))) for n in range(3)]
    loads.append(asyncio.create_task(pool.load(cloud)))
    while len(begun) < 2:
        await asyncio.sleep(0)
    assert begun == ["fat", "cloud"] or begun == ["cloud", "fat"], "what is a service elsewhere takes little"
    monkeypatch.setattr("agentvoicebox.plugins.pool.ALONE", 0.01)
    loads.append(asyncio.create_task(pool.load(EngineSpec("stt", "late"))))
    while len(begun) < 3:
        await asyncio.sleep(0.001)
    assert begun[2] == "late"
    gate.set()
    await asyncio.gather(*loads)
    assert sorted(begun) == ["cloud", "fat", "fat", "fat", "late"]


async def test_what_an_engine_does_not_tell_is_measured(pool: Pool):
    await hear(pool, EngineSpec("stt", "fat"))
    assert 48 * MIB < pool.metrics()[0].memory < 100 * MIB


def test_before_the_first_load_the_size_of_the_model_on_disk_is_expected(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(3_000))
    (tmp_path / "vocabulary").write_bytes(bytes(1_000))
    for model, size in (
        (tmp_path, 4_000),
        (tmp_path / "vocabulary", 1_000),
        (tmp_path / "none", 0),
        ("base", 0),
        ("/\0", 0),
    ):
        assert engine.expected(EngineSpec("stt", "x", (("model", str(model)),))) == size
    assert engine.expected(EngineSpec("stt", "x")) == 0
    assert engine.expected(EngineSpec("stt", "x", (("key", "k"),))) == LEAST


async def test_engines_that_nobody_asks_for_any_more_are_not_remembered_for_ever(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("agentvoicebox.plugins.pool.MOST_LINES", 3)
    for number in range(20):
        with pytest.raises(Unavailable):
            await hear(pool, EngineSpec("stt", f"missing {number}"))
    assert len(pool._lines) <= 4
