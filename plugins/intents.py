"""Intent files (`.intent`, `.entity`) matched in process: no compiler, no training, no child processes."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import simplematch
from langcodes import closest_match
from ovos_bus_client.message import Message
from ovos_config.config import Configuration
from ovos_plugin_manager.templates.pipeline import ConfidenceMatcherPipeline, IntentHandlerMatch
from ovos_utils.lang import standardize_lang_tag
from ovos_utils.log import LOG
from padacioso.bracket_expansion import expand_parentheses, normalize_example

from agentvoicebox.config import ovos

NAME = "agentvoicebox-intents"
"""As which it is installed; its stages have `-high`, `-medium` and `-low` after that."""

HIGH, MEDIUM, LOW = 0.95, 0.8, 0.5
_MAX_WORDS = 50
_MAX_CHARACTERS = 1000
_FARTHEST = 10
"""Distance between languages, as langcodes counts it, from which on they are different ones."""
_MARKS = '.,;:!?¿¡…"'
simplematch.register_type("word", r"\w+")  # what padacioso makes of `:0` in a sample
_INNER_MARKS = re.compile(rf"[{_MARKS}]+(?=\s)|(?<=\s)[{_MARKS}]+")


class Found(NamedTuple):
    """One way to understand an utterance; the greatest is the best."""

    confidence: float
    length: int
    """Characters of the sample: of two, the longer one says more."""
    intent: str
    entities: dict[str, str]
    utterance: str


@dataclass(frozen=True, slots=True)
class Pattern:
    """A sample with `{entities}` or `*` in it."""

    sample: str
    matcher: simplematch.Matcher

    def find(self, utterance: str, values: dict[str, set[str]]) -> tuple[float, dict[str, str]] | None:
        """Confidence and entities, scored as padacioso does: a free part costs certainty, an unknown value more."""
        groups = self.matcher.match(utterance)
        if groups is None:
            return None
        entities = {name.lower(): str(value) for name, value in groups.items() if isinstance(name, str)}
        confidence = 0.85 if "*" in self.sample else 1.0
        for name, value in entities.items():
            if name not in values:
                confidence -= 0.04
            elif value.casefold() not in values[name]:
                confidence -= 0.1
        return confidence, entities


@dataclass(frozen=True, slots=True)
class Intent:
    """The samples of one intent, in their plain form, and the words that rule it out."""

    sentences: frozenset[str]
    patterns: tuple[Pattern, ...]
    unless: re.Pattern[str] | None


@dataclass(slots=True)
class Grammar:
    """The intents and entities of one skill in one language, by their names."""

    intents: dict[str, Intent] = field(default_factory=dict)
    entities: dict[str, set[str]] = field(default_factory=dict)

    def find(self, utterance: str, refused: Container[str]) -> Iterator[Found]:
        """All intents that `utterance` can mean, but the refused ones."""
        plain = _plain(utterance)
        digits = re.sub(r"\d", "#", plain)  # in a sample, `#` stands for a digit
        spoken = utterance.strip(_MARKS + " ")
        for name, intent in self.intents.items():
            if name in refused or (intent.unless and intent.unless.search(plain)):
                continue
            if plain in intent.sentences or digits in intent.sentences:
                yield Found(1.0, len(plain), name, {}, utterance)
                continue
            for pattern in intent.patterns:
                if found := pattern.find(spoken, self.entities):
                    yield Found(found[0], len(pattern.sample), name, found[1], utterance)
                    break


class Intents(ConfidenceMatcherPipeline):  # type: ignore[misc]
    """The stages `agentvoicebox-intents-high`, `-medium` and `-low`.

    It stands in for padatious on the bus, where a stage of it is in the pipeline; elsewhere padatious, or whoever
    is there, answers for itself. Nothing is kept of an utterance or a session.
    """

    def __init__(self, bus: Any = None, config: dict[str, Any] | None = None) -> None:
        super().__init__(bus, config)
        core = Configuration()
        self._language = core.get("lang") or "en-us"
        languages = [self._language, *(core.get("secondary_langs") or [])]
        self._grammars: dict[str, dict[str, Grammar]] = {standardize_lang_tag(name): {} for name in languages}
        self._closest = lru_cache(maxsize=64)(self._find_closest)
        # Core runs each handler on any thread of its pool: what arrived first must still be done first.
        self._changes: deque[Message] = deque()
        self._lock = threading.Lock()
        self._stands_in = ovos.listed(core, NAME)
        if not self._stands_in:
            return
        for name in _CHANGES:
            self.bus.on(name, self._changes.append)
        self.bus.on("mycroft.skills.train", self._train)

    def match_high(self, utterances: list[str], lang: str, message: Message) -> IntentHandlerMatch | None:
        return self._match(utterances, lang, message, HIGH)

    def match_medium(self, utterances: list[str], lang: str, message: Message) -> IntentHandlerMatch | None:
        return self._match(utterances, lang, message, MEDIUM)

    def match_low(self, utterances: list[str], lang: str, message: Message) -> IntentHandlerMatch | None:
        return self._match(utterances, lang, message, LOW)

    def shutdown(self) -> None:
        if not self._stands_in:
            return
        for name in _CHANGES:
            self.bus.remove(name, self._changes.append)
        self.bus.remove("mycroft.skills.train", self._train)

    def _match(self, utterances: list[str], lang: str, message: Message, least: float) -> IntentHandlerMatch | None:
        language = self._closest(lang or self._language)
        if language is None:
            return None
        session = message.context.get("session") or {}
        skills, intents = session.get("blacklisted_skills") or (), session.get("blacklisted_intents") or ()
        with self._lock:
            self._settle()
            found = [
                one
                for skill, grammar in self._grammars[language].items()
                if skill not in skills
                for utterance in utterances
                if len(utterance) <= _MAX_CHARACTERS and len(utterance.split()) < _MAX_WORDS
                for one in grammar.find(utterance, intents)
            ]
        best = max(found, key=lambda one: one[:2], default=None)
        if best is None or best.confidence < least:
            return None
        return IntentHandlerMatch(
            best.intent, dict(best.entities), skill_id=_skill(best.intent), utterance=best.utterance
        )

    def _find_closest(self, lang: str) -> str | None:
        closest, distance = closest_match(standardize_lang_tag(lang), list(self._grammars))
        return closest if distance < _FARTHEST else None

    def _train(self, message: Message) -> None:
        with self._lock:
            self._settle()
        self.bus.emit(message.reply("mycroft.skills.trained"))

    def _settle(self) -> None:
        while self._changes:
            change = self._changes.popleft()
            try:
                _CHANGES[change.msg_type](self, change.data)
            except (KeyError, TypeError, AttributeError, re.error) as error:
                LOG.error(f"{change.msg_type} of {change.data.get('name')} cannot be used: {error!r}")

    def _grammar(self, data: dict[str, Any]) -> Grammar | None:
        """Where the intent or entity of `data` belongs; none if this cell does not speak its language."""
        skills = self._grammars.get(standardize_lang_tag(data.get("lang") or self._language))
        return None if skills is None else skills.setdefault(_skill(data["name"]), Grammar())

    def _add_intent(self, data: dict[str, Any]) -> None:
        if grammar := self._grammar(data):
            grammar.intents[data["name"]] = _intent(data["samples"], data.get("blacklisted_words") or ())

    def _add_entity(self, data: dict[str, Any]) -> None:
        """The name is `skill:entity_md5`, as ovos-workshop sends it."""
        if grammar := self._grammar(data):
            name = re.sub(r"_[0-9a-f]{32}$", "", data["name"].partition(":")[2])
            grammar.entities[name.lower()] = {value.casefold() for value in _expand(data["samples"])}

    def _detach_intent(self, data: dict[str, Any]) -> None:
        for skills in self._grammars.values():
            if grammar := skills.get(_skill(data["intent_name"])):
                grammar.intents.pop(data["intent_name"], None)

    def _detach_skill(self, data: dict[str, Any]) -> None:
        for skills in self._grammars.values():
            skills.pop(data["skill_id"], None)


_CHANGES = {
    "padatious:register_intent": Intents._add_intent,
    "padatious:register_entity": Intents._add_entity,
    "detach_intent": Intents._detach_intent,
    "detach_skill": Intents._detach_skill,
}


def _skill(intent: str) -> str:
    return intent.partition(":")[0]


def _plain(text: str) -> str:
    """What is left of a sentence without capitals, punctuation and superfluous spaces."""
    return " ".join(_INNER_MARKS.sub(" ", text).casefold().split()).strip(_MARKS + " ")


def _expand(samples: Iterable[str]) -> Iterator[str]:
    """Each `(one|other)` and `[optional]` spelled out."""
    for sample in samples:
        if any(mark in sample for mark in "([|"):
            yield from expand_parentheses(normalize_example(sample))
        else:
            yield normalize_example(sample)


def _intent(samples: Iterable[str], unless: Iterable[str]) -> Intent:
    free, fixed = set(), set()
    for sample in _expand(samples):
        if "{" in sample or "*" in sample:
            free.add(" ".join(sample.split()).strip(_MARKS + " "))
        else:
            fixed.add(_plain(sample))
    patterns = (
        Pattern(sample, simplematch.Matcher(sample, case_sensitive=False))
        for sample in sorted(free, key=lambda sample: (-len(sample), sample))
    )
    words = "|".join(re.escape(word) for word in unless)
    return Intent(frozenset(fixed - {""}), tuple(patterns), re.compile(rf"\b({words})\b", re.I) if words else None)
