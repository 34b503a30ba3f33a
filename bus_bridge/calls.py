"""What goes to the language model without core: the wishes of a client that brings its own tools or instructions.

Skills cannot call a client's tools, so such a turn is the model's alone. `Calls` keeps the part of the conversation
that is not over yet: a question, the calls it led to, and what they returned. Pure; messages are OpenAI's chat format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]

MOST_MESSAGES = 128
"""Of an exchange with tools, after which its oldest calls are forgotten, each with what it returned."""

_MOST_LEFT = MOST_MESSAGES // 2
"""Calls that are waited for when the question they belong to is answered."""


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

    @property
    def joins(self) -> bool:
        """Whether question and answer are part of the session's conversation."""
        return not self.apart and self.input is None


@dataclass(frozen=True, slots=True)
class Call:
    """A function that the model wants called; `arguments` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


class Calls:
    """One session's open exchange; None in place of empty, for most sessions have none."""

    __slots__ = ("_messages", "_noted", "_told")

    def __init__(self) -> None:
        self._messages: Messages | None = None
        self._noted = False
        """Whether the first message is a question that was answered before, while calls it led to still ran."""
        self._told: frozenset[str] = frozenset()
        """Calls whose results the model has been told."""

    @property
    def question(self) -> str:
        """What the user has asked since the last answer; when that is nothing, what led to the calls."""
        asked = [str(each["content"]) for each in self._messages or () if each["role"] == "user"]
        return " ".join(asked[self._noted :] or asked)

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

    def returned(self, call_id: str, output: str) -> None:
        """What a call returned; it may come before `called`, when the answer that called it is still being spoken."""
        self._add({"role": "tool", "tool_call_id": call_id, "content": output})

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

    def tell(self) -> Messages:
        """The same, for the model to answer now."""
        self._told = frozenset(each["tool_call_id"] for each in self._messages or () if each["role"] == "tool")
        return self.complete()

    def end(self) -> None:
        """The question is answered. Calls whose results the model does not know yet stay, with what led to them."""
        messages, self._messages = self._messages or (), None
        calls = [call for each in messages for call in each.get("tool_calls") or () if call["id"] not in self._told]
        calls = calls[-_MOST_LEFT:]
        first = [each for each in messages[:1] if each["role"] == "user" and calls]
        self._noted, self._told = bool(first), frozenset()
        if calls:
            left = {call["id"] for call in calls}
            late = [each for each in messages if each.get("tool_call_id") in left]
            self._messages = [*first, {"role": "assistant", "content": None, "tool_calls": calls}, *late]

    def _add(self, message: dict[str, Any]) -> None:
        self._messages = self._messages if self._messages is not None else []
        self._messages.append(message)
        while len(self._messages) > MOST_MESSAGES:
            # The question stays: without it nobody knows what the rest is about.
            gone = self._messages.pop(1 if self._messages[0]["role"] == "user" else 0)
            ids = {call["id"] for call in gone.get("tool_calls") or ()}
            self._messages = [each for each in self._messages if each.get("tool_call_id") not in ids]
