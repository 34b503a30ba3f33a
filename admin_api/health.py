"""Whether the node is alive, and whether it can do its work; it tells nobody anything else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from agentvoicebox.admin_api import auth

log = logging.getLogger(__name__)

Check = Callable[[], Awaitable[object]]
"""Raises when what it asks does not answer; says `degraded` when the node can do without for a while."""

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
    checks: Mapping[str, Check] = request.app.state.checks
    found = dict(zip(checks, await asyncio.gather(*(_ask(*part) for part in checks.items())), strict=True))
    good = "down" not in found.values()
    worst = next(state for state in ("down", "degraded", "ok") if state in found.values())
    ready = Ready(status=worst, checks=found)
    return JSONResponse(ready.model_dump(), 200 if good else 503)


async def _ask(name: str, check: Check) -> str:
    try:
        async with asyncio.timeout(PATIENCE):
            told = await check()
    except Exception as error:
        log.warning("%s does not answer: %s", name, type(error).__name__)
        return "down"
    return "degraded" if told == "degraded" else "ok"
