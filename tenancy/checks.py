"""What a value from outside must look like."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from agentvoicebox.config.errors import BadInput, TooLarge

Choice = TypeVar("Choice", bound=StrEnum)

MOST_JSON = 64 * 1024
"""Bytes of one document of a tenant's: a configuration, a context."""

_EMAIL = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})+")
_ZONE = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_READ_IN_TWO_WAYS = frozenset("ßẞς")
"""What IDNA 2003, which Python speaks, writes as other letters, and IDNA 2008, which browsers speak, does not."""
_URL = re.compile(r"[!-\[\]-~]{1,2000}")
"""Visible ASCII without the backslash, which some parsers read as a slash."""
_NEVER_PUBLIC = ("localhost", "local", "internal", "intranet", "lan", "home", "corp", "arpa", "test", "invalid")
"""Last labels of names that mean something inside a network only."""


def words(value: object, param: str, shortest: int, longest: int) -> str:
    """Text for people: `shortest` to `longest` characters, no line breaks or other control characters."""
    if not isinstance(value, str) or not shortest <= len(value.strip()) or len(value) > longest:
        raise BadInput(f"{param} must be text of {shortest} to {longest} characters.", param=param)
    if not value.isprintable():
        raise BadInput(f"{param} must not hold control characters.", param=param)
    return value


def shaped(value: object, param: str, shape: re.Pattern[str], like: str) -> str:
    """Text for machines, which must match `shape` as a whole; `like` describes it in the error."""
    if not isinstance(value, str) or not shape.fullmatch(value):
        raise BadInput(f"{param} must be {like}.", param=param)
    return value


def chosen(value: object, param: str, choices: type[Choice]) -> Choice:
    """One of `choices`."""
    try:
        return choices(str(value))
    except ValueError as error:
        raise BadInput(f"{param} must be one of {', '.join(choices)}.", param=param) from error


def number(value: object, param: str, least: int, most: int = 2**31 - 1) -> int:
    """A whole number from `least` to `most`, which by default is what a column can hold."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadInput(f"{param} must be a whole number from {least} to {most}.", param=param)
    return value


def real(value: object, param: str, least: float, most: float) -> float:
    """A number, whole or not, from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise BadInput(f"{param} must be a number from {least:g} to {most:g}.", param=param)
    return float(value)


def yes_or_no(value: object, param: str) -> bool:
    """True or false, and nothing that merely looks like it."""
    if not isinstance(value, bool):
        raise BadInput(f"{param} must be true or false.", param=param)
    return value


def email(value: object, param: str = "email") -> str:
    """An e-mail address, in lower case; whether it receives anything only a message can tell."""
    found = shaped(value, param, _EMAIL, "an e-mail address such as name@example.com")
    if len(found) > 320:
        raise BadInput(f"{param} must be at most 320 characters.", param=param)
    return found.lower()


def timezone(value: object, param: str = "timezone") -> str:
    """The name of a time zone, such as `Europe/Vienna`."""
    like = "the name of a time zone such as UTC or Europe/Vienna"
    if len(name := shaped(value, param, _ZONE, like)) > 50:
        raise BadInput(f"{param} must be {like}.", param=param)
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        if name != "UTC":  # a system may know no zones at all
            raise BadInput(f"{param} must be {like}.", param=param) from error
    return name


def host(value: object, param: str) -> str:
    """A host name of at least two labels, in the lower case ASCII that DNS knows it by; no address."""
    like = "a host name such as voice.example.com"
    if not isinstance(value, str) or not 3 <= len(value) <= 253:
        raise BadInput(f"{param} must be {like}.", param=param)
    if not _READ_IN_TWO_WAYS.isdisjoint(value):
        raise BadInput(f"{param} holds a letter that DNS is asked for in two ways; give its xn-- form.", param=param)
    try:
        name = value.rstrip(".").encode("idna").decode("ascii").lower() if value.isprintable() else ""
    except UnicodeError as error:
        raise BadInput(f"{param} must be {like}.", param=param) from error
    labels = name.split(".")
    if len(name) > 253 or len(labels) < 2 or not all(map(_LABEL.fullmatch, labels)):
        raise BadInput(f"{param} must be {like}.", param=param)
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
        # What ends in a number is read as an address, however oddly it is written.
        raise BadInput(f"{param} must be a name, not an address.", param=param)
    return name


def public_url(value: object, param: str) -> str:
    """An https address that the public network knows by name, without credentials.

    Names may still lead to private addresses: whoever connects looks at what the name resolves to then.
    """
    like = "an https address of a public host, without user name or password"
    text = shaped(value, param, _URL, like)
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as error:
        raise BadInput(f"{param} must be {like}.", param=param) from error
    if parts.scheme != "https" or parts.username is not None or parts.password is not None:
        raise BadInput(f"{param} must be {like}.", param=param)
    if host(parts.hostname, param).rpartition(".")[2] in _NEVER_PUBLIC:
        raise BadInput(f"{param} must be {like}.", param=param)
    return text


def document(value: object, param: str, most: int = MOST_JSON) -> dict[str, Any]:
    """An object that JSON can hold, of at most `most` bytes. Raises `BadInput`, `TooLarge`."""
    if not isinstance(value, Mapping):
        raise BadInput(f"{param} must be an object.", param=param)
    made = dict(value)
    try:
        size = len(json.dumps(made, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:  # the last for what holds itself, or is far too deep
        raise BadInput(f"{param} must be an object that JSON can hold.", param=param) from error
    if size > most:
        raise TooLarge(f"{param} holds at most {most} bytes.", param=param)
    return made


def identifier(value: object, param: str) -> uuid.UUID:
    """A UUID in its usual form, as text or already read."""
    if isinstance(value, uuid.UUID):
        return value
    if isinstance(value, str) and len(value) in (32, 36):
        try:
            found = uuid.UUID(value)
        except ValueError:
            pass
        else:
            if value.lower() in (str(found), found.hex):
                return found
    raise BadInput(f"{param} must be a UUID.", param=param)


def moment(value: object, param: str) -> datetime:
    """A point in time, which names its zone."""
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise BadInput(f"{param} must be a time with its zone.", param=param)
    return value
