"""What a tenant has chosen: what its devices are told of it, and how the node listens and speaks for them."""

from __future__ import annotations

import dataclasses
import uuid
from dataclasses import dataclass

from agentvoicebox.bus_bridge.engines import Engines, manner
from agentvoicebox.bus_bridge.models import SessionSettings
from agentvoicebox.plugins.device import wire
from agentvoicebox.plugins.device.choices import Choices, WakeWord
from agentvoicebox.tenancy import personas, settings, tenants, voices, wake_words
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import Persona
from agentvoicebox.tenancy.voices import VoiceConfig


@dataclass(frozen=True, slots=True)
class House:
    """What holds for all devices of one tenant."""

    name: str
    voice: VoiceConfig
    stt_model: str
    """The defaults of the tenant's settings."""
    tts_voice: str
    personas: tuple[str, ...]
    """Names of those that can be asked for."""
    wake_words: tuple[WakeWord, ...]


@dataclass(frozen=True, slots=True)
class Manner:
    """How a device listens and speaks while a certain persona answers on it."""

    choices: Choices
    etag: str
    frame: str
    """The `Configured` that tells of it."""
    settings: SessionSettings


async def read(database: Database, tenant_id: uuid.UUID) -> House:
    """What the tenant has chosen now. Raises `NotFound`, `Unavailable`."""
    tenant = await tenants.get(database, tenant_id)
    decided = await settings.get(database, tenant_id)
    voice = await voices.get(database, tenant_id)
    named = await personas.names(database, tenant_id)
    rows = await wake_words.active(database, tenant_id)
    own = sorted((row.phrase, float(row.sensitivity), row.model_ref or "", str(row.id)) for row in rows)
    return House(
        name=tenant.name,
        voice=voice,
        stt_model=decided.default_stt_model,
        tts_voice=decided.default_tts_voice,
        personas=tuple(name for _, name in named),
        wake_words=tuple(WakeWord(*each) for each in own) or (WakeWord(voice.wake_word.lower()),),
    )


def compose(house: House, persona: Persona | None, engines: Engines) -> Manner:
    """How the tenant's devices listen and speak when this persona answers, or None the tenant's own assistant."""
    spoken = engines.begin(house.voice, house.stt_model, house.tts_voice)
    if persona is not None:
        spoken = dataclasses.replace(spoken, **manner(persona, engines.settings.languages))
    choices = Choices(
        tenant=house.name,
        language=spoken.language,
        voice="" if spoken.voice == "auto" else spoken.voice,
        speed=spoken.speed,
        persona=persona.name if persona is not None else house.voice.persona_name,
        personas=house.personas,
        wake_words=house.wake_words,
    )
    etag = choices.etag
    return Manner(choices, etag, wire.encode(wire.Configured(etag, choices.as_dict())), spoken)


def speaking(settings: SessionSettings, language: str, languages: tuple[str, ...]) -> SessionSettings:
    """The settings with another language, where that is one of `languages`; devices write it `en-us` as well."""
    found = next((each for each in languages if each.lower() == language.lower()), None)
    return settings if found is None else dataclasses.replace(settings, language=found)
