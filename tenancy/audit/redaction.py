"""What may stand in an audit line: no secrets, no more than so much, and nothing the database cannot hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

MARK = "[redacted]"

_TEXT = 1_000
"""Characters of one string within a record of values."""
_ITEMS = 100
"""Entries of one mapping or list."""
_DEPTH = 8
_BUDGET = 16_000
"""Characters of one record of values, roughly."""

_SECRET = re.compile(
    "keys?|apikeys?|tokens?|jwt|bearer|secrets?|passwords?|passwd|passphrase|passcode|pwd|pin|otp|authorization|auth|"
    "cookies?|credentials?|hash(es)?|digest|salt|signature|private|wrapped|sealed|nonce|dsn"
)
_COUNTED = re.compile("(api)?keys?|tokens?|hash(es)?|credentials|secrets")
"""Of these there may be a number, which says nothing: `max_api_keys`, `input_tokens`."""
_ABOUT = re.compile(
    "ids?|prefix|name|count|version|type|kind|class|tier|at|by|expiry|limit|length|size|status|used|usage|seconds|"
    "last|method|algorithm"
)
"""What is said about a secret is none: `key_id`, `token_type`."""

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_LOOKS_SECRET = re.compile(
    r"""
      avb_[\w-]{20,}                                   # keys of ours
    | \b(?:sk|pk|rk|xox[a-z]|gh[a-z]|glpat)[-_][\w-]{16,}  # keys of others
    | \b(?:bearer|basic)\s+[\w.~+/=-]{8,}              # an Authorization header
    | \beyJ[\w-]{8,}\.[\w-]+\.[\w-]*                   # a JWT
    | -----BEGIN\ [^-]*PRIVATE\ KEY-----.*             # PEM
    | (?<=://)[^\s/@:]*:[^\s/@]+(?=@)                  # the credentials of an address
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def line(text: object, longest: int) -> str:
    """`text` as one line of at most `longest` characters, without what looks like a secret."""
    return _cut(_CONTROL.sub(" ", _storable(str(text), longest)).strip(), longest)


def values(record: Mapping[Any, Any] | None) -> dict[str, Any] | None:
    """`record` as JSON may hold it: secrets replaced by `MARK`, what is too long or deep cut and marked as cut."""
    return None if record is None else _Copy().mapping(record, 0)


def is_secret(name: str, value: object = "") -> bool:
    """Whether what goes by `name` must not be written down."""
    if value is None or isinstance(value, bool):
        return False
    parts = [part.lower() for part in _WORDS.findall(name)]
    telling = [part for part in parts if _SECRET.fullmatch(part)]
    if not telling or _ABOUT.fullmatch(parts[-1]):
        return False
    return not (isinstance(value, (int, float)) and all(map(_COUNTED.fullmatch, telling)))


class _Copy:
    """One record on its way into a line; what it has used up counts for all its parts."""

    def __init__(self) -> None:
        self._left = _BUDGET

    def mapping(self, given: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in given.items():
            if len(made) >= _ITEMS or self._left <= 0:
                made["…"] = f"{len(given) - len(made)} more"
                break
            key = line(name.value if isinstance(name, Enum) else name, 100)
            self._left -= len(key)
            made[key] = MARK if is_secret(key, value) else self.value(value, depth + 1)
        return made

    def value(self, given: Any, depth: int) -> Any:
        self._left -= 4
        if isinstance(given, Enum):
            given = given.value
        if given is None or isinstance(given, bool):
            return given
        if isinstance(given, int):
            return int(given) if given.bit_length() <= 256 else "a number of more than 256 bits"
        if isinstance(given, float):
            return float(given) if math.isfinite(given) else str(given)
        if isinstance(given, (bytes, bytearray, memoryview)):
            return f"{memoryview(given).nbytes} bytes"
        if isinstance(given, Mapping):
            return self.mapping(given, depth) if depth < _DEPTH else "…"
        if isinstance(given, Iterable) and not isinstance(given, str):
            return self._items(list(given), depth) if depth < _DEPTH else "…"
        return self._text(str(given))

    def _items(self, given: list[Any], depth: int) -> list[Any]:
        made: list[Any] = []
        for value in given:
            if len(made) >= _ITEMS or self._left <= 0:
                made.append(f"… {len(given) - len(made)} more")
                break
            made.append(self.value(value, depth + 1))
        return made

    def _text(self, given: str) -> str:
        most = max(0, min(_TEXT, self._left))
        text = _storable(given, most)
        self._left -= min(len(text), most)
        return text if len(text) <= most else f"{text[:most]}… of {len(given)} characters"


def _storable(text: str, most: int) -> str:
    """No NUL, no lone surrogate, no secret; only so much is looked at, since the rest will be cut."""
    text = text[: most + 4_096]
    text = text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    return _LOOKS_SECRET.sub(MARK, text)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
