"""The pipeline stage that answers what no skill does: it asks the node, and says each sentence as it is complete.

It matches and lets core go at once; answers are waited for on an event loop of its own, so that a hundred of them keep
no thread of core. Who answers, with which model and whose key, is for the node to know: it is told the turn.
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
from typing import Any, NamedTuple

from ovos_bus_client.message import Message
from ovos_config.config import Configuration
from ovos_plugin_manager.templates.pipeline import IntentHandlerMatch, PipelinePlugin
from ovos_utils.log import LOG

from agentvoicebox.plugins import node
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

_KEYS = ("tenant_id", "avb_session", "avb_turn")


class Turn(NamedTuple):
    """Whose question it is; another session or tenant cannot touch it."""

    tenant: str
    session: str
    id: str


class Persona(PipelinePlugin):  # type: ignore[misc]
    """The stage `agentvoicebox-persona`. It matches nothing unless `mycroft.conf` says where the node is."""

    def __init__(self, bus: Any = None, config: dict[str, Any] | None = None) -> None:
        super().__init__(bus, config)
        self._node = _node()
        self._loop = asyncio.new_event_loop()
        self._answers: dict[Turn, asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name="persona", daemon=True)
        self._thread.start()
        self._handlers = {
            "avb.persona.ask": self._ask,
            "avb.persona.cancel": self._cancel,
            "mycroft.stop": self._stop,
        }
        for name, handler in self._handlers.items():
            self.bus.on(name, handler)

    def match(self, utterances: list[str], lang: str, message: Message) -> IntentHandlerMatch | None:
        """A match for every utterance of somebody's turn."""
        if self._node is None or not any(utterances) or _turn(message.context) is None:
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
        if self._node is not None and (turn := _turn(message.context)) is not None:
            self._loop.call_soon_threadsafe(self._begin, self._node, turn, message)

    def _cancel(self, message: Message) -> None:
        """The bridge does not want the rest of a turn."""
        turn = _turn({**message.context, "avb_turn": message.data.get("turn")})
        self._loop.call_soon_threadsafe(self._end, lambda other: other == turn)

    def _stop(self, message: Message) -> None:
        """Somebody has said "stop" with nothing else to be stopped. Core tells all; it is meant for one session."""
        tenant, session = message.context.get("tenant_id"), message.context.get("avb_session")
        self._loop.call_soon_threadsafe(self._end, lambda turn: (turn.tenant, turn.session) == (tenant, session))

    # --- on the loop --------------------------------------------------------------------------------------------------

    def _begin(self, door: node.Node, turn: Turn, message: Message) -> None:
        if turn in self._answers:
            return
        answer = _Answer(self.bus, message)
        task = self._answers[turn] = self._loop.create_task(answer.give(door, turn.id))

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
        tasks = list(self._answers.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # the connections close in the next round


class _Answer:
    """What becomes of one question. All of it carries the question's context, so that it finds its way back."""

    def __init__(self, bus: Any, question: Message) -> None:
        self._bus = bus
        self._question = question
        self._language = str(question.data.get("lang") or "en-us")
        self._spoken = False
        self._timer: asyncio.TimerHandle | None = None

    async def give(self, door: node.Node, turn: str) -> None:
        """Say the answer sentence by sentence, and if there is none or only half of one, why."""
        self._emit("mycroft.skill.handler.start", {"name": SKILL})
        sentences = Sentences(self._language)
        apology = None
        try:
            async with (
                asyncio.timeout(LIMIT),
                aclosing(door.ask(turn, str(self._question.data.get("utterance") or ""), self._language)) as texts,
            ):
                async for text in texts:
                    self._say(sentences.feed(text))
        except node.Failed as error:
            apology = error.code
        except TimeoutError:
            apology = "provider_timeout"
        except Exception as error:
            LOG.error(f"an answer of the persona failed: {type(error).__name__}")
            apology = "failed"
        self._say(sentences.end())
        if apology is None and not self._spoken:
            apology = "no_answer"
        if apology is not None:
            LOG.warning(f"the persona has no answer, or half of one: {apology}")
            why = _sentence("broke_off" if self._spoken else _reason(apology), self._language)
            self._say([why], {"skill": SKILL, "avb": "apology"})  # which the bridge does not remember as an answer

    def end(self) -> None:
        """The turn is over, whatever has become of it."""
        if self._timer is not None:
            self._timer.cancel()
        self._bus.emit(self._question.forward("ovos.utterance.handled", {"name": SKILL}))

    def _say(self, sentences: list[str], meta: Mapping[str, str] = MappingProxyType({"skill": SKILL})) -> None:
        for sentence in sentences:
            if words := speakable(sentence):
                self._spoken = True
                data = {"utterance": words, "lang": self._language, "expect_response": False, "meta": dict(meta)}
                self._emit("speak", data)

    def _emit(self, kind: str, data: Mapping[str, Any]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(SIGN, self._emit, "avb.persona.waiting", {})
        self._bus.emit(self._question.forward(kind, dict(data)))


def _node() -> node.Node | None:
    try:
        return node.configured(Configuration().get("agentvoicebox"))
    except (OSError, ValueError) as error:
        LOG.error(f"the persona cannot read the key of its node: {type(error).__name__}")
        return None


def _turn(context: Mapping[str, Any]) -> Turn | None:
    """The turn that a message belongs to; None if it does not say so in full. A cell answers nobody else."""
    keys = [key for name in _KEYS if isinstance(key := context.get(name), str) and key]
    return Turn(*keys) if len(keys) == len(_KEYS) else None


@cache
def _told() -> dict[str, dict[str, str]]:
    told: dict[str, dict[str, str]] = json.loads(
        resources.files("agentvoicebox.plugins").joinpath("persona.json").read_text(encoding="utf-8")
    )
    return told


def _reason(code: str) -> str:
    """The name of what to say for a code."""
    return _SENTENCES.get(code, "unreachable" if code.startswith("provider_") else "failed")


def _sentence(name: str, language: str) -> str:
    told = _told()
    return told.get(language[:2].lower(), told["en"])[name]
