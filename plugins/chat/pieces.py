"""Calls of tools as they come in the pieces of an answer, put together by the one rule for all who do so."""

from __future__ import annotations

import uuid
from typing import Any, Final

from agentvoicebox.plugins.chat.errors import ProviderFailed

MOST_CALLS: Final = 64
"""Calls in one answer, far above what models make of one question; `Chats` hands on no more."""


def checked(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `tool_calls` of a `Delta` from a provider, made valid Unicode.

    Raises `ProviderFailed` (provider_garbage) for more calls than anybody means.
    """
    if len(pieces) > MOST_CALLS or not all(0 <= (piece.get("index") or 0) < MOST_CALLS for piece in pieces):
        raise ProviderFailed("provider_garbage")
    return [_valid(piece) for piece in pieces]


def valid(text: str) -> str:
    """`text` as UTF-8 can hold it: JSON can name half of a character, which nobody could hand on."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _valid(piece: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _valid(value) if isinstance(value, dict) else valid(value) if isinstance(value, str) else value
        for name, value in piece.items()
    }


class Pieces:
    """The calls of one answer, by their place among them (`index`)."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[str, str, list[str]]] = {}

    def add(self, pieces: list[dict[str, Any]]) -> None:
        """Take the `tool_calls` of a `Delta`: an id and a name replace older ones, arguments continue them."""
        for piece in pieces:
            index, function = piece.get("index") or 0, piece.get("function") or {}
            id, name, arguments = self._calls.get(index, ("", "", []))
            arguments.append(function.get("arguments") or "")
            self._calls[index] = piece.get("id") or id, function.get("name") or name, arguments

    def whole(self) -> list[dict[str, Any]]:
        """The calls in their order, as `tool_calls` of a message in OpenAI's format. One without a name is none."""
        return [
            {
                "id": id or f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": name, "arguments": "".join(arguments)},
            }
            for _, (id, name, arguments) in sorted(self._calls.items())
            if name
        ]
