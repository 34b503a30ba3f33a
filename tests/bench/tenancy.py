"""Tenancy, measured: keys, permissions, rates, isolation, ledger, audit and the REST service over all of them.

    ./run bench tenancy              prints one JSON object per line; takes some minutes
    ./run bench tenancy keys audit   only these parts: `parts/` has one module for each

Every part makes its own PostgreSQL. Processor time is the system's own accounting of the process that does the
work; where something is compared, both sides run in turns in the same run.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from parts.reports import tell

PARTS = ("keys", "permissions", "limits", "ledger", "audit", "isolation", "api")


def main() -> int:
    chosen = sys.argv[1:] or PARTS
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        tell(f"There is no part {unknown[0]!r}; there is: {', '.join(PARTS)}")
        return 2
    for name in chosen:
        tell(f"measuring {name}")
        asyncio.run(importlib.import_module(f"parts.{name}").measure())
    return 0


if __name__ == "__main__":
    sys.exit(main())
