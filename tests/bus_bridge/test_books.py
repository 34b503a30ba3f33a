"""The books are complete, whatever happens to the store, and whenever the node stops."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from agentvoicebox.bus_bridge import books as module
from agentvoicebox.bus_bridge.books import Books, SessionBooks
from agentvoicebox.config.errors import NotFound, Unavailable
from agentvoicebox.tenancy import sessions
from agentvoicebox.tenancy.models import SessionStatus

TENANT = uuid.uuid4()


class Store:
    """Stands where `tenancy.sessions` stands: takes a moment for each writing, and fails on demand."""

    def __init__(self) -> None:
        self.lines: dict[uuid.UUID, list[sessions.Event]] = {}
        self.ended: dict[uuid.UUID, SessionStatus] = {}
        self.writing = asyncio.Event()
        self.delay = 0.01
        self.failure: Callable[[uuid.UUID], Exception | None] = lambda session_id: None

    async def record(self, database: object, tenant_id: object, session_id: uuid.UUID, events: list[Any]) -> None:
        await self._write(session_id)
        self.lines.setdefault(session_id, []).extend(events)

    async def finish(self, database: object, tenant_id: object, session_id: uuid.UUID, status: SessionStatus) -> None:
        await self._write(session_id)
        self.ended[session_id] = status

    async def _write(self, session_id: uuid.UUID) -> None:
        self.writing.set()
        await asyncio.sleep(self.delay)
        if (failure := self.failure(session_id)) is not None:
            raise failure

    def texts(self, session_id: uuid.UUID) -> list[object]:
        lines = self.lines.get(session_id, [])
        assert [line.sequence for line in lines] == list(range(len(lines)))
        return [line.content["text"] for line in lines]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(sessions, "record", store.record)
    monkeypatch.setattr(sessions, "finish", store.finish)
    monkeypatch.setattr(module, "SOON", 0.01)
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    return store


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
    async with asyncio.timeout(5):
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
    assert store.ended == dict.fromkeys(names, SessionStatus.COMPLETED)
    await asyncio.sleep(0)
    assert told == names


async def test_closing_waits_out_a_short_absence_of_the_store(store: Store, books: Books):
    absent = [Unavailable("away")] * 3
    store.failure = lambda _: absent.pop() if absent else None
    name = write(opened(books), "one")
    await books.close()
    assert store.texts(name) == ["one"]


@pytest.mark.parametrize("delay", [0.0, 3600.0])
async def test_closing_gives_up_on_a_store_that_is_away_or_hangs(
    store: Store, books: Books, delay: float, caplog: pytest.LogCaptureFixture
):
    store.delay = delay
    store.failure = lambda _: Unavailable("away")
    told: list[str] = []
    name = write(opened(books), "secret", "secret")
    books.end(TENANT, name, SessionStatus.COMPLETED, lambda: told.append("ended"))
    async with asyncio.timeout(3):
        await books.close()
    await asyncio.sleep(0)
    assert told == ["ended"]
    assert "2 lines and the ends of 1 sessions are lost" in caplog.text
    assert "secret" not in caplog.text


async def test_an_end_is_told_once_it_is_written_and_not_before_the_history_is(store: Store, books: Books):
    store.failure = lambda _: Unavailable("away")
    told: list[SessionStatus | None] = []
    name = write(session := opened(books), "one")
    books.end(TENANT, name, SessionStatus.TERMINATED, lambda: told.append(store.ended.get(name)))
    await asyncio.sleep(0.1)
    assert (told, store.ended) == ([], {})
    write(session, "two")
    store.failure = lambda _: None
    await until(lambda: bool(told))
    assert told == [SessionStatus.TERMINATED]
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


async def test_closing_empty_books(store: Store, books: Books):
    await books.close()
    assert not store.writing.is_set()


async def test_a_character_that_the_store_refuses_is_replaced(stack: Any, customer: Any):
    row = await sessions.create(stack.database, customer.id)
    books = Books(stack.database, None)  # type: ignore[arg-type]
    session = SessionBooks(books, customer.id, None, row.id)
    write(session, "good", "a\0b", "\ud800")
    session.record("response", {"text": "fine", "audio_seconds": 1.5})
    await books.close()
    lines = await sessions.history(stack.database, customer.id, row.id)
    assert [line.content["text"] for line in lines] == ["good", "a\ufffdb", "\ufffd", "fine"]
