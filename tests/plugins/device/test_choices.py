"""What a tenant has chosen: it survives the way, and nonsense is refused."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentvoicebox.plugins.device import choices
from agentvoicebox.plugins.device.choices import Choices, WakeWord

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
WAKE_WORD = st.builds(WakeWord, TEXT.filter(bool), st.floats(0, 1), TEXT, TEXT)
CHOICES = st.builds(
    Choices,
    tenant=TEXT,
    language=TEXT,
    voice=TEXT,
    speed=st.floats(0.5, 2),
    persona=TEXT,
    personas=st.lists(TEXT, max_size=4).map(tuple),
    wake_words=st.lists(WAKE_WORD, max_size=4).map(tuple),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


@given(CHOICES)
def test_choices_arrive_as_they_are(told: Choices) -> None:
    again = choices.of(json.loads(json.dumps(told.as_dict())))
    assert again == told
    assert again.etag == told.etag


@given(CHOICES, CHOICES)
def test_the_tag_is_the_same_for_the_same_choices_only(one: Choices, other: Choices) -> None:
    assert (one.etag == other.etag) == (one.as_dict() == other.as_dict())


@given(st.dictionaries(st.sampled_from([*Choices().as_dict(), "later"]), JSON, max_size=5) | JSON)
def test_nonsense_is_refused_and_nothing_else_happens(told: object) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(choices.of(told), Choices)


@pytest.mark.parametrize(
    "told",
    [
        *(None, [], "x", {"tenant": 1}, {"language": None}, {"speed": "fast"}, {"speed": True}, {"speed": 3}),
        {"speed": float("nan")},
        {"personas": "Ada"},
        {"personas": [1]},
        {"wake_words": {}},
        {"wake_words": ["hey"]},
        {"wake_words": [{"phrase": ""}]},
        {"wake_words": [{"phrase": 5}]},
        {"wake_words": [{"phrase": "hey", "sensitivity": 2}]},
        {"wake_words": [{"phrase": "hey", "model": None}]},
    ],
)
def test_what_makes_no_choices_is_refused(told: object) -> None:
    with pytest.raises(ValueError, match=r"must"):
        choices.of(told)


def test_what_is_left_out_or_not_known_is_as_on_a_new_device() -> None:
    assert choices.of({"later": 1}) == Choices()
    assert choices.of({"wake_words": []}).wake_words == ()
    assert choices.of({"wake_words": [{"phrase": "hey", "later": 1}]}).wake_words == (WakeWord("hey"),)
