"""The node's ear and voice: which engine serves a session, and its work off the event loop."""

from __future__ import annotations

from dataclasses import dataclass

from agentvoicebox.bus_bridge.models import LISTENING_RATE, SessionSettings
from agentvoicebox.plugins.models import Choice
from agentvoicebox.plugins.pool import EngineSpec, Pool, Speech


@dataclass(frozen=True, slots=True)
class Engines:
    """One choice of engines over one shared pool. Cancelling an awaiting task cancels the engine's work."""

    pool: Pool
    choice: Choice

    async def load(self) -> None:
        """Load both engines now rather than at the first word. Raises `AvbError`."""
        await self.pool.load(self.choice.stt)
        await self.pool.load(self.choice.tts)

    async def transcribe(self, pcm: bytes, language: str, engine: str = "auto") -> str:
        """What was said in 16 kHz 16-bit mono audio; empty when nothing was heard. Raises `AvbError`."""
        return (await self.pool.transcribe(_spec(engine, self.choice.stt), pcm, LISTENING_RATE, language)).text

    async def speak(self, text: str, settings: SessionSettings) -> Speech:
        """Say it with the session's voice and speed. Raises `AvbError`."""
        return await self.pool.speak(
            _spec(settings.tts, self.choice.tts),
            text,
            language=settings.language,
            voice=settings.voice,
            speed=settings.speed,
        )


def _spec(engine: str, default: EngineSpec) -> EngineSpec:
    """The engine a tenant has named, else the node's choice."""
    return default if engine in ("auto", default.plugin) else EngineSpec(default.kind, engine)
