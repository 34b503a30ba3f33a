"""What goes to the language model without core: the wishes of a client that brings its own tools or instructions.

Skills cannot call a client's tools, so such a turn is the model's alone. `Calls` keeps the part of the conversation
that is not over yet: a question, the calls it led to, and what they returned. Pure; messages are OpenAI's chat format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]

MOST_MESSAGES = 64
"""Of an exchange with tools, after which its oldest calls are forgotten, each with what it returned."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client wants of one answer, beyond the answer; what it leaves open is the session's."""

    instructions: str = ""
    tools: tuple[Mapping[str, Any], ...] | None = None
    tool_choice: Any = None
    input: tuple[Mapping[str, Any], ...] | None = None
    """The conversation to answer in place of the session's, as chat messages."""
    apart: bool = False
    """Whether the answer stays out of the conversation."""


@dataclass(frozen=True, slots=True)
class Call:
    """A function that the model wants called; `arguments` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


class Calls:
    """One session's open exchange; None in place of empty, for most sessions have none."""

    __slots__ = ("_messages",)

    def __init__(self) -> None:
        self._messages: Messages | None = None

    @property
    def messages(self) -> Messages:
        """The exchange so far: nothing, or what begins with the user's question."""
        return list(self._messages or ())

    @property
    def question(self) -> str:
        """What the user asked at its beginning."""
        return next((str(each["content"]) for each in self._messages or () if each["role"] == "user"), "")

    def asked(self, text: str) -> None:
        """The user said something new; calls that still run may be answered later."""
        if text:
            self._add({"role": "user", "content": text})

    def called(self, said: str, calls: Sequence[Call]) -> None:
        """The model said this, and wants these called."""
        wanted = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in calls
        ]
        self._add({"role": "assistant", "content": said or None, "tool_calls": wanted})

    def returned(self, call_id: str, output: str) -> bool:
        """What a call returned; false when nobody called it."""
        known = any(call["id"] == call_id for each in self._messages or () for call in each.get("tool_calls") or ())
        if known:
            self._add({"role": "tool", "tool_call_id": call_id, "content": output})
        return known

    def complete(self) -> Messages:
        """The exchange as a provider takes it: every call has a result, if only that there is none yet."""
        found: Messages = []
        results = {each["tool_call_id"]: each for each in self._messages or () if each["role"] == "tool"}
        for each in self._messages or ():
            if each["role"] == "tool":
                continue
            found.append(each)
            for call in each.get("tool_calls") or ():
                missing = {"role": "tool", "tool_call_id": call["id"], "content": "No result yet."}
                found.append(results.get(call["id"], missing))
        return found

    def end(self) -> None:
        """The question is answered."""
        self._messages = None

    def _add(self, message: dict[str, Any]) -> None:
        self._messages = self._messages if self._messages is not None else []
        self._messages.append(message)
        while len(self._messages) > MOST_MESSAGES:
            gone = self._messages.pop(0)
            ids = {call["id"] for call in gone.get("tool_calls") or ()}
            self._messages = [each for each in self._messages if each.get("tool_call_id") not in ids]
