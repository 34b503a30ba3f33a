"""Events until the platform knows them: once each, over restarts, full disks, wrong clocks and poison."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agentvoicebox.plugins.device import reports, wire
from agentvoicebox.plugins.device.reports import Outbox
from agentvoicebox.plugins.device.requests import Away, Failed

Event = dict[str, Any]


class Store:
    """A platform's, as an outbox sees it: it counts what it is told twice once."""

    def __init__(self) -> None:
        self.away = False
        self.refuses: Callable[[Event], str] = lambda event: ""
        self.events: dict[str, Event] = {}
        self.sent: list[int] = []

    async def take(self, events: list[Event]) -> None:
        if self.away:
            raise Away("away")
        self.sent.append(len(events))
        assert len(events) <= wire.MOST_EVENTS
        for event in events:
            if code := self.refuses(event):
                raise Failed("no", code=code)
        self.events |= {event["id"]: event for event in events}


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said in the log."""
    written: list[str] = []
    for name in ("info", "warning", "error", "exception"):
        monkeypatch.setattr(reports.LOG, name, lambda line, *_, **__: written.append(str(line)))
    return written


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "_SOONEST", 0.001)
    monkeypatch.setattr(reports, "_LATEST", 0.002)


@asynccontextmanager
async def telling(outbox: Outbox, store: Store) -> AsyncIterator[None]:
    """The outbox is at work."""
    task = asyncio.create_task(outbox.tell(store.take))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        outbox.close()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def add(outbox: Outbox, count: int = 1, **facts: Any) -> None:
    for number in range(count):
        outbox.add("stt", {"engine": "local", "number": number, **facts})
    outbox.wake()


async def test_what_happens_is_told_once_and_nothing_is_left_of_it(tmp_path: Path, store: Store) -> None:
    outbox = Outbox(tmp_path / "r.jsonl")
    add(outbox)
    async with telling(outbox, store):
        await until(lambda: store.events)
        add(outbox)
        await until(lambda: len(store.events) == 2)
        await until(lambda: not len(outbox) and not (tmp_path / "r.jsonl").exists())
    assert store.sent == [1, 1]
    assert not (tmp_path / "r.jsonl").exists()


async def test_ten_thousand_are_told_in_order_and_in_batches(tmp_path: Path, store: Store) -> None:
    outbox = Outbox(tmp_path / "r.jsonl")
    store.away = True
    async with telling(outbox, store):
        add(outbox, 10_000)
        outbox.keep()
        store.away = False
        outbox.wake()
        await until(lambda: not len(outbox))
        await until(lambda: not (tmp_path / "r.jsonl").exists())
    assert [event["number"] for event in store.events.values()] == list(range(10_000))
    assert store.sent == [wire.MOST_EVENTS] * 50


async def test_of_more_the_oldest_are_forgotten(tmp_path: Path, store: Store, lines: list[str]) -> None:
    outbox = Outbox(tmp_path / "r.jsonl")
    add(outbox, 10_300)
    assert len(outbox) == reports.MOST
    assert len(lines) == 1
    async with telling(outbox, store):
        await until(lambda: not len(outbox))
    assert min(event["number"] for event in store.events.values()) == 300


async def test_what_cannot_be_told_soon_is_put_on_disk(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "SOON", 0.01)
    outbox, store.away = Outbox(tmp_path / "s" / "r.jsonl"), True
    async with telling(outbox, store):
        add(outbox, 3)
        file = tmp_path / "s" / "r.jsonl"
        await until(lambda: file.exists() and len(file.read_text().splitlines()) == 3)
        assert file.stat().st_mode & 0o777 == 0o600
        store.away = False
        outbox.wake()
        await until(lambda: not file.exists())
    assert len(store.events) == 3


def test_a_year_without_a_platform_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "MOST", 10)
    monkeypatch.setattr(reports, "_UNTIDY", 20)
    outbox = Outbox(tmp_path / "r.jsonl")
    for _ in range(50):
        add(outbox, 5)
        outbox.keep()
        assert len((tmp_path / "r.jsonl").read_text().splitlines()) <= 35
    assert len(outbox._on_disk) <= 35
    outbox.close()


async def test_a_new_process_tells_what_the_old_one_could_not(tmp_path: Path, store: Store) -> None:
    old = Outbox(tmp_path / "r.jsonl")
    add(old, 5)
    old.close()
    with (tmp_path / "r.jsonl").open("a") as file:
        far = {"id": "f" * 32, "kind": "stt", "boot": "b", "wall": 10**400, "up": 0}
        file.write(json.dumps(far) + '\nnonsense\n{"id": 1}\n[]\n\0\0\0\n{"id": "half')
    new = Outbox(tmp_path / "r.jsonl")
    add(new, 1)
    async with telling(new, store):
        await until(lambda: len(store.events) == 6)
        await until(lambda: not (tmp_path / "r.jsonl").exists())


async def test_a_process_that_is_killed_between_telling_and_tidying_tells_twice_and_counts_once(
    tmp_path: Path, store: Store
) -> None:
    old = Outbox(tmp_path / "r.jsonl")
    add(old, 5)
    old.close()
    left = (tmp_path / "r.jsonl").read_bytes()
    for _ in range(2):
        (tmp_path / "r.jsonl").write_bytes(left)
        new = Outbox(tmp_path / "r.jsonl")
        async with telling(new, store):
            await until(lambda: (tmp_path / "r.jsonl").exists() is False)
    assert len(store.events) == 5
    assert sum(store.sent) == 10


async def test_an_answer_that_is_lost_leads_to_telling_again(tmp_path: Path, store: Store) -> None:
    outbox = Outbox(tmp_path / "r.jsonl")
    lost = [True]

    async def take(events: list[Event]) -> None:
        await Store.take(store, events)
        if lost.pop():
            lost.append(False)
            raise Away("broke off")

    store.take = take  # type: ignore[method-assign]
    add(outbox, 3)
    async with telling(outbox, store):
        await until(lambda: store.sent)
        outbox.wake()
        await until(lambda: not len(outbox))
    assert (len(store.events), sum(store.sent)) == (3, 6)


# --- problems ---------------------------------------------------------------------------------------------------------


async def test_an_event_that_no_platform_takes_does_not_keep_the_others(
    tmp_path: Path, store: Store, lines: list[str]
) -> None:
    outbox = Outbox(tmp_path / "r.jsonl")
    store.refuses = lambda event: "validation_error" if event["number"] in (77, 130) else ""
    add(outbox, 300)
    outbox.keep()
    async with telling(outbox, store):
        await until(lambda: not len(outbox))
        await until(lambda: not (tmp_path / "r.jsonl").exists())
    assert sorted(event["number"] for event in store.events.values()) == [n for n in range(300) if n not in (77, 130)]
    assert len(lines) == 2
    assert "validation_error" in lines[0]


async def test_a_platform_whose_store_is_away_loses_nothing(tmp_path: Path, store: Store, lines: list[str]) -> None:
    outbox = Outbox(tmp_path / "r.jsonl")
    tries = iter(range(1000))
    store.refuses = lambda event: "store_unavailable" if next(tries) < 50 else ""
    add(outbox, 3)
    async with telling(outbox, store):
        await until(lambda: len(store.events) == 3)
    assert lines == []


@pytest.mark.parametrize("fact", [object(), float("nan"), "x" * 5000, {1, 2}])
def test_what_cannot_be_said_is_left_out(fact: Any, tmp_path: Path, lines: list[str]) -> None:
    outbox = Outbox(tmp_path / "r.jsonl")
    outbox.add("stt", {"engine": fact})
    assert len(outbox) == 0
    assert len(lines) == 1


def test_facts_do_not_take_the_place_of_what_an_event_is(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "r.jsonl")
    outbox.add("stt", {"id": "x", "kind": "y", "at": -1.0})
    (event,) = outbox._events.values()
    told = outbox._dated(event)
    assert (len(told["id"]), told["kind"]) == (32, "stt")
    assert told["at"] > 0
    assert {"wall", "boot", "up"}.isdisjoint(told)


# --- disks ------------------------------------------------------------------------------------------------------------


async def test_a_directory_that_cannot_be_takes_one_line_and_no_event(
    tmp_path: Path, store: Store, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "SOON", 0.001)
    (tmp_path / "file").write_text("")
    outbox, store.away = Outbox(tmp_path / "file" / "r.jsonl"), True
    async with telling(outbox, store):
        for _ in range(5):
            add(outbox)
            await until(lambda: outbox._unkept_since is None)
        store.away = False
        outbox.wake()
        await until(lambda: len(store.events) == 5)
    assert len(lines) == 1
    assert "memory" in lines[0]


FULL = """
import asyncio, resource, signal, sys
from pathlib import Path
from agentvoicebox.plugins.device import reports
from agentvoicebox.plugins.device.reports import Outbox
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
said = []
reports.LOG.warning = said.append
box = Outbox(Path(sys.argv[1]))
for n in range(3):
    box.add("stt", {"number": n})
box.keep()
before = Path(sys.argv[1]).read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, resource.RLIM_INFINITY))
for n in range(3, 6):
    box.add("stt", {"number": n})
    box.keep()
assert Path(sys.argv[1]).read_bytes() == before, "half a line"
assert len(said) == 1, said
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
box.close()
"""


def test_a_full_disk_is_survived_and_written_to_when_there_is_room_again(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    subprocess.run([sys.executable, "-W", "error", "-c", FULL, file], check=True, timeout=60)
    assert [json.loads(line)["number"] for line in file.read_text().splitlines()] == [0, 1, 2, 3, 4, 5]


CROWD = """
import sys
from pathlib import Path
from agentvoicebox.plugins.device.reports import Outbox
box = Outbox(Path(sys.argv[1]))
box._remember()
for n in range(200):
    box.add("stt", {"who": sys.argv[2]})
    box.keep()
print(len(box._on_disk), flush=True)
sys.stdin.read()
"""


def start(file: Path, who: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CROWD, file, str(who)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def test_processes_of_the_same_name_do_not_spoil_each_others_file(tmp_path: Path, store: Store) -> None:
    crowd = [start(tmp_path / "r.jsonl", who) for who in range(3)]
    for each in crowd:
        assert each.stdout is not None
        each.stdout.readline()
    assert len([name for name in os.listdir(tmp_path) if name.endswith(".jsonl")]) == 3
    for each in crowd:
        each.kill()
        each.communicate()
    outbox = Outbox(tmp_path / "r.jsonl")
    async with telling(outbox, store):
        await until(lambda: len(store.events) == 600)
        await until(lambda: not [name for name in os.listdir(tmp_path) if name.endswith(".jsonl")])
    assert sum(store.sent) == 600


def test_threads_may_report_at_the_same_time(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "r.jsonl")
    threads = [threading.Thread(target=lambda: (add(outbox, 200), outbox.keep())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    outbox.close()
    numbers = [json.loads(line)["id"] for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert (len(numbers), len(set(numbers))) == (1600, 1600)


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_a_clock_that_is_a_year_off_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, up = time.time, reports._up
    monkeypatch.setattr(time, "time", lambda: real() - 365 * 86_400)
    outbox = Outbox(tmp_path / "r.jsonl")
    add(outbox)
    (event,) = outbox._events.values()
    # An hour later the clock is set, and only then the platform is there.
    monkeypatch.setattr(reports, "_up", lambda: up() + 3600)
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    outbox.set_clock(real() + 3600)
    assert abs(outbox._dated(event)["at"] - real()) < 60


def test_an_event_from_before_a_restart_of_the_device_has_the_time_of_its_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox(tmp_path / "r.jsonl")
    add(outbox)
    (event,) = outbox._events.values()
    now = time.time()
    outbox.set_clock(now + 5000)
    before = {**event, "boot": "another", "up": 10**9, "wall": now - 7200}
    assert abs(outbox._dated(before)["at"] - (now + 5000 - 7200)) < 60
    # Nothing has happened in the future, or before there was time.
    assert outbox._dated({**before, "wall": now + 10**9})["at"] <= now + 5060
    assert outbox._dated({**before, "wall": -(10.0**12)})["at"] == 0


@pytest.mark.parametrize("told", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_platform_whose_clock_makes_no_sense_is_not_believed(told: float, tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "r.jsonl")
    outbox.set_clock(told)
    add(outbox)
    (event,) = outbox._events.values()
    assert abs(outbox._dated(event)["at"] - time.time()) < 60
