"""How long a device waits is its owner's choice, within reason."""

from __future__ import annotations

import pytest

from agentvoicebox.plugins.device import patience


def test_it_is_what_the_section_says() -> None:
    assert patience.of({"patience": 2}) == 2.0
    assert patience.of({}) == patience.PATIENCE


@pytest.mark.parametrize("told", ["4", None, True, 0, -1, 1e9, float("nan")])
def test_what_is_none_takes_one_line(told: object, lines: list[str]) -> None:
    assert patience.of({"patience": told}) == patience.PATIENCE
    assert len(lines) == 1
    assert "patience in mycroft.conf" in lines[0]
