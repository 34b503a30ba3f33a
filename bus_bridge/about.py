"""What skills are told of the tenant they speak for, in a cell and on a device: `plugins.tenant` asks it.

All of it is read as that tenant, and remembered for a moment: skills ask in every turn.
"""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, date, datetime, time
from typing import Any

from sqlalchemy import and_, select

from agentvoicebox.bus_bridge.answers import Answers
from agentvoicebox.config.errors import BadInput, NotFound
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.metering import summed
from agentvoicebox.tenancy.models import Metric, Project, SessionMonth, SkillSettings, Tenant, UsageMinute
from agentvoicebox.tenancy.voices import SKILL

COUNTED = 30.0
"""Seconds for which what a tenant has used is remembered: adding up the minutes of a busy month takes a while."""


async def tell(
    database: Database,
    answers: Answers,
    tenant_id: uuid.UUID,
    project_id: uuid.UUID | None,
    session_id: uuid.UUID | None,
    persona: str,
    locale: str,
    skill: str,
) -> dict[str, Any]:
    """Whose conversation it is, who could answer in it, what the tenant has set for `skill`, and what it has used.

    `persona` is the name of who answers now. Settings are for the skill of that id; an empty one has none. Raises
    `BadInput` for what is no skill's id, `NotFound` for a tenant that is gone, `Unavailable`.
    """
    if skill and not SKILL.fullmatch(skill):
        raise BadInput("skill must be a skill's id, such as skill-account.agentvoicebox.", param="skill")

    async def read() -> dict[str, Any]:
        return await _chosen(database, tenant_id, project_id, skill)

    async def count() -> dict[str, Any]:
        return await _account(database, tenant_id)

    chosen, names, account = await asyncio.gather(
        answers.recent(tenant_id, ("about", project_id, skill), read),
        answers.names(tenant_id),
        answers.recent(tenant_id, ("account",), count, COUNTED),
    )
    return {
        **chosen,
        "session": str(session_id) if session_id is not None else None,
        "locale": locale,
        "persona": persona,
        "personas": [name for _, name in names],
        "skill": skill,
        "account": account,
    }


async def _chosen(database: Database, tenant_id: uuid.UUID, project_id: uuid.UUID | None, skill: str) -> dict[str, Any]:
    query = (
        select(Tenant.name, Tenant.slug, Project.name, SkillSettings.settings)
        .select_from(Tenant)
        .outerjoin(Project, and_(Project.tenant_id == Tenant.id, Project.id == project_id))
        .outerjoin(SkillSettings, and_(SkillSettings.tenant_id == Tenant.id, SkillSettings.skill_id == skill))
        .where(Tenant.id == tenant_id)
    )
    async with database.tenant(tenant_id) as session:
        found = (await session.execute(query)).one_or_none()
    if found is None:
        raise _gone()
    name, slug, project, settings = found
    return {
        "tenant": {"id": str(tenant_id), "name": name, "slug": slug},
        "project": {"id": str(project_id), "name": project} if project is not None else None,
        "settings": dict(settings or {}),
    }


async def _account(database: Database, tenant_id: uuid.UUID) -> dict[str, Any]:
    """Plan, and what was used of it since the first of the month in UTC. Sessions are counted as their limit counts."""
    first = datetime.now(UTC).date().replace(day=1)
    plan = (
        select(Tenant.tier, Tenant.max_sessions_per_month, SessionMonth.sessions)
        .select_from(Tenant)
        .outerjoin(SessionMonth, and_(SessionMonth.tenant_id == Tenant.id, SessionMonth.month == first))
        .where(Tenant.id == tenant_id)
    )
    used = (
        select(UsageMinute.metric, summed())
        .where(UsageMinute.minute >= datetime.combine(first, time(), UTC))
        .group_by(UsageMinute.metric)
    )
    async with database.tenant(tenant_id) as session:
        found = (await session.execute(plan)).one_or_none()
        amounts = {metric: float(quantity) for metric, quantity in await session.execute(used)}
    if found is None:
        raise _gone()
    tier, most, sessions = found
    return {
        "plan": str(tier),
        "used": {str(metric): amounts.get(metric, 0.0) for metric in Metric} | {str(Metric.SESSIONS): sessions or 0},
        "limits": {str(metric): None for metric in Metric} | {str(Metric.SESSIONS): most},
        "resets": _next_month(first).isoformat(),
    }


def _next_month(first: date) -> date:
    return date(first.year + first.month // 12, first.month % 12 + 1, 1)


def _gone() -> NotFound:
    return NotFound("There is no such tenant.", code="tenant_not_found")
