"""What the engines of a pool have done, in counts that a metrics endpoint hands out. All labels are bounded: what
tenants write (models, voices, languages) never makes a series of its own beyond that."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import PurePath

from agentvoicebox.plugins.pool.runner import EngineSpec

STT_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0)
TTS_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
AUDIO_SECONDS = (1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
CONFIDENCE = (0.2, 0.4, 0.6, 0.8, 0.9)

OTHER = "other"

MOST_ENGINES, MOST_LABELS = 64, 64
"""Engines, and languages or codes of an engine, that are counted apart; the rest is `other`."""

_LANGUAGE = re.compile(r"[a-z]{2,3}")
_PLAIN = re.compile(r"[\w.+-]{1,64}")


@dataclass(slots=True)
class Histogram:
    """How often a value was at most each of `bounds`, and above all of them."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def add(self, value: float) -> None:
        """One value more."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass(slots=True)
class EngineMetrics:
    """One engine: a kind, a plugin and a model, whatever else their configurations say."""

    kind: str
    plugin: str
    model: str
    requests: dict[tuple[str, str], int] = field(default_factory=dict)
    """Calls by voice (empty for ears) and language (`en`, `auto`), answered or not."""
    failures: dict[str, int] = field(default_factory=dict)
    """Calls that were not answered, by the code of the error."""
    seconds: dict[str, Histogram] = field(default_factory=dict)
    """From call to (whole) answer, waiting included, by voice."""
    audio: Histogram = field(default_factory=lambda: Histogram(AUDIO_SECONDS))
    """Seconds of audio heard or spoken."""
    confidence: Histogram = field(default_factory=lambda: Histogram(CONFIDENCE))
    """How sure ears were of what they heard, 0 to 1, where they tell."""
    characters: dict[str, int] = field(default_factory=dict)
    """Characters spoken, by voice."""
    waiting: int = 0
    """Jobs in the queue now."""
    working: int = 0
    """Calls the engine does now."""
    loaded: int = 0
    """Configurations of it that are in memory now."""
    memory: int = 0
    """Bytes they hold."""
    open: int = 0
    """Configurations of it that are left alone because they keep failing."""

    def asked(self, voice: str, language: str) -> None:
        """A call has come; `voice` is one of the engine's, `auto`, `other`, or empty for ears."""
        language = _language(language, {known for _, known in self.requests})
        self.requests[voice, language] = self.requests.get((voice, language), 0) + 1

    def failed(self, code: str) -> None:
        """It was not answered."""
        code = code if code in self.failures or len(self.failures) < MOST_LABELS else OTHER
        self.failures[code] = self.failures.get(code, 0) + 1

    def answered(
        self,
        voice: str,
        seconds: float,
        audio_seconds: float,
        characters: int = 0,
        confidence: float | None = None,
    ) -> None:
        """It was answered, so many seconds after the call."""
        if confidence is not None:
            self.confidence.add(confidence)
        if voice not in self.seconds:
            self.seconds[voice] = Histogram(STT_SECONDS if self.kind == "stt" else TTS_SECONDS)
        self.seconds[voice].add(seconds)
        self.audio.add(audio_seconds)
        if self.kind == "tts":
            self.characters[voice] = self.characters.get(voice, 0) + characters


def model_of(spec: EngineSpec) -> str:
    """The name of an engine's model as its configuration gives it, without any path; empty when it names none."""
    name = PurePath(str(dict(spec.config).get("model") or "")).name
    return name if not name or _PLAIN.fullmatch(name) else OTHER


def engine_of(
    spec: EngineSpec, known: Collection[tuple[str, str, str]], plugins: Collection[str]
) -> tuple[str, str, str]:
    """Under which kind, plugin and model an engine is counted, given those that are counted already, and the names of
    all plugins of its kind: any other name is what somebody wrote, and nobody else's business.
    """
    if spec.plugin not in plugins:
        return spec.kind, OTHER, OTHER
    key = (spec.kind, spec.plugin, model_of(spec))
    return key if key in known or len(known) < MOST_ENGINES else (spec.kind, OTHER, OTHER)


def _language(language: str, known: set[str]) -> str:
    short = language.split("-")[0].lower()
    plain = short == "auto" or _LANGUAGE.fullmatch(short)
    return short if short in known or (plain and len(known) < MOST_LABELS) else OTHER
