"""The store for a command that comes and goes, whether `avb up` runs on the same directory or not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import TypeVar

from agentvoicebox.config.settings import Settings
from agentvoicebox.tenancy import database as stores
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.embedded import serving

T = TypeVar("T")


def use(settings: Settings, work: Callable[[Database], Awaitable[T]]) -> T:
    """Run `work` on the store, and start and stop an embedded one around it where none is running."""
    with ExitStack() as stack:
        if settings.database is None:
            address: stores.Address = stack.enter_context(serving(settings.data)).url
        else:
            address = stores.external(settings.database)

        async def run() -> T:
            await stores.prepare(address)
            database = Database(address)
            try:
                return await work(database)
            finally:
                await database.close()

        return asyncio.run(run())
