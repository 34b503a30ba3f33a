"""How a tenant's assistant listens: its choices, what there is to choose from, and transcripts of audio files."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from msgspec import UNSET, Meta, UnsetType

from agentvoicebox.admin_api import auth, recordings, schemas, speech, voice
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import View
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.admin_api.visits import Visit
from agentvoicebox.bus_bridge import engines as ears
from agentvoicebox.bus_bridge.engines import Engines
from agentvoicebox.bus_bridge.models import BYTES_PER_SECOND, SessionSettings
from agentvoicebox.config.errors import Conflict
from agentvoicebox.config.settings import Settings
from agentvoicebox.plugins import pool
from agentvoicebox.tenancy import voices
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import Metric

router = APIRouter(prefix="/api/v2/stt", tags=["stt"])

LARGEST = 25 * 1024 * 1024
"""Bytes of an audio file."""
LONGEST = 600.0
"""Seconds of one."""
PIECE = 25.0
"""Seconds that an engine is given at once: others have their turn in between."""

_READING = ThreadPoolExecutor(2, "audio-files")
"""What reads the files of strangers: however many they send, everything else has its threads."""

_FIELDS = {
    "model": "stt_model",
    "language": "stt_language",
    "vad_enabled": "stt_vad",
    "engine": "stt",
    "fallbacks": "stt_fallbacks",
}
"""What `VoiceConfig` calls them."""

Language = Annotated[str, Meta(pattern=f"^({voices.LANGUAGE.pattern}|auto)?$")]
"""A BCP 47 tag, `auto` to detect it, or empty for the language that the assistant speaks."""
Spoken = Annotated[str | None, Query(pattern=f"^({voices.LANGUAGE.pattern}|auto)$", description="A tag, or auto.")]
Model = Literal["auto", "tiny", "base", "small", "medium", "large-v2", "large-v3"]
Wanted = Annotated[Literal["tiny", "base", "small", "medium", "large-v2", "large-v3"] | None, Query()]

Clean = Annotated[bool, Query(description="Take noise away, and bring it to a volume easy to understand.")]


class SttChange(Body):
    """What is to be different about how the assistant listens."""

    model: Model | UnsetType = UNSET
    language: Language | UnsetType = UNSET
    vad_enabled: bool | UnsetType = UNSET
    engine: voice.Engine | UnsetType = UNSET
    fallbacks: voice.Engines | UnsetType = UNSET


class Compute(View):
    """By what the node's own recogniser computes; the operator's choice."""

    engine: str
    device: str
    compute_type: str


class SttConfig(View):
    """How the assistant listens. A model of `auto` is the default of the tenant's settings."""

    model: str
    language: str
    vad_enabled: bool
    engine: str
    fallbacks: list[str]
    compute: Compute | None
    """None where this node does not listen."""


class Ear(View):
    """A recogniser that can be chosen."""

    name: str
    ready: bool
    """Whether all that it needs from outside is there: a key, for those that are elsewhere."""


class Whisper(View):
    """A Whisper model, and what choosing it means."""

    name: str
    word_errors: float
    """Percent of the words of read English that it misunderstands, as published."""
    speed: float
    """Times as fast as the large ones."""
    size: int
    """Bytes on disk."""
    memory: int
    """Bytes that it holds."""
    installed: bool


class Ears(View):
    """The recognisers and models that can be chosen; models from the fastest to the most accurate."""

    engines: list[Ear]
    models: list[Whisper]


class Segment(View):
    """A part of a recording, in seconds from its beginning."""

    start: float
    end: float
    text: str


class Transcript(View):
    """What was understood; empty when nothing was."""

    text: str
    language: str
    confidence: float | None
    """0 to 1, where the engine tells."""
    audio_seconds: float
    engine: str
    model: str
    """The Whisper model; empty for other engines."""
    seconds: float
    """How long it took."""
    segments: list[Segment]


class Hearing(voice.Doing):
    """How one recogniser does."""

    average_confidence: float | None
    """0 to 1; None for an engine that does not tell."""


class Metrics(View):
    """How the recognisers of this node do."""

    items: list[Hearing]


_FILE = recordings.document(LARGEST, LONGEST)


@router.get("", dependencies=auth.may("voice_config.view"))
async def list_engines(request: Request, visit: Visiting, store: Store) -> Ears:
    """The recognisers that can be chosen, and the Whisper models with what each costs and gives."""
    from agentvoicebox.plugins import models

    here = request.app.state.engines
    own = {each.name for each in await speech.credentials(store, visit)}
    return Ears(
        engines=[
            Ear(name=name, ready=here is not None and _ready(name, own, here.settings))
            for name in ears.choosable("stt")
        ],
        models=[
            Whisper(
                name=each.model,
                word_errors=each.word_errors,
                speed=each.speed,
                size=each.size,
                memory=each.memory,
                installed=here is not None and here.has(each.model),
            )
            for each in models.trade_offs()
        ],
    )


@router.get("/config", dependencies=auth.may("voice_config.view"))
async def read_stt_config(request: Request, visit: Visiting, store: Store) -> SttConfig:
    """How the assistant listens."""
    return _shown(request, await voices.get(store, visit.tenant_id))


@router.patch("/config", dependencies=auth.may("tenant.configure_voice"), openapi_extra=schemas.document(SttChange))
async def change_stt_config(request: Request, visit: Visiting, store: Store) -> SttConfig:
    """Change some of it; sessions that begin from now on have it."""
    changes = schemas.changes(await schemas.read(request, SttChange))
    voice.check_engines("stt", changes, "engine", "fallbacks")
    if request.app.state.engines is not None and "model" in changes:
        _check_model(request.app.state.engines, changes["model"])
    return _shown(request, await speech.change(store, visit, changes, _FIELDS))


@router.post("/transcribe", dependencies=auth.may("tenant.create_session", body=LARGEST), openapi_extra=_FILE)
async def transcribe(
    request: Request, visit: Visiting, store: Store, language: Spoken = None, model: Wanted = None, clean: Clean = False
) -> Transcript:
    """What is said in an audio file, which is the body; metered by its length."""
    return await _transcribe(request, visit, store, language, model, clean)


@router.post("/test", dependencies=auth.may("tenant.configure_voice", body=LARGEST), openapi_extra=_FILE)
async def try_listening(
    request: Request, visit: Visiting, store: Store, language: Spoken = None, model: Wanted = None, clean: Clean = False
) -> Transcript:
    """The same, for whoever sets the assistant up; metered as well."""
    return await _transcribe(request, visit, store, language, model, clean)


@router.get("/metrics", dependencies=auth.may("voice_config.view"))
async def read_stt_metrics(request: Request, visit: Visiting, store: Store) -> Metrics:
    """How well and how fast the recognisers of this node answer; a tenant sees those that it could have."""
    here = speech.engines(request)
    found = [each for each in here.metrics() if each.kind == "stt"]
    if not visit.operator:
        known = ears.choosable("stt")
        own = {each.name for each in await speech.credentials(store, visit)}
        found = [each for each in found if each.plugin in known and _ready(each.plugin, own, here.settings)]
    return Metrics(items=[_hearing(each, counts=visit.operator) for each in found])


async def _transcribe(
    request: Request, visit: Visit, store: Database, language: str | None, model: str | None, clean: bool
) -> Transcript:
    recordings.check(request)
    wanted = await speech.begin(request, visit, store)
    here = speech.engines(request)
    if model is not None:
        _check_model(here, model)
    wanted = replace(wanted, stt_language=language or wanted.stt_language, stt_model=model or wanted.stt_model)
    file = await schemas.received(request)
    begun = time.monotonic()
    pieces = await asyncio.get_running_loop().run_in_executor(_READING, _read, file, clean)
    heard = await _heard(request, visit, wanted, pieces)
    engine = next((piece.engine for piece in heard if piece.engine), "")
    return Transcript(
        text=" ".join(piece.text for piece in heard if piece.text),
        language=next((piece.language for piece in heard if piece.language), ""),
        confidence=_mean([(piece.confidence, piece.audio_seconds) for piece in heard]),
        audio_seconds=sum(map(len, pieces)) / BYTES_PER_SECOND,
        engine=engine,
        model=here.whisper(wanted) if engine in ears.WHISPER else "",
        seconds=time.monotonic() - begun,
        segments=list(_segments(heard)),
    )


async def _heard(request: Request, visit: Visit, wanted: SessionSettings, pieces: list[bytes]) -> list[pool.Transcript]:
    """What is said in the pieces, one by one; what was heard is metered, also when not all of it was."""
    engines = speech.engines(request)
    heard: list[pool.Transcript] = []
    try:
        for piece in pieces:
            if heard and await request.is_disconnected():
                break  # nobody reads this
            heard.append(await engines.transcribe(piece, wanted, visit.tenant_id))
            if wanted.stt_language == "auto" and heard[0].language:
                wanted = replace(wanted, stt_language=heard[0].language)  # found out once
    finally:
        used = sum(len(piece) for piece in pieces[: len(heard)]) / BYTES_PER_SECOND
        await speech.meter(request, visit, "stt", Metric.STT_AUDIO_SECONDS, used)
    return heard


def _read(file: bytes, clean: bool) -> list[bytes]:
    """The sound of a file, in pieces. Raises `BadInput`, `TooLarge`."""
    from agentvoicebox.plugins import audio

    pcm = audio.decode(file, longest=LONGEST)
    return audio.split(audio.normalised(audio.denoised(pcm)) if clean else pcm, PIECE)


def _segments(heard: list[pool.Transcript]) -> Iterator[Segment]:
    begin = 0.0
    for piece in heard:
        if piece.text:
            yield Segment(start=begin, end=begin + piece.audio_seconds, text=piece.text)
        begin += piece.audio_seconds


def _mean(weighted: list[tuple[float | None, float]]) -> float | None:
    known = [(value, weight) for value, weight in weighted if value is not None and weight > 0]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if known else None


def _hearing(found: pool.EngineMetrics, *, counts: bool) -> Hearing:
    told = voice.doing(found, counts=counts)
    return Hearing(
        **told, average_confidence=found.confidence.sum / found.confidence.count if found.confidence.count else None
    )


def _check_model(here: Engines, model: str) -> None:
    """Raise `Conflict` (`model_not_installed`) unless a tenant can have that Whisper model here."""
    if model != "auto" and not here.has(model):
        known = [name for name in voices.WHISPER_MODELS if here.has(name)]
        raise Conflict(
            f"The Whisper model {model} is not installed: the operator fetches it with `avb models pull "
            f"faster-whisper-{model}`. Installed: {', '.join(known) or 'none'}.",
            code="model_not_installed",
            param="model",
        )


def _ready(name: str, own: set[str], settings: Settings) -> bool:
    """Whether somebody has a key for a recogniser that needs one."""
    if name.endswith("deepgram"):
        return "deepgram" in own or bool(settings.deepgram_key)
    if name.endswith("openai"):
        return "openai" in own or bool(settings.openai_key or settings.openai_url)
    return True


def _shown(request: Request, config: voices.VoiceConfig) -> SttConfig:
    here = request.app.state.engines
    compute = None
    if here is not None:
        told = dict(here.choice.stt.config)
        compute = Compute(
            engine=here.choice.stt.plugin,
            device=str(told.get("device", "auto")),
            compute_type=str(told.get("compute_type", "auto")),
        )
    return SttConfig(**{name: getattr(config, field) for name, field in _FIELDS.items()}, compute=compute)
