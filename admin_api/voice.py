"""How a tenant's assistant sounds: its choices, the voices there are, and speech made from text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from msgspec import UNSET, Meta, UnsetType

from agentvoicebox.admin_api import auth, schemas, speech
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import View
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.bus_bridge import engines
from agentvoicebox.config.errors import NotFound
from agentvoicebox.plugins.pool import EngineMetrics
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


class Doing(View):
    """How one engine does, on this node, for all of its tenants together; times are seconds.

    How much others use is nobody's business: counts, and what is under way, are for the operator alone.
    """

    engine: str
    model: str
    average_seconds: float | None
    """From the question to the whole answer, waiting included; None before the first answer."""
    average_audio_seconds: float | None
    failure_rate: float | None
    """0 to 1, of what was not merely a guess; None before the first question."""
    requests: int | None = None
    failures: int | None = None
    waiting: int | None = None
    """Requests whose turn has not come yet."""
    working: int | None = None
    """Calls that it does now."""
    loaded: int | None = None
    """Configurations of it that are in memory."""
    memory: int | None = None
    """Bytes that they hold."""
    open_circuits: int | None = None
    """Configurations of it that are left alone, for they keep failing."""


class VoiceMetrics(View):
    """How the voices of this node do."""

    items: list[Doing]


@router.get("/config", dependencies=auth.may("voice_config.view"))
async def read_voice_config(visit: Visiting, store: Store) -> VoiceConfig:
    """How the assistant sounds and listens."""
    return VoiceConfig.model_validate(await voices.get(store, visit.tenant_id))


@router.patch("/config", dependencies=auth.may("voice_config.edit"), openapi_extra=schemas.document(VoiceChange))
async def change_voice_config(request: Request, visit: Visiting, store: Store) -> VoiceConfig:
    """Change some of it; sessions that begin from now on have it."""
    changes = schemas.changes(await schemas.read(request, VoiceChange))
    check_engines("stt", changes, "stt", "stt_fallbacks")
    check_engines("tts", changes, "tts", "tts_fallbacks")
    if "wake_word" in changes:
        language = changes.get("language") or (await voices.get(store, visit.tenant_id)).language
        changes["wake_word"] = (await speech.check_phrase(changes["wake_word"], language, "wake_word")).phrase
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


@router.get("/metrics", dependencies=auth.may("voice_config.view"))
async def read_voice_metrics(request: Request, visit: Visiting) -> VoiceMetrics:
    """How well and how fast the voices of this node answer."""
    known = engines.choosable("tts")
    found = [each for each in speech.engines(request).metrics() if each.kind == "tts"]
    shown = [each for each in found if visit.operator or each.plugin in known]
    return VoiceMetrics(items=[Doing(**doing(each, counts=visit.operator)) for each in shown])


def check_engines(kind: Literal["stt", "tts"], changes: Mapping[str, Any], first: str, others: str) -> None:
    """Raise `BadInput` (`unknown_engine`) if one of the engines that are chosen under these names is not there."""
    for param, names in ((first, [changes[first]] if first in changes else []), (others, changes.get(others, []))):
        for name in names:
            engines.check(kind, name, param)


def doing(found: EngineMetrics, *, counts: bool) -> dict[str, Any]:
    """The fields of a `Doing`."""
    guesses = found.failures.get("busy", 0)  # given up for those who had really said something
    requests, failures = sum(found.requests.values()) - guesses, sum(found.failures.values()) - guesses
    answered = sum(each.count for each in found.seconds.values())
    told: dict[str, Any] = {
        "engine": found.plugin,
        "model": found.model,
        "average_seconds": sum(each.sum for each in found.seconds.values()) / answered if answered else None,
        "average_audio_seconds": found.audio.sum / found.audio.count if found.audio.count else None,
        "failure_rate": failures / requests if requests else None,
    }
    if counts:
        told |= {
            "requests": requests,
            "failures": failures,
            "waiting": found.waiting,
            "working": found.working,
            "loaded": found.loaded,
            "memory": found.memory,
            "open_circuits": found.open,
        }
    return told
