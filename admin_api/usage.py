"""What a tenant used."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterator
from datetime import date, datetime

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from agentvoicebox.admin_api import auth
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import CSV, View, attachment
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.tenancy import usage
from agentvoicebox.tenancy.usage import Period

router = APIRouter(prefix="/api/v2/usage", tags=["usage"])


class Amounts(View):
    """What was used of everything; levels with their greatest value."""

    requests: int
    sessions: int
    session_seconds: float
    stt_audio_seconds: float
    tts_audio_seconds: float
    audio_minutes: float
    llm_input_tokens: int
    llm_output_tokens: int
    storage_bytes: int
    concurrent_sessions_peak: int


class Summary(View):
    """What was used from `since` up to, and without, `until`."""

    period: Period
    since: datetime
    until: datetime
    amounts: Amounts


class Day(View):
    """What was used on a day in UTC."""

    date: date
    amounts: Amounts


class Daily(View):
    """Every day of a period, the oldest first."""

    period: Period
    items: list[Day]


@router.get("", dependencies=auth.may("tenant.view_usage"))
async def read_usage(
    visit: Visiting, store: Store, period: Period = Period.MONTH, project_id: uuid.UUID | None = None
) -> Summary:
    """What was used in the period, of one project or in all."""
    return Summary.model_validate(await usage.summary(store, visit.tenant_id, period, project_id))


@router.get("/daily", dependencies=auth.may("tenant.view_usage"))
async def read_daily_usage(
    visit: Visiting, store: Store, period: Period = Period.MONTH, project_id: uuid.UUID | None = None
) -> Daily:
    """What was used on each day of the period, in UTC."""
    days = await usage.daily(store, visit.tenant_id, period, project_id)
    return Daily(period=period, items=[Day.model_validate(day) for day in days])


@router.get("/export", dependencies=auth.may("tenant.view_usage"), response_class=StreamingResponse, responses=CSV)
async def export_usage(
    visit: Visiting, store: Store, period: Period = Period.MONTH, project_id: uuid.UUID | None = None
) -> StreamingResponse:
    """The days of the period as a table."""
    days = await usage.daily(store, visit.tenant_id, period, project_id)
    return await attachment("usage", "csv", _each(usage.csv_rows(days)))


async def _each(lines: Iterator[str]) -> AsyncGenerator[str | bytes, None]:
    for line in lines:
        yield line
