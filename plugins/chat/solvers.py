"""Question solvers of OpenVoiceOS, by the names of their plugins, asked in threads of their own.

Solvers block, some load for seconds, some hang: each configuration of a solver has a few threads and a short queue, so
that it can stop nobody but itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import metadata
from queue import SimpleQueue
from typing import Any, Final

from agentvoicebox.config.errors import AvbError, BadInput, NotFound, Unavailable
from agentvoicebox.plugins.breaker import Breaker
from agentvoicebox.plugins.chat.request import Delta
from agentvoicebox.plugins.chat.tokens import Tokens

GROUPS: Final = ("opm.solver.question", "neon.plugin.solver")
"""Where question solvers register; OPM reads the older name, too."""
OFFERED: Final = {
    "ovos-solver-plugin-wikipedia": "Wikipedia",
    "ovos-solver-plugin-ddg": "DuckDuckGo",
    "ovos-solver-plugin-wolfram-alpha": "Wolfram Alpha",
    "ovos-solver-wordnet-plugin": "WordNet",
}
"""Those that are listed whether they are installed or not."""
UNFIT: Final = frozenset({"ovos-solver-bus-plugin"})
"""It asks whatever OVOS listens on this machine's default bus, outside of any tenant's session."""
THREADS: Final = 4
WAITING: Final = 16
KEPT: Final = 64
LONGEST_QUESTION: Final = 2_000
LONGEST_ANSWER: Final = 20_000
"""Characters."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SolverInfo:
    """A solver: the name of its plugin, what people call it, and whether it is installed here."""

    id: str
    name: str
    installed: bool


class Solvers:
    """All solvers that were installed when this was made; for one event loop."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], _Solver] = OrderedDict()
        self._plugins = _plugins()

    def installed(self) -> list[SolverInfo]:
        """The solvers that can be chosen, those that we offer everywhere first. Loads none of them."""
        found = self._plugins
        others = sorted(found.keys() - OFFERED.keys())
        return [
            *(SolverInfo(id, name, id in found) for id, name in OFFERED.items()),
            *(SolverInfo(id, _readable(id), True) for id in others),
        ]

    async def ask(
        self, name: str, question: str, language: str, config: Mapping[str, Any], deadline: float = 5.0
    ) -> str | None:
        """What the solver answers, or None: ask the next one. `deadline` is in seconds.

        Instances are shared by all who ask with an equal `config`. Raises `NotFound` (solver_missing), `BadInput`
        (solver_config_invalid), or `Unavailable`: solver_timeout, solver_failed, solver_busy, circuit_open. A solver
        that is still loading after the deadline goes on loading, for the next question.
        """
        solver = self._solver(name, config)
        solver.breaker.admit()
        try:
            answer = await asyncio.wait_for(
                asyncio.wrap_future(solver.ask(question[:LONGEST_QUESTION], language)), deadline
            )
        except TimeoutError:
            (solver.breaker.failed if solver.ready else solver.breaker.undecided)()
            message = f"The solver {name} took longer than {deadline:g} s; ask again, or without it."
            failure: AvbError = Unavailable(message, code="solver_timeout")
        except Unavailable:  # too many are waiting
            solver.breaker.undecided()
            raise
        except asyncio.CancelledError:
            solver.breaker.undecided()
            raise
        except Exception as error:
            solver.breaker.failed()
            log.warning("solver %s failed: %s", name, type(error).__name__)
            message = f"The solver {name} failed; check its configuration and what it needs."
            failure = Unavailable(message, code="solver_failed")
        else:
            solver.breaker.succeeded()
            return answer.strip()[:LONGEST_ANSWER] or None if isinstance(answer, str) else None
        raise failure  # out here, so that it does not carry along what the solver says about the question

    async def deltas(
        self, name: str, question: str, language: str, config: Mapping[str, Any], deadline: float = 5.0
    ) -> AsyncGenerator[Delta, None]:
        """The same as an answer of a language model: the text, if there is one, then the end; it costs no tokens."""
        if answer := await self.ask(name, question, language, config, deadline):
            yield Delta(answer)
        yield Delta(finish="stop", tokens=Tokens(0, 0))

    def close(self) -> None:
        """Let all threads end when they have finished what they do; none keeps the process from ending."""
        for solver in self._kept.values():
            solver.close()
        self._kept.clear()

    def _solver(self, name: str, config: Mapping[str, Any]) -> _Solver:
        try:
            key = name, json.dumps(config, sort_keys=True)
        except (TypeError, ValueError):
            raise BadInput("A solver's configuration must be JSON.", code="solver_config_invalid") from None
        solver = self._kept.get(key)
        if solver is None:
            if (found := self._plugins.get(name)) is None:
                raise NotFound(f"There is no solver {name} here; install its package.", code="solver_missing")
            solver = self._kept[key] = _Solver(found, json.loads(key[1]))
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)[1].close()
        self._kept.move_to_end(key)
        return solver


class _Solver:
    """One solver with one configuration, loaded by the first question, and the threads that ask it."""

    def __init__(self, plugin: metadata.EntryPoint, config: dict[str, Any]) -> None:
        self.breaker = Breaker()
        self.ready = False
        self._plugin = plugin
        self._config = config
        self._instance: Any = None
        self._loading = threading.Lock()
        self._counting = threading.Lock()
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = 0
        self._unfinished = 0

    def ask(self, question: str, language: str) -> Future[Any]:
        """Queue a question. Raises `Unavailable` (solver_busy) when too many wait."""
        if self._unfinished >= THREADS + WAITING:
            raise Unavailable("Too many ask this solver now; try again in a moment.", code="solver_busy")
        future: Future[Any] = Future()
        with self._counting:
            self._unfinished += 1
        future.add_done_callback(self._finished)
        self._jobs.put((future, lambda: self._load().spoken_answer(question, lang=language)))
        if self._threads < min(THREADS, self._unfinished):
            self._threads += 1
            threading.Thread(target=self._work, name=f"solver {self._plugin.name}", daemon=True).start()
        return future

    def close(self) -> None:
        """Let the threads end."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def _finished(self, _future: Future[Any]) -> None:
        with self._counting:
            self._unfinished -= 1

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, call = job
            if not future.set_running_or_notify_cancel():  # nobody waits for it any more
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # a plugin may even try to end the process
                future.set_exception(error if isinstance(error, Exception) else RuntimeError(type(error).__name__))

    def _load(self) -> Any:
        with self._loading:
            if self._instance is None:
                instance = self._plugin.load()(config=dict(self._config))
                # What people ask is neither kept on disk for all who ask after them, nor sent to a translator's public
                # server that nobody chose; some solvers would do either unasked.
                instance.enable_cache = instance.enable_tx = False
                self._instance, self.ready = instance, True
        return self._instance


def _plugins() -> dict[str, metadata.EntryPoint]:
    """The installed question solvers by name; the newer group counts before the older one."""
    found = {each.name: each for group in reversed(GROUPS) for each in metadata.entry_points(group=group)}
    return {name: plugin for name, plugin in found.items() if name not in UNFIT}


def _readable(id: str) -> str:
    """A name for people, made from that of a plugin."""
    words = [word for word in id.split("-") if word not in ("ovos", "solver", "plugin")]
    return " ".join(words).capitalize() or id
