"""How work for engines elsewhere, and what becomes of it, is written down: MessagePack, a small struct per thing said.

What is asked: `Load`, `Unload`, `Hear`, `Say`, `ListVoices`, and in place of any of them, later, `Cancel`. What is
answered: `Ready`, `Understood`, `Voices`, or for `Say` one `Part` after the other, numbered from 0; and last of all
`Done` or `Failure`. Which question an answer belongs to is said outside of it, by a number or by a field.

A worker on another machine has its models in another directory. Values of a configuration that lie in the directory of
models travel as names in it (`models:faster-whisper-base`), and each worker puts its own directory in front.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from agentvoicebox.config.errors import (
    AvbError,
    BadInput,
    Conflict,
    Forbidden,
    NotFound,
    RateLimited,
    Refused,
    TooLarge,
    Unavailable,
)
from agentvoicebox.plugins.pool.line import Crowded
from agentvoicebox.plugins.pool.runner import EngineSpec, Heard, Loaded, Speech, Transcript, Utter, Voice

_MODELS = "models:"

_KINDS: dict[str, type[AvbError]] = {
    each.__name__: each
    for each in (
        *(AvbError, BadInput, Refused, Forbidden, NotFound, Conflict, TooLarge, RateLimited, Unavailable),
        Crowded,  # says nothing of the engine, so that no pool holds it against one
    )
}


class Load(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Make an engine ready; answered with `Ready`."""

    spec: EngineSpec


class Unload(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Give an engine's memory back; answered with `Done`."""

    spec: EngineSpec


class Hear(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Understand audio; answered with `Understood`."""

    spec: EngineSpec
    jobs: list[Heard]


class Say(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Say a text; answered with `Part`s and `Done`."""

    spec: EngineSpec
    utter: Utter


class ListVoices(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Name the voices; answered with `Voices`."""

    spec: EngineSpec


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A process is there, and keeps its files in this directory, which is to be removed when it could not itself."""

    directory: str


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Nobody waits any more; answered with whatever comes first, at the latest with a `Failure`."""


class Failure(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An error of our vocabulary."""

    kind: str
    """The name of its class."""
    code: str
    message: str
    param: str | None = None
    retry_after: float = 0.0

    @classmethod
    def of(cls, error: AvbError) -> Failure:
        """Write an error down; one of a narrower kind becomes what it is a kind of."""
        kind = next(kind.__name__ for kind in type(error).__mro__ if _KINDS.get(kind.__name__) is kind)
        return cls(kind, error.code, error.message, error.param, getattr(error, "retry_after", 0.0))

    def error(self) -> AvbError:
        """The error again."""
        kind = _KINDS.get(self.kind, AvbError)
        if kind is RateLimited:
            return RateLimited(self.message, retry_after=self.retry_after, code=self.code, param=self.param)
        return kind(self.message, code=self.code, param=self.param)


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What must be known of an engine to give it work."""

    loaded: Loaded


class Understood(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What became of each utterance, in their order."""

    answers: list[Transcript | Failure]


class Voices(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An engine's voices."""

    voices: list[Voice]


class Part(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What is said, in parts numbered from 0. Whoever says the same again says it in the same parts."""

    number: int
    speech: Speech


class Done(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """That was all: so many parts."""

    parts: int = 0


Ask = Load | Unload | Hear | Say | ListVoices
Answer = Ready | Understood | Voices | Part | Done | Failure

Unreadable = msgspec.MsgspecError
"""Raised for what nobody of this version has written."""

encode = msgspec.msgpack.Encoder().encode
_asks: msgspec.msgpack.Decoder[Ask] = msgspec.msgpack.Decoder(Ask)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_numbered = msgspec.msgpack.Decoder(tuple[int, Ask | Cancel | Hello | Answer])


def read_ask(data: bytes) -> Ask:
    """What is asked. Raises `Unreadable`."""
    return _asks.decode(data)


def read_answer(data: bytes) -> Answer:
    """What is answered. Raises `Unreadable`."""
    return _answers.decode(data)


def read_numbered(data: bytes) -> tuple[int, Ask | Cancel | Hello | Answer]:
    """Either, with the number before it. Raises `Unreadable`."""
    return _numbered.decode(data)


def outgoing(spec: EngineSpec, models: Path | None = None) -> EngineSpec:
    """An engine as it travels: paths are texts, and those in the directory `models` are names in it."""
    return EngineSpec(spec.kind, spec.plugin, tuple((name, _outgoing(value, models)) for name, value in spec.config))


def incoming(spec: EngineSpec, models: Path | None = None) -> EngineSpec:
    """An engine as it is here, its models in the directory `models`. Raises `BadInput` for a name outside of it."""
    return EngineSpec(spec.kind, spec.plugin, tuple((name, _incoming(value, models)) for name, value in spec.config))


def _outgoing(value: Any, models: Path | None) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_outgoing(each, models) for each in value)
    if isinstance(value, str | Path) and models is not None and Path(value).is_relative_to(models):
        return _MODELS + Path(value).relative_to(models).as_posix()
    return str(value) if isinstance(value, Path) else value


def _incoming(value: Any, models: Path | None) -> Any:
    if isinstance(value, list):  # which cannot be told from a tuple on its way, and would not be hashable here
        return tuple(_incoming(each, models) for each in value)
    if models is None or not (isinstance(value, str) and value.startswith(_MODELS)):
        return value
    name = PurePosixPath(value.removeprefix(_MODELS))
    if name.is_absolute() or ".." in name.parts:
        raise BadInput(f"{str(name)!r} is no name of a model.", param="model")
    return str(models / name)
