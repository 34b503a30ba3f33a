"""Turns that go to the language model without core: those of a client that brings its own tools or instructions."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.answers import Answers, Who
from agentvoicebox.bus_bridge.calls import Call, Calls
from agentvoicebox.bus_bridge.models import SessionSettings
from agentvoicebox.bus_bridge.talk import Talk
from agentvoicebox.plugins.clauses import Sentences, speakable

Tell = Callable[[ev.Event], None]


@dataclass(slots=True)
class Conversation:
    """What one session says to the model, and keeps of it."""

    answers: Answers
    tenant_id: uuid.UUID
    session_id: uuid.UUID
    talk: Talk
    calls: Calls

    async def answer(self, wanted: ev.Converse, settings: SessionSettings, tell: Tell) -> None:
        """Tell the session what the model says, sentence by sentence, and whom it wants called. Raises `AvbError`."""
        wish, talk = wanted.wish, self.talk
        if not wish.apart and wish.input is None:
            self.calls.asked(wanted.text)
            messages = [*talk.messages(), *self.calls.complete()]
        elif wish.input is not None:
            messages = [dict(each) for each in wish.input]
        else:
            messages = [*talk.messages(), {"role": "user", "content": wanted.text}]
        if instructions := wish.instructions or settings.instructions:
            messages.insert(0, {"role": "system", "content": instructions})
        tools = settings.tools if wish.tools is None else wish.tools
        key = f"avb:{self.session_id}:{wanted.turn_id}"
        who = Who(self.tenant_id, talk.project_id, self.session_id, key, settings.language)
        persona = await self.answers.persona(self.tenant_id, talk.project_id, talk.persona)
        voice = _Aloud(settings.language) if settings.speaks else _Written()
        calls = _Pieces()
        said = self.answers.stream(
            who,
            persona,
            messages,
            tools=[dict(tool) for tool in tools] or None,
            tool_choice=(settings.tool_choice if wish.tool_choice is None else wish.tool_choice) if tools else None,
        )
        async with aclosing(said):
            async for delta in said:
                for text in voice.feed(delta.text):
                    tell(ev.Spoke(wanted.turn_id, text))
                calls.add(delta.tool_calls or [])
        for text in voice.end():
            tell(ev.Spoke(wanted.turn_id, text))
        for call in calls.whole():
            tell(ev.Called(wanted.turn_id, call))
        tell(ev.Handled(wanted.turn_id))

    def note(self, ended: ev.ReplyEnded) -> None:
        """A turn is over: remember what was said in it, whoever answered."""
        if ended.wish is None:
            self.talk.note(ended.asked, ended.text)
        elif ended.wish.apart or ended.wish.input is not None:
            return
        elif ended.calls:
            self.calls.called(ended.text, ended.calls)
        else:
            self.talk.note(self.calls.question, ended.text)
            self.calls.end()


class _Aloud:
    """An answer to listen to, sentence by sentence, without what cannot be said."""

    def __init__(self, language: str) -> None:
        self._sentences = Sentences(language)

    def feed(self, text: str) -> list[str]:
        """What can be said now."""
        return [said for sentence in self._sentences.feed(text) if (said := speakable(sentence))]

    def end(self) -> list[str]:
        """What is left to say."""
        return [said for sentence in self._sentences.end() if (said := speakable(sentence))]


class _Written:
    """An answer to read: paragraph by paragraph, with its marks and code as the model wrote them."""

    def __init__(self) -> None:
        self._text = ""

    def feed(self, text: str) -> list[str]:
        """What is complete now; nothing within a block of code."""
        self._text += text
        if self._text.count("```") % 2:
            return []
        done, mark, self._text = self._text.rpartition("\n\n")
        return [done + mark] if done.strip() else []

    def end(self) -> list[str]:
        """What is left."""
        return [self._text] if self._text.strip() else []


class _Pieces:
    """Calls as they come in pieces, by their place among the calls of the answer."""

    def __init__(self) -> None:
        self._calls: dict[int, dict[str, str]] = {}

    def add(self, pieces: list[dict[str, Any]]) -> None:
        for piece in pieces:
            call = self._calls.setdefault(int(piece.get("index") or 0), {"id": "", "name": "", "arguments": ""})
            function = piece.get("function") or {}
            call["id"] = piece.get("id") or call["id"]
            call["name"] = function.get("name") or call["name"]
            call["arguments"] += function.get("arguments") or ""

    def whole(self) -> list[Call]:
        """All of them; one without a name is none."""
        found = [call for _, call in sorted(self._calls.items()) if call["name"]]
        return [Call(call["id"] or f"call_{uuid.uuid4().hex[:24]}", call["name"], call["arguments"]) for call in found]
