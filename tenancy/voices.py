"""How a tenant's assistant sounds and listens."""

from __future__ import annotations

import math
import re
import uuid
from dataclasses import asdict, dataclass, fields

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, NotFound
from agentvoicebox.tenancy import audit, models
from agentvoicebox.tenancy.checks import shaped, words
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import Action

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z]{4})?(-([A-Za-z]{2}|[0-9]{3}))?(-[A-Za-z0-9]{5,8})?")
_SKILL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MOST_SKILLS = 200


@dataclass(frozen=True, slots=True)
class VoiceConfig:
    """One tenant's choices; a value that makes no sense raises `BadInput` naming its field."""

    voice: str = "auto"
    """A voice of the engine; `auto` is the engine's own choice for the language."""
    speed: float = 1.0
    """0.5 to 2.0 times the voice's own."""
    language: str = "en-US"
    """A BCP 47 tag."""
    wake_word: str = "hey mycroft"
    persona_name: str = "Assistant"
    disabled_skills: tuple[str, ...] = ()
    """OVOS skill ids that never answer this tenant."""
    stt: str = "auto"
    """An engine's ovos-plugin-manager name; `auto` is the best one here."""
    tts: str = "auto"

    def __post_init__(self) -> None:
        for param in ("voice", "stt", "tts"):
            shaped(getattr(self, param), param, _NAME, "a name of letters, digits and . _ + -, at most 64 characters")
        shaped(self.language, "language", _LANGUAGE, "a language tag such as en-US")
        words(self.wake_word, "wake_word", 2, 64)
        words(self.persona_name, "persona_name", 1, 100)
        if isinstance(self.speed, bool) or not isinstance(self.speed, int | float) or not math.isfinite(self.speed):
            raise BadInput("speed must be a number.", param="speed")
        if not 0.5 <= self.speed <= 2.0:
            raise BadInput("speed must be 0.5 to 2.0.", param="speed")
        if not isinstance(self.disabled_skills, tuple) or len(self.disabled_skills) > _MOST_SKILLS:
            raise BadInput(f"disabled_skills must be at most {_MOST_SKILLS} skill ids.", param="disabled_skills")
        for skill in self.disabled_skills:
            shaped(skill, "disabled_skills", _SKILL, "skill ids such as skill-account.agentvoicebox")


async def get(database: Database, tenant_id: uuid.UUID) -> VoiceConfig:
    """The tenant's choices. Raises `NotFound` for an unknown tenant."""
    async with database.tenant(tenant_id) as session:
        found = await _read(session)
    if found is None:
        raise NotFound("There is no such tenant.", code="tenant_not_found")
    return found


async def put(database: Database, tenant_id: uuid.UUID, config: VoiceConfig) -> None:
    """Replace the tenant's choices; sessions made from now on use them. Raises `NotFound` for an unknown tenant."""
    async with database.tenant(tenant_id) as session:
        if await session.get(models.Tenant, tenant_id) is None:
            raise NotFound("There is no such tenant.", code="tenant_not_found")
        before = await _read(session)
        await store(session, tenant_id, config)
        old, new = asdict(before) if before is not None else {}, asdict(config)
        if changed := [name for name in new if old.get(name) != new[name]]:
            await audit.append(
                session,
                Action.SETTINGS_CHANGE,
                "voice_config",
                tenant_id,
                f"Changed {', '.join(changed)}",
                old={name: old.get(name) for name in changed},
                new={name: new[name] for name in changed},
            )


async def store(session: AsyncSession, tenant_id: uuid.UUID, config: VoiceConfig) -> None:
    """Write the choices within a transaction of the caller's."""
    chosen = {**asdict(config), "disabled_skills": list(config.disabled_skills)}
    statement = insert(models.VoiceConfig).values(tenant_id=tenant_id, **chosen)
    await session.execute(
        statement.on_conflict_do_update(index_elements=["tenant_id"], set_={**chosen, "updated_at": func.now()})
    )


async def _read(session: AsyncSession) -> VoiceConfig | None:
    row = (await session.execute(select(models.VoiceConfig))).scalar_one_or_none()
    if row is None:
        return None
    chosen = {field.name: getattr(row, field.name) for field in fields(VoiceConfig)}
    return VoiceConfig(**{**chosen, "disabled_skills": tuple(row.disabled_skills)})
