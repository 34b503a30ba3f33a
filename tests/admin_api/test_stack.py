"""How the installation keeps its cells, and whom it believes about clients."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from agentvoicebox.admin_api import app
from agentvoicebox.admin_api import stack as module
from agentvoicebox.admin_api.node import Node
from agentvoicebox.config import settings
from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins import models
from agentvoicebox.tenancy import keys, sessions


class Cell:
    """Ends when it is told to; its starts fail as `failures` says."""

    name = "cell-1"
    url = ""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.starts = 0
        self.ended = asyncio.Event()

    async def start(self, tell: object = None) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.starts += 1
        self.url = f"ws://cell/{self.starts}"
        self.ended.clear()

    async def stop(self, grace: float = 0) -> None:
        self.ended.set()

    async def died(self) -> str:
        await self.ended.wait()
        return "core was ended"


class Bus:
    """Connects, unless it is to fail."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.url = ""
        self.tries = 0

    async def connect(self, url: str) -> None:
        self.tries += 1
        if self.failures:
            raise self.failures.pop(0)
        self.url = url

    def lose(self, reason: str) -> None:
        self.url = ""

    async def canary(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN", 0.01)


@pytest.mark.parametrize("failure", [RuntimeError("unforeseen"), ValueError("no JSON")])
async def test_a_cell_is_replaced_whatever_goes_wrong(failure: Exception, caplog: pytest.LogCaptureFixture):
    cell, bus = Cell(), Bus(Unavailable("not yet"), failure)
    await cell.start()
    keeper = asyncio.create_task(module.keep(cell, bus))  # type: ignore[arg-type]
    try:
        for start in (2, 3):
            await asyncio.sleep(0)
            cell.failures = [failure]
            cell.ended.set()
            async with asyncio.timeout(30):
                while bus.url != f"ws://cell/{start}":
                    await asyncio.sleep(0.01)
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
    assert bus.tries == 4
    assert "keeping cell-1 failed" in caplog.text
    assert "cell-1 cannot be reached: not yet" in caplog.text


async def test_a_bus_that_is_lost_again_is_no_longer_tried():
    cell, bus = Cell(), Bus(*[Unavailable("gone")] * 1000)
    await cell.start()
    keeper = asyncio.create_task(module.keep(cell, bus))  # type: ignore[arg-type]
    cell.ended.set()
    async with asyncio.timeout(30):
        while bus.tries < 2:
            await asyncio.sleep(0.01)
    keeper.cancel()
    await asyncio.gather(keeper, return_exceptions=True)
    tries = bus.tries
    await asyncio.sleep(0.05)
    assert bus.tries == tries


FORWARDED = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}


async def test_without_a_declared_proxy_nobody_speaks_for_others(stack: Any, customer: Any):
    async with httpx.AsyncClient(base_url=stack.url, headers=customer.headers | FORWARDED, timeout=60) as http:
        body = (await http.post("/api/v2/sessions")).json()
    assert body["ws_url"].startswith("ws://")
    row = await sessions.get(stack.database, customer.id, uuid.UUID(body["session_id"]))
    assert str(row.client_ip) == "127.0.0.1"


@pytest.mark.parametrize(
    ("flags", "seen"),
    [
        ({}, ("10.0.0.5", "http")),
        ({"trusted_proxies": "10.0.0.0/8"}, ("10.0.0.5", "http")),
        ({"behind_proxy": True}, ("10.0.0.5", "http")),
        ({"behind_proxy": True, "trusted_proxies": "10.0.0.0/8,::1"}, ("203.0.113.9", "https")),
    ],
)
async def test_only_declared_proxies_are_believed(tmp_path: Path, flags: dict[str, Any], seen: tuple[str, str]):
    scopes: list[dict[str, Any]] = []

    async def rest(scope: dict[str, Any], receive: Any, send: Any) -> None:
        scopes.append(scope)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    chosen = settings.load({"data": tmp_path, **flags}, environ={"HOME": str(tmp_path)})
    config = module.configured(chosen, Node(None, rest))
    config.load()
    transport = httpx.ASGITransport(config.loaded_app, client=("10.0.0.5", 5))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://node", headers=FORWARDED) as http:
        await http.get("/")
    assert (scopes[0]["client"][0], scopes[0]["scheme"]) == seen


@pytest.mark.parametrize(
    ("told", "kept"),
    [("unknown", None), ("_hidden", None), ("fe80::1%eth0", "fe80::1"), ("203.0.113.9", "203.0.113.9")],
)
async def test_a_client_without_an_address_gets_its_session(stack: Any, customer: Any, told: str, kept: str | None):
    gateway = stack.gateway
    rest = app.create(stack.database, gateway.door.keyring, stack.limiter, gateway.books.ledger)
    node = Node(gateway, rest)
    transport = httpx.ASGITransport(node, client=(told, 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://node", headers=customer.headers) as http:
        reply = await http.post("/api/v2/sessions")
    assert reply.status_code == 201
    row = await sessions.get(stack.database, customer.id, uuid.UUID(reply.json()["session_id"]))
    assert (row.client_ip and str(row.client_ip)) == kept


@pytest.mark.parametrize(
    ("engine", "stt"),
    [("auto", "agentvoicebox-stt-sphinx"), ("models", "agentvoicebox-stt-whisper")],
)
async def test_a_node_whose_workers_have_the_models_starts_without_any(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, stt: str
):
    async def fetch(*_: object, **__: object) -> None:
        pytest.fail("the node fetches models that it never loads")

    monkeypatch.setattr(models, "fetch_defaults", fetch)
    told: list[str] = []
    given = {
        "data": tmp_path,
        "models": tmp_path,
        "redis": redis_url,
        "speech": "queue",
        "engine": engine,
        "vad": "webrtc",
    }
    starting = module.Stack(settings.load(given, environ={"HOME": str(tmp_path)}), told.append)
    starting._answers = SimpleNamespace(key_of=None)  # type: ignore[assignment]
    try:
        await starting._load_engines()
        assert starting.engines.choice.stt.plugin == stt
    finally:
        await starting.stop()
    assert "avb worker --kinds stt" in told[-1]
    assert any("AVB_ENGINE=models" in line for line in told) == (engine == "auto")


async def test_a_node_that_works_itself_does_not_start_without_engines(tmp_path: Path):
    given = {"data": tmp_path, "models": tmp_path, "engine": "models"}
    starting = module.Stack(settings.load(given, environ={"HOME": str(tmp_path)}))
    starting._answers = SimpleNamespace(key_of=None)  # type: ignore[assignment]
    with pytest.raises(Unavailable, match="avb models pull"):
        await starting._load_engines()
    await starting.stop()


async def test_the_first_start_made_the_operators_key(stack: Any):
    assert stack.operator_key_made
    assert keys.operator_key(stack.settings.data)[1] is False


async def test_a_host_name_under_the_base_domain_names_its_tenant_and_no_other(stack: Any, new_customer: Any):
    mine, theirs = await new_customer(scopes=("admin",)), await new_customer()
    gateway = stack.gateway
    rest = app.create(stack.database, gateway.door.keyring, stack.limiter, gateway.books.ledger, base="voice.example")
    transport = httpx.ASGITransport(app=Node(gateway, rest), client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, headers=mine.headers) as http:
        answers = {}
        for host in (
            f"{mine.slug}.voice.example",
            f"{theirs.slug}.voice.example",
            "nobody.voice.example",
            "api.voice.example",
        ):
            answers[host] = await http.get(f"http://{host}/api/v2/tenants/me")
    own, foreign, unknown, platform = answers.values()
    assert (own.status_code, own.json()["slug"]) == (200, mine.slug)
    assert (foreign.status_code, foreign.json()["error"]) == (403, "permission_denied")
    assert unknown.status_code in (403, 404)
    assert (platform.status_code, platform.json()["slug"]) == (200, mine.slug)
