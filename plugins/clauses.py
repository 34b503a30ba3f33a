"""Where a speaker pauses: text cut into sentences as it arrives, and into clauses for speaking early.

Nothing here needs more than the standard library, never looks at a clock and never changes a word: what is cut joins
back to the same words. Where it is not sure that a sentence ended, it goes on: a late pause is better than "Doctor.
Smith". Time is linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

MOST_SENTENCE = 400
"""Characters of a sentence; a longer one is cut at a pause or space."""

MOST_CLAUSE = 300
"""Characters of a clause, where the text has a space or mark to cut at."""

_LEAST, _EARLY, _FIRST = 10, 28, 40
"""Characters of a first clause: fewer sound torn off, and more than `_EARLY` only where there is no better place."""

_GROWTH = 2
"""How many times longer than the one before a clause may be, as it is synthesised while that one is heard."""

_QUOTE = 80
"""Characters of a quotation that is left whole; in longer ones a speaker pauses too."""

_SIGHT = MOST_SENTENCE + 2 * _QUOTE
"""Characters that are looked at to find the end of one sentence, whatever the text."""

OPENERS: dict[str, tuple[str, ...]] = {
    "en": ("Sure,", "Sure!", "Sure.", "Okay,", "Okay.", "Of course.", "Of course!", "Of course,", "Certainly!", "Well,",
           "Yes,", "No,", "Hello!", "Hi!", "Great!", "Great question!", "Sorry,", "I'm sorry,", "Let me see.",
           "One moment."),
    "es": ("Claro,", "¡Claro!", "Por supuesto.", "¡Por supuesto!", "Vale,", "Bueno,", "Sí,", "No,", "¡Hola!",
           "Lo siento,", "Un momento."),
    "fr": ("Bien sûr,", "Bien sûr.", "Bien sûr !", "D'accord,", "D'accord.", "Oui,", "Non,", "Bonjour !", "Désolé,",
           "Un instant."),
    "hi": ("ज़रूर,", "ज़रूर!", "ठीक है,", "ठीक है।", "हाँ,", "नहीं,", "नमस्ते!", "माफ़ कीजिए,", "एक क्षण।"),
    "it": ("Certo,", "Certo!", "Certamente.", "Va bene,", "Va bene.", "Sì,", "No,", "Ciao!", "Mi dispiace,",
           "Un momento."),
    "ja": ("はい、", "いいえ、", "もちろんです。", "わかりました。", "こんにちは。", "すみません、",
           "少々お待ちください。"),
    "pt": ("Claro,", "Claro!", "Com certeza.", "Com certeza!", "Tudo bem,", "Sim,", "Não,", "Olá!", "Desculpe,",
           "Um momento."),
    "zh": ("好的，", "好的。", "当然，", "当然。", "当然可以。", "是的，", "不，", "你好！", "抱歉，", "请稍等。"),
}  # fmt: skip
"""What replies begin with, in any tenant's words: worth a clause of its own, since its audio can be kept for all."""

_TITLES = {
    "": "dr prof st vs etc inc ltd co corp jr sr ca cf al approx tel",
    "en": "mr mrs ms messrs gen col capt lt sgt maj cmdr rev hon gov sen rep pres ave blvd rd mt ft dept est ext "
          "jan feb apr aug sept oct nov dec",
    "es": "sr sra srta sres d dña dra ud uds ee uu avda av pág págs núm tel aprox admón",
    "fr": "m mm mme mmes mlle mlles me mgr ex env av bd éd tél",
    "de": "bzw usw ggf evtl inkl exkl zzgl bspw vgl sog str hr fr hrn bzgl ca mio mrd abs geb gest tel st jh jan feb "
          "apr aug sep sept okt nov dez",
    "hi": "डॉ श्री श्रीमती प्रो पं",
    "it": "sig sigg dott dottssa sigra avv ing arch rag geom on ecc pag pagg prof ssa",
    "pt": "sr sra srta srs dra exmo exma av pág págs tel aprox profa",
}  # fmt: skip
"""Words before whose full stop no sentence ends; the first line is for every language."""

_NUMBERED = re.compile(r"no|nos|nr|nº|núm|num|pp?|pg|pag|fig|vol|art|sec|ch|cap|kap|ver|rn|bd")
"""The same, where a number follows: "No. 5", but "No. I do not"."""

_LINKS = {
    "en": "and but or so because when while if that which who where with in on at for from to by as is are was were "
          "will can",
    "es": "y e o u pero porque cuando mientras si que con en para por desde a es está son fue",
    "fr": "et mais ou parce quand lorsque si que qui avec dans sur pour par depuis à est sont était",
    "de": "und aber oder weil wenn dass während mit in im auf für von nach bei zu ist sind war wird",
    "hi": "और लेकिन या क्योंकि जब अगर कि जो",
    "it": "e ed ma o perché quando se che con in nel nella su per da a è sono era",
    "pt": "e mas ou porque quando enquanto se que com em no na para por desde é está são era",
}  # fmt: skip
"""Words before which a voice may pause where the text has no mark."""

_ORDINALS = frozenset({"de", "cs", "da", "fi", "hu", "nb", "nn", "no", "pl", "sk", "sl"})
"""Languages that write 21st as "21."."""

_DENSE = {"ja": 3, "ko": 2, "zh": 3}
"""How many times longer a character takes to say than a Latin one."""

_CLOSERS = "\"'”’»›)\\]}」』）】》〉*_"
_ENDS = ".!?…"
_WIDE = "。！？｡।॥"
_PAIRS = {'"': '"', "“": "”", "„": "“”", "«": "»", "»": "«", "「": "」", "『": "』"}

_OPEN = r"(?P<open>(?<![^\s(\[{—–-])(?:[\"“„»](?=\S)|«)|[「『])"
# Possessive, and never in the middle of a run: what was refused once is not tried again from its second character.
_SENTENCE = re.compile(
    rf"{_OPEN}|(?<![{_ENDS}])(?P<marks>[{_ENDS}]++)[“{_CLOSERS}]*+(?=\s)|(?P<wide>[{_WIDE}]++)[{_CLOSERS}]*+|(?P<line>\n)"
)
_CLAUSE = re.compile(
    rf"{_OPEN}|(?P<mark>(?<![,;:…])[,;:…]++[“{_CLOSERS}]*+(?=\s)|[、，；：]++[{_CLOSERS}]*+|\s[–—-]{{1,2}}(?=\s)|\)(?=\s))"
    # Not beside a number, nor after the full stop of an abbreviation.
    r"|(?P<space>(?<![\d.«(\s])\s++(?=[^\W\d]))"
)
_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"\w+")
_SPEAKABLE = re.compile(r"[^\W_]")
_DOTTED = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}")
_BRACKETS = "([{\"'“„«»‹¿¡*_#-"


@dataclass(frozen=True, slots=True)
class _Rules:
    """What a language adds."""

    titles: frozenset[str]
    links: frozenset[str]
    ordinals: bool
    density: int
    openers: frozenset[str]


@cache
def _known(language: str) -> _Rules:
    return _Rules(
        frozenset(f"{_TITLES['']} {_TITLES.get(language, '')}".split()),
        frozenset(_LINKS.get(language, "").split()),
        language in _ORDINALS,
        _DENSE.get(language, 1),
        frozenset(OPENERS.get(language, ())),
    )


def _rules(language: str) -> _Rules:
    primary = re.split("[-_]", language.lower(), maxsplit=1)[0] or "en"
    # Languages that nothing is known of share one entry: the caller may invent names without end.
    return _known(primary if primary in _TITLES or primary in _ORDINALS or primary in _DENSE else "en")


class Sentences:
    """The sentences of a text that arrives in pieces of any size, the same however it was cut.

    Fenced blocks of code are left out: nobody can listen to them. A sentence may have nothing speakable in it (a rule,
    an emoji): see `speakable`.
    """

    def __init__(self, language: str) -> None:
        self._rules = _rules(language)
        self._text = ""
        self._fenced = False

    def feed(self, text: str) -> list[str]:
        """The sentences that are complete with these characters, without the space around them."""
        self._text += text
        return list(self._take(False))

    def end(self) -> list[str]:
        """The sentences that are left when no more will come; the object begins anew."""
        found = list(self._take(True))
        self._text, self._fenced = "", False
        return found

    def _take(self, final: bool) -> Iterator[str]:
        at, text = 0, self._text
        while True:
            if self._fenced:
                close = text.find("\n```", at)
                if close < 0:
                    # What is inside is forgotten at once, but for what may be the beginning of its end.
                    self._text = text[max(at, len(text) - 3) :]
                    return
                at, self._fenced = close + 4, False
            at = _start(text, at)
            if text.startswith("```", at):
                at, self._fenced = at + 3, True
                continue
            end = _cut(text, at, self._rules, final)
            if end is None:
                break
            yield text[at:end].rstrip()
            at = end
        self._text = text[at:]


def clauses(text: str, language: str) -> list[str]:
    """Cut a text for synthesis: a short first clause, to be heard early, then longer ones of up to 300 characters.

    Cuts are where a speaker pauses, never in numbers, abbreviations, addresses or short quotations. Each has something
    to speak, unless nothing in the text has; empty text has none.
    """
    rules, text = _rules(language), text.rstrip()
    places = list(_places(text, rules))
    pieces: list[str] = []
    at, first, said = _start(text, 0), 0, 0
    while at < len(text):
        while first < len(places) and places[first][0] <= at:
            first += 1
        end = _choose(text, at, places, first, said, rules)
        pieces.append(text[at:end].rstrip())
        if _SPEAKABLE.search(pieces[-1]):
            said = max(said, len(pieces[-1]))
        at = _start(text, end)
    return _joined(pieces)


def speakable(text: str) -> str:
    """What to say of a text with the Markdown that language models write, line by line; empty where that is nothing."""
    for pattern, instead in _MARKDOWN:
        text = pattern.sub(instead, text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if _SPEAKABLE.search(line))


def _start(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _cut(text: str, at: int, rules: _Rules, final: bool) -> int | None:
    """Where the sentence that begins at `at` ends; None while that is not certain, or when nothing is left.

    It depends on the next `_SIGHT` characters only, and not on how many of them were there when it was decided.
    """
    sight = text[at : at + _SIGHT]
    if not sight:
        return None
    final = final or len(sight) == _SIGHT
    end = _ending(sight, rules, final)
    if end is None:
        if not final:
            return None
        end = len(sight.rstrip())
    if end <= MOST_SENTENCE:
        return at + end
    places = [place for place in _pauses(sight, 0, len(sight)) if place[0] <= MOST_SENTENCE]
    if not places:
        return at + _whole(sight, 0, MOST_SENTENCE)
    return at + max(places, key=lambda place: (place[1] > 1 and place[0] > MOST_SENTENCE // 2, place[0]))[0]


def _ending(text: str, rules: _Rules, final: bool) -> int | None:
    """Where the first sentence of the text certainly ends."""
    at = shut = 0
    while found := _SENTENCE.search(text, at):
        at = found.end()
        if found["open"]:
            if found.start() < shut:
                continue
            close = _closing(text, found)
            if close >= 0:
                # The marks before the closing one may end the sentence as well.
                at = max(at, len(text[:close].rstrip(_ENDS + _WIDE + " \u00a0\u202f")))
                shut = close + 1
            elif not final and len(text) <= found.end() + _QUOTE:
                return None
            continue
        following = _start(text, at)
        while following < len(text) and text[following] in "»”’」』)" and _is_closing(text, following):
            at = following + 1
            following = _start(text, at)
        if following == len(text):
            return None
        if _ends(text, found, at, following, rules):
            return at
    return None


def _closing(text: str, opening: re.Match[str]) -> int:
    """Where a quotation ends; -1 when it is none, or a long one."""
    end = opening.end() + _QUOTE
    places = [text.find(mark, opening.end(), end) for mark in _PAIRS[opening["open"]]]
    return min((place for place in places if place >= 0), default=-1)


def _is_closing(text: str, at: int) -> bool:
    """Whether a mark after a space closes what came before, as in French, or opens what comes, as in German."""
    return text[at] != "»" or at + 1 == len(text) or not (text[at + 1].isalnum() or text[at + 1] in "¿¡")


def _ends(text: str, found: re.Match[str], end: int, following: int, rules: _Rules) -> bool:
    """Whether a sentence ends at the mark `found` (with what closes it at `end`), another beginning at `following`."""
    if found["wide"]:
        return True
    gap, begins = text[end:following], text[following]
    lines = gap.count("\n") + (found["line"] is not None)
    if lines > 1:
        return True
    if found["line"] is not None:
        return not begins.islower()
    closed = end > found.end("marks")
    marks = found["marks"]
    if marks.strip("."):
        if "…" not in marks:
            return not (begins in ",;:.!?…" or (closed and begins.islower()))
    elif len(marks) == 1 and _abbreviates(text[: found.start()], begins, rules):
        return False
    return not (begins.islower() or begins in ",;:.!?…" or (not lines and begins in "-–—"))


def _abbreviates(before: str, begins: str, rules: _Rules) -> bool:
    """Whether the full stop after `before` belongs to its last word."""
    word = (before[-32:].split() or [""])[-1].lstrip(_BRACKETS)
    small = word.casefold()
    if word.isdecimal():
        return (rules.ordinals and len(word) <= 2) or word == before.lstrip(_BRACKETS + " ")
    return (
        small in rules.titles
        or (begins.isdecimal() and bool(_NUMBERED.fullmatch(small)))
        or (len(word) == 1 and word.isalpha())
        or bool(_DOTTED.fullmatch(word))
    )


def _places(text: str, rules: _Rules) -> Iterator[tuple[int, int]]:
    """Where the text may be cut and how well: 3 a sentence ends, 2 a mark, 1 before a linking word, 0 a space."""
    at = _start(text, 0)
    while (end := _cut(text, at, rules, True)) is not None:
        for place, worth in _pauses(text, at, end):
            if place < end:
                word = _WORD.match(text, place)
                yield place, 1 if worth == 0 and word and word[0].casefold() in rules.links else worth
        yield end, 3
        at = _start(text, end)


def _pauses(text: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The places inside of a sentence: 2 after a mark, 0 after a space."""
    at = shut = begin
    while found := _CLAUSE.search(text, at, end):
        at = found.end()
        if found["open"]:
            if found.start() >= shut and (close := _closing(text, found)) >= 0:
                at = shut = close + 1
            continue
        yield at, 2 if found["mark"] else 0


def _choose(text: str, at: int, places: list[tuple[int, int]], first: int, said: int, rules: _Rules) -> int:
    """Where the clause that begins at `at` ends, after some of up to `said` characters; `places[first]` lies ahead."""
    most = min(max(_FIRST // rules.density, _GROWTH * said), MOST_CLAUSE // rules.density)
    near: list[tuple[int, int]] = []
    for place in range(first, len(places)):
        if places[place][0] > at + MOST_CLAUSE // rules.density:
            break
        near.append(places[place])
    within = [place for place in near if place[0] <= at + most]
    if said == 0:
        chosen = _early(text, at, within, rules)
    elif len(text) <= at + most:
        return len(text)
    else:
        far = [place for place in within if place[0] > at + most // 2] or within
        chosen = max(far, key=lambda place: (place[1], place[0]), default=None)
    if chosen is None:
        chosen = near[0] if near else (_whole(text, at, at + MOST_CLAUSE // rules.density), 0)
    return chosen[0]


def _early(text: str, at: int, places: list[tuple[int, int]], rules: _Rules) -> tuple[int, int] | None:
    """The best of the places for a first clause."""
    least, early = at + _LEAST // rules.density, at + _EARLY // rules.density
    for place in places:
        if place[1] > 1 and (place[0] >= least or text[at : place[0]].strip() in rules.openers):
            if place[0] <= early:
                return place
            break
    rest = len(text) - at
    if rest <= early - at:
        return len(text), 3
    for wanted, most in ((1, early), (2, len(text)), (1, len(text))):
        for place in places:
            if place[1] >= wanted and least <= place[0] <= most:
                return place
    if rest <= _FIRST // rules.density:
        return len(text), 3
    return next((place for place in reversed(places) if least <= place[0] <= early), None)


def _whole(text: str, begin: int, end: int) -> int:
    """The last space between, or where none is, a place near the end that tears no accent off nor an emoji apart."""
    if end >= len(text):
        return len(text)
    for place in range(end, begin + (end - begin) // 2, -1):
        if text[place - 1].isspace():
            return place
    for place in range(end, max(end - 32, begin), -1):
        if not (unicodedata.category(text[place]).startswith("M") or "\u200d" in text[place - 1 : place + 1]):
            return place
    return end


def _joined(pieces: list[str]) -> list[str]:
    """The same pieces, those with nothing to speak at the end of the one before, or before the first."""
    groups: list[list[str]] = []
    spoken = False
    for piece in pieces:
        speaks = bool(_SPEAKABLE.search(piece))
        if groups and not (speaks and spoken):
            groups[-1].append(piece)
        else:
            groups.append([piece])
        spoken = spoken or speaks
    return [" ".join(group) for group in groups]


_EMOJI = "[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\ufe0e\ufe0f\u200d\u20e3\U000e0020-\U000e007f]+"
_MARKDOWN = tuple(
    (re.compile(pattern, re.MULTILINE), instead)
    for pattern, instead in (
        (r"[^\S\n]+", " "),
        (r"```[\s\S]*?(?:```|\Z)", "\n"),
        (r"!?\[([^\[\]]{0,500})\]\([^()\s]{0,2000}(?: \"[^\"]{0,200}\")?\)", r"\1"),
        (r"<?https?://(?:www\.)?([^\s/?#>)]{1,253})[^\s>)]{0,2000}>?", r"\1"),
        (r"</?[A-Za-z][^<>\n]{0,200}>", " "),
        (r"^ ?(?:> ?)+", ""),
        (r"^ ?#{1,6} ", ""),
        (r"^ ?[-*+•] (?:\[[ xX]\] )?", ""),
        (r"^ ?\|[ |:-]*$", ""),
        (r"^ ?\| ?| ?\| ?$", ""),
        (r" \| ", ", "),
        (r"`+", ""),
        (r"(?<![^\W_])(?:\*{1,3}|_{1,3}|~~)(?=\S)|(?<=\S)(?:\*{1,3}|_{1,3}|~~)(?![^\W_])", ""),
        (_EMOJI, ""),
    )
)
"""In this order: space, code, links, addresses (their host is said), tags, quotes, headings, lists, tables, …"""
