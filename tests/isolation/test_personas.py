"""Two tenants and their personas on one whole installation; their language model is a server here that keeps what it is
asked (hazards H4, H5, H19 and H26, and what DESIGN §4 wants of them)."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection

from agentvoicebox.admin_api.stack import Stack
from agentvoicebox.bus_bridge import client
from agentvoicebox.config import settings
from agentvoicebox.tenancy import keys, limits, personas, tenants

TEXT = {"modality": "text"}


class Asked:
    """One request to the model."""

    def __init__(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.system = body["messages"][0]["content"]
        self.said = [message["content"] for message in body["messages"][1:]]
        self.writer = writer
        self.over = asyncio.Event()

    @property
    def name(self) -> str:
        return str(self.system.split("Your name is ")[1].split(".")[0])

    def write(self, *texts: str) -> None:
        for text in texts:
            choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
            event = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            self.writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def end(self) -> None:
        self.writer.write(b"data: [DONE]\n\n")


class Model:
    """A language model's server. It says who it was told to be; with `hold` set it waits for its test first."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[Asked] = []
        self.arrived = asyncio.Condition()
        self.hold = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(line for line in head.split("\r\n") if line.startswith("content-length"))
        asked = Asked(json.loads(await reader.readexactly(int(length.split(":")[1]))), writer)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        async with self.arrived:
            self.asked.append(asked)
            self.arrived.notify_all()
        if not self.hold:
            asked.write(f"This is {asked.name}. ", f"You said: {asked.said[-1]}.")
            asked.end()
            writer.close()
        with suppress(ConnectionError):
            await reader.read()
        asked.over.set()
        writer.close()

    async def next(self, number: int = 1) -> list[Asked]:
        """Waits for so many questions since `reset`."""
        async with asyncio.timeout(20), self.arrived:
            await self.arrived.wait_for(lambda: len(self.asked) >= number)
        return self.asked

    def reset(self) -> None:
        self.hold = False
        for asked in self.asked:
            asked.writer.transport.abort()
        self.asked = []


@pytest.fixture(scope="module")
async def front() -> AsyncIterator[Model]:
    model = Model()
    server = await asyncio.start_server(model.serve, "127.0.0.1", 0)
    model.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    yield model
    model.reset()
    server.close()
    await server.wait_closed()


@pytest.fixture(scope="module")
async def house(front: Model, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """An installation with a language model."""
    data = tmp_path_factory.mktemp("house")
    flags = {"data": data, "port": 0, "engine": "offline", "compatible_url": front.url, "compatible_key": "local"}
    stack = Stack(settings.load(flags, environ={"HOME": str(data)}))
    await stack.start()
    stack.limiter.failures = limits.Rate(1_000_000, 60_000_000)
    yield stack
    await stack.stop()


@pytest.fixture
async def model(front: Model) -> AsyncIterator[Model]:
    yield front
    front.reset()


class Tenant:
    """A tenant with personas; the first one is its default. Each knows a secret."""

    def __init__(self, stack: Stack, id_: uuid.UUID, key: str, secret: str) -> None:
        self.stack = stack
        self.id = id_
        self.key = key
        self.secret = secret
        self.personas: dict[str, uuid.UUID] = {}

    def session(self, **config: Any) -> Any:
        return client.session(self.stack.url, self.key, TEXT | config)


async def _tenant(stack: Stack, *names: str) -> Tenant:
    slug = f"t-{uuid.uuid4().hex[:12]}"
    made = await tenants.create(stack.database, slug, f"Tenant {slug}", "enterprise")
    issued = await keys.issue(stack.database, made.id, "test", ("realtime",), None, rate_class="unlimited")
    tenant = Tenant(stack, made.id, issued.key, f"the cellar key lies under {slug}")
    for name in names:
        character = personas.Character(name, system_prompt=f"You know that {tenant.secret}.")
        tenant.personas[name] = (await personas.create(stack.database, made.id, character)).id
    if names:
        await personas.make_default(stack.database, made.id, tenant.personas[names[0]])
    return tenant


async def _ask(socket: ClientConnection, text: str) -> None:
    message = {"type": "response.create", "messages": [{"role": "user", "content": text}]}
    await socket.send(json.dumps(message))


async def test_each_is_answered_by_its_own(house: Stack, model: Model) -> None:
    ours, theirs = await _tenant(house, "Alba"), await _tenant(house, "Bruno")
    async with ours.session() as one, theirs.session() as two:
        for number in range(3):
            first, second = await asyncio.gather(*(s.write(f"colorless idea {number}") for s in (one, two)))
            assert first.text.startswith("This is Alba."), first.text
            assert second.text.startswith("This is Bruno."), second.text
    assert len(model.asked) == 6
    for asked in model.asked:
        own, other = (ours, theirs) if asked.name == "Alba" else (theirs, ours)
        everything = json.dumps([asked.system, *asked.said])
        assert own.secret in everything
        assert other.secret not in everything
        assert ("Bruno" if asked.name == "Alba" else "Alba") not in everything


async def test_who_is_talked_to_is_each_sessions_own_affair(house: Stack, model: Model) -> None:
    """Hazard H4: in stock OVOS, one household's "talk to …" is everybody's."""
    ours, theirs = await _tenant(house, "Alba", "Carla"), await _tenant(house, "Bruno", "Carla")
    async with ours.session() as one, ours.session() as same, theirs.session() as other:
        assert "Carla" in (await one.write("talk to Carla")).text
        answers = [await session.write("colorless ideas") for session in (one, same, other)]
    assert [answer.text.split(".")[0] for answer in answers] == ["This is Carla", "This is Alba", "This is Bruno"]
    assert ours.secret in model.asked[0].system
    assert theirs.secret not in model.asked[0].system


async def test_nobody_meets_anothers_persona(house: Stack, model: Model) -> None:
    """Hazard H5: in stock OVOS, all personas are visible to all sessions, and to be asked by anybody."""
    ours, theirs = await _tenant(house, "Alba"), await _tenant(house, "Bruno")
    async with theirs.session() as session:
        for wish in ("talk to Alba", "colorless ideas"):
            assert (await session.write(wish)).text.startswith("This is Bruno.")
    async with theirs.session(persona_id=str(ours.personas["Alba"])) as session:
        assert (await session.write("colorless ideas")).text.startswith("This is Bruno.")
    assert all(ours.secret not in asked.system for asked in model.asked)


async def test_what_was_said_stays_in_its_session(house: Stack, model: Model) -> None:
    """Hazard H5: in stock OVOS, one memory holds what all have said."""
    ours, theirs = await _tenant(house, "Alba"), await _tenant(house, "Alba")
    async with ours.session() as one, ours.session() as same, theirs.session() as other:
        for session in (one, same, other, one):
            await session.write("colorless ideas")
    assert [len(asked.said) for asked in model.asked] == [1, 1, 1, 3]
    assert model.asked[3].said == ["colorless ideas", "This is Alba. You said: colorless ideas.", "colorless ideas"]


async def test_a_session_that_wants_quiet_silences_nobody_else(house: Stack, model: Model) -> None:
    """Hazards H1 and H12: cancelled, and "stop"; the answers of others go on."""
    ours, theirs = await _tenant(house, "Alba"), await _tenant(house, "Bruno")
    model.hold = True
    async with ours.session() as one, ours.session() as same, theirs.session() as other:
        for number, session in enumerate((one, same, other)):
            await _ask(session.socket, "colorless ideas")
            await model.next(number + 1)
        mine, *others = model.asked
        await one.socket.send(json.dumps({"type": "response.cancel"}))
        await asyncio.wait_for(mine.over.wait(), 10)
        async with asyncio.timeout(10):
            while json.loads(await one.socket.recv())["type"] != "response.done":
                pass
        assert (await one.write("stop")).error is None
        for asked in others:
            assert not asked.over.is_set()
            asked.write("Still here.")
            asked.end()
            asked.writer.close()
        answers = [await session._answer() for session in (same, other)]
    assert [(answer.text, answer.error) for answer in answers] == [("Still here.", None)] * 2


async def test_a_persona_that_is_removed_while_it_speaks_ends_its_sentence(house: Stack, model: Model) -> None:
    tenant = await _tenant(house, "Alba", "Carla")
    model.hold = True
    async with tenant.session(persona_id="Carla") as session:
        await _ask(session.socket, "colorless ideas")
        (asked,) = await model.next()
        asked.write("The beginning. ")
        await personas.delete(house.database, tenant.id, tenant.personas["Carla"])
        asked.write("The end.")
        asked.end()
        asked.writer.close()
        told = await session._answer()
        model.hold = False
        again = await session.write("colorless ideas")
    assert (told.text, told.error) == ("The beginning. The end.", None)
    assert again.error is None
    assert again.text


async def test_a_model_that_dies_half_way_is_told_politely(house: Stack, model: Model) -> None:
    tenant = await _tenant(house, "Alba")
    model.hold = True
    async with tenant.session() as session:
        await _ask(session.socket, "colorless ideas")
        (asked,) = await model.next()
        asked.write("The beginning. ", "And the mid")
        await asked.writer.drain()
        asked.writer.transport.abort()
        told = await session._answer()
        model.hold = False
        again = await session.write("colorless ideas")
    assert told.error is None
    assert told.text.startswith("The beginning.")
    assert told.text.endswith("Sorry, I lost the rest of my answer.")
    assert again.text.startswith("This is Alba.")


async def test_without_a_language_model_that_is_said(stack: Stack, new_customer: Any) -> None:
    """And no server far away is asked in its place (hazard H19)."""
    customer = await new_customer()
    async with client.session(stack.url, customer.key, TEXT) as session:
        answer = await session.write("colorless ideas")
        assert answer.error is None
        assert answer.text == "No language model is set up here, so I only know what my skills can do."
        assert (await session.write("what time is it")).text, "and skills answer as ever"
