"""How many tokens a request has used: what the provider says where that can be true, our own estimate elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

BYTES_PER_TOKEN = 4
"""The usual rule for text in European languages."""
INPUT_SLACK = 1024
"""Tokens that a provider may add to a prompt of its own: the chat's template, how to use tools."""
OUTPUT_SLACK = 64
"""Tokens of an answer that are no text: its end, and the frame around calls of tools."""
LONGEST_TOKEN = 32
"""Bytes of text for each token allowed, above which a provider is taken to ignore `max_tokens`."""
PIECE = 8
"""Bytes that each piece of a call counts toward that at least, whatever is in it."""
ENDINGS = frozenset({"stop", "length", "tool_calls", "content_filter"})
"""How an answer may end, in OpenAI's words; a provider may say anything."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of the prompt and of the answer; `estimated` when one of them is our estimate, not the provider's word."""

    input: int
    output: int
    estimated: bool = False


class Count:
    """Counts what one request uses, while it is answered.

    A provider's word is taken if it is physically possible: a token is at least one byte of what was exchanged, save
    for the little that is added on both sides and for hidden reasoning, which `max_tokens` bounds.
    """

    __slots__ = ("_hidden", "_input", "_most", "_output", "_pieces", "_prompt", "_said", "_thought", "finish", "sent")

    def __init__(self, prompt: int, most: int) -> None:
        """`prompt` bytes are sent; at most `most` tokens are asked for."""
        self.finish: str | None = None
        self._prompt = prompt
        self._most = most
        self._said = 0
        self._thought = 0
        self._pieces = 0
        self.sent = False
        """Whether the prompt has gone out, so that somebody may have to pay for it."""
        self._input: object = None
        self._output: object = None
        self._hidden: object = 0

    @property
    def overflowing(self) -> bool:
        """Whether more has been said than the tokens asked for can hold."""
        return self._said + self._thought + PIECE * self._pieces > LONGEST_TOKEN * self._most + 1024

    @property
    def ending(self) -> str:
        """How the answer ended, for the last delta."""
        return "length" if self.overflowing else self.finish if self.finish in ENDINGS else "stop"

    def said(self, text: str, calls: list[dict[str, Any]] | None) -> None:
        """A piece of the answer has come."""
        self._said += len(text.encode(errors="replace"))
        for call in calls or ():
            self._pieces += 1
            function = call.get("function") or {}
            self._said += sum(len(str(function.get(name, "")).encode()) for name in ("name", "arguments"))

    def think(self, text: str) -> None:
        """A piece of reasoning has come, which is paid for but not part of the answer."""
        self._thought += len(text.encode(errors="replace"))

    def told(self, *, input: object = None, output: object = None, hidden: object = None) -> None:
        """The provider's word, whatever it is; `hidden` is the part of the output that is not shown. None: not said."""
        self._input = self._input if input is None else input
        self._output = self._output if output is None else output
        self._hidden = self._hidden if hidden is None else hidden

    def tokens(self) -> Tokens:
        """What was used until now."""
        if not self.sent:
            return Tokens(0, 0)
        seen = self._said + self._thought
        hidden = _whole(self._hidden, 0, self._most) or 0
        taken = _whole(self._input, 1, self._prompt + INPUT_SLACK)
        given = _whole(self._output, 1 if seen else 0, min(seen + hidden + OUTPUT_SLACK, self._most + OUTPUT_SLACK))
        return Tokens(
            taken if taken is not None else _estimate(self._prompt),
            given if given is not None else min(_estimate(seen), self._most),
            estimated=taken is None or given is None,
        )


def _whole(number: object, least: int, most: int) -> int | None:
    """`number` as an integer if it is one from `least` to `most`."""
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        return None
    return int(number) if number == int(number) and least <= number <= most else None


def _estimate(size: int) -> int:
    return math.ceil(size / BYTES_PER_TOKEN)
