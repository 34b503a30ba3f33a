"""What routes need of the application: its parts, by name."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from agentvoicebox.tenancy.database import Database


async def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


Store = Annotated[Database, Depends(_database)]
