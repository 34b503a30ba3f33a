"""Rates: what one decision costs, and what it costs that nodes tell one another.

A decision is measured where it is allowed, with both windows counted, for one subject after another of a thousand; the
floor is the same loop around a function that does nothing. Reconciliation is measured against a Redis of the
measurement's own, with every subject used once since the last call; the server's share is what the system accounts it.
"""

from __future__ import annotations

import itertools
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from parts.reports import cpu_per_call, report

from agentvoicebox.tenancy.limits import Limiter, Rate, Reconciler, Subject
from agentvoicebox.tenancy.models import RateClass, Tier
from agentvoicebox.tenancy.state import Use
from agentvoicebox.tenancy.state.redis import RedisState

SUBJECTS = 1000
CALLS = 200_000
ROUNDS = 50

PLENTY = Rate(10_000_000, 1_000_000_000)
"""Never met, so that every decision is the usual one."""


class Holder:
    """What a `Grant` says."""

    tier = Tier.ENTERPRISE
    rate_class = RateClass.UNLIMITED

    def __init__(self) -> None:
        self.tenant_id = uuid.uuid4()
        self.key_id = uuid.uuid4()


async def measure() -> None:
    """Print one JSON line each."""
    decisions()
    await reconciliation()


def decisions() -> None:
    subjects: list[Subject] = [("key", uuid.uuid4()) for _ in range(SUBJECTS)]
    limiter = Limiter()

    def nothing(subject: Subject, rate: Rate) -> None:
        pass

    def floor(calls: int) -> None:
        for subject in itertools.islice(itertools.cycle(subjects), calls):
            nothing(subject, PLENTY)

    def decide(calls: int) -> None:
        for subject in itertools.islice(itertools.cycle(subjects), calls):
            limiter.decide(subject, PLENTY)

    def check(calls: int) -> None:
        for _ in range(calls):
            limiter.check_failures("192.0.2.1")

    holder = Holder()

    def admit(calls: int) -> None:
        fresh = Limiter()
        for i in range(calls):
            if i % 50_000 == 0:
                fresh = Limiter()
            fresh.admit_request(holder)

    empty = cpu_per_call(floor, CALLS)
    report(
        "tenancy.limits.decision",
        cpu_per_call(decide, CALLS) - empty,
        "us",
        1.0,
        "an empty loop, which is taken off",
        empty_loop=round(empty, 3),
        failures_check=round(cpu_per_call(check, CALLS), 3),
        request_of_an_unlimited_key=round(cpu_per_call(admit, CALLS), 3),
    )


async def reconciliation() -> None:
    with redis() as (url, server):
        state = RedisState(url, "bench")
        limiter = Limiter()
        reconciler = Reconciler(limiter, state)
        subjects: list[Subject] = [("key", uuid.uuid4()) for _ in range(SUBJECTS)]
        await state.reconcile([Use("key:first", 1, 1)])
        before = sum(server.cpu_times()[:2])
        spent = waited = 0.0
        for _ in range(ROUNDS):
            for subject in subjects:
                limiter.decide(subject, PLENTY)
            begin, cpu = time.perf_counter(), time.process_time()
            await reconciler.once()
            spent += time.process_time() - cpu
            waited += time.perf_counter() - begin
        served = sum(server.cpu_times()[:2]) - before
        if state.degraded:
            raise RuntimeError("Redis did not keep up.")
        await state.close()
    each = SUBJECTS * ROUNDS
    report(
        "tenancy.limits.reconciliation",
        spent / each * 1e6,
        "us",
        57.0,
        "one Redis call per decision",
        subjects_per_call=SUBJECTS,
        redis_cpu_us=round(served / each * 1e6, 2),
        call_ms=round(waited / ROUNDS * 1e3, 2),
    )


@contextmanager
def redis() -> Iterator[tuple[str, psutil.Process]]:
    """A server of our own, which keeps nothing."""
    with tempfile.TemporaryDirectory(prefix="avb-bench-") as directory:
        socket = Path(directory) / "redis.sock"
        command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                while not socket.exists() and process.poll() is None:
                    time.sleep(0.01)
                yield f"unix://{socket}", psutil.Process(process.pid)
            finally:
                process.kill()
