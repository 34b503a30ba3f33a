"""Where the answers of a persona come from: in a cell from its node, on a device from the platform.

Both do the same for `plugins.persona`: they say whose question it is, ask, and know who is meant to be quiet. Only a
device has somebody nearer to ask when the platform is out of reach.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ovos_bus_client.message import Message
from ovos_plugin_manager.solvers import load_chat_solver_plugin, load_question_solver_plugin
from ovos_utils.log import LOG

from agentvoicebox.config.errors import AvbError
from agentvoicebox.plugins import node

if TYPE_CHECKING:
    from agentvoicebox.plugins.device.link import Link

NEAR = 8.0
"""Seconds in which a local solver must answer."""

MOST_NEAR = 4
"""Questions that a local solver works on at once; a device has few processors, and a plugin may hang for ever."""

_KEYS = ("tenant_id", "avb_session", "avb_turn")


class Turn(NamedTuple):
    """Whose question it is; another session or tenant cannot touch it."""

    tenant: str
    """Empty on a device, which has only one."""
    session: str
    id: str


class Asker(Protocol):
    """Who is asked."""

    @property
    def quiet(self) -> tuple[str, ...]:
        """Messages upon which the answers of their session end."""

    @property
    def asked(self) -> Mapping[str, str]:
        """Questions of core's to whoever was active lately, and the names of their answers.

        Core waits half a second for those that do not answer, at each turn for five minutes after theirs.
        """

    @property
    def ready(self) -> bool:
        """Whether an answer can be had at this moment. Never blocks."""

    def turn(self, message: Message) -> Turn | None:
        """The turn that a question begins or belongs to; None when it is nobody's."""

    def meant(self, message: Message, turn: Turn) -> bool:
        """Whether a message of `quiet` is meant for this turn."""

    def ask(self, turn: Turn, question: str, language: str) -> AsyncGenerator[str]:
        """The text of the answer as it comes. Raises `node.Failed`; closing it ends the work there."""

    async def instead(self, question: str, language: str, code: str) -> str:
        """An answer from nearby, when `ask` has failed with `code` before a word was said; empty when there is none."""


class Cell:
    """The node, for a turn of one of its tenants' sessions."""

    quiet: tuple[str, ...] = ("mycroft.stop",)
    asked: Mapping[str, str] = MappingProxyType({})  # the stage `agentvoicebox-guard` sees to it that core does not ask
    ready = True

    def __init__(self, door: node.Node) -> None:
        self._door = door

    def turn(self, message: Message) -> Turn | None:
        """The turn in the message's context, if it says so in full. A cell answers nobody else."""
        return context_turn(message.context)

    def meant(self, message: Message, turn: Turn) -> bool:
        """Core tells everybody of a stop; it is meant for the session that said it."""
        return (turn.tenant, turn.session) == (message.context.get("tenant_id"), message.context.get("avb_session"))

    def ask(self, turn: Turn, question: str, language: str) -> AsyncGenerator[str]:
        """Ask as the persona of the turn."""
        return self._door.ask(turn.id, question, language)

    async def instead(self, question: str, language: str, code: str) -> str:
        """Nobody: a cell has no solvers of its own."""
        return ""


class Device:
    """The platform, for whoever speaks to this device; and `near`, if there is one, while that is away."""

    # What one says next takes the place of what was still to be said.
    quiet: tuple[str, ...] = ("mycroft.stop", "avb.persona.stop", "recognizer_loop:utterance")
    asked: Mapping[str, str] = MappingProxyType(
        {"avb.persona.stop.ping": "skill.stop.pong", "avb.persona.converse.ping": "skill.converse.pong"}
    )

    def __init__(self, link: Link, near: Near | None = None) -> None:
        self._link = link
        self._near = near

    @property
    def ready(self) -> bool:
        """Whether the platform, or somebody nearer, can be asked. Never blocks."""
        return self._link.state == "up" or self._near is not None

    def turn(self, message: Message) -> Turn:
        """A new turn of the OVOS session; most devices know only the one called `default`."""
        return Turn("", _session(message), uuid.uuid4().hex)

    def meant(self, message: Message, turn: Turn) -> bool:
        """A button's message carries no session, and means whoever stands before the device."""
        return turn.session == _session(message)

    async def ask(self, turn: Turn, question: str, language: str) -> AsyncGenerator[str]:
        """Ask in the device's own conversation."""
        try:
            asking = self._link.ask(question, language)
        except AvbError as error:
            raise node.failed(error.code) from error
        try:
            async for text in asking:
                yield text
        except AvbError as error:
            raise node.failed(error.code) from error
        finally:
            asking.cancel()

    async def instead(self, question: str, language: str, code: str) -> str:
        """What the local solver knows. That it was asked is reported."""
        if self._near is None:
            return ""
        answer = await self._near.ask(question, language)
        if answer:
            reason = code if code in ("platform_away", "key_refused") else "failed"
            self._link.report("persona", engine=self._near.name, reason=reason)
        return answer


class Near:
    """A solver plugin on this machine. It is loaded beside what else goes on, and asked on threads of its own."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.name = name
        self._options = dict(options)
        self._solver: Any = None
        self._loading = threading.Lock()
        self._free = threading.BoundedSemaphore(MOST_NEAR)
        threading.Thread(target=self._load, name="persona-near", daemon=True).start()

    async def ask(self, question: str, language: str) -> str:
        """Its answer; empty when it knows none, fails, or takes longer than `NEAR`."""
        if not self._free.acquire(blocking=False):
            return ""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[str] = loop.create_future()

        def work() -> None:
            try:
                answer = self._answer(question, language)
            finally:
                self._free.release()
            with suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(_resolve, answered, answer)

        threading.Thread(target=work, name="persona-near", daemon=True).start()
        try:
            async with asyncio.timeout(NEAR):
                return await answered
        except TimeoutError:
            LOG.warning(f"the solver {self.name} does not answer")
            return ""

    def _answer(self, question: str, language: str) -> str:
        try:
            solver = self._load()
            return str(solver.spoken_answer(question, lang=language) or "") if solver is not None else ""
        except Exception as error:  # its text may hold what was asked
            LOG.warning(f"the solver {self.name} failed: {type(error).__name__}")
            return ""

    def _load(self) -> Any:
        with self._loading:
            if self._solver is None:
                try:
                    made = load_question_solver_plugin(self.name) or load_chat_solver_plugin(self.name)
                    self._solver = made(config=self._options)
                except Exception as error:
                    LOG.error(f"the solver {self.name} cannot be loaded; is it installed? {type(error).__name__}")
            return self._solver


def _resolve(answered: asyncio.Future[str], answer: str) -> None:
    if not answered.done():
        answered.set_result(answer)


def configured(section: Mapping[str, Any] | None, options: Mapping[str, Any]) -> Asker | None:
    """Who is asked, by the section `agentvoicebox` of a `mycroft.conf` and the options of the persona's stage.

    None when the section names nobody. Raises `OSError` or `ValueError` when a cell's key cannot be read.
    """
    if not section:
        return None
    if section.get("place") == "cell":
        door = node.configured(section)
        return Cell(door) if door is not None else None
    from agentvoicebox.plugins.device import link  # which a cell does not need

    shared = link.shared("core")
    if shared is None:
        return None
    fallback = options.get("fallback")
    return Device(shared, Near(str(fallback), options.get(str(fallback)) or {}) if fallback else None)


def context_turn(context: Mapping[str, Any]) -> Turn | None:
    """The turn that the keys of a context name; None if they do not all do."""
    keys = [key for name in _KEYS if isinstance(key := context.get(name), str) and key]
    return Turn(*keys) if len(keys) == len(_KEYS) else None


def _session(message: Message) -> str:
    session = message.context.get("session")
    found = session.get("session_id") if isinstance(session, Mapping) else None
    return found if isinstance(found, str) and found else "default"
