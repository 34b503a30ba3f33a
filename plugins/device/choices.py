"""What a tenant has chosen for its devices, as the platform tells it and a device keeps it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class WakeWord:
    """A phrase that wakes the device."""

    phrase: str
    """As it is spoken, in lower case: `okay nabu`."""
    sensitivity: float = 0.5
    """0 (hardly ever) to 1 (at anything similar); 0.5 is the engine's own choice."""
    model: str = ""
    """Which engine and model hear it, as `plugins.phrases` names them; empty for whatever that finds for the phrase."""
    id: str = ""
    """Of the tenant's record; empty for the phrase of the voice configuration."""


@dataclass(frozen=True, slots=True)
class Choices:
    """How the assistant on a device is to be. The defaults are for a device that has never heard from the platform."""

    tenant: str = ""
    """Name of the tenant."""
    language: str = "en-US"
    """A BCP 47 tag."""
    voice: str = ""
    """A voice of the platform's engine; empty for the engine's own choice."""
    speed: float = 1.0
    """0.5 to 2.0 times the voice's own."""
    persona: str = ""
    """Who answers what no skill does."""
    personas: tuple[str, ...] = ()
    """Who could."""
    wake_words: tuple[WakeWord, ...] = (WakeWord("hey mycroft"),)
    """Those that are not disabled."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        told = asdict(self)
        return {**told, "personas": list(self.personas), "wake_words": list(told["wake_words"])}

    @property
    def etag(self) -> str:
        """The same for the same choices, and for no others."""
        told = json.dumps(self.as_dict(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(told.encode()).hexdigest()[:32]


def of(told: object) -> Choices:
    """Choices from plain values; fields that are not known are passed over. Raises `ValueError` for what makes none."""
    if not isinstance(told, Mapping):
        raise ValueError("choices must be an object")
    given: dict[str, Any] = {}
    for name, kind in (("tenant", str), ("language", str), ("voice", str), ("persona", str)):
        if name in told:
            given[name] = _typed(told[name], kind, name)
    if "speed" in told:
        given["speed"] = _number(told["speed"], 0.5, 2.0, "speed")
    if "personas" in told:
        given["personas"] = tuple(_typed(each, str, "personas") for each in _typed(told["personas"], list, "personas"))
    if "wake_words" in told:
        given["wake_words"] = tuple(_wake_word(each) for each in _typed(told["wake_words"], list, "wake_words"))
    return Choices(**given)


def _wake_word(told: object) -> WakeWord:
    if not isinstance(told, Mapping) or not told.get("phrase"):
        raise ValueError("a wake word must have a phrase")
    named = {name: _typed(told.get(name, ""), str, name) for name in ("phrase", "model", "id")}
    return WakeWord(sensitivity=_number(told.get("sensitivity", 0.5), 0.0, 1.0, "sensitivity"), **named)


def _typed(value: object, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be of type {kind.__name__}")
    return value


def _number(value: object, low: float, high: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be {low:g} to {high:g}")
    return float(value)
