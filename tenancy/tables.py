"""Rows of CSV (RFC 4180), with nothing in them that a spreadsheet would run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from datetime import date, datetime

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def row(values: Iterable[object]) -> str:
    """One line, with its end."""
    line = io.StringIO()
    csv.writer(line).writerow([cell(value) for value in values])
    return line.getvalue()


def cell(value: object) -> str:
    """A value as text. Numbers stay numbers; text that begins as a formula does gets an apostrophe in front."""
    if value is None:
        return ""
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    text = str(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"'{text}" if text.startswith(_FORMULA) and not is_number else text
