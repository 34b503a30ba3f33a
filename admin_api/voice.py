"""How a tenant's assistant sounds: its choices, the voices there are, and speech made from text."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from msgspec import UNSET, Meta, UnsetType

from agentvoicebox.admin_api import auth, schemas, speech
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import View
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.config.errors import NotFound
from agentvoicebox.tenancy import usage, voices
from agentvoicebox.tenancy.usage import Period

router = APIRouter(prefix="/api/v2/voice", tags=["voice"])

Engine = Annotated[str, Meta(pattern=f"^{voices.NAME.pattern}$")]
"""The ovos-plugin-manager name of an engine, or `auto`."""
Voice = Annotated[str, Meta(pattern=f"^{voices.NAME.pattern}$")]
Language = Annotated[str, Meta(pattern=f"^{voices.LANGUAGE.pattern}$")]
"""A BCP 47 tag."""
Speed = Annotated[float, Meta(ge=0.5, le=2.0)]
Engines = Annotated[list[Engine], Meta(max_length=voices.MOST_FALLBACKS)]


class VoiceChange(Body):
    """What is to be different about how the assistant sounds and listens."""

    voice: Voice | UnsetType = UNSET
    speed: Speed | UnsetType = UNSET
    language: Language | UnsetType = UNSET
    wake_word: Annotated[str, Meta(min_length=2, max_length=64)] | UnsetType = UNSET
    persona_name: Annotated[str, Meta(min_length=1, max_length=100)] | UnsetType = UNSET
    disabled_skills: (
        Annotated[list[Annotated[str, Meta(pattern=f"^{voices.SKILL.pattern}$")]], Meta(max_length=voices.MOST_SKILLS)]
        | UnsetType
    ) = UNSET
    stt: Engine | UnsetType = UNSET
    stt_fallbacks: Engines | UnsetType = UNSET
    tts: Engine | UnsetType = UNSET
    tts_fallbacks: Engines | UnsetType = UNSET


class VoiceConfig(View):
    """How the assistant sounds and listens. More about listening is at `/stt/config`."""

    voice: str
    speed: float
    language: str
    wake_word: str
    persona_name: str
    disabled_skills: list[str]
    stt: str
    stt_fallbacks: list[str]
    tts: str
    tts_fallbacks: list[str]


class OneVoice(View):
    """A voice that can be chosen."""

    name: str
    language: str
    gender: str


class Voices(View):
    """The voices of the node's own engine."""

    items: list[OneVoice]


class Speech(Body):
    """What is to be said, and how; what is left out is as the tenant has chosen."""

    text: Annotated[str, Meta(max_length=speech.LONGEST_TEXT)]
    voice: Voice | UnsetType = UNSET
    speed: Speed | UnsetType = UNSET
    language: Language | UnsetType = UNSET
    format: Literal["wav", "pcm"] = "wav"


class VoiceUsage(View):
    """What was spoken and understood from `since` up to, and without, `until`."""

    period: Period
    since: datetime
    until: datetime
    stt_minutes: float
    tts_minutes: float
    llm_input_tokens: int
    llm_output_tokens: int


@router.get("/config", dependencies=auth.may("voice_config.view"))
async def read_voice_config(visit: Visiting, store: Store) -> VoiceConfig:
    """How the assistant sounds and listens."""
    return VoiceConfig.model_validate(await voices.get(store, visit.tenant_id))


@router.patch("/config", dependencies=auth.may("voice_config.edit"), openapi_extra=schemas.document(VoiceChange))
async def change_voice_config(request: Request, visit: Visiting, store: Store) -> VoiceConfig:
    """Change some of it; sessions that begin from now on have it."""
    changes = schemas.changes(await schemas.read(request, VoiceChange))
    changed = await speech.change(store, visit, changes, {name: name for name in VoiceConfig.model_fields})
    speech.forget(request, visit)
    return VoiceConfig.model_validate(changed)


@router.get("/voices", dependencies=auth.may("voice_config.view"))
async def list_voices(request: Request) -> Voices:
    """The voices there are."""
    return Voices(items=[OneVoice.model_validate(each) for each in await speech.engines(request).voices()])


@router.get(
    "/voices/{name}/preview",
    dependencies=auth.may("voice_config.view"),
    response_class=Response,
    responses=speech.WAV,
)
async def preview_voice(
    request: Request,
    visit: Visiting,
    store: Store,
    name: str,
    speed: Annotated[float, Query(ge=0.5, le=2.0)] = 1.0,
) -> Response:
    """How a voice sounds, at that many times its own speed; metered as speech."""
    found = next((each for each in await speech.engines(request).voices() if each.name == name), None)
    if found is None:
        raise NotFound("There is no such voice; see /api/v2/voice/voices.", param="name")
    begin = await speech.begin(request, visit, store)
    # Of the engine whose voice it is, whichever the tenant has chosen.
    wanted = replace(begin, voice=name, speed=speed, language=found.language or begin.language, tts=("auto",))
    return await speech.clip(request, visit, wanted)


_SPOKEN = {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("audio/wav", "audio/pcm")}}


@router.post(
    "/tts",
    dependencies=auth.may("tenant.create_session"),
    openapi_extra=schemas.document(Speech),
    response_class=Response,
    responses={200: {"description": "Audio, as it is made.", **_SPOKEN}},
)
async def speak(request: Request, visit: Visiting, store: Store) -> Response:
    """Say a text: 16-bit mono, sent while it is made, so a WAV header says 0xFFFFFFFF for its length."""
    wanted = await schemas.read(request, Speech)
    given = {name: value for name, value in schemas.changes(wanted).items() if name in ("voice", "speed", "language")}
    begin = replace(await speech.begin(request, visit, store), **given)
    return await speech.streamed(request, visit, wanted.text, begin, wav=wanted.format == "wav")


@router.get("/usage", dependencies=auth.may("tenant.view_usage"))
async def read_voice_usage(visit: Visiting, store: Store, period: Period = Period.MONTH) -> VoiceUsage:
    """How much was spoken and understood."""
    found = await usage.summary(store, visit.tenant_id, period)
    return VoiceUsage(
        period=found.period,
        since=found.since,
        until=found.until,
        stt_minutes=found.amounts.stt_audio_seconds / 60,
        tts_minutes=found.amounts.tts_audio_seconds / 60,
        llm_input_tokens=found.amounts.llm_input_tokens,
        llm_output_tokens=found.amounts.llm_output_tokens,
    )
