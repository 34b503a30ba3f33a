"""The conversation of one session as the node remembers it, and what a user says to change who answers in it.

Pure: nothing here awaits, looks anything up or owns a clock. The phrases by which users switch personas are in
`talk.json`, by language; names are matched by how they sound written down, for they come from a recogniser.
"""

from __future__ import annotations

import json
import re
import unicodedata
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from rapidfuzz.distance import Levenshtein

if TYPE_CHECKING:
    from agentvoicebox.tenancy.models import Persona

MOST_TURNS = 20
MOST_CHARACTERS = 8_000
"""Of a conversation that is remembered; the oldest is forgotten first."""

_MOST_COMMAND = 120
"""Characters of an utterance that can be a command."""
_FALLBACK = "en"

_FOLDS = (("ph", "f"), ("th", "t"), ("ck", "k"), ("c", "k"), ("q", "k"), ("z", "s"), ("y", "i"), ("w", "v"))
"""Letters that a recogniser takes for one another in names it does not know."""

Names = Sequence[tuple[uuid.UUID, str]]
"""A tenant's personas: id and name."""


@dataclass(frozen=True, slots=True)
class Switch:
    """The user wants to talk to this persona."""

    persona_id: uuid.UUID
    name: str


@dataclass(frozen=True, slots=True)
class Ask:
    """The user wants to know whom they talk to."""


@dataclass(frozen=True, slots=True)
class Reset:
    """The user wants whoever answers by default."""


Command = Switch | Ask | Reset


def _ignore(persona: Persona | None) -> None:
    """Nobody has to be told."""


class Talk:
    """What one session remembers. Small while nothing was said: there are many sessions."""

    __slots__ = ("_turns", "instructions", "language", "on_switch", "persona", "project_id")

    def __init__(
        self,
        *,
        project_id: uuid.UUID | None = None,
        persona: uuid.UUID | str | None = None,
        instructions: str = "",
        language: str = "en-US",
    ) -> None:
        self.project_id = project_id
        """Whose default persona and whose usage it is."""
        self.persona = persona
        """The id (or name) of who answers; None for the default of project or tenant."""
        self.instructions = instructions
        """What the client asks of every answer."""
        self.language = language
        self.on_switch: Callable[[Persona | None], None] = _ignore
        """Told when the user has switched: whom to, or None for the platform's own assistant."""
        self._turns: list[tuple[str, str]] | None = None

    def messages(self) -> list[dict[str, Any]]:
        """The last turns in OpenAI's chat format, oldest first, a user's message and its answer each."""
        return [
            {"role": role, "content": text}
            for turn in self._turns or ()
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]

    def note(self, user: str, assistant: str) -> None:
        """Remember a turn, whoever answered it. What was not said or not answered leaves nothing to remember."""
        user, assistant = user.strip(), assistant.strip()
        if not user or not assistant:
            return
        turns = self._turns = self._turns if self._turns is not None else []
        turns.append((user[: MOST_CHARACTERS // 2], assistant[: MOST_CHARACTERS // 2]))
        while len(turns) > MOST_TURNS or sum(len(said) + len(answer) for said, answer in turns) > MOST_CHARACTERS:
            del turns[0]

    def forget(self) -> None:
        """Begin anew."""
        self._turns = None


def is_command(text: str, language: str) -> bool:
    """Whether the utterance has the form of a command; whom it names is for `command` to find out."""
    return _parsed(text, language) is not None


def command(text: str, language: str, names: Names) -> Command | None:
    """What the user wants changed about who answers; None when it is something else, or the name is nobody's.

    A name counts without regard to case, accents and articles. One that is not quite right counts if exactly one
    persona sounds like it and nobody else nearly does: otherwise the utterance goes its usual way.
    """
    found = _parsed(text, language)
    if not isinstance(found, str):
        return found
    phrases = _phrases(language)
    match = _match(found, names, phrases.article) if phrases is not None else None
    return Switch(*match) if match is not None else None


def called(heard: str, language: str, names: Names) -> tuple[uuid.UUID, str] | None:
    """Whose name this is, as far as it has been understood; the rules are those of `command`."""
    phrases = _phrases(language) or _phrases(_FALLBACK)
    assert phrases is not None
    return _match(heard, names, phrases.article) if _plain(heard) else None


def sentence(kind: str, language: str, name: str) -> str:
    """What is said after a command: `kind` is `switched`, `asked` or `resetted`."""
    phrases = _phrases(language) or _phrases(_FALLBACK)
    assert phrases is not None
    return phrases.sentences[kind].replace("{name}", name)


@dataclass(frozen=True, slots=True)
class _Phrases:
    """What is understood and said in one language."""

    switch: re.Pattern[str]
    ask: re.Pattern[str]
    reset: re.Pattern[str]
    article: re.Pattern[str]
    tail: re.Pattern[str]
    sentences: dict[str, str]


@cache
def _table() -> dict[str, dict[str, Any]]:
    file = resources.files("agentvoicebox.bus_bridge") / "talk.json"
    table: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return table


def _phrases(language: str) -> _Phrases | None:
    primary = language.partition("-")[0].lower()
    return _compiled(primary) if primary in _table() else None


@cache
def _compiled(primary: str) -> _Phrases:
    table = _table()[primary]

    def one_of(patterns: list[str]) -> str:
        return "|".join(f"(?:{pattern})" for pattern in patterns)

    # A group's name may occur once: that of an alternative is found by being the only one that is set.
    switch = one_of(table["switch"]).replace("{name}", "(.+)")
    return _Phrases(
        re.compile(switch),
        re.compile(one_of(table["ask"])),
        re.compile(one_of(table["reset"])),
        re.compile(f"^(?:{one_of(table['article'])}) "),
        re.compile(f" (?:{one_of(table['tail'])})$"),
        {kind: table[kind] for kind in ("switched", "asked", "resetted")},
    )


def _parsed(text: str, language: str) -> str | Ask | Reset | None:
    """A command, or for a switch the name as it was heard."""
    phrases = _phrases(language)
    if phrases is None or len(text) > _MOST_COMMAND:
        return None
    said = _plain(text)
    while (cut := phrases.tail.sub("", said)) != said:
        said = cut
    if phrases.ask.fullmatch(said):
        return Ask()
    if phrases.reset.fullmatch(said):
        return Reset()
    match = phrases.switch.fullmatch(said)
    return next(name for name in match.groups() if name) if match is not None else None


def _plain(text: str) -> str:
    """Lower-case words without accents or punctuation, one space between them."""
    apart = unicodedata.normalize("NFKD", text.casefold())
    return " ".join(re.sub(r"[^\w]|_", " ", "".join(c for c in apart if not unicodedata.combining(c))).split())


def _match(heard: str, names: Names, article: re.Pattern[str]) -> tuple[uuid.UUID, str] | None:
    def bare(name: str) -> str:
        return article.sub("", _plain(name), count=1).replace(" ", "")

    wanted = bare(heard)
    spelt = [(bare(persona[1]), persona) for persona in names]
    exact = [persona for name, persona in spelt if name == wanted]
    if exact:
        return exact[0] if len(exact) == 1 else None
    return _similar(_sound(wanted), [(_sound(name), persona) for name, persona in spelt])


def _similar(wanted: str, sounds: list[tuple[str, tuple[uuid.UUID, str]]]) -> tuple[uuid.UUID, str] | None:
    """The only one that sounds like it, from its first letter on, if no other comes near."""
    allowed = 0 if len(wanted) < 3 else 1 if len(wanted) < 7 else 2
    near = [(Levenshtein.distance(wanted, sound), sound, persona) for sound, persona in sounds]
    close = [(distance, sound, persona) for distance, sound, persona in near if distance <= allowed + 1]
    if len(close) != 1:
        return None
    distance, sound, persona = close[0]
    return persona if distance <= allowed and sound[:1] == wanted[:1] else None


def _sound(name: str) -> str:
    for letters, one in _FOLDS:
        name = name.replace(letters, one)
    return re.sub(r"(.)\1+", r"\1", name)
