"""One real stock stack for all tests, and a plain client of its bus."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
import websockets

from agentvoicebox.bus_bridge.cells import Cell

TURN = 60.0
"""Seconds after which a turn that nobody ends has failed."""


@dataclass
class Turn:
    """What was on the bus while one utterance was answered."""

    messages: list[dict[str, Any]]
    """Those that carry the key of the turn, up to `ovos.utterance.handled`."""
    others: list[dict[str, Any]]

    @property
    def types(self) -> list[str]:
        return [message["type"] for message in self.messages]

    @property
    def answers(self) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == "speak"]

    @property
    def spoken(self) -> str:
        return " ".join(answer["data"]["utterance"] for answer in self.answers)

    @property
    def skill(self) -> str:
        return str(self.answers[0]["context"]["skill_id"])


class Bus:
    """A connection to the bus of a cell."""

    def __init__(self, socket: websockets.ClientConnection) -> None:
        self._socket = socket

    async def send(self, kind: str, data: dict[str, Any], context: dict[str, Any]) -> None:
        await self._socket.send(json.dumps({"type": kind, "data": data, "context": context}))

    async def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self._socket.recv())
        return message

    async def ask(self, utterance: str, session: dict[str, Any] | None = None, **context: str | None) -> str:
        """Say something; returns the key of the turn. A context key that is None is left out."""
        turn = uuid4().hex
        session = {"session_id": f"s-{turn}", "blacklisted_skills": [], "blacklisted_intents": []} | (session or {})
        keys = {
            "tenant_id": "t",
            "tenant_name": "Acme",
            "persona_name": "Ada",
            "avb_session": session["session_id"],
            "avb_turn": turn,
        } | context
        await self.send(
            "recognizer_loop:utterance",
            {"utterances": [utterance], "lang": "en-us"},
            {"source": "test", "destination": ["skills"], "session": session}
            | {name: value for name, value in keys.items() if value is not None},
        )
        return turn

    async def say(self, utterance: str, session: dict[str, Any] | None = None, **context: str | None) -> Turn:
        """Say something and wait until it is answered."""
        key, turn = await self.ask(utterance, session, **context), Turn([], [])
        async with asyncio.timeout(TURN):
            while "ovos.utterance.handled" not in turn.types:
                message = await self.receive()
                ours = message.get("context", {}).get("avb_turn") == key
                (turn.messages if ours else turn.others).append(message)
        return turn


@asynccontextmanager
async def _connect(url: str) -> AsyncIterator[Bus]:
    async with websockets.connect(url, proxy=None) as socket:
        yield Bus(socket)


@pytest.fixture(scope="session")
def connect() -> Callable[[str], AbstractAsyncContextManager[Bus]]:
    """Connects to the bus at a URL."""
    return _connect


@pytest.fixture(scope="session")
def steps() -> list[str]:
    """What the cell told while it was starting."""
    return []


@pytest.fixture(scope="session")
async def cell(tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> AsyncIterator[Cell]:
    cell = Cell("test", tmp_path_factory.mktemp("cell"), ["en-us"])
    await cell.start(steps.append)
    yield cell
    await cell.stop()


@pytest.fixture
async def bus(cell: Cell) -> AsyncIterator[Bus]:
    async with _connect(cell.url) as bus:
        yield bus
