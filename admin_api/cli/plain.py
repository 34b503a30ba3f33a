"""Text for people where rich is not installed, as on a Raspberry Pi: tables, colours, large digits."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, TextIO

COLOURS = {"green": 32, "yellow": 33, "red": 31, "bold": 1}

_DIGITS = (
    ("███", "  █", "███", "███", "█ █", "███", "███", "███", "███", "███"),
    ("█ █", "  █", "  █", "  █", "█ █", "█  ", "█  ", "  █", "█ █", "█ █"),
    ("█ █", "  █", "███", "███", "███", "███", "███", "  █", "███", "███"),
    ("█ █", "  █", "█  ", "  █", "  █", "  █", "█ █", "  █", "█ █", "  █"),
    ("███", "  █", "███", "███", "  █", "███", "███", "  █", "███", "███"),
)


def emit(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def colour(text: str, name: str, stream: TextIO | None = None) -> str:
    """The text in a colour, on a terminal that has some."""
    stream = stream or sys.stdout
    if name not in COLOURS or not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{COLOURS[name]}m{text}\x1b[0m"


def paragraph(text: str) -> None:
    """A text on stdout, folded where the terminal ends, with further lines set in."""
    for line in _folded(text, shutil.get_terminal_size((120, 24)).columns, "    "):
        print(line)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], colours: Sequence[str] = ()) -> None:
    """A table on stdout; the last column is folded where the terminal ends. `colours` are those of the rows."""
    widths = [max(len(row[number]) for row in (columns, *rows)) for number in range(len(columns) - 1)]
    begin = sum(widths) + 2 * len(widths)
    left = max(shutil.get_terminal_size((120, 24)).columns - begin, 30)
    print(colour(_row(columns, widths), "bold"))
    for number, row in enumerate(rows):
        first, *more = _folded(row[-1], left) or [""]
        line = _row((*row[:-1], first), widths)
        print(colour(line, colours[number]) if number < len(colours) else line)
        for each in more:
            print(" " * begin + each)


def _folded(text: str, width: int, indent: str = "") -> list[str]:
    # Flags and paths are there to be copied: they stay whole, even where they are wider than the terminal.
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def large(digits: str) -> str:
    """Digits that are read from across a room, in groups of four."""
    groups = [digits[at : at + 4] for at in range(0, len(digits), 4)]
    return "\n".join(
        "     ".join("  ".join(row[int(digit)] for digit in group) for group in groups).rstrip() for row in _DIGITS
    )


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
    return "  ".join([*padded, cells[-1]]).rstrip()
