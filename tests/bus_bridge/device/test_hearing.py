"""What is heard in a request, and when it is worth recognising early."""

from __future__ import annotations

from agentvoicebox.bus_bridge.device.hearing import Hearing

WINDOW = 512
SECONDS = WINDOW / 16_000


def hear(hearing: Hearing, *probabilities: float) -> None:
    for probability in probabilities:
        hearing.audio += bytes(2 * WINDOW)
        assert len(hearing.fresh(2.0)) == 2 * WINDOW
        hearing.judge([probability])


def test_silence_is_no_pause_and_a_click_is_no_speech():
    hearing = Hearing(WINDOW)
    hear(hearing, *[0.1] * 20, 0.9, *[0.1] * 20)
    assert not hearing.pause
    assert hearing.spoken == 0


def test_a_pause_comes_after_speech_and_ends_with_it():
    hearing = Hearing(WINDOW)
    hear(hearing, 0.1, 0.9, 0.9, 0.9, 0.1)
    assert not hearing.pause, "between two words"
    hear(hearing, *[0.1] * 5)
    before = hearing.pause
    assert before
    hear(hearing, 0.4)
    assert not hearing.pause, "in doubt somebody speaks"
    assert abs(hearing.spoken - 10 * SECONDS) < 1e-6
    hear(hearing, *[0.1] * 6)
    assert hearing.pause not in (0, before), "who looks only now sees that it is another one"


def test_what_fills_no_window_is_judged_at_the_end():
    hearing = Hearing(WINDOW)
    hearing.audio += bytes(3 * WINDOW)
    assert len(hearing.fresh(2.0)) == 2 * WINDOW
    hearing.judge([0.1])
    assert hearing.fresh(2.0) == b""
    assert len(hearing.rest()) == 2 * WINDOW
    hearing.judge([0.1])
    assert hearing.rest() == b""


def test_much_at_once_is_judged_piece_by_piece():
    hearing = Hearing(WINDOW)
    hearing.audio += bytes(10 * 32_000)
    sizes = []
    while windows := hearing.fresh(2.0):
        sizes.append(len(windows) / 32_000)
        hearing.judge([0.0] * (len(windows) // (2 * WINDOW)))
    assert max(sizes) <= 2.0
    assert sum(sizes) + len(hearing.rest()) / 32_000 >= 10.0


def test_guesses_that_agree_are_told_as_all_there_is_so_far():
    hearing = Hearing(WINDOW, partials=True)
    assert hearing.guessed("what is") is None
    assert hearing.guessed("what is the weather") == "what is"
    assert hearing.guessed(None) is None
    assert hearing.guessed("what is the weather in") == "what is the weather"
    assert hearing.guessed("what is the weather in") == "what is the weather in"
