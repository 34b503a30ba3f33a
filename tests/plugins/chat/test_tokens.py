"""Counts of tokens are believed where they are possible."""

from __future__ import annotations

from typing import Any

import pytest

from agentvoicebox.plugins.chat.tokens import Count, Tokens


def counting(text: str = "", calls: list[dict[str, Any]] | None = None) -> Count:
    """A prompt of 400 bytes, at most 1024 tokens asked for, and this said."""
    count = Count(400, 1024)
    count.sent = True
    count.said(text, calls)
    return count


def test_what_was_not_sent_costs_nothing() -> None:
    count = Count(400, 1024)
    assert count.tokens() == Tokens(0, 0)
    count.sent = True
    assert count.tokens() == Tokens(100, 0, estimated=True)
    count.sent = False
    assert count.tokens() == Tokens(0, 0)


@pytest.mark.parametrize(("taken", "given"), [(90, 3), (1, 1), (1424, 76), (90.0, 3.0)])
def test_possible_counts_are_believed(taken: float, given: float) -> None:
    count = counting("Good morning")
    count.told(input=taken, output=given)
    assert count.tokens() == Tokens(int(taken), int(given))


@pytest.mark.parametrize("taken", [0, -1, 1425, float("nan"), float("inf"), "90", True, None, [], 1.5])
def test_impossible_counts_of_the_prompt_are_estimated(taken: object) -> None:
    count = counting("Good morning")
    count.told(input=taken, output=3)
    assert count.tokens() == Tokens(100, 3, estimated=True)


@pytest.mark.parametrize("given", [0, -1, 77, 1_000_000, float("nan"), "3", None])
def test_impossible_counts_of_the_answer_are_estimated(given: object) -> None:
    count = counting("Good morning")
    count.told(input=90, output=given)
    assert count.tokens() == Tokens(90, 3, estimated=True)


def test_reasoning_counts_whether_it_is_shown_or_only_told_up_to_what_was_asked_for() -> None:
    shown = counting("Good morning")
    shown.think("Is it morning?" * 50)
    shown.told(input=90, output=700)
    assert shown.tokens() == Tokens(90, 700)
    told = counting("Good morning")
    told.told(input=90, output=700, hidden=690)
    assert told.tokens() == Tokens(90, 700)
    lied = counting("Good morning")
    lied.told(input=90, output=5_000, hidden=4_990)
    assert lied.tokens() == Tokens(90, 3, estimated=True)


def test_bytes_are_counted_not_characters_and_calls_too() -> None:
    count = counting("日本語", [{"function": {"name": "light", "arguments": '{"on": true}'}}, {"index": 0}])
    assert count.tokens() == Tokens(100, 7, estimated=True)


def test_no_more_is_estimated_than_was_asked_for() -> None:
    count = counting("a" * 33_000)
    assert count.tokens() == Tokens(100, 1024, estimated=True)
    assert not count.overflowing
    count.said("a" * 1_000, None)
    assert (count.overflowing, count.ending) == (True, "length")


def test_a_broken_text_does_not_stop_the_counting() -> None:
    assert counting("\ud800").tokens() == Tokens(100, 1, estimated=True)
