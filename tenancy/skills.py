"""What tenants set for skills: one small document each, which the skill reads and nobody else understands."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete as erase
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert

from agentvoicebox.config.errors import BadInput, Conflict
from agentvoicebox.tenancy import audit, tenants
from agentvoicebox.tenancy.checks import document, shaped
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import Action, SkillSettings
from agentvoicebox.tenancy.voices import SKILL

MOST = 200
"""Skills that one tenant has settings for."""
MOST_BYTES = 16 * 1024
"""Of one skill's settings, as JSON."""

_SHOWN = 50
"""Names of fields that one audit line tells."""

_COUNT = select(func.count()).select_from(SkillSettings)


async def settings(database: Database, tenant_id: uuid.UUID, skill_id: str) -> dict[str, Any]:
    """What the tenant has set for a skill; empty when that is nothing. Raises `BadInput`."""
    _check(skill_id)
    query = select(SkillSettings.settings).where(SkillSettings.skill_id == skill_id)
    async with database.tenant(tenant_id) as session:
        found = (await session.execute(query)).scalar_one_or_none()
    return dict(found or {})


async def set_settings(
    database: Database, tenant_id: uuid.UUID, skill_id: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Replace what the tenant has set for a skill, of at most 16 KiB as JSON; an empty object forgets it.

    The audit log tells which fields have changed, and nothing of what is in them. Raises `BadInput`, `TooLarge`,
    `NotFound` for an unknown tenant, `Conflict` (`too_many_skills`) when there are settings for 200 others.
    """
    _check(skill_id)
    made = document(settings, "settings", MOST_BYTES)
    if not all(isinstance(name, str) for name in made):
        raise BadInput("settings must be an object whose names are text.", param="settings")
    async with database.tenant(tenant_id) as session:
        await tenants.lock(session, tenant_id)
        query = select(SkillSettings.settings).where(SkillSettings.skill_id == skill_id)
        stored = (await session.execute(query)).scalar_one_or_none()
        changed = _changed(stored or {}, made)
        if not changed:
            return made
        if not made:
            await session.execute(erase(SkillSettings).where(SkillSettings.skill_id == skill_id))
        else:
            if stored is None and (await session.scalar(_COUNT) or 0) >= MOST:
                raise Conflict(
                    f"A tenant has settings for at most {MOST} skills; empty those of one first.",
                    code="too_many_skills",
                )
            statement = insert(SkillSettings).values(tenant_id=tenant_id, skill_id=skill_id, settings=made)
            await session.execute(
                statement.on_conflict_do_update(
                    index_elements=["tenant_id", "skill_id"], set_={"settings": made, "updated_at": func.now()}
                )
            )
        more = [f"and {len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else []
        await audit.append(
            session,
            Action.UPDATE,
            "skill_settings",
            skill_id,
            f"Changed the settings of {skill_id}",
            details={"fields": [*(name[:100] for name in changed[:_SHOWN]), *more]},
        )
    return made


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The names of fields that differ. As JSON: 1 and true are equal to Python."""
    was, now = ({name: json.dumps(value, sort_keys=True) for name, value in each.items()} for each in (old, new))
    return sorted(name for name in {*was, *now} if was.get(name) != now.get(name))


def _check(skill_id: object) -> None:
    shaped(skill_id, "skill_id", SKILL, "a skill id such as skill-account.agentvoicebox")
