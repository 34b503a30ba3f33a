"""The node's ear and voice: which engines serve a session, in which order, and their work off the event loop."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agentvoicebox.bus_bridge.models import LISTENING_RATE, SessionSettings, TurnDetection
from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.config.settings import Settings
from agentvoicebox.plugins import models
from agentvoicebox.plugins.models import Choice
from agentvoicebox.plugins.pool import EngineMetrics, EngineSpec, Pool, Speech, Transcript, Voice
from agentvoicebox.plugins.pool.engine import installed
from agentvoicebox.tenancy.models import Persona
from agentvoicebox.tenancy.settings import Settings as TenantSettings
from agentvoicebox.tenancy.voices import WHISPER_MODELS, VoiceConfig

DEEPGRAM, OPENAI = "agentvoicebox-stt-deepgram", "agentvoicebox-stt-openai"

CLOUD = {"deepgram": DEEPGRAM, "openai": OPENAI}
"""Recognisers elsewhere, by the provider whose key they need."""

WHISPER = ("whisper", "agentvoicebox-stt-whisper", "ovos-stt-plugin-fasterwhisper")
"""Names under which a tenant may ask for Whisper."""

UNDECIDED = ("auto", TenantSettings().default_stt_model)
"""Values of `default_stt_model` that leave the Whisper model to the operator: the second one every new tenant has."""

_ALIASES = {"stt": ("auto", "whisper", *CLOUD), "tts": ("auto",)}

KeyOf = Callable[[uuid.UUID, str, str], Awaitable[str | None]]
"""A tenant's own key: of tenant, kind and name."""


async def _no_key(tenant_id: uuid.UUID, kind: str, name: str) -> str | None:
    """Nobody has brought a key."""
    return None


@dataclass(frozen=True, slots=True)
class Engines:
    """One choice of engines over one shared pool. Cancelling an awaiting task cancels the engine's work.

    `tenant` is whom the work is for: the pool is fair between them.
    """

    pool: Pool
    choice: Choice
    settings: Settings
    key_of: KeyOf = _no_key

    async def load(self) -> None:
        """Load the node's own engines now rather than at the first word, and for good. Raises `AvbError`."""
        await self.pool.load(self.choice.stt, pinned=True)
        await self.pool.load(self.choice.tts, pinned=True)

    def begin(self, voice: VoiceConfig, stt_model: str, tts_voice: str) -> SessionSettings:
        """Where a session of a tenant begins, by its voice configuration and the defaults of its settings.

        A language that no cell speaks becomes the first one that they do.
        """
        languages = self.settings.languages
        language = voice.language if voice.language in languages else languages[0]
        decided = stt_model in WHISPER_MODELS and stt_model not in UNDECIDED
        default = stt_model if decided else self.settings.whisper
        name = voice.voice
        if name == "auto" and language.startswith("en"):  # the names of default voices are those of English ones
            name = tts_voice
        return SessionSettings(
            language=language,
            voice=name,
            speed=voice.speed,
            stt=(voice.stt, *voice.stt_fallbacks),
            stt_model=default if voice.stt_model == "auto" else voice.stt_model,
            stt_language=voice.stt_language,
            stt_vad=voice.stt_vad,
            tts=(voice.tts, *voice.tts_fallbacks),
            turn_detection=TurnDetection(silence=self.settings.vad_hangover),
        )

    async def transcribe(
        self,
        pcm: bytes,
        settings: SessionSettings,
        tenant: uuid.UUID,
        *,
        tentative: bool = False,
        deadline: float = 30.0,
    ) -> Transcript:
        """What was said in 16 kHz 16-bit mono audio; empty when nothing was heard. Raises `AvbError`.

        A `tentative` one gives way to all others, and is never asked of a service elsewhere, which would be paid for
        every guess: `Unavailable` with the code `busy` where the tenant has chosen only such. `deadline` is in seconds.
        """
        chosen = await self._ears(settings, tenant)
        if tentative:
            chosen = _here(chosen)
        engines = tuple(dict.fromkeys((*chosen, self.choice.stt)))  # whoever else fails, what is here can be asked
        language = settings.stt_language or settings.language
        return await self.pool.transcribe(
            engines, pcm, LISTENING_RATE, language, tenant=str(tenant), deadline=deadline, tentative=tentative
        )

    def stream(
        self, text: str, settings: SessionSettings, tenant: uuid.UUID, *, deadline: float = 30.0
    ) -> AsyncGenerator[Speech]:
        """Say it with the session's voice and speed, the first audio as soon as it is there. Raises `AvbError`.

        No two pieces are further apart than `deadline` seconds.
        """
        return self.pool.stream(
            self._voices(settings),
            text,
            settings.language,
            settings.voice,
            settings.speed,
            tenant=str(tenant),
            deadline=deadline,
        )

    async def speak(self, text: str, settings: SessionSettings, tenant: uuid.UUID) -> Speech:
        """Say it, whole. Raises `AvbError`."""
        engines = self._voices(settings)
        return await self.pool.speak(
            engines, text, settings.language, settings.voice, settings.speed, tenant=str(tenant)
        )

    async def voices(self) -> list[Voice]:
        """What the node's own voice can sound like."""
        return await self.pool.voices(self.choice.tts)

    def metrics(self) -> list[EngineMetrics]:
        """How the engines do."""
        return self.pool.metrics()

    def has(self, whisper: str) -> bool:
        """Whether a tenant can have that Whisper model: it is on this node's disk, or it is the operator's choice."""
        if self.settings.engine == "offline" or whisper not in WHISPER_MODELS:
            return False
        chosen = whisper == self.settings.whisper and self.choice.stt.plugin in WHISPER
        return chosen or models.installed(models.defaults(whisper)[0], self.settings.models)

    def whisper(self, settings: SessionSettings) -> str:
        """The Whisper model that a session is heard with, where it is heard with one."""
        return settings.stt_model if self.has(settings.stt_model) else self.settings.whisper

    async def _ears(self, settings: SessionSettings, tenant: uuid.UUID) -> list[EngineSpec]:
        """Those that the tenant has chosen, as far as they can be asked."""
        found: list[EngineSpec] = []
        for name in settings.stt:
            if name in CLOUD or name in CLOUD.values():
                found += await self._cloud(next(p for p, plugin in CLOUD.items() if name in (p, plugin)), tenant)
            elif name == "auto" or name in WHISPER or name == self.choice.stt.plugin:
                found.append(self._local(settings))
            else:
                found.append(EngineSpec("stt", name))
        return found

    async def _cloud(self, provider: str, tenant: uuid.UUID) -> list[EngineSpec]:
        """With the tenant's own key, else the platform's; nothing when there is neither, and the service wants one."""
        ours = {"deepgram": self.settings.deepgram_key, "openai": self.settings.openai_key}[provider]
        url = {"deepgram": self.settings.deepgram_url, "openai": self.settings.openai_url}[provider]
        key = await self.key_of(tenant, "stt" if provider == "deepgram" else "llm", provider) or ours
        if not key and not (url and provider == "openai"):  # many servers with its protocol want none
            return []
        config = {name: value for name, value in (("key", key), ("url", url)) if value}
        return [EngineSpec("stt", CLOUD[provider], tuple(config.items()))]

    def _local(self, settings: SessionSettings) -> EngineSpec:
        """Whisper as the tenant wants it, where that model is here; else what the node has chosen."""
        if not self.has(settings.stt_model):
            return self.choice.stt
        return models.whisper_spec(self.settings.models, settings.stt_model, vad=settings.stt_vad)

    def _voices(self, settings: SessionSettings) -> Sequence[EngineSpec]:
        own = self.choice.tts
        chosen = [own if name in ("auto", own.plugin) else EngineSpec("tts", name) for name in settings.tts]
        return tuple(dict.fromkeys((*chosen, own)))


def _here(chosen: list[EngineSpec]) -> list[EngineSpec]:
    """Those of a tenant's ears that guesses are asked of. Raises `Unavailable` (`busy`) where it has no such."""
    here = [spec for spec in chosen if spec.plugin not in CLOUD.values()]
    if chosen and not here:
        raise Unavailable(
            "Services elsewhere hear whole utterances only: wait for the final transcript, or choose an engine here.",
            code="busy",
        )
    return here


def manner(persona: Persona, languages: Sequence[str]) -> dict[str, Any]:
    """How a persona speaks, as settings of a session; what it leaves open is the tenant's."""
    spoken = {"voice": persona.voice, "speed": persona.speed}
    if persona.language in languages:
        spoken["language"] = persona.language
    return {name: value for name, value in spoken.items() if value}


def choosable(kind: Literal["stt", "tts"]) -> list[str]:
    """The names under which engines can be chosen: plugins that are installed, and ours for some of them."""
    return sorted({*_ALIASES[kind], *installed(kind)})


def check(kind: Literal["stt", "tts"], name: str, param: str) -> None:
    """Raise `BadInput` (`unknown_engine`) unless an engine can be chosen by that name."""
    known = choosable(kind)
    if name not in known:
        raise BadInput(
            f"{param}: there is no engine {name[:64]!r}; there are {', '.join(known)}.",
            code="unknown_engine",
            param=param,
        )
