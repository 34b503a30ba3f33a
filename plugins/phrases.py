"""Phrases that can wake a device: which of them a model was made for, and which of the others can be spelt out.

Four phrases come with a model of their own, which costs little and hears well. Any other English phrase is searched for
by its pronunciation, so each of its words must be in pocketsphinx's dictionary.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pocketsphinx
import pymicro_wakeword

from agentvoicebox.config.errors import BadInput

SPHINX = "sphinx"
"""The model of all phrases without one of their own."""

FEWEST_SOUNDS = 6
"""Phonemes of a phrase; with fewer something in every other sentence sounds like it."""
MOST_WORDS = 5
LONGEST = 60
"""Characters of a phrase."""

_MICRO = "micro/"
_NO_PUNCTUATION = re.compile(r"[^\w'\s]+|_+")
_LETTERS = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@dataclass(frozen=True, slots=True)
class Phrase:
    """A phrase that can be heard, and by what."""

    phrase: str
    """Lower case, words divided by one space, no punctuation."""
    model: str
    """`micro/` and the name of a shipped model, or `sphinx`."""


@dataclass(frozen=True, slots=True)
class Shipped:
    """A model that comes with pymicro-wakeword."""

    phrase: str
    name: str
    languages: frozenset[str]
    """Whose speakers it was trained with, as two letters each."""


def check(phrase: str, language: str = "en-US") -> Phrase:
    """The phrase as it is kept, and the model that hears it when speakers of `language` say it.

    Raises `BadInput`, param `phrase`: `phrase_invalid` for what is no phrase, `phrase_too_long`, `phrase_too_short`,
    `phrase_language` where no model was made for the language, and `phrase_unpronounceable`, which names the word.
    """
    kept = normalise(phrase)
    if not kept:
        raise _refused("phrase_invalid", f"A wake phrase is words, such as {_examples()}; this has no letter in it.")
    if len(kept) > LONGEST:
        raise _refused("phrase_too_long", f"A wake phrase has at most {LONGEST} characters: choose a shorter one.")
    for word in kept.split():
        if not _LETTERS.fullmatch(word):
            raise _refused("phrase_invalid", f"“{word}” has more than letters in it: write it as it is spoken.")
    spoken = language.replace("_", "-").split("-")[0].lower()
    if (shipped := _models().get(kept)) is not None:
        if spoken not in shipped.languages:
            raise _foreign(language, spoken)
        return Phrase(kept, _MICRO + shipped.name)
    if spoken != "en":
        raise _foreign(language, spoken)
    words = kept.split()
    if len(words) > MOST_WORDS:
        raise _refused("phrase_too_long", f"A wake phrase has at most {MOST_WORDS} words: leave some out.")
    if sounds(kept) < FEWEST_SOUNDS:
        raise _refused(
            "phrase_too_short",
            f"“{kept}” is too short and would be heard all day: add a word, as in “{kept} computer”.",
        )
    return Phrase(kept, SPHINX)


def normalise(phrase: str) -> str:
    """Lower case, without accents' variants, punctuation and more than one space at a time."""
    text = unicodedata.normalize("NFKC", phrase).replace("\u2019", "'").casefold()
    return " ".join(word.strip("'") for word in _NO_PUNCTUATION.sub(" ", text).split() if word.strip("'"))


def available() -> list[str]:
    """The phrases that have a model of their own."""
    return sorted(_models())


def model_file(model: str) -> Path:
    """The description of the shipped model that `micro/…` names. Raises `BadInput` for any other."""
    name = model.removeprefix(_MICRO)
    if model == name or name not in {shipped.name for shipped in _models().values()}:
        raise BadInput(f"There is no wake word model {model!r}: choose one of {_examples()}.", code="model_unknown")
    return _directory() / f"{name}.json"


def pronunciations(word: str) -> list[str]:
    """How a word can be said, as pocketsphinx spells phonemes: `HH EH L OW`; empty for one that nobody knows."""
    return [line.split(" ", 1)[1].strip() for line in entries(word)]


def sounds(phrase: str) -> int:
    """Phonemes of a phrase at the least. Raises `BadInput` (`phrase_unpronounceable`), naming the word."""
    return sum(min(len(each.split()) for each in _known(word)) for word in phrase.split())


def entries(word: str) -> list[str]:
    """The lines of pocketsphinx's dictionary for a word."""
    # It is 3 MB and asked when somebody changes a phrase: it is read each time and not kept. The lines of a word stand
    # together, so the search ends soon after the first.
    text = "\n" + _dictionary().read_text(encoding="utf-8")
    start = text.find(f"\n{word} ") + 1
    known = re.compile(rf"{re.escape(word)}(?:\(\d+\))? ")
    lines = text[start : start + 4_000].splitlines(keepends=True) if start else []
    return list(itertools.takewhile(known.match, lines))


def _known(word: str) -> list[str]:
    if not (said := pronunciations(word)):
        raise _refused(
            "phrase_unpronounceable",
            f"Nobody knows how “{word}” is pronounced: write it as English words that sound like it, "
            f"or choose {_examples()}.",
        )
    return said


def _foreign(language: str, spoken: str) -> BadInput:
    fitting = [f"“{phrase}”" for phrase, shipped in sorted(_models().items()) if spoken in shipped.languages]
    remedy = f"in {language} there is {', '.join(fitting)}" if fitting else "wake words are heard in English so far"
    return _refused("phrase_language", f"There is no model for this phrase in {language}: {remedy}.")


def _refused(code: str, message: str) -> BadInput:
    return BadInput(message, code=code, param="phrase")


def _examples() -> str:
    return ", ".join(f"“{phrase}”" for phrase in available())


@cache
def _models() -> dict[str, Shipped]:
    found = {}
    for file in sorted(_directory().glob("*.json")):
        told = json.loads(file.read_text(encoding="utf-8"))
        phrase = normalise(told["wake_word"])
        found[phrase] = Shipped(phrase, file.stem, frozenset(told.get("trained_languages", ())))
    return found


def _directory() -> Path:
    return Path(pymicro_wakeword.__file__).parent / "models"


def _dictionary() -> Path:
    return Path(pocketsphinx.get_model_path("en-us")) / "cmudict-en-us.dict"
