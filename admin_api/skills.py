"""Skills: what a tenant has set for each of them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request

from agentvoicebox.admin_api import auth, schemas
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import View
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.tenancy import skills, voices

router = APIRouter(prefix="/api/v2/skills", tags=["skills"])

SkillId = Annotated[str, Path(pattern=f"^{voices.SKILL.pattern}$", description="As OVOS names the skill.")]


class NewSettings(Body):
    """All that is to be set for a skill."""

    settings: dict[str, Any]
    """At most 16 KiB as JSON."""


class Settings(View):
    """What is set for a skill; empty where nothing is."""

    skill_id: str
    settings: dict[str, Any]


@router.get("/{skill_id}/settings", dependencies=auth.may("skill.view"))
async def read_skill_settings(visit: Visiting, store: Store, skill_id: SkillId) -> Settings:
    """What the tenant has set for a skill, whether or not that is installed."""
    return Settings(skill_id=skill_id, settings=await skills.settings(store, visit.tenant_id, skill_id))


@router.put("/{skill_id}/settings", dependencies=auth.may("skill.edit"), openapi_extra=schemas.document(NewSettings))
async def set_skill_settings(request: Request, visit: Visiting, store: Store, skill_id: SkillId) -> Settings:
    """Set all of a skill's settings anew; the skill has them from its next question on, on devices too."""
    wanted = await schemas.read(request, NewSettings)
    kept = await skills.set_settings(store, visit.tenant_id, skill_id, wanted.settings)
    return Settings(skill_id=skill_id, settings=kept)
