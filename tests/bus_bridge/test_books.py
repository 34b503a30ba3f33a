"""The books are complete, whatever happens to the store, and whenever the node stops."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from agentvoicebox.bus_bridge import books as module
from agentvoicebox.bus_bridge.books import Books, SessionBooks, Spent
from agentvoicebox.config.errors import BadInput, NotFound, Unavailable
from agentvoicebox.tenancy import metering, sessions
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import Metric, SessionStatus

TENANT = uuid.uuid4()


class Store:
    """Stands where `tenancy.sessions` stands: takes a moment for each writing, and fails on demand."""

    def __init__(self) -> None:
        self.lines: dict[uuid.UUID, list[sessions.Event]] = {}
        self.ended: dict[uuid.UUID, SessionStatus] = {}
        self.reasons: dict[uuid.UUID, str] = {}
        self.used: dict[uuid.UUID, list[Spent]] = {}
        self.writing = asyncio.Event()
        self.delay = 0.01
        self.failure: Callable[[uuid.UUID], Exception | None] = lambda session_id: None

    async def record(self, database: object, tenant_id: object, session_id: uuid.UUID, events: list[Any]) -> None:
        await self._write(session_id)
        self.lines.setdefault(session_id, []).extend(events)

    async def finish(
        self,
        database: object,
        tenant_id: object,
        session_id: uuid.UUID,
        status: SessionStatus,
        *,
        reason: str,
        **spent: Any,
    ) -> None:
        await self._write(session_id)
        self.reasons[session_id] = reason
        self.ended[session_id] = status
        self.used.setdefault(session_id, []).append(Spent(**spent))

    async def add_usage(self, database: object, tenant_id: object, session_id: uuid.UUID, **spent: Any) -> None:
        await self._write(session_id)
        self.used.setdefault(session_id, []).append(Spent(**spent))

    async def _write(self, session_id: uuid.UUID) -> None:
        self.writing.set()
        await asyncio.sleep(self.delay)
        if (failure := self.failure(session_id)) is not None:
            raise failure

    def texts(self, session_id: uuid.UUID) -> list[object]:
        lines = self.lines.get(session_id, [])
        assert [line.sequence for line in lines] == list(range(len(lines)))
        return [line.content["text"] for line in lines]


class Paper:
    """Stands where the ledger stands: counts an id once, may be away, and may lose the answer."""

    def __init__(self) -> None:
        self.lines: dict[tuple[uuid.UUID, str], Usage] = {}
        self.calls: list[int] = []
        self.tries = 0
        self.away = False
        self.mute = False
        self.hangs = False

    async def record(self, usages: Sequence[Usage]) -> None:
        self.tries += 1
        await asyncio.sleep(3600 if self.hangs else 0)
        if self.away:
            raise Unavailable("away")
        for usage in usages:
            self.lines.setdefault((usage.tenant_id, usage.event_id), usage)
        self.calls.append(len(usages))
        if self.mute:
            raise Unavailable("nobody knows whether that was counted")

    def of(self, metric: Metric, tenant_id: uuid.UUID = TENANT) -> list[float]:
        return [line.quantity for line in self.lines.values() if (line.metric, line.tenant_id) == (metric, tenant_id)]


@pytest.fixture
def paper() -> Paper:
    return Paper()


@pytest.fixture
def metered(store: Store, paper: Paper, monkeypatch: pytest.MonkeyPatch) -> Books:
    """Books with a ledger, and with short minutes."""
    monkeypatch.setattr(module, "MINUTE", 0.05)
    return Books(None, paper)  # type: ignore[arg-type]


def admitted(tenant_id: uuid.UUID = TENANT) -> Any:
    """What the door knows of whoever comes in."""
    return SimpleNamespace(tenant_id=tenant_id, project_id=uuid.uuid4())


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Books that write all there is, also on a machine that stalls."""
    monkeypatch.setattr(module, "PATIENCE", 30.0)


@pytest.fixture
def store(patient: None, monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(sessions, "record", store.record)
    monkeypatch.setattr(sessions, "finish", store.finish)
    monkeypatch.setattr(sessions, "add_usage", store.add_usage)
    monkeypatch.setattr(module, "SOON", 0.01)
    return store


@pytest.fixture
def hurried(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Books that soon give up on a store."""
    monkeypatch.setattr(module, "PATIENCE", 0.5)


@pytest.fixture
def long_minutes(metered: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """No minute passes in the test, however slow the machine is."""
    monkeypatch.setattr(module, "MINUTE", 3600.0)


@pytest.fixture
def books(store: Store) -> Books:
    return Books(None, None)  # type: ignore[arg-type]


def opened(books: Books) -> SessionBooks:
    return SessionBooks(books, TENANT, None, uuid.uuid4())


def write(session: SessionBooks, *texts: str) -> uuid.UUID:
    for text in texts:
        session.record("transcript", {"text": text})
    return session.session_id


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def test_closing_in_the_middle_of_a_writing_loses_nothing(store: Store, books: Books):
    told: list[uuid.UUID] = []
    names = []
    for _ in range(20):
        names.append(name := write(opened(books), "one", "two"))
        books.end(TENANT, name, SessionStatus.COMPLETED, lambda name=name: told.append(name))
    await store.writing.wait()
    await books.close()
    assert [store.texts(name) for name in names] == [["one", "two"]] * 20
    # A node of other tests may be writing the ends of its own sessions.
    assert {name: store.ended[name] for name in names} == dict.fromkeys(names, SessionStatus.COMPLETED)
    await asyncio.sleep(0)
    assert told == names


async def test_closing_waits_out_a_short_absence_of_the_store(store: Store, books: Books):
    absent = [Unavailable("away")] * 3
    store.failure = lambda _: absent.pop() if absent else None
    name = write(opened(books), "one")
    await books.close()
    assert store.texts(name) == ["one"]


@pytest.mark.parametrize("delay", [0.0, 3600.0])
@pytest.mark.usefixtures("hurried")
async def test_closing_gives_up_on_a_store_that_is_away_or_hangs(
    store: Store, books: Books, delay: float, caplog: pytest.LogCaptureFixture
):
    store.delay = delay
    store.failure = lambda _: Unavailable("away")
    told: list[str] = []
    name = write(opened(books), "secret", "secret")
    books.end(TENANT, name, SessionStatus.COMPLETED, lambda: told.append("ended"))
    async with asyncio.timeout(30):
        await books.close()
    await asyncio.sleep(0)
    assert told == ["ended"]
    assert "2 lines and the ends of 1 sessions are lost" in caplog.text
    assert "secret" not in caplog.text


async def test_an_end_is_told_once_it_is_written_and_not_before_the_history_is(store: Store, books: Books):
    store.failure = lambda _: Unavailable("away")
    told: list[SessionStatus | None] = []
    name = write(session := opened(books), "one")
    books.end(TENANT, name, SessionStatus.TERMINATED, lambda: told.append(store.ended.get(name)), "session_idle")
    await asyncio.sleep(0.1)
    assert (told, store.ended.get(name)) == ([], None)
    write(session, "two")
    store.failure = lambda _: None
    await until(lambda: bool(told))
    assert told == [SessionStatus.TERMINATED]
    assert store.reasons[name] == "session_idle"
    assert store.texts(name) == ["one", "two"]


@pytest.mark.parametrize("failure", [NotFound("gone"), RuntimeError("secret")])
async def test_one_failure_costs_its_own_session_only_and_is_logged_without_content(
    store: Store, books: Books, failure: Exception, caplog: pytest.LogCaptureFixture
):
    told: list[str] = []
    bad, good = write(opened(books), "secret"), write(session := opened(books), "one")
    store.failure = lambda name: failure if name == bad else None
    books.end(TENANT, bad, SessionStatus.COMPLETED, lambda: told.append("given up"))
    await until(lambda: bool(told))
    assert told == ["given up"]
    write(session, "two")
    await until(lambda: store.texts(good) == ["one", "two"])
    logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(logged) == 2, "its history and its end"
    assert all(str(bad) in line and "secret" not in line for line in logged)


async def test_a_listener_that_fails_stops_nothing(store: Store, books: Books):
    loop, wrong = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda loop, context: wrong.append(context["exception"]))
    try:
        books.end(TENANT, uuid.uuid4(), SessionStatus.COMPLETED, lambda: 1 / 0)
        await until(lambda: bool(wrong))
    finally:
        loop.set_exception_handler(None)
    name = write(opened(books), "one")
    await until(lambda: store.texts(name) == ["one"])


async def test_what_is_written_meanwhile_follows_in_order(store: Store, books: Books):
    name = write(session := opened(books), "one")
    await store.writing.wait()
    write(session, "two")
    await until(lambda: store.texts(name) == ["one", "two"])


async def test_there_is_an_end_to_what_is_kept(store: Store, books: Books, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MOST_WAITING", 2)
    name = write(opened(books), "one", "two", "three")
    await books.close()
    assert store.texts(name) == ["one", "two"]


async def test_a_session_that_says_too_much_loses_its_own_history_alone(
    store: Store, books: Books, caplog: pytest.LogCaptureFixture
):
    loud = write(opened(books), *("said" for _ in range(2 * module.MOST_WAITING)))
    quiet = write(opened(books), "one", "two")
    await books.close()
    assert store.texts(quiet) == ["one", "two"]
    assert store.texts(loud) == ["said"] * module.MOST_OF_SESSION
    lost = [record.getMessage() for record in caplog.records if "lost" in record.getMessage()]
    assert len(lost) == 1
    assert str(loud) in lost[0]


async def test_closing_empty_books(store: Store, books: Books):
    await books.close()
    assert not store.writing.is_set()


@pytest.mark.usefixtures("patient")
async def test_a_character_that_the_store_refuses_is_replaced(stack: Any, customer: Any):
    row = await sessions.create(stack.database, customer.id)
    books = Books(stack.database, None)  # type: ignore[arg-type]
    session = SessionBooks(books, customer.id, None, row.id)
    write(session, "good", "a\0b", "\ud800")
    session.record("response", {"text": "fine", "audio_seconds": 1.5})
    await books.close()
    lines = await sessions.history(stack.database, customer.id, row.id)
    assert [line.content["text"] for line in lines] == ["good", "a\ufffdb", "\ufffd", "fine"]


async def test_a_session_is_counted_once_and_its_time_as_it_passes(metered: Books, paper: Paper):
    """Before it ends, part by part; in the end the parts are all of it."""
    begin = time.monotonic()
    session = metered.of(admitted(), uuid.uuid4())
    inner = time.monotonic()
    await until(lambda: len(paper.of(Metric.SESSION_SECONDS)) >= 3)
    assert paper.of(Metric.SESSIONS) == [1]
    outer = time.monotonic()
    metered.end(TENANT, session.session_id, SessionStatus.COMPLETED)
    end = time.monotonic()
    await metered.close()
    assert paper.of(Metric.SESSIONS) == [1]
    assert outer - inner <= sum(paper.of(Metric.SESSION_SECONDS)) <= end - begin
    lines = [line for line in paper.lines.values() if line.metric is not Metric.CONCURRENT_SESSIONS_PEAK]
    assert {(line.session_id, line.project_id) for line in lines} == {(session.session_id, session.project_id)}
    assert {line.event_id for line in lines if line.metric is Metric.SESSIONS} == {f"{session.session_id}:begun"}


async def test_time_goes_on_while_the_store_is_away(metered: Books, paper: Paper):
    """Nothing is lost and nothing piles up: the seconds wait in the session, not in lines."""
    paper.away = True
    begun = [metered.of(admitted(), uuid.uuid4()) for _ in range(5)]
    inner = time.monotonic()
    await until(lambda: paper.tries >= 10 and time.monotonic() > inner + 4 * module.MINUTE)
    assert len(metered._meter._owed) <= 2 * len(begun) + 1
    gone = begun.pop()
    metered.end(TENANT, gone.session_id, SessionStatus.COMPLETED)
    paper.away = False
    await until(lambda: len(paper.of(Metric.SESSIONS)) == 5)
    outer = time.monotonic()
    await metered.close()
    assert paper.of(Metric.SESSIONS) == [1] * 5
    for session in begun:
        lines = [line for (_, name), line in paper.lines.items() if name.startswith(f"{session.session_id}:seconds:")]
        assert sum(line.quantity for line in lines) >= outer - inner
        assert len({line.event_id for line in lines}) == len(lines)


async def test_an_answer_that_is_lost_counts_nothing_twice(metered: Books, paper: Paper):
    paper.mute = True
    begin = time.monotonic()
    session = metered.of(admitted(), uuid.uuid4())
    inner = time.monotonic()
    await until(lambda: len(paper.calls) >= 5)
    paper.mute = False
    outer = time.monotonic()
    metered.end(TENANT, session.session_id, SessionStatus.COMPLETED)
    await metered.close()
    assert paper.of(Metric.SESSIONS) == [1]
    assert outer - inner <= sum(paper.of(Metric.SESSION_SECONDS)) <= time.monotonic() - begin


@pytest.mark.usefixtures("long_minutes")
async def test_closing_records_also_sessions_that_nobody_ended(metered: Books, paper: Paper):
    session = metered.of(admitted(), uuid.uuid4())
    inner = time.monotonic()
    await asyncio.sleep(0.02)  # much less than a minute, of which each has a peak
    outer = time.monotonic()
    await metered.close()
    assert paper.of(Metric.SESSIONS) == [1]
    assert sum(paper.of(Metric.SESSION_SECONDS)) >= outer - inner
    assert paper.of(Metric.CONCURRENT_SESSIONS_PEAK) == [1]
    before = dict(paper.lines)
    metered.end(TENANT, session.session_id, SessionStatus.ERROR)  # too late
    await asyncio.sleep(0.05)
    assert paper.lines == before


@pytest.mark.parametrize("how", ["away", "hangs"])
@pytest.mark.usefixtures("hurried")
async def test_closing_gives_up_on_a_ledger_that_is_away_or_hangs(
    metered: Books, paper: Paper, how: str, caplog: pytest.LogCaptureFixture
):
    setattr(paper, how, True)
    metered.of(admitted(), uuid.uuid4())
    async with asyncio.timeout(30):
        await metered.close()
    assert "3 lines of usage of sessions are lost" in caplog.text


async def test_how_many_at_once_is_the_greatest_of_each_minute(metered: Books, paper: Paper):
    other = uuid.uuid4()
    ids = [metered.of(admitted(), uuid.uuid4()).session_id for _ in range(3)]
    metered.of(admitted(other), uuid.uuid4())
    for name in ids[:2]:
        metered.end(TENANT, name, SessionStatus.COMPLETED)
    await until(lambda: len(paper.of(Metric.CONCURRENT_SESSIONS_PEAK)) >= 3)
    assert paper.of(Metric.CONCURRENT_SESSIONS_PEAK)[:3] == [3, 1, 1]
    assert set(paper.of(Metric.CONCURRENT_SESSIONS_PEAK, other)) == {1}
    metered.end(TENANT, ids[2], SessionStatus.COMPLETED)
    await until(lambda: TENANT not in metered._meter._crowds)
    metered.of(admitted(), uuid.uuid4())
    metered.of(admitted(), uuid.uuid4())
    await metered.close()
    assert paper.of(Metric.CONCURRENT_SESSIONS_PEAK)[-1] == 2, "the next crowd is another event"


async def test_one_task_and_few_calls_for_a_thousand_sessions(metered: Books, paper: Paper):
    before = len(asyncio.all_tasks())
    for _ in range(1000):
        metered.of(admitted(), uuid.uuid4())
    assert len(asyncio.all_tasks()) == before + 1
    await until(lambda: len(paper.of(Metric.SESSION_SECONDS)) >= 1000)
    assert paper.calls[0] >= 1000, "that they began"
    assert len(paper.calls) < 500, "what is due in the same moment goes together"
    await metered.close()


@pytest.mark.usefixtures("long_minutes")
async def test_what_a_session_heard_and_said_is_in_its_record(metered: Books, store: Store, paper: Paper):
    session = metered.of(admitted(), uuid.uuid4())
    await session.meter("turn 1", 1.5, 2.0)
    await session.meter("turn 2", 0.0, 0.25)
    paper.away = True
    with pytest.raises(Unavailable):
        await session.meter("turn 3", 100.0, 100.0)
    paper.away = False
    metered.end(TENANT, session.session_id, SessionStatus.COMPLETED)
    await metered.close()
    assert store.used == {session.session_id: [Spent(3.75)]}
    assert (paper.of(Metric.STT_AUDIO_SECONDS), paper.of(Metric.TTS_AUDIO_SECONDS)) == ([1.5], [2.0, 0.25])


@pytest.mark.usefixtures("long_minutes")
async def test_what_a_language_model_read_and_wrote_is_in_its_record(metered: Books, store: Store):
    session, stranger = metered.of(admitted(), uuid.uuid4()), uuid.uuid4()
    metered.count(TENANT, session.session_id, 100, 20)
    metered.count(TENANT, session.session_id, 150, 30)
    metered.count(TENANT, stranger, 7, 7)
    metered.end(TENANT, session.session_id, SessionStatus.COMPLETED)
    await metered.close()
    assert store.used == {session.session_id: [Spent(0.0, 250, 50)]}


async def test_the_record_is_told_of_audio_while_the_session_runs(metered: Books, store: Store):
    """Each second of it once, also when the store was away, and when the session ends in the middle of a writing."""
    session = metered.of(admitted(), uuid.uuid4())
    store.failure = lambda _: Unavailable("away")
    await session.meter("turn 1", 1.0, 0.0)
    await store.writing.wait()
    store.failure = lambda _: None
    await until(lambda: bool(store.used))
    store.writing.clear()
    await session.meter("turn 2", 2.0, 0.0)
    await store.writing.wait()
    await session.meter("turn 3", 4.0, 0.0)
    metered.end(TENANT, session.session_id, SessionStatus.COMPLETED)
    await metered.close()
    assert store.used == {session.session_id: [Spent(1.0), Spent(2.0), Spent(4.0)]}


async def test_a_clock_set_to_nonsense_keeps_no_session_from_ending(
    metered: Books, store: Store, paper: Paper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    session = metered.of(admitted(), uuid.uuid4())

    def wrong(*_: object, **__: object) -> Usage:
        raise BadInput("set the clock")

    monkeypatch.setattr(module, "Usage", wrong)
    metered.end(TENANT, session.session_id, SessionStatus.COMPLETED)
    await metered.close()
    assert store.ended[session.session_id] == SessionStatus.COMPLETED
    assert "set the clock" in caplog.text
    assert paper.of(Metric.SESSIONS) == [1]


async def test_a_ledger_that_fails_unexpectedly_is_logged_and_does_not_stop_the_rest(
    metered: Books, paper: Paper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    record, lost = paper.record, list[int]()

    async def fail(usages: Sequence[Usage]) -> None:
        if not lost:
            lost.append(len(usages))  # more than its beginning, if a minute has passed by then
            raise RuntimeError("secret")
        await record(usages)

    monkeypatch.setattr(paper, "record", fail)
    metered.of(admitted(), uuid.uuid4())
    await until(lambda: len(paper.of(Metric.SESSION_SECONDS)) >= 2)
    await metered.close()
    assert f"{lost[0]} lines of usage could not be recorded: RuntimeError" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.usefixtures("patient")
async def test_a_session_in_the_real_ledger(stack: Any, new_customer: Any):
    customer = await new_customer()
    row = await sessions.create(stack.database, customer.id)
    await sessions.activate(stack.database, customer.id, row.id)
    ledger = Ledger(stack.database)
    books = Books(stack.database, ledger)
    session = books.of(admitted(customer.id), row.id)
    await session.meter("turn", 1.0, 0.5)
    books.end(customer.id, row.id, SessionStatus.COMPLETED)
    await books.close()
    await ledger.close()
    used = await metering.totals(stack.database, customer.id)
    assert used.pop(Metric.SESSION_SECONDS) > 0
    assert used == {
        Metric.SESSIONS: 1.0,
        Metric.CONCURRENT_SESSIONS_PEAK: 1.0,
        Metric.STT_AUDIO_SECONDS: 1.0,
        Metric.TTS_AUDIO_SECONDS: 0.5,
    }
    assert (await sessions.get(stack.database, customer.id, row.id)).audio_duration_seconds == 1.5
