"""Engines and persona, measured: the pool, Whisper, Kokoro, the persona in its cell, and the chat door.

    ./run bench speech                  prints one JSON object per line; takes some minutes
    ./run bench speech whisper kokoro   only these parts: `parts/` has one module for each

Models are made for the measurement: real shapes with random weights, so that they cost what the real ones cost and
say nothing. What is compared runs in turns in the same run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from parts.reports import run

if __name__ == "__main__":
    sys.exit(run(("pool", "whisper", "kokoro", "chat", "persona")))
