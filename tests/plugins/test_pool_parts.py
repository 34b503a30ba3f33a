"""Turns, memory and counts of a pool: arithmetic without clocks or threads."""

from __future__ import annotations

import pytest

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins.pool.memory import LEAST, Memory
from agentvoicebox.plugins.pool.metrics import (
    MOST_ENGINES,
    MOST_LABELS,
    STT_SECONDS,
    EngineMetrics,
    Histogram,
    engine_of,
    model_of,
)
from agentvoicebox.plugins.pool.queue import Queue, Turns
from agentvoicebox.plugins.pool.runner import EngineSpec

MIB = 1024**2


def order(turns: Turns[str]) -> list[str]:
    return [turns.next() or "?" for _ in range(len(turns))]


def test_one_tenants_hundred_jobs_do_not_delay_anothers_first():
    turns: Turns[str] = Turns()
    turns.add("a", "a0")
    assert turns.next() == "a0"
    for n in range(1, 100):
        turns.add("a", f"a{n}")
    turns.add("b", "b0")
    turns.add("b", "b1")
    assert order(turns)[:5] == ["b0", "a1", "b1", "a2", "a3"]


def test_tenants_that_come_first_are_served_in_the_order_in_which_they_came():
    turns: Turns[str] = Turns()
    for tenant in "abc":
        turns.add(tenant, f"{tenant}0")
        turns.add(tenant, f"{tenant}1")
    assert order(turns) == ["a0", "b0", "c0", "a1", "b1", "c1"]


def test_who_always_asks_again_in_time_has_no_more_than_its_share():
    turns: Turns[str] = Turns()
    for n in range(10):
        turns.add("a", f"a{n}")
    turns.add("b", "b")
    served = []
    for _ in range(8):
        served.append(turns.next())
        if served[-1] == "b":
            turns.add("b", "b")
    assert served == ["a0", "b", "a1", "b", "a2", "b", "a3", "b"]


def test_what_is_dropped_is_never_taken_and_leaves_nothing_behind():
    turns: Turns[str] = Turns()
    for n in range(3):
        turns.add("a", f"a{n}")
    turns.add("b", "b0")
    turns.drop("a", "a0")
    turns.drop("a", "a0")
    turns.drop("nobody", "x")
    turns.drop("b", "b0")
    assert (len(turns), list(turns)) == (2, ["a1", "a2"])
    assert order(turns) == ["a1", "a2"]
    assert turns.next() is None
    assert (turns._new, len(turns._row)) == ({}, 0), "tenants that want nothing take no memory"


def test_a_batch_is_taken_across_tenants_and_guesses_only_when_nothing_else_waits():
    queue: Queue[str] = Queue()
    queue.tentative.add("a", "guess")
    for n in range(3):
        queue.certain.add("a", f"a{n}")
    queue.certain.add("b", "b0")
    queue.certain.add("c", "c0")
    assert len(queue) == 6
    assert [queue.take(4), queue.take(4), queue.take(4), queue.take(4)] == [
        ["a0", "b0", "c0", "a1"],
        ["a2"],
        ["guess"],
        [],
    ]


def idle(key: str) -> bool:
    return False


def test_who_was_used_longest_ago_leaves_first_and_no_more_than_needed():
    memory: Memory[str] = Memory(100 * MIB)
    for key in "abc":
        memory.hold(key, 30 * MIB)
    memory.touch("a")
    assert memory.leaving(10 * MIB, idle) == []
    assert memory.leaving(11 * MIB, idle) == ["b"]
    assert memory.leaving(50 * MIB, idle) == ["b", "c"]
    memory.forget("b")
    assert memory.leaving(40 * MIB, idle) == []
    assert (memory.size("b"), memory.size("c"), memory.held) == (0, 30 * MIB, 60 * MIB)


def test_who_is_busy_or_pinned_stays():
    memory: Memory[str] = Memory(100 * MIB)
    for key in "abc":
        memory.hold(key, 30 * MIB)
    memory.pin("a")
    assert memory.leaving(30 * MIB, lambda key: key == "b") == ["c"]
    assert memory.leaving(60 * MIB, lambda key: key == "b") is None, "b has to come to rest"


def test_what_never_fits_beside_the_pinned_ones_is_refused_with_the_remedy():
    memory: Memory[str] = Memory(100 * MIB)
    memory.hold("a", 60 * MIB)
    memory.hold("b", 40 * MIB)
    memory.pin("a")
    memory.check("c", 40 * MIB)
    with pytest.raises(Unavailable, match="AVB_SPEECH_MEMORY") as caught:
        memory.check("c", 41 * MIB)
    assert caught.value.code == "engines_full"
    memory.check("a", 100 * MIB)


def test_an_engine_elsewhere_counts_for_something_too():
    memory: Memory[int] = Memory(10 * LEAST)
    for number in range(11):
        memory.hold(number, 0)
    assert memory.leaving(0, lambda key: False) == [0]


def test_a_histogram_has_the_buckets_of_its_metric():
    seconds = Histogram(STT_SECONDS)
    for value in (0.05, 0.1, 0.11, 10.0, 11.0):
        seconds.add(value)
    assert seconds.counts == [2, 1, 0, 0, 0, 0, 1, 1]
    assert (seconds.count, round(seconds.sum, 2)) == (5, 21.26)


def test_what_clients_write_makes_no_endless_series():
    metrics = EngineMetrics("tts", "x", "")
    for number in range(5_000):
        metrics.asked("auto", f"{chr(97 + number % 26)}{chr(97 + number // 26 % 26)}-{number}")
        metrics.asked("auto", f"<script {number}>")
        metrics.failed(f"code_{number}")
    assert len(metrics.requests) <= MOST_LABELS + 1
    assert len(metrics.failures) <= MOST_LABELS + 1
    assert sum(metrics.requests.values()) == 10_000
    assert sum(metrics.failures.values()) == 5_000
    known: dict[tuple[str, str, str], EngineMetrics] = {}
    for number in range(1_000):
        key = engine_of(EngineSpec("stt", "whisper", (("model", f"m{number}"),)), known, {"whisper"})
        known[key] = EngineMetrics(*key)
    assert len(known) == MOST_ENGINES + 1


def test_a_name_that_no_plugin_has_is_told_to_nobody():
    mine = EngineSpec("stt", "my secret project", (("model", "mine"),))
    assert engine_of(mine, (), {"whisper"}) == ("stt", "other", "other")


def test_a_models_name_is_told_without_its_place():
    assert model_of(EngineSpec("stt", "x", (("key", "secret"), ("model", "/srv/models/base")))) == "base"
    assert model_of(EngineSpec("stt", "x")) == ""
    assert model_of(EngineSpec("stt", "x", (("model", "a model\nof mine"),))) == "other"
    assert "secret" not in repr(EngineSpec("stt", "x", (("key", "secret"),)))
