"""A device with stock OVOS, measured: what our plugins add to a turn, what wake words cost, and life without platform.

    ./run bench device              prints one JSON object per line; takes some minutes
    ./run bench device wake         only this part: `parts/` has one module for each

Everything is real: `avb up` in a process of its own, and beside it the stock services of a device, which hear somebody
speak at the pace of speech and play their answer into files.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from parts.reports import run

if __name__ == "__main__":
    sys.exit(run(("wake", "turns", "live", "lost")))
