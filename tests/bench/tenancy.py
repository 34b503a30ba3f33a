"""Tenancy, measured: keys, permissions, rates, isolation, ledger, audit and the REST service over all of them.

    ./run bench tenancy              prints one JSON object per line; takes some minutes
    ./run bench tenancy keys audit   only these parts: `parts/` has one module for each

Every part makes its own PostgreSQL. Processor time is the system's own accounting of the process that does the
work; where something is compared, both sides run in turns in the same run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from parts.reports import run

if __name__ == "__main__":
    sys.exit(run(("keys", "permissions", "limits", "ledger", "audit", "isolation", "api")))
