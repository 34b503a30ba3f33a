"""The listener's story: silence, speech, silence. Time is an argument, so nothing here waits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentvoicebox.bus_bridge.models import BYTES_PER_SECOND, TurnDetection
from agentvoicebox.bus_bridge.turns import LONGEST_UTTERANCE, Change, Listener

WINDOW = b"\x01\x00" * 512
SECONDS = 512 / 16_000


def hear(listener: Listener, *probabilities: float) -> list[Change]:
    return [change for p in probabilities if (change := listener.hear(WINDOW, p)) is not None]


def test_speech_and_silence_make_an_utterance():
    listener = Listener(TurnDetection(silence=0.2))
    assert hear(listener, *[0.0] * 10) == []
    assert hear(listener, 0.9, 0.9) == [Change.BEGAN]
    assert hear(listener, *[0.9] * 20) == []
    assert hear(listener, *[0.0] * 6) == [Change.PAUSED]
    assert hear(listener, 0.0) == [Change.ENDED]


def test_a_click_is_not_speech():
    listener = Listener(TurnDetection())
    assert hear(listener, 0.0, 0.9, 0.0, 0.9, 0.0, 0.0) == []


def test_the_prefix_is_kept_and_no_more():
    listener = Listener(TurnDetection(prefix_padding=0.3))
    hear(listener, *[0.0] * 200, 0.9, 0.9)
    kept = len(listener.audio) / BYTES_PER_SECOND
    assert 0.3 <= kept - 2 * SECONDS < 0.3 + 2 * SECONDS
    assert listener.began_at == pytest.approx(202 * SECONDS - kept)


def test_a_pause_that_goes_on_is_taken_back():
    listener = Listener(TurnDetection(silence=0.5))
    hear(listener, 0.9, 0.9)
    assert hear(listener, 0.0, 0.0, 0.9) == [Change.PAUSED, Change.RESUMED]


def test_a_doubtful_window_ends_nothing_by_itself():
    listener = Listener(TurnDetection(threshold=0.5, silence=0.2))
    hear(listener, 0.9, 0.9)
    assert hear(listener, *[0.4] * 20) == []
    assert Change.ENDED in hear(listener, 0.1, *[0.4] * 7)


def test_endless_speech_ends():
    listener = Listener(TurnDetection())
    assert hear(listener, *[0.9] * (int(LONGEST_UTTERANCE / SECONDS) - 1)) == [Change.BEGAN]
    assert hear(listener, 0.9) == [Change.ENDED]
    assert len(listener.take()) == pytest.approx(LONGEST_UTTERANCE * BYTES_PER_SECOND, abs=len(WINDOW))
    assert hear(listener, 0.9, 0.9) == [Change.BEGAN], "and what comes then is the next one"


def test_taking_starts_afresh():
    listener = Listener(TurnDetection())
    hear(listener, 0.9, 0.9, 0.9)
    audio = listener.take()
    assert len(audio) == 3 * len(WINDOW)
    assert not listener.speaking
    assert hear(listener, 0.0, 0.9, 0.9) == [Change.BEGAN]


@given(st.lists(st.floats(0, 1), max_size=400), st.floats(0.05, 1.0))
def test_changes_always_come_in_a_sensible_order(probabilities: list[float], silence: float):
    listener = Listener(TurnDetection(silence=silence))
    allowed = {
        None: {Change.BEGAN},
        Change.BEGAN: {Change.PAUSED, Change.ENDED},
        Change.PAUSED: {Change.RESUMED, Change.ENDED},
        Change.RESUMED: {Change.PAUSED, Change.ENDED},
        Change.ENDED: {Change.BEGAN},
    }
    last = None
    for p in probabilities:
        change = listener.hear(WINDOW, p)
        if change is not None:
            assert change in allowed[last]
            last = change
        if change is Change.ENDED:
            assert listener.take()
    assert listener.position == pytest.approx(len(probabilities) * SECONDS)
