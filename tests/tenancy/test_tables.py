"""What a table holds, and what a spreadsheet makes of it."""

from __future__ import annotations

import csv
import io
from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentvoicebox.tenancy import tables


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (-1.5, "-1.5"),
        (True, "True"),
        (date(2026, 1, 2), "2026-01-02"),
        (datetime(2026, 1, 2, 3, tzinfo=UTC), "2026-01-02T03:00:00+00:00"),
        ({"a": "ü"}, '{"a": "ü"}'),
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@x", "'@x"),
        ("\tx", "'\tx"),
        ("\rx", "'\rx"),
        ("plain", "plain"),
    ],
)
def test_values_become_text_and_text_no_formula(value: object, text: str) -> None:
    assert tables.cell(value) == text


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=5))
def test_a_row_is_read_as_it_was_written(values: list[str]) -> None:
    [read] = csv.reader(io.StringIO(tables.row(values), newline=""))
    assert [text.removeprefix("'") for text in read] == [text.removeprefix("'") for text in values]
