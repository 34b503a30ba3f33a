"""How a tenant's assistant sounds and listens."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, NotFound
from agentvoicebox.tenancy import audit, models
from agentvoicebox.tenancy.checks import number, public_url, real, shaped, words, yes_or_no
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import Action

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z]{4})?(-([A-Za-z]{2}|[0-9]{3}))?(-[A-Za-z0-9]{5,8})?")
SKILL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,99}")
MOST_SKILLS = 200
MOST_FALLBACKS = 5

WHISPER_MODELS = ("tiny", "base", "small", "medium", "large-v2", "large-v3")
"""From the fastest to the most accurate."""

PROVIDERS = ("openai", "anthropic", "groq", "ollama", "compatible")
"""Who has language models: `compatible` is any address that speaks OpenAI's protocol."""


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
    stt_model: str = "auto"
    """A Whisper model, tiny to large-v3; `auto` is the `default_stt_model` of the tenant's settings."""
    stt_language: str = ""
    """What is spoken: a BCP 47 tag, `auto` to detect it, empty for `language`."""
    stt_vad: bool = True
    """Whether silence within an utterance is cut out before it is recognised."""
    stt_fallbacks: tuple[str, ...] = ()
    """Engines that are asked, in this order, when `stt` fails."""
    tts_fallbacks: tuple[str, ...] = ()
    llm_provider: str = "auto"
    """One of `PROVIDERS`; `auto` is the `default_llm_provider` of the tenant's settings."""
    llm_model: str = "auto"
    """A model of that provider's; `auto` is the `default_llm_model` of the tenant's settings."""
    llm_fallbacks: tuple[str, ...] = ()
    """Providers that are asked, in this order, when `llm_provider` fails: `provider/model`."""
    llm_url: str = ""
    """Where the provider `compatible` is: an https address; empty for the operator's."""
    llm_temperature: float = 0.7
    """0 to 2: from the most likely words to surprising ones."""
    llm_max_tokens: int = 1024
    """256 to 4096 tokens an answer."""

    def __post_init__(self) -> None:
        for param in ("voice", "stt", "tts"):
            shaped(getattr(self, param), param, NAME, "a name of letters, digits and . _ + -, at most 64 characters")
        shaped(self.language, "language", LANGUAGE, "a language tag such as en-US")
        words(self.wake_word, "wake_word", 2, 64)
        words(self.persona_name, "persona_name", 1, 100)
        check_speed(self.speed)
        if not isinstance(self.disabled_skills, tuple) or len(self.disabled_skills) > MOST_SKILLS:
            raise BadInput(f"disabled_skills must be at most {MOST_SKILLS} skill ids.", param="disabled_skills")
        for skill in self.disabled_skills:
            shaped(skill, "disabled_skills", SKILL, "skill ids such as skill-account.agentvoicebox")
        self._check_hearing()
        self._check_language_model()

    def _check_hearing(self) -> None:
        if self.stt_model not in ("auto", *WHISPER_MODELS):
            raise BadInput(f"stt_model must be auto, {', '.join(WHISPER_MODELS)}.", param="stt_model")
        if self.stt_language not in ("", "auto"):
            shaped(self.stt_language, "stt_language", LANGUAGE, "a language tag such as en-US, or auto")
        yes_or_no(self.stt_vad, "stt_vad")
        for param in ("stt_fallbacks", "tts_fallbacks"):
            for name in _several(getattr(self, param), param):
                shaped(name, param, NAME, "names of engines")

    def _check_language_model(self) -> None:
        if self.llm_provider not in ("auto", *PROVIDERS):
            raise BadInput(f"llm_provider must be auto, {', '.join(PROVIDERS)}.", param="llm_provider")
        shaped(self.llm_model, "llm_model", MODEL, "a model of letters, digits and . _ : / + -, at most 100 characters")
        for name in _several(self.llm_fallbacks, "llm_fallbacks"):
            provider, _, model = str(name).partition("/")
            if provider not in PROVIDERS or not MODEL.fullmatch(model):
                raise BadInput("llm_fallbacks must be like groq/llama-3.1-8b-instant.", param="llm_fallbacks")
        if self.llm_url != "":
            public_url(self.llm_url, "llm_url")
        if isinstance(self.llm_temperature, bool) or not isinstance(self.llm_temperature, int | float):
            raise BadInput("llm_temperature must be a number.", param="llm_temperature")
        if not 0 <= self.llm_temperature <= 2:
            raise BadInput("llm_temperature must be 0 to 2.", param="llm_temperature")
        number(self.llm_max_tokens, "llm_max_tokens", 256, 4096)


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
        await _write(session, tenant_id, await _read(session), config)


async def patch(database: Database, tenant_id: uuid.UUID, changes: Mapping[str, Any]) -> VoiceConfig:
    """Change these fields of `VoiceConfig` and leave the others; sessions made from now on use them.

    Raises `BadInput` for an unknown field or a value without sense, `NotFound` for an unknown tenant.
    """
    for name in changes:
        if name not in VoiceConfig.__dataclass_fields__:
            raise BadInput(f"There is no choice {str(name)[:50]!r}.", param=str(name)[:50])
    async with database.tenant(tenant_id) as session:
        # Locked, so that of two changes at once neither is written over.
        before = await _read(session, lock=True)
        if before is None:
            raise NotFound("There is no such tenant.", code="tenant_not_found")
        after = replace(before, **changes)
        await _write(session, tenant_id, before, after)
    return after


async def _write(session: AsyncSession, tenant_id: uuid.UUID, before: VoiceConfig | None, after: VoiceConfig) -> None:
    """Write the choices, and the audit line about those that differ."""
    await store(session, tenant_id, after)
    old, new = asdict(before) if before is not None else {}, asdict(after)
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
    chosen = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    statement = insert(models.VoiceConfig).values(tenant_id=tenant_id, **chosen)
    await session.execute(
        statement.on_conflict_do_update(index_elements=["tenant_id"], set_={**chosen, "updated_at": func.now()})
    )


def check_speed(speed: object) -> None:
    """Raise `BadInput` unless a voice can speak at that many times its own speed."""
    real(speed, "speed", 0.5, 2.0)


async def _read(session: AsyncSession, *, lock: bool = False) -> VoiceConfig | None:
    query = select(models.VoiceConfig)
    row = (await session.execute(query.with_for_update() if lock else query)).scalar_one_or_none()
    if row is None:
        return None
    stored: dict[str, Any] = {field.name: getattr(row, field.name) for field in fields(VoiceConfig)}
    chosen: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()
    }
    return VoiceConfig(**chosen)


def _several(given: object, param: str) -> tuple[object, ...]:
    if not isinstance(given, tuple) or len(given) > MOST_FALLBACKS:
        raise BadInput(f"{param} must be a list of at most {MOST_FALLBACKS}.", param=param)
    return given
