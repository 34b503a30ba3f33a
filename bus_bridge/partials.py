"""What can be told of an utterance while it is still being spoken. Pure."""

from __future__ import annotations

import re
from unicodedata import category

FIRST = 0.6
"""Seconds of speech before the first guess at it."""

GROWTH = 1.25
"""How much longer than at the last guess an utterance must be for the next: hearing it again costs its whole length."""

_UNPARTED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese, Japanese
)
"""Letters of languages that part no words."""

_WORD = re.compile(rf"\s?(?:[{_UNPARTED}][^\w\s]*|[^\s{_UNPARTED}]+)")
"""A word with the space before it; of a language without spaces, a character, with the marks that follow it."""


class Partials:
    """Words that two guesses in a row agree on are told; they are not taken back before the final transcript.

    Where no spaces part words, characters are compared.

    A recogniser changes its mind about the last words as it hears more, and hardly ever about those before.
    """

    __slots__ = ("_before", "_due", "_told", "guessing")

    def __init__(self) -> None:
        self._before: list[str] = []
        self._told = 0
        self._due = FIRST
        self.guessing = False
        """Whether a guess is under way."""

    def due(self, seconds: float) -> bool:
        """Whether an utterance that is so long by now is worth a guess; if so, that is under way from now on."""
        if self.guessing or seconds < self._due:
            return False
        self.guessing = True
        self._due = max(seconds * GROWTH, seconds + FIRST)
        return True

    def hear(self, text: str) -> str:
        """Take a guess; returns what is certain now and was not before, with the space that parts it from that."""
        self.guessing = False
        words = _WORD.findall(" ".join(text.split()))
        agreed = 0
        for one, other in zip(self._before, words, strict=False):
            if _plain(one) != _plain(other):
                break
            agreed += 1
        self._before = words
        if agreed <= self._told:
            return ""
        fresh = "".join(words[self._told : agreed])
        self._told = agreed
        return fresh

    def miss(self) -> None:
        """There was no time for the guess."""
        self.guessing = False


def _plain(word: str) -> str:
    """Without case, and what surrounds it; vowel signs, which Python does not count among letters, belong to it."""
    kept = [place for place, each in enumerate(word) if category(each)[0] not in "PSZ"]
    return word[kept[0] : kept[-1] + 1].casefold() if kept else ""
