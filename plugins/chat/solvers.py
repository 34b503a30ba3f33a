"""Question solvers of OpenVoiceOS, by the names of their plugins, asked in threads of their own.

Solvers block, some load for seconds, some hang: each configuration of a solver has a few threads and a short queue, so
that it can stop nobody but itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import metadata
from queue import SimpleQueue
from typing import Any, Final

from agentvoicebox.config.errors import AvbError, BadInput, NotFound, Unavailable
from agentvoicebox.plugins.breaker import Breaker

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
NEEDED: Final = {"ovos-solver-plugin-wolfram-alpha": "appid"}
"""What a configuration must hold: without it the plugin would ask with an identity of its author's."""
THREADS: Final = 8
WAITING: Final = 12
PLACES: Final = (THREADS + WAITING) // 4
"""Of those, for one tenant: fewer than there are threads, so that it cannot have them all."""
KEPT: Final = 64
"""Configurations, and of each the tenants of which we remember how it went."""
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
        self,
        name: str,
        question: str,
        language: str,
        config: Mapping[str, Any],
        deadline: float = 5.0,
        *,
        tenant: str = "",
    ) -> str | None:
        """What the solver answers, or None: ask the next one. `deadline` is in seconds.

        Instances are shared by all who ask with an equal `config`, but places are limited for each `tenant`, and one
        for whom a solver keeps failing leaves it alone without the others. A solver that is still loading after the
        deadline goes on loading, for the next question.

        Raises `NotFound` (solver_missing), `BadInput` (solver_config_invalid), or `Unavailable`: solver_timeout,
        solver_failed, solver_busy, circuit_open.
        """
        solver = self._solver(name, config)
        breaker = solver.breaker(tenant)
        breaker.admit()
        try:
            async with asyncio.timeout(deadline):
                answer = await asyncio.wrap_future(solver.ask(question[:LONGEST_QUESTION], language, tenant))
        except TimeoutError:
            (breaker.failed if solver.ready else breaker.undecided)()
            message = f"The solver {name} took longer than {deadline:g} s; ask again, or without it."
            failure: AvbError = Unavailable(message, code="solver_timeout")
        except (Unavailable, asyncio.CancelledError):  # too many are waiting, or nobody is any more
            breaker.undecided()
            raise
        except Exception as error:
            breaker.failed()
            log.warning("solver %s failed: %s", name, type(error).__name__)
            message = f"The solver {name} failed; check its configuration and what it needs."
            failure = Unavailable(message, code="solver_failed")
        else:
            breaker.succeeded()
            return answer.strip()[:LONGEST_ANSWER] or None if isinstance(answer, str) else None
        raise failure  # out here, so that it does not carry along what the solver says about the question

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
        if (needed := NEEDED.get(name)) is not None and not config.get(needed):
            raise BadInput(f"The solver {name} needs {needed} in its configuration.", code="solver_config_invalid")
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
        self.ready = False
        self._breakers: OrderedDict[str, Breaker] = OrderedDict()
        self._plugin = plugin
        self._config = config
        self._instance: Any = None
        self._loading = threading.Lock()
        self._counting = threading.Lock()
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = 0
        self._unfinished: Counter[str] = Counter()

    def breaker(self, tenant: str) -> Breaker:
        """How it went for this tenant: what some ask makes a solver fail, or its server refuse, that others can use."""
        found = self._breakers.setdefault(tenant, Breaker())
        self._breakers.move_to_end(tenant)
        if len(self._breakers) > KEPT:
            self._breakers.popitem(last=False)
        return found

    def ask(self, question: str, language: str, tenant: str) -> Future[Any]:
        """Queue a question. Raises `Unavailable` (solver_busy) when too many wait, or too many of this tenant's."""
        future: Future[Any] = Future()
        with self._counting:
            unfinished = self._unfinished.total() + 1
            if self._unfinished[tenant] >= PLACES or unfinished > THREADS + WAITING:
                raise Unavailable("Too many ask this solver now; try again in a moment.", code="solver_busy")
            self._unfinished[tenant] += 1
        future.add_done_callback(lambda _: self._finished(tenant))
        self._jobs.put((future, lambda: self._load().spoken_answer(question, lang=language)))
        if self._threads < min(THREADS, unfinished):
            self._threads += 1
            threading.Thread(target=self._work, name=f"solver {self._plugin.name}", daemon=True).start()
        return future

    def close(self) -> None:
        """Let the threads end."""
        for _ in range(self._threads):
            self._jobs.put(None)

    def _finished(self, tenant: str) -> None:
        with self._counting:
            self._unfinished[tenant] -= 1
            self._unfinished += Counter()  # drops those who have none

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
