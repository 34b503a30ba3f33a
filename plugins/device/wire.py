"""What a device and the platform say to each other over the socket `/ws/v2/device`.

Text frames are JSON objects with a `type`; binary frames are audio: the number of the request they belong to (32 bits,
big-endian), then 16-bit little-endian mono samples, 16 kHz towards the platform. A device numbers its requests from 1;
what answers a request carries its number. Pure: both sides read and write with this.
"""

from __future__ import annotations

import json
import math
import struct
import types
import typing
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar

PATH = "/ws/v2/device"

LISTENING_RATE = 16_000
"""Hz of what a device sends."""

BEAT = 0.25
"""Seconds after which the platform says that it is still at work on a request."""

LARGEST_FRAME = 1024 * 1024
"""Bytes of one frame, text or audio."""

MOST_EVENTS = 200
"""Events of one `Report`."""

_NUMBER = struct.Struct(">I")


class Garbled(ValueError):
    """A frame that says nothing that this side understands; the message tells why, without what it held."""


class Said:
    """One text frame. Subclasses name their `type` and have their fields checked on both ways."""

    type: ClassVar[str]


# --- a device says ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello(Said):
    """The first frame: who this is. `have` is the `etag` of the choices that the device knows, or empty."""

    type: ClassVar[str] = "hello"
    process: str
    """`listener`, `audio`, `core` or `command`."""
    name: str = ""
    """What the device calls itself."""
    version: str = ""
    """Of AgentVoiceBox on it."""
    have: str = ""


@dataclass(frozen=True, slots=True)
class Listen(Said):
    """Audio follows, as somebody speaks; `language` is a BCP 47 tag, or empty for the tenant's choice."""

    type: ClassVar[str] = "listen"
    id: int
    language: str = ""
    partials: bool = False
    """Whether to tell what has been understood so far."""


@dataclass(frozen=True, slots=True)
class Finish(Said):
    """All audio of a `Listen` has been sent."""

    type: ClassVar[str] = "finish"
    id: int


@dataclass(frozen=True, slots=True)
class Speak(Said):
    """Say this; empty voice and language are the tenant's or its persona's choice."""

    type: ClassVar[str] = "speak"
    id: int
    text: str
    language: str = ""
    voice: str = ""


@dataclass(frozen=True, slots=True)
class Ask(Said):
    """Let the persona answer: in the device's own conversation, or, with `messages`, in the one that they are.

    `messages` are in OpenAI's chat format, the question last; `text` is empty then.
    """

    type: ClassVar[str] = "ask"
    id: int
    text: str = ""
    language: str = ""
    messages: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class About(Said):
    """Tell whose device this is, and what the tenant has set for a skill."""

    type: ClassVar[str] = "about"
    id: int
    skill: str = ""


@dataclass(frozen=True, slots=True)
class Choose(Said):
    """Let this persona answer on this device from now on; empty for the default one."""

    type: ClassVar[str] = "choose"
    id: int
    persona: str = ""


@dataclass(frozen=True, slots=True)
class Report(Said):
    """What happened, each event with an `id` of its own: told twice, it counts once."""

    type: ClassVar[str] = "report"
    id: int
    events: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Cancel(Said):
    """Nobody wants the answer to this request any more; nothing answers this."""

    type: ClassVar[str] = "cancel"
    id: int


# --- the platform says ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome(Said):
    """The answer to `Hello`. `time` is the platform's, in seconds since 1970."""

    type: ClassVar[str] = "welcome"
    tenant_id: str
    tenant_name: str
    device_id: str
    time: float


@dataclass(frozen=True, slots=True)
class Configured(Said):
    """What the tenant has chosen (`Choices.as_dict`): after `Welcome` if that is news to it, and at each change."""

    type: ClassVar[str] = "configured"
    etag: str
    choices: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Working(Said):
    """The request has been taken, and every `BEAT`: it is still worked on."""

    type: ClassVar[str] = "working"
    id: int


@dataclass(frozen=True, slots=True)
class Partial(Said):
    """What has been understood so far."""

    type: ClassVar[str] = "partial"
    id: int
    text: str


@dataclass(frozen=True, slots=True)
class Transcript(Said):
    """The end of a `Listen`: what was understood; empty when nothing was. `confidence` is 0 to 1 where it is known."""

    type: ClassVar[str] = "transcript"
    id: int
    text: str
    language: str = ""
    confidence: float | None = None
    engine: str = ""


@dataclass(frozen=True, slots=True)
class Sound(Said):
    """Audio of this rate, in Hz, follows for a `Speak`."""

    type: ClassVar[str] = "sound"
    id: int
    rate: int


@dataclass(frozen=True, slots=True)
class Text(Said):
    """A piece of the answer to an `Ask`."""

    type: ClassVar[str] = "text"
    id: int
    text: str


@dataclass(frozen=True, slots=True)
class Told(Said):
    """The answer to `About` (see `plugins/tenant.py`) or `Choose` (`persona`: who answers now)."""

    type: ClassVar[str] = "told"
    id: int
    about: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Done(Said):
    """The end of the answer to a `Speak` or `Ask`; or a `Report` is in the store."""

    type: ClassVar[str] = "done"
    id: int


@dataclass(frozen=True, slots=True)
class Problem(Said):
    """Instead of the (rest of the) answer to a request; with the number 0, about the connection."""

    type: ClassVar[str] = "problem"
    id: int
    code: str
    message: str


FROM_DEVICE: tuple[type[Said], ...] = (Hello, Listen, Finish, Speak, Ask, About, Choose, Report, Cancel)
FROM_PLATFORM: tuple[type[Said], ...] = (
    *(Welcome, Configured, Working, Partial, Transcript, Sound),
    *(Text, Told, Done, Problem),
)


def encode(said: Said) -> str:
    """A text frame."""
    told = {each.name: getattr(said, each.name) for each in fields(said)}  # type: ignore[arg-type]
    return json.dumps({"type": said.type, **told}, ensure_ascii=False, separators=(",", ":"))


def decode(frame: str, known: tuple[type[Said], ...]) -> Said:
    """What a text frame says. Fields that are not known are passed over. Raises `Garbled`."""
    try:
        told = json.loads(frame)
    except (ValueError, RecursionError) as error:
        raise Garbled("not JSON") from error
    if not isinstance(told, dict):
        raise Garbled("not an object")
    kind = next((each for each in known if each.type == told.get("type")), None)
    if kind is None:
        raise Garbled("no type that is known here")
    given = {}
    for name, allowed in _allowed(kind).items():  # type: ignore[arg-type]
        if name in told:
            given[name] = _checked(told[name], allowed, f"{kind.type}.{name}")
    try:
        return kind(**given)
    except TypeError as error:
        raise Garbled(f"{kind.type}: something is missing") from error


def audio(number: int, pcm: bytes) -> bytes:
    """A binary frame."""
    return _NUMBER.pack(number) + pcm


def split(frame: bytes) -> tuple[int, bytes]:
    """The number of its request, and the audio of a binary frame. Raises `Garbled`."""
    if len(frame) < _NUMBER.size or len(frame) % 2:
        raise Garbled("audio is a number of 4 bytes and whole 16-bit samples")
    return _NUMBER.unpack_from(frame)[0], frame[_NUMBER.size :]


def _checked(value: object, allowed: tuple[type, ...], place: str) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed and int not in allowed:
        try:
            value = float(value)
        except OverflowError as error:
            raise Garbled(f"{place} is too large") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise Garbled(f"{place} is no number")
    if type(value) not in allowed:
        raise Garbled(f"{place} is of another type")
    if place.endswith(".id") and isinstance(value, int) and not 0 <= value < 2**32:
        raise Garbled(f"{place} is no number of a request")
    return value


@cache
def _allowed(kind: type[Said]) -> dict[str, tuple[type, ...]]:
    """The types that each field of a frame takes."""
    hints = typing.get_type_hints(kind)
    return {each.name: _types(hints[each.name]) for each in fields(kind)}  # type: ignore[arg-type]


def _types(hint: Any) -> tuple[type, ...]:
    if isinstance(hint, types.UnionType):
        return tuple(each for part in typing.get_args(hint) for each in _types(part))
    return (typing.get_origin(hint) or hint,)
