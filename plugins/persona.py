"""The pipeline stage that answers what no skill does: it asks, and says each sentence as it is complete.

It matches and lets core go at once; answers are waited for on an event loop of its own, so that a hundred of them keep
no thread of core. Whom it asks is told by `plugins.askers`: a cell its node, a device the platform. Who answers there,
with which model and whose key, is not for it to know.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping
from contextlib import aclosing
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from ovos_bus_client.message import Message
from ovos_config.config import Configuration
from ovos_plugin_manager.templates.pipeline import IntentHandlerMatch, PipelinePlugin
from ovos_utils.log import LOG

from agentvoicebox.config.tasks import end
from agentvoicebox.plugins import askers, node
from agentvoicebox.plugins.askers import Asker, Turn
from agentvoicebox.plugins.clauses import Sentences, speakable

SKILL = "avb.persona"
"""Who speaks, as the bus and the lists of disabled skills call it."""

SIGN = 4.0
"""Seconds after which a turn of which nothing is heard gives a sign of life: the bridge ends it after ten."""

LIMIT = 60.0
"""Seconds an answer may take in all."""

_SENTENCES = {
    "no_language_model": "no_language_model",
    "circuit_open": "unreachable",
    "node_unreachable": "no_platform",
    "platform_away": "no_platform",
    "key_refused": "no_platform",
    "store_unavailable": "no_platform",
    "service_unavailable": "no_platform",
    "prompt_too_long": "too_long",
    "payload_too_large": "too_long",
    "validation_error": "too_long",
    "rate_limit_exceeded": "too_much",
    "tenant_limit_exceeded": "too_much",
    "quota_exceeded": "too_much",
    "no_answer": "nothing",
}
"""What is said for which code of the node's; all that begin with "provider_" are "unreachable", any other "failed"."""


class Persona(PipelinePlugin):  # type: ignore[misc]
    """The stage `agentvoicebox-persona`. It matches nothing unless there is somebody to ask."""

    def __init__(self, bus: Any = None, config: dict[str, Any] | None = None) -> None:
        super().__init__(bus, config)
        self._asker = _asker(self.config)
        self._loop = asyncio.new_event_loop()
        self._answers: dict[Turn, asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name="persona", daemon=True)
        self._thread.start()
        self._handlers = {"avb.persona.ask": self._ask, "avb.persona.cancel": self._cancel}
        if self._asker is not None:
            self._handlers |= dict.fromkeys(self._asker.quiet, self._hush)
            self._handlers |= dict.fromkeys(self._asker.asked, self._can)
        for name, handler in self._handlers.items():
            self.bus.on(name, handler)

    def match(self, utterances: list[str], lang: str, message: Message) -> IntentHandlerMatch | None:
        """A match for every utterance of somebody's turn, while there is somebody to ask."""
        asker = self._asker
        if asker is None or not any(utterances) or not asker.ready or asker.turn(message) is None:
            return None
        return IntentHandlerMatch("avb.persona.ask", {}, skill_id=SKILL, utterance=utterances[0])

    def shutdown(self) -> None:
        for name, handler in self._handlers.items():
            self.bus.remove(name, handler)
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- on core's threads --------------------------------------------------------------------------------------------

    def _ask(self, message: Message) -> None:
        if self._asker is not None and (turn := self._asker.turn(message)) is not None:
            self._loop.call_soon_threadsafe(self._begin, self._asker, turn, message)

    def _cancel(self, message: Message) -> None:
        """The bridge does not want the rest of a turn."""
        turn = askers.context_turn({**message.context, "avb_turn": message.data.get("turn")})
        self._loop.call_soon_threadsafe(self._end, lambda other: other == turn)

    def _can(self, message: Message) -> None:
        """Core asks whether there is something to stop, or whether what is said next is for this stage."""
        asker = self._asker
        assert asker is not None
        stop = message.msg_type.endswith(".stop.ping")
        busy = stop and any(asker.meant(message, turn) for turn in list(self._answers))
        self.bus.emit(message.reply(asker.asked[message.msg_type], {"skill_id": SKILL, "can_handle": busy}))

    def _hush(self, message: Message) -> None:
        """Somebody wants quiet, or has said something else. Core tells all; it is meant for one session."""
        asker = self._asker
        assert asker is not None
        self._loop.call_soon_threadsafe(self._end, lambda turn: asker.meant(message, turn))
        if message.msg_type == f"{SKILL}.stop":
            # What is on its way to the loudspeaker is for core to end, once it hears that there was something.
            self.bus.emit(message.reply(f"{SKILL}.stop.response", {"skill_id": SKILL, "result": True}))
            self.bus.emit(message.forward("ovos.utterance.handled", {"name": SKILL}))  # core ends no such turn itself

    # --- on the loop --------------------------------------------------------------------------------------------------

    def _begin(self, asker: Asker, turn: Turn, message: Message) -> None:
        if turn in self._answers:
            return
        answer = _Answer(self.bus, message)
        task = self._answers[turn] = self._loop.create_task(answer.give(asker, turn))

        def ended(task: asyncio.Task[None]) -> None:
            # Not in the task itself: one that is cancelled before its first step never runs.
            del self._answers[turn]
            answer.end()
            if not task.cancelled() and (error := task.exception()) is not None:
                LOG.error(f"an answer of the persona failed: {type(error).__name__}")

        task.add_done_callback(ended)

    def _end(self, meant: Callable[[Turn], bool]) -> None:
        for turn, task in self._answers.items():
            if meant(turn):
                task.cancel()

    async def _hang_up(self) -> None:
        await end(*self._answers.values())
        await asyncio.sleep(0)  # the connections close in the next round


class _Answer:
    """What becomes of one question. All of it carries the question's context, so that it finds its way back."""

    def __init__(self, bus: Any, question: Message) -> None:
        self._bus = bus
        self._question = question
        self._language = str(question.data.get("lang") or "en-us")
        self._spoken = False
        self._timer: asyncio.TimerHandle | None = None

    async def give(self, asker: Asker, turn: Turn) -> None:
        """Say the answer sentence by sentence, and if there is none or only half of one, why."""
        self._emit("mycroft.skill.handler.start", {"name": SKILL})
        question = str(self._question.data.get("utterance") or "")
        sentences = Sentences(self._language)
        apology = None
        try:
            async with asyncio.timeout(LIMIT), aclosing(asker.ask(turn, question, self._language)) as texts:
                async for text in texts:
                    self._say(sentences.feed(text))
        except node.Failed as error:
            apology = error.code
        except TimeoutError:
            apology = "provider_timeout"
        except Exception as error:
            LOG.error(f"an answer of the persona failed: {type(error).__name__}")
            apology = "failed"
        if apology is not None and not self._spoken:
            answer = await asker.instead(question, self._language, apology)
            if answer:
                sentences, apology = Sentences(self._language), None  # half a sentence of another is not said
                self._say(sentences.feed(answer))
        self._say(sentences.end())
        if apology is None and not self._spoken:
            apology = "no_answer"
        if apology is not None:
            LOG.warning(f"the persona has no answer, or half of one: {apology}")
            why = sentence("broke_off" if self._spoken else _reason(apology), self._language)
            self._say([why], {"skill": SKILL, "avb": "apology"})  # which the bridge does not remember as an answer

    def end(self) -> None:
        """The turn is over, whatever has become of it."""
        if self._timer is not None:
            self._timer.cancel()
        self._bus.emit(self._question.forward("ovos.utterance.handled", {"name": SKILL}))

    def _say(self, sentences: list[str], meta: Mapping[str, str] = MappingProxyType({"skill": SKILL})) -> None:
        for each in sentences:
            if words := speakable(each):
                self._spoken = True
                data = {"utterance": words, "lang": self._language, "expect_response": False, "meta": dict(meta)}
                self._emit("speak", data)

    def _emit(self, kind: str, data: Mapping[str, Any]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(SIGN, self._emit, "avb.persona.waiting", {})
        self._bus.emit(self._question.forward(kind, dict(data)))


def _asker(options: Mapping[str, Any]) -> Asker | None:
    try:
        return askers.configured(Configuration().get("agentvoicebox"), options)
    except (OSError, ValueError) as error:
        LOG.error(f"the persona cannot read the key of its node: {type(error).__name__}")
        return None


@cache
def _told() -> dict[str, dict[str, str]]:
    told: dict[str, dict[str, str]] = json.loads(
        resources.files("agentvoicebox.plugins").joinpath("persona.json").read_text(encoding="utf-8")
    )
    return told


def _reason(code: str) -> str:
    """The name of what to say for a code."""
    return _SENTENCES.get(code, "unreachable" if code.startswith("provider_") else "failed")


def sentence(name: str, language: str) -> str:
    """What is said, by its name in `persona.json`, in a language or, if that has none, in English."""
    told = _told()
    return told.get(language[:2].lower(), told["en"])[name]
