"""What a tenant's administrators have decided for all of it."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Request
from msgspec import UNSET, Meta, UnsetType

from agentvoicebox.admin_api import auth, schemas, speech
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import View
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.tenancy import settings
from agentvoicebox.tenancy.models import VoiceProvider

router = APIRouter(prefix="/api/v2/tenants", tags=["settings"])

Address = Annotated[str, Meta(max_length=2000)]
"""An https address; empty for none."""
Colour = Annotated[str, Meta(pattern="^#[0-9A-Fa-f]{6}$")]
Short = Annotated[str, Meta(min_length=1, max_length=50)]
Long = Annotated[str, Meta(min_length=1, max_length=100)]
Networks = Annotated[list[Annotated[str, Meta(max_length=50)]], Meta(max_length=settings.MOST_NETWORKS)]
"""Such as 192.0.2.0/24; none means from everywhere."""
Minutes = Annotated[int, Meta(ge=5, le=1440)]


class SettingsChange(Body):
    """The settings that are to be different."""

    logo_url: Address | UnsetType = UNSET
    primary_color: Colour | UnsetType = UNSET
    default_voice_provider: VoiceProvider | UnsetType = UNSET
    default_stt_model: Short | UnsetType = UNSET
    default_tts_voice: Short | UnsetType = UNSET
    default_llm_provider: Short | UnsetType = UNSET
    default_llm_model: Long | UnsetType = UNSET
    email_notifications_enabled: bool | UnsetType = UNSET
    webhook_url: Address | UnsetType = UNSET
    allowed_ip_ranges: Networks | UnsetType = UNSET
    require_mfa: bool | UnsetType = UNSET
    session_timeout_minutes: Minutes | UnsetType = UNSET


class AllSettings(Body):
    """All settings; what is left out goes back to its default."""

    logo_url: Address = ""
    primary_color: Colour = "#6366f1"
    default_voice_provider: VoiceProvider = VoiceProvider.LOCAL
    default_stt_model: Short = "base"
    default_tts_voice: Short = "am_onyx"
    default_llm_provider: Short = "groq"
    default_llm_model: Long = "llama-3.1-8b-instant"
    email_notifications_enabled: bool = True
    webhook_url: Address = ""
    allowed_ip_ranges: Networks = msgspec.field(default_factory=list)
    require_mfa: bool = False
    session_timeout_minutes: Minutes = 60


class Settings(View):
    """The settings of a tenant."""

    logo_url: str
    primary_color: str
    default_voice_provider: VoiceProvider
    default_stt_model: str
    default_tts_voice: str
    default_llm_provider: str
    default_llm_model: str
    email_notifications_enabled: bool
    webhook_url: str
    allowed_ip_ranges: list[str]
    require_mfa: bool
    session_timeout_minutes: int


@router.get("/me/settings", dependencies=auth.may("tenant.view"))
@router.get("/{tenant_id:uuid}/settings", dependencies=auth.may_there("tenant.view"))
async def read_settings(visit: Visiting, store: Store) -> Settings:
    """The settings."""
    return Settings.model_validate(await settings.get(store, visit.tenant_id))


_CHANGE = schemas.document(SettingsChange)
_ALL = schemas.document(AllSettings)


@router.patch("/me/settings", dependencies=auth.may("tenant.administrate"), openapi_extra=_CHANGE)
@router.patch("/{tenant_id:uuid}/settings", dependencies=auth.may_there("tenant.administrate"), openapi_extra=_CHANGE)
async def change_settings(request: Request, visit: Visiting, store: Store) -> Settings:
    """Change some settings; keys carry them within a second."""
    changes = schemas.changes(await schemas.read(request, SettingsChange))
    changed = await settings.patch(store, visit.tenant_id, changes, caller_ip=visit.lockable_ip)
    speech.forget(request, visit)
    return Settings.model_validate(changed)


@router.put("/me/settings", dependencies=auth.may("tenant.administrate"), openapi_extra=_ALL)
@router.put("/{tenant_id:uuid}/settings", dependencies=auth.may_there("tenant.administrate"), openapi_extra=_ALL)
async def replace_settings(request: Request, visit: Visiting, store: Store) -> Settings:
    """Replace all settings."""
    wanted = settings.Settings(**msgspec.structs.asdict(await schemas.read(request, AllSettings)))
    replaced = await settings.put(store, visit.tenant_id, wanted, caller_ip=visit.lockable_ip)
    speech.forget(request, visit)
    return Settings.model_validate(replaced)
