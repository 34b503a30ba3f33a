"""The node's ear and voice: which engines serve a session, in which order, and their work off the event loop."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentvoicebox.bus_bridge.models import LISTENING_RATE, SessionSettings, TurnDetection
from agentvoicebox.config.settings import Settings
from agentvoicebox.plugins import models
from agentvoicebox.plugins.models import Choice
from agentvoicebox.plugins.pool import EngineMetrics, EngineSpec, Pool, Speech, Transcript, Voice
from agentvoicebox.tenancy.voices import VoiceConfig

DEEPGRAM, OPENAI = "agentvoicebox-stt-deepgram", "agentvoicebox-stt-openai"

CLOUD = {"deepgram": DEEPGRAM, "openai": OPENAI}
"""Recognisers elsewhere, by the provider whose key they need."""

WHISPER = ("whisper", "agentvoicebox-stt-whisper", "ovos-stt-plugin-fasterwhisper")
"""Names under which a tenant may ask for Whisper."""

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
        name = voice.voice
        if name == "auto" and language.startswith("en"):  # the names of default voices are those of English ones
            name = tts_voice
        return SessionSettings(
            language=language,
            voice=name,
            speed=voice.speed,
            stt=(voice.stt, *voice.stt_fallbacks),
            stt_model=stt_model if voice.stt_model == "auto" else voice.stt_model,
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

        A `tentative` one gives way to all others. `deadline` is in seconds.
        """
        engines = await self._ears(settings, tenant)
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

    async def _ears(self, settings: SessionSettings, tenant: uuid.UUID) -> Sequence[EngineSpec]:
        found: list[EngineSpec] = []
        for name in settings.stt:
            if name in CLOUD or name in CLOUD.values():
                found += await self._cloud(next(p for p, plugin in CLOUD.items() if name in (p, plugin)), tenant)
            elif name == "auto" or name in WHISPER or name == self.choice.stt.plugin:
                found.append(self._local(settings))
            else:
                found.append(EngineSpec("stt", name))
        # Whoever else fails, what is here can be asked.
        return tuple(dict.fromkeys((*found, self.choice.stt)))

    async def _cloud(self, provider: str, tenant: uuid.UUID) -> list[EngineSpec]:
        """With the tenant's own key, else the platform's; nothing when there is neither."""
        ours = {"deepgram": self.settings.deepgram_key, "openai": self.settings.openai_key}[provider]
        url = {"deepgram": self.settings.deepgram_url, "openai": self.settings.openai_url}[provider]
        key = await self.key_of(tenant, "stt" if provider == "deepgram" else "llm", provider) or ours
        if not key:
            return []
        config = {"key": key} | ({"url": url} if url else {})
        return [EngineSpec("stt", CLOUD[provider], tuple(sorted(config.items())))]

    def _local(self, settings: SessionSettings) -> EngineSpec:
        """Whisper as the tenant wants it, where that model is here; else what the node has chosen."""
        name, _ = models.defaults(settings.stt_model)
        if self.settings.engine == "offline" or not models.installed(name, self.settings.models):
            return self.choice.stt
        return models.whisper_spec(self.settings.models, settings.stt_model, vad=settings.stt_vad)

    def _voices(self, settings: SessionSettings) -> Sequence[EngineSpec]:
        own = self.choice.tts
        chosen = [own if name in ("auto", own.plugin) else EngineSpec("tts", name) for name in settings.tts]
        return tuple(dict.fromkeys((*chosen, own)))


def installed_whispers(models_dir: Path) -> list[str]:
    """The Whisper models that a tenant can have here."""
    names = [model.name for model in models.available(models_dir) if model.kind == "stt" and model.installed]
    return [name.removeprefix("faster-whisper-") for name in names]
