"""Solvers that are installed are found by name and asked, and a bad one stops nobody but itself."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from agentvoicebox.config.errors import BadInput, NotFound, Unavailable
from agentvoicebox.plugins.chat import solvers
from agentvoicebox.plugins.chat.solvers import Solvers

QUESTION = "who keeps my secret"
PATIENCE = 60.0
"""Seconds for what comes at some time; what never comes is waited for until a test has enough, see `Waits`."""
PLUGINS = {
    "asking": "neon.plugin.solver",
    "keeping": "neon.plugin.solver",
    "hanging": "opm.solver.question",
    "moody": "opm.solver.question",
}
SOURCE = '''
"""Solvers for tests."""
import json, threading, urllib.request
from ovos_plugin_manager.templates.solvers import QuestionSolver

gate = threading.Event()
loading = threading.Event()
threads = set()
made = []

class Asking(QuestionSolver):
    def __init__(self, config=None):
        made.append(config)
        super().__init__(config)
    def get_spoken_answer(self, query, lang=None, units=None):
        with urllib.request.urlopen(self.config["url"] + "/models", timeout=60) as answer:
            return f"{query} {lang} {json.load(answer)['data'][0]['id']}"

class Hanging(QuestionSolver):
    def __init__(self, config=None):
        if (config or {}).get("slow"):
            loading.wait()
        super().__init__(config)
    def get_spoken_answer(self, query, lang=None, units=None):
        threads.add(threading.current_thread())
        gate.wait()
        return "at last"

class Keeping(QuestionSolver):
    def __init__(self, config=None):
        super().__init__(config, enable_cache=True)
        self.enable_tx = True
    def get_spoken_answer(self, query, lang=None, units=None):
        made.append(query)
        return f"answer {len(made)}"

class Moody(QuestionSolver):
    def get_spoken_answer(self, query, lang=None, units=None):
        mood = self.config["mood"]
        if mood == "raise":
            raise ValueError(query)
        if mood == "exit":
            raise SystemExit(1)
        return {"none": None, "empty": "  ", "number": 7, "long": "a" * 30_000, "good": " fine "}[mood]
'''


@pytest.fixture
def solver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Solvers]:
    """All that are installed, and three of our own."""
    (tmp_path / "quiz_solvers.py").write_text(SOURCE)
    info = tmp_path / "quiz_solvers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quiz-solvers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\nquiz-{name} = quiz_solvers:{name.title()}\n" for name, group in PLUGINS.items())
    )
    monkeypatch.syspath_prepend(tmp_path)
    asked = Solvers()
    yield asked
    if module := sys.modules.pop("quiz_solvers", None):
        module.gate.set()
        module.loading.set()
    asked.close()
    for thread in threading.enumerate():
        if thread.name.startswith("solver "):
            thread.join()


def test_four_are_always_listed_and_the_others_when_they_are_installed(solver: Solvers) -> None:
    listed = {each.id: each for each in solver.installed()}
    assert [each.name for each in solver.installed()][:4] == ["Wikipedia", "DuckDuckGo", "Wolfram Alpha", "WordNet"]
    assert listed["ovos-solver-failure-plugin"].installed
    assert listed["ovos-solver-yes-no-plugin"].name == "Yes no"
    assert {"quiz-asking", "quiz-hanging"} <= listed.keys()
    assert "ovos-solver-bus-plugin" not in listed
    assert "quiz_solvers" not in sys.modules


async def test_a_stock_solver_answers(solver: Solvers) -> None:
    assert await solver.ask("ovos-solver-failure-plugin", "what is love", "en-US", {}, PATIENCE)
    assert await solver.ask("ovos-solver-yes-no-plugin", "yes, please", "en-US", {}, PATIENCE) == "yes"


async def test_a_solver_that_asks_a_server_gets_question_language_and_configuration(
    solver: Solvers, providers: Any
) -> None:
    server = await providers()
    config = {"url": server.url()}
    for _ in range(3):
        assert await solver.ask("quiz-asking", QUESTION, "de-DE", config, PATIENCE) == f"{QUESTION} de-DE small"
    other = await solver.ask("quiz-asking", QUESTION, "de-DE", config | {"lang": "de-DE"}, PATIENCE)
    assert other == f"{QUESTION} de-DE small"
    assert sys.modules["quiz_solvers"].made == [config, config | {"lang": "de-DE"}]
    assert len(server.asked) == 4


@pytest.mark.parametrize(("mood", "answer"), [("good", "fine"), ("none", None), ("empty", None), ("number", None)])
async def test_no_answer_means_ask_the_next(solver: Solvers, mood: str, answer: str | None) -> None:
    assert await solver.ask("quiz-moody", QUESTION, "en-US", {"mood": mood}, PATIENCE) == answer


async def test_questions_are_neither_kept_nor_translated_elsewhere(solver: Solvers) -> None:
    answers = [await solver.ask("quiz-keeping", QUESTION, "de-DE", {}, PATIENCE) for _ in range(2)]
    assert answers == ["answer 1", "answer 2"]
    assert sys.modules["quiz_solvers"].made == [QUESTION, QUESTION]


async def test_an_answer_has_an_end(solver: Solvers) -> None:
    answer = await solver.ask("quiz-moody", QUESTION, "en-US", {"mood": "long"}, PATIENCE)
    assert answer == "a" * solvers.LONGEST_ANSWER


@pytest.mark.parametrize("mood", ["raise", "exit"])
async def test_a_solver_that_raises_is_named_and_left_alone_after_a_while(
    solver: Solvers, caplog: pytest.LogCaptureFixture, mood: str
) -> None:
    for _ in range(5):
        with pytest.raises(Unavailable) as caught:
            await solver.ask("quiz-moody", QUESTION, "en-US", {"mood": mood}, PATIENCE)
        assert (caught.value.code, caught.value.__context__) == ("solver_failed", None)
    with pytest.raises(Unavailable) as caught:
        await solver.ask("quiz-moody", QUESTION, "en-US", {"mood": mood}, PATIENCE)
    assert caught.value.code == "circuit_open"
    with pytest.raises(Unavailable) as caught:
        await solver.ask("quiz-moody", QUESTION, "en-US", {"mood": mood}, PATIENCE, tenant="another")
    assert caught.value.code == "solver_failed"
    assert await solver.ask("quiz-moody", QUESTION, "en-US", {"mood": "good"}, PATIENCE) == "fine"
    ours = [each for each in caplog.records if each.name.startswith("agentvoicebox")]
    assert len(ours) == 6
    assert not any(QUESTION in each.getMessage() or each.exc_info for each in ours)
    assert all(each.levelno == logging.WARNING for each in ours)


async def hanging(count: int) -> None:
    """Wait until so many threads hang."""
    async with asyncio.timeout(PATIENCE):
        while len(getattr(sys.modules.get("quiz_solvers"), "threads", ())) < count:
            await asyncio.sleep(0.01)


async def test_a_solver_that_hangs_stops_nobody_else(solver: Solvers, waits: Any) -> None:
    ours = waits(solvers)
    asks = [solver.ask("quiz-hanging", QUESTION, "en-US", {}, PATIENCE, tenant=str(number % 5)) for number in range(30)]
    asking = asyncio.gather(*asks, return_exceptions=True)
    await hanging(solvers.THREADS)
    await ours.end_all(asking)
    done = await asking
    codes = [getattr(each, "code", each) for each in done]
    most = solvers.THREADS + solvers.WAITING
    assert (codes.count("solver_timeout"), codes.count("solver_busy")) == (most, 30 - most)
    module = sys.modules["quiz_solvers"]
    assert len(module.threads) == solvers.THREADS
    assert await solver.ask("quiz-moody", QUESTION, "en-US", {"mood": "good"}, PATIENCE) == "fine"
    module.gate.set()
    assert await solver.ask("quiz-hanging", QUESTION, "en-US", {"another": 1}, PATIENCE) == "at last"


async def test_one_tenant_cannot_have_all_places_of_a_solver(solver: Solvers, waits: Any) -> None:
    ours = waits(solvers)
    asks = [solver.ask("quiz-hanging", QUESTION, "en-US", {}, PATIENCE, tenant="acme") for _ in range(30)]
    asking = asyncio.gather(*asks, return_exceptions=True)
    await hanging(solvers.PLACES)
    await ours.end_all(asking)
    codes = [getattr(each, "code", each) for each in await asking]
    assert (codes.count("solver_timeout"), codes.count("solver_busy")) == (solvers.PLACES, 30 - solvers.PLACES)
    with pytest.raises(Unavailable) as caught:
        await solver.ask("quiz-hanging", QUESTION, "en-US", {}, PATIENCE, tenant="acme")
    assert caught.value.code == "circuit_open"
    module = sys.modules["quiz_solvers"]
    assert len(module.threads) == solvers.PLACES < solvers.THREADS
    beta = asyncio.create_task(solver.ask("quiz-hanging", QUESTION, "en-US", {}, PATIENCE, tenant="beta"))
    await hanging(solvers.PLACES + 1)
    module.gate.set()
    assert await beta == "at last"


async def test_a_solver_that_needs_a_key_is_not_asked_with_somebody_else_s(solver: Solvers) -> None:
    for config in ({}, {"appid": ""}):
        with pytest.raises(BadInput) as caught:
            await solver.ask("ovos-solver-plugin-wolfram-alpha", QUESTION, "en-US", config, PATIENCE)
        assert caught.value.code == "solver_config_invalid"
    with pytest.raises(NotFound):
        await solver.ask("ovos-solver-plugin-wolfram-alpha", QUESTION, "en-US", {"appid": "ours"}, PATIENCE)


async def test_a_solver_that_loads_slowly_answers_the_next_question(
    solver: Solvers, waits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, codes, jobs = waits(solvers), [], list[Future[Any]]()

    class Job(Future[Any]):
        def __init__(self) -> None:
            super().__init__()
            jobs.append(self)

    monkeypatch.setattr(solvers, "Future", Job)
    for number in range(6):  # more often than a breaker allows
        asking = asyncio.create_task(solver.ask("quiz-hanging", QUESTION, "en-US", {"slow": True}, PATIENCE))
        # A job that no thread has taken yet would give its place free again.
        while not (asking.done() or (len(jobs) > number and jobs[number].running())):
            await asyncio.sleep(0.001)
        await ours.end_all(asking)
        with pytest.raises(Unavailable) as caught:
            await asking
        codes.append(caught.value.code)
    assert codes == ["solver_timeout"] * solvers.PLACES + ["solver_busy"]
    while "quiz_solvers" not in sys.modules:
        await asyncio.sleep(0.01)
    module = sys.modules["quiz_solvers"]
    while not hasattr(module, "Moody"):
        await asyncio.sleep(0.01)
    module.loading.set()
    module.gate.set()
    assert await solver.ask("quiz-hanging", QUESTION, "en-US", {"slow": True}, PATIENCE, tenant="another") == "at last"


async def test_who_is_cancelled_leaves_no_job_behind(solver: Solvers) -> None:
    asks = [
        solver.ask("quiz-hanging", QUESTION, "en-US", {}, PATIENCE, tenant=str(n % 4))
        for n in range(solvers.THREADS + 8)
    ]
    tasks = [asyncio.create_task(each) for each in asks]
    await hanging(solvers.THREADS)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    sys.modules["quiz_solvers"].gate.set()
    assert await solver.ask("quiz-hanging", QUESTION, "en-US", {}, PATIENCE) == "at last"


async def test_what_is_not_there_or_not_json_is_refused(solver: Solvers) -> None:
    for name in ("nobody", "ovos-solver-bus-plugin", "ovos-solver-plugin-wikipedia-not"):
        with pytest.raises(NotFound) as missing:
            await solver.ask(name, QUESTION, "en-US", {}, PATIENCE)
        assert missing.value.code == "solver_missing"
    with pytest.raises(BadInput) as wrong:
        await solver.ask("quiz-moody", QUESTION, "en-US", {"mood": object()}, PATIENCE)
    assert wrong.value.code == "solver_config_invalid"


async def test_few_configurations_stay_loaded(solver: Solvers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "KEPT", 2)
    for number in range(6):
        assert await solver.ask("quiz-moody", QUESTION, "en-US", {"mood": "good", "n": number}, PATIENCE) == "fine"
    while (left := [each for each in threading.enumerate() if each.name == "solver quiz-moody"])[2:]:
        left[0].join(0.05)
    assert len(left) == 2
