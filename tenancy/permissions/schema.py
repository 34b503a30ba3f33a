"""The schema of permissions: what a resource's relations are, and which permissions follow from them.

The language is the part of SpiceDB's that needs nothing but unions and arrows:

    definition document {
        relation folder: folder
        relation reader: user | team#member | user:*
        permission read = reader + folder->read
    }
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from agentvoicebox.config.errors import BadInput

_TOKEN = re.compile(
    r"(?P<skip>\s+|//[^\n]*|/\*.*?\*/)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<mark>->|[{}:=+|#*])|(?P<strange>.)",
    re.DOTALL,
)
_NAME = re.compile(r"[a-z][a-z0-9_]{1,62}[a-z0-9]")
_KEYWORDS = frozenset({"definition", "relation", "permission", "caveat", "nil", "with"})


class SchemaError(BadInput):
    """The schema cannot be read; the message names the line."""

    default_code = "schema_invalid"


class SubjectType(NamedTuple):
    """Who may stand at the end of a relation: `user`, `team#member`, or everybody of a type, `user:*`."""

    type: str
    relation: str = ""
    everybody: bool = False


class Arrow(NamedTuple):
    """`relation->name`: who has `name` on what the relation leads to."""

    relation: str
    name: str


Term = str | Arrow


@dataclass(frozen=True, slots=True)
class Definition:
    """A type of resource or subject."""

    name: str
    relations: Mapping[str, frozenset[SubjectType]]
    permissions: Mapping[str, tuple[Term, ...]]


Schema = Mapping[str, Definition]
"""Definitions by name."""


def parse(text: str) -> Schema:
    """Read a schema whole. Raises `SchemaError` for what is not of the language or leads nowhere."""
    reader = _Reader(text)
    schema: dict[str, Definition] = {}
    lines: dict[str, int] = {}
    while reader.more():
        line = reader.word("definition")
        name = reader.name()
        if name in schema:
            raise _error(line, f"{name} is defined twice")
        lines[name] = line
        schema[name] = _definition(reader, name)
    for name, definition in schema.items():
        _check(schema, definition, lines[name])
    return schema


def _definition(reader: _Reader, name: str) -> Definition:
    relations: dict[str, frozenset[SubjectType]] = {}
    permissions: dict[str, tuple[Term, ...]] = {}
    reader.mark("{")
    while not reader.take("}"):
        is_relation = reader.take("relation")
        line = reader.line if is_relation else reader.word("permission")
        member = reader.name()
        if member in relations or member in permissions:
            raise _error(line, f"{name} has {member} twice")
        if is_relation:
            reader.mark(":")
            types = [_subject_type(reader)]
            while reader.take("|"):
                types.append(_subject_type(reader))
            relations[member] = frozenset(types)
        else:
            reader.mark("=")
            terms = [_term(reader)]
            while reader.take("+"):
                terms.append(_term(reader))
            permissions[member] = tuple(terms)
    return Definition(name, relations, permissions)


def _subject_type(reader: _Reader) -> SubjectType:
    name = reader.name()
    if reader.take("#"):
        return SubjectType(name, reader.name())
    if reader.take(":"):
        reader.mark("*")
        return SubjectType(name, everybody=True)
    return SubjectType(name)


def _term(reader: _Reader) -> Term:
    name = reader.name()
    return Arrow(name, reader.name()) if reader.take("->") else name


def _check(schema: Schema, definition: Definition, line: int) -> None:
    """Every name leads somewhere, and no permission to itself only."""
    name = definition.name
    for relation, types in definition.relations.items():
        for subject in types:
            if subject.type not in schema:
                raise _error(line, f"{name}#{relation} names {subject.type}, which is not defined")
            if subject.relation and not _has(schema[subject.type], subject.relation):
                raise _error(line, f"{name}#{relation} names {subject.type}#{subject.relation}, which is not defined")
    for permission, terms in definition.permissions.items():
        for term in terms:
            if isinstance(term, str):
                if not _has(definition, term):
                    raise _error(line, f"{name}#{permission} names {term}, which {name} lacks")
                continue
            leads_to = definition.relations.get(term.relation)
            if leads_to is None:
                raise _error(line, f"{name}#{permission} follows {term.relation}, which is no relation of {name}")
            for subject in leads_to:
                if subject.relation or subject.everybody or not _has(schema[subject.type], term.name):
                    raise _error(line, f"{name}#{permission} cannot follow {term.relation} to {term.name}")
        _ends(definition, permission, (), line)


def _ends(definition: Definition, name: str, through: tuple[str, ...], line: int) -> None:
    if name in through:
        raise _error(line, f"{definition.name}#{name} is defined by itself")
    for term in definition.permissions.get(name, ()):
        if isinstance(term, str):
            _ends(definition, term, (*through, name), line)


def _has(definition: Definition, name: str) -> bool:
    return name in definition.relations or name in definition.permissions


def _error(line: int, what: str) -> SchemaError:
    return SchemaError(f"The permission schema, line {line}: {what}.")


class _Reader:
    """Goes through the words and marks of a schema."""

    def __init__(self, text: str) -> None:
        self.line = 1
        """Of what was taken last."""
        self._tokens: list[tuple[str, int]] = []
        line = 1
        for found in _TOKEN.finditer(text):
            if found.lastgroup == "strange":
                raise _error(line, f"{found[0]!r} is not understood; there are only unions (+) and arrows (->)")
            if found.lastgroup != "skip":
                self._tokens.append((found[0], line))
            line += found[0].count("\n")
        self._tokens.reverse()

    def more(self) -> bool:
        return bool(self._tokens)

    def take(self, expected: str) -> bool:
        """Whether `expected` comes next; then it is taken."""
        if not self._tokens or self._tokens[-1][0] != expected:
            return False
        _, self.line = self._tokens.pop()
        return True

    def mark(self, expected: str) -> None:
        if not self.take(expected):
            raise _error(*self._instead_of(repr(expected)))

    def word(self, expected: str) -> int:
        """Take that keyword; the line it is on."""
        if not self.take(expected):
            raise _error(*self._instead_of(expected))
        return self.line

    def name(self) -> str:
        found = self._tokens[-1][0] if self._tokens else ""
        if not _NAME.fullmatch(found) or found in _KEYWORDS:
            raise _error(*self._instead_of("a name of 3 to 64 of a-z, 0-9 and _"))
        self.take(found)
        return found

    def _instead_of(self, expected: str) -> tuple[int, str]:
        found, line = self._tokens[-1] if self._tokens else ("the end", self.line)
        return line, f"expected {expected}, found {found}"
