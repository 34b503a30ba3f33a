"""An installation of two cells: each tenant has its own for good, both answer, and a restart tidies up."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from agentvoicebox.admin_api.stack import Stack
from agentvoicebox.bus_bridge import client
from agentvoicebox.config import settings
from agentvoicebox.tenancy import keys, sessions, tenants


@asynccontextmanager
async def running(data: Path) -> AsyncIterator[Stack]:
    flags = {"data": data, "port": 0, "engine": "offline", "cells": 2}
    stack = Stack(settings.load(flags, environ={"HOME": str(data)}))
    await stack.start()
    try:
        yield stack
    finally:
        await stack.stop()


@asynccontextmanager
async def overheard(stack: Stack, connect: Callable) -> AsyncIterator[dict[str, set[str]]]:
    """Which tenants each cell meets."""
    met: dict[str, set[str]] = {}
    ready = []

    async def listen(name: str) -> None:
        met[name] = set()
        async with connect(stack.cells[name].url) as bus:
            ready.append(name)
            while True:
                if tenant := (await bus.receive()).get("context", {}).get("tenant_id"):
                    met[name].add(tenant)

    listeners = [asyncio.create_task(listen(name)) for name in stack.cells]
    try:
        async with asyncio.timeout(60):
            while len(ready) < len(listeners):
                await asyncio.sleep(0.01)
        yield met
    finally:
        for listener in listeners:
            listener.cancel()
        await asyncio.gather(*listeners, return_exceptions=True)


async def ask(stack: Stack, key: str) -> str:
    async with client.session(stack.url, key, {"modality": "text"}) as session:
        return (await session.write("who am i talking to")).text


async def test_a_tenant_always_meets_the_same_cell_and_both_answer(tmp_path: Path, connect):
    customers: dict[str, str] = {}
    async with running(tmp_path) as stack, overheard(stack, connect) as met:
        while not all(met.values()):
            assert len(customers) < 40, "one cell is never chosen"
            slug = f"t-{uuid.uuid4().hex[:12]}"
            tenant = await tenants.create(stack.database, slug, f"Tenant {slug}")
            key = (await keys.issue(stack.database, tenant.id, "test", ("realtime",))).key
            customers[str(tenant.id)] = key
            for _ in range(2):
                assert slug in await ask(stack, key)
        left = await sessions.create(stack.database, tenant.id)
        await sessions.activate(stack.database, tenant.id, left.id)  # as a crash leaves it
    async with running(tmp_path) as stack, overheard(stack, connect) as again:
        for key in customers.values():
            assert await ask(stack, key)
        found = await sessions.get(stack.database, tenant.id, left.id)
    assert (found.status, found.termination_reason) == ("terminated", "node_restarted")
    assert sorted(met) == ["cell-1", "cell-2"]
    assert not set.intersection(*met.values())
    assert set.union(*met.values()) == set(customers)
    assert again == met
