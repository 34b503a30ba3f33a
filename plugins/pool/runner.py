"""What engines are asked and what they answer, and what does their work: a `Runner`.

Three of them serve a pool: `threads.Threads` in this process, `processes.Processes` in processes of its own and
`streams.Streams` on other machines. A runner does as it is told; who is served when, for how long and by which
engine is decided by the pool alone.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from agentvoicebox.config.errors import AvbError

RATE = 16_000
"""Hz of what engines hear: what the stock listener hands over, and what some plugins take any audio for."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What makes an engine the same engine: its kind, its plugin's name and its configuration."""

    kind: Literal["stt", "tts"]
    plugin: str
    config: tuple[tuple[str, Any], ...] = field(default=(), repr=False)
    """Pairs in the order of their names. It may hold keys of tenants: never written down."""


_SECRETS = frozenset({"key", "api_key", "token", "secret", "password", "credential"})


def elsewhere(spec: EngineSpec) -> bool:
    """Whether an engine is a service somewhere else: its configuration holds a key."""
    return any(name in _SECRETS for name, _ in spec.config)


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was understood; empty text when nothing was heard."""

    text: str
    confidence: float | None
    """0 to 1, where the engine tells."""
    audio_seconds: float
    language: str = ""
    """What was spoken, as far as known: the language asked for, or the one that the engine found."""
    engine: str = ""
    """The plugin that has understood it."""


@dataclass(frozen=True, slots=True)
class Speech:
    """16-bit little-endian mono audio at `rate` Hz."""

    pcm: bytes
    rate: int
    engine: str = ""
    """The plugin that has said it."""

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return len(self.pcm) / 2 / self.rate


@dataclass(frozen=True, slots=True)
class Voice:
    """One of an engine's voices; what is not known of it is empty."""

    name: str
    language: str = ""
    """As OVOS writes it: `en-US`."""
    gender: str = ""
    """`female`, `male`, or empty."""


@dataclass(frozen=True, slots=True)
class Heard:
    """Audio to understand."""

    pcm16k: bytes
    """16-bit little-endian mono audio at 16 kHz."""
    language: str
    """As OVOS writes it, or `auto`."""
    tentative: bool = False
    """Whether somebody still speaks, and a rough answer does."""

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return len(self.pcm16k) / 2 / RATE


@dataclass(frozen=True, slots=True)
class Utter:
    """Text to say."""

    text: str
    language: str
    voice: str = "auto"
    """One of the engine's; `auto`, or one that it does not have, is its own choice."""
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a pool must know of an engine to give it work."""

    memory: int = 0
    """Bytes that it holds in the memory which the pool manages."""
    parallel: int = 1
    """Calls that it does at once."""
    batch: int = 1
    """Utterances that it hears in one call."""
    voices: tuple[str, ...] = ()
    """The names of its voices, as far as it tells: only these are labels of its metrics."""


class Runner(Protocol):
    """Where the work of engines is done. Cancelling the task that awaits a call cancels its work.

    A cancelled call (and a generator that is closed) returns when the engine is at rest again, so that the pool
    gives nobody a place that is still taken.
    """

    async def load(self, spec: EngineSpec) -> Loaded:
        """Make an engine ready; again when it is ready does nothing. Raises `AvbError`: `engine_missing` where it is
        not installed, `engine_failed` where it does not start."""

    async def unload(self, spec: EngineSpec) -> None:
        """Give an engine's memory back. The pool asks only for engines without work."""

    async def transcribe(self, spec: EngineSpec, jobs: list[Heard]) -> list[Transcript | AvbError]:
        """What each of the jobs says, in their order: at most `Loaded.batch` of them. Raises `AvbError` for all."""

    def stream(self, spec: EngineSpec, utter: Utter) -> AsyncGenerator[Speech]:
        """The parts of what is said, as they come. Raises `AvbError`."""

    async def voices(self, spec: EngineSpec) -> list[Voice]:
        """The engine's voices. Raises `AvbError`."""

    async def close(self) -> None:
        """Let the work at hand end, and forget all engines."""
