"""What the parts of the benchmarks share: a store of their own, and lines of result."""

from __future__ import annotations

import asyncio
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from agentvoicebox.tenancy.database import Address, Database, prepare
from agentvoicebox.tenancy.embedded import serving

_RESULTS = sys.stdout
"""Where the lines of result go, and nothing else."""


def report(name: str, value: float, unit: str, bar: float, against: str, better: str = "lower", **detail: Any) -> None:
    """Print one measurement as one JSON object."""
    line = {
        "name": name,
        "value": round(value, 3),
        "unit": unit,
        "bar": bar,
        "better": better,
        "pass": value <= bar if better == "lower" else value >= bar,
        "against": against,
        "detail": detail,
    }
    print(json.dumps(line), file=_RESULTS, flush=True)


def tell(text: str) -> None:
    """Say on stderr what is being done."""
    print(text, file=sys.stderr, flush=True)


def run(parts: Sequence[str]) -> int:
    """Measure the parts that the command line names, or all; the exit code."""
    chosen = sys.argv[1:] or parts
    unknown = [name for name in chosen if name not in parts]
    if unknown:
        tell(f"There is no part {unknown[0]!r}; there is: {', '.join(parts)}")
        return 2
    # OVOS and its plugins log to standard output, which is for the results.
    with redirect_stdout(sys.stderr):
        for name in chosen:
            tell(f"measuring {name}")
            asyncio.run(importlib.import_module(f"parts.{name}").measure())
    return 0


def percentile(values: list[float], part: float) -> float:
    """The value that `part` (0 to 1) of `values` do not exceed."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def cpu_per_call(work: Callable[[int], object], calls: int, rounds: int = 7) -> float:
    """CPU of one of `calls` done by `work(calls)`, in microseconds; the median of some rounds."""
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        work(calls)
        found.append((time.process_time() - begin) / calls * 1e6)
    return statistics.median(found)


@asynccontextmanager
async def store() -> AsyncIterator[tuple[Address, Database]]:
    """A PostgreSQL of the measurement's own, with our tables in it."""
    with tempfile.TemporaryDirectory(prefix="avb-bench-") as name, serving(Path(name)) as postgres:
        await prepare(postgres.url)
        database = Database(postgres.url)
        try:
            yield postgres.url, database
        finally:
            await database.close()
            await asyncio.sleep(0)
