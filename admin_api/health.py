"""Whether the node is alive, and whether it can do its work; it tells nobody anything else."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from agentvoicebox.admin_api import auth

log = logging.getLogger(__name__)

Check = Callable[[], Awaitable[object]]
"""Raises when what it asks does not answer; says `degraded` when the node can do without for a while."""

FRESH = 1.0
"""Seconds for which an answer is good."""

PATIENCE = 3.0
"""Seconds that a part has to answer."""

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    """The process answers."""

    status: str = "ok"


class Ready(BaseModel):
    """What the node needs, part by part: `ok`, `degraded` (it serves on, by what it knows itself) or `down` (503)."""

    status: str
    checks: dict[str, str]


@router.get("/health", dependencies=auth.public())
async def read_health() -> Alive:
    """The process answers."""
    return Alive()


@router.get("/health/ready", dependencies=auth.public(), response_model=Ready, responses={503: {"model": Ready}})
async def read_readiness(request: Request) -> JSONResponse:
    """Whether every part that the node needs answers."""
    readiness: Readiness = request.app.state.readiness
    ready = await readiness.read()
    return JSONResponse(ready.model_dump(), 503 if ready.status == "down" else 200)


class Readiness:
    """What was found out last, for whoever asks within a second: anybody may ask, and the parts have work to do."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = checks
        self._until = 0.0
        self._finding: asyncio.Task[Ready] | None = None

    async def read(self) -> Ready:
        """How the node is."""
        if self._finding is None or (self._finding.done() and time.monotonic() >= self._until):
            self._finding = asyncio.create_task(self._find())
        return await asyncio.shield(self._finding)

    async def _find(self) -> Ready:
        found = await asyncio.gather(*(_ask(*part) for part in self._checks.items()))
        self._until = time.monotonic() + FRESH
        worst = next(state for state in ("down", "degraded", "ok") if state in found)
        return Ready(status=worst, checks=dict(zip(self._checks, found, strict=True)))


async def _ask(name: str, check: Check) -> str:
    try:
        async with asyncio.timeout(PATIENCE):
            told = await check()
    except Exception as error:
        log.warning("%s does not answer: %s", name, type(error).__name__)
        return "down"
    return "degraded" if told == "degraded" else "ok"
