"""Turns that go to the language model without core: those of a client that brings its own tools or instructions."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass

from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.answers import Answers, Who
from agentvoicebox.bus_bridge.calls import Call, Calls, Messages
from agentvoicebox.bus_bridge.models import SessionSettings, Tokens
from agentvoicebox.bus_bridge.talk import Talk
from agentvoicebox.plugins.chat.pieces import MOST_CALLS, Pieces
from agentvoicebox.plugins.clauses import Sentences, speakable

SIGN = 1.0
"""Seconds after which the session is told again that the model is at it, if nothing else is."""

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
        """Tell the session what the model says, and whom it wants called. Raises `AvbError`.

        What is listened to comes sentence by sentence, what is read as the model writes it.
        """
        wish, talk = wanted.wish, self.talk
        voice = _Aloud(wanted.turn_id, settings.language) if wanted.speaks else _Written(wanted.turn_id)
        key = f"avb:{self.session_id}:{wanted.turn_id}"
        who = Who(self.tenant_id, talk.project_id, self.session_id, key, settings.language)
        messages = self._messages(wanted)
        if wish.joins and wanted.text and (done := await self.answers.obey(who, talk, wanted.text)) is not None:
            for event in (*voice.feed(done), *voice.end(), ev.Handled(wanted.turn_id)):
                tell(event)
            return
        if instructions := wish.instructions or settings.instructions:
            messages.insert(0, {"role": "system", "content": instructions})
        tools = settings.tools if wish.tools is None else wish.tools
        persona = await self.answers.answering(who, talk)
        calls, tokens = Pieces(), Tokens()
        said = self.answers.stream(
            who,
            persona,
            messages,
            tools=[dict(tool) for tool in tools] or None,
            tool_choice=(settings.tool_choice if wish.tool_choice is None else wish.tool_choice) if tools else None,
        )
        clock = asyncio.get_running_loop().time
        sign = clock() + SIGN
        async with aclosing(said):
            async for delta in said:
                for event in voice.feed(delta.text):
                    tell(event)
                if delta.tool_calls:
                    calls.add(delta.tool_calls)
                if delta.tokens is not None:
                    tokens = Tokens(delta.tokens.input, delta.tokens.output)
                if clock() >= sign:
                    sign = clock() + SIGN
                    tell(ev.Progressed(wanted.turn_id))
        for event in voice.end():
            tell(event)
        for call in calls.whole()[:MOST_CALLS]:
            tell(ev.Called(wanted.turn_id, Call(call["id"], **call["function"])))
        tell(ev.Handled(wanted.turn_id, tokens))

    def note(self, ended: ev.ReplyEnded) -> None:
        """A turn is over: remember what was said in it, whoever answered. An apology is no answer."""
        said = "" if ended.apology else ended.text
        if ended.wish is None:
            self.talk.note(ended.asked, said)
        elif not ended.wish.joins:
            return
        elif ended.calls:
            self.calls.called(said, ended.calls)
        else:
            self.talk.note(self.calls.question, said)
            self.calls.end()

    def _messages(self, wanted: ev.Converse) -> Messages:
        """What is to be answered, after what was said before."""
        wish = wanted.wish
        if wish.input is not None:
            return [dict(each) for each in wish.input]
        if wish.joins:
            self.calls.asked(wanted.text)
            return [*self.talk.messages(), *self.calls.tell()]
        asked = [{"role": "user", "content": wanted.text}] if wanted.text else []
        return [*self.talk.messages(), *self.calls.complete(), *asked]


class _Aloud:
    """An answer to listen to, sentence by sentence, without what cannot be said."""

    def __init__(self, turn_id: str, language: str) -> None:
        self._turn_id = turn_id
        self._sentences = Sentences(language)

    def feed(self, text: str) -> list[ev.Event]:
        """What can be said now."""
        return self._said(self._sentences.feed(text)) if text else []

    def end(self) -> list[ev.Event]:
        """What is left to say."""
        return self._said(self._sentences.end())

    def _said(self, sentences: list[str]) -> list[ev.Event]:
        return [ev.Spoke(self._turn_id, said) for sentence in sentences if (said := speakable(sentence))]


class _Written:
    """An answer to read, as the model writes it."""

    def __init__(self, turn_id: str) -> None:
        self._turn_id = turn_id

    def feed(self, text: str) -> list[ev.Event]:
        """The same."""
        return [ev.Wrote(self._turn_id, text)] if text else []

    def end(self) -> list[ev.Event]:
        """Nothing is held back."""
        return []
