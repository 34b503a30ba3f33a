"""What an examination has found: one line after the other, each with its remedy."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from typing import Literal

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
"""How each state is shown."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: `state` is ok, warn (something works less well) or fail (what was examined cannot do its work)."""

    what: str
    state: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


def python() -> Finding:
    """Whether this is a Python that all of it runs on."""
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    remedy = "" if good else "use Python 3.11 to 3.13"
    return Finding("Python", "ok" if good else "fail", platform.python_version(), remedy)
