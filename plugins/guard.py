"""The pipeline stage that looks after a cell: it answers what nobody else there answers, and the canary."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ovos_bus_client.message import Message
from ovos_bus_client.session import SessionManager
from ovos_config.config import Configuration
from ovos_plugin_manager.templates.pipeline import IntentHandlerMatch, PipelinePlugin

from agentvoicebox.config import ovos

NAME = "agentvoicebox-guard"
"""As which it is installed."""

_THREADS = 64


class Guard(PipelinePlugin):  # type: ignore[misc]
    """The first stage of the pipeline. It matches nothing but the canary.

    Where it is not in the pipeline, as on a device, it does nothing: there are screens and networks there.
    """

    def __init__(self, bus: Any = None, config: dict[str, Any] | None = None) -> None:
        super().__init__(bus, config)
        self._handlers: dict[str, Callable[[Message], None]] = {}
        if not ovos.listed(Configuration(), NAME):
            return
        self._widen()
        self._handlers = {
            "gui.status.request": self._no_screen,
            "ovos.PHAL.internet_check": self._no_network,
            "avb.session.forget": self._forget,
            "avb.canary": self._answer,
        }
        for name, handler in self._handlers.items():
            self.bus.on(name, handler)

    def match(self, utterances: list[str], lang: str, message: Message) -> IntentHandlerMatch | None:
        """A match if this is the reserved utterance in a reserved session; both are needed."""
        self._retire(message)
        session = message.context.get("session", {}).get("session_id", "")
        if session.startswith(ovos.CANARY_SESSION) and ovos.CANARY_UTTERANCE in utterances:
            return IntentHandlerMatch("avb.canary", {}, utterance=ovos.CANARY_UTTERANCE)
        return None

    def shutdown(self) -> None:
        for name, handler in self._handlers.items():
            self.bus.remove(name, handler)

    def _widen(self) -> None:
        """All skills and handlers of core share one pool of cpu + 4 threads: a few that wait would stop all others.

        The attribute is private to Python's executor (3.11 to 3.14); without it the pool stays as it is.
        """
        pool = getattr(getattr(self.bus, "emitter", None), "_executor", None)
        if isinstance(pool, ThreadPoolExecutor) and hasattr(pool, "_max_workers"):
            pool._max_workers = max(pool._max_workers, _THREADS)

    def _retire(self, message: Message) -> None:
        """Core asks every skill of the last turns whether it wants to converse, and waits half a second for those that
        cannot: only conversational skills of ovos-workshop answer. The others need not be asked.
        """
        session = message.context.get("session") or {}
        states = session.get("utterance_states") or {}
        session["active_skills"] = [
            entry
            for entry in session.get("active_skills") or []
            if states.get(entry[0]) == "response" or self.bus.emitter.listeners(f"{entry[0]}.converse.ping")
        ]

    def _no_screen(self, message: Message) -> None:
        self.bus.emit(message.response({"connected": False}))

    def _no_network(self, message: Message) -> None:
        self.bus.emit(message.response({"network_connected": False, "internet_connected": False}))

    def _forget(self, message: Message) -> None:
        """Core itself never forgets a session: its table would grow with every one that was ever opened."""
        name = message.data.get("session_id")
        if name and name != "default":
            SessionManager.sessions.pop(name, None)

    def _answer(self, message: Message) -> None:
        self.bus.emit(message.forward("ovos.utterance.handled"))
