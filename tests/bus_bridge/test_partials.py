"""Partial transcripts: told early, and only what will probably stand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentvoicebox.bus_bridge.partials import FIRST, Partials


def test_what_two_guesses_agree_on_is_told_once():
    partials = Partials()
    assert partials.hear("what") == ""
    assert partials.hear("what time") == "what"
    assert partials.hear("what time is") == " time"
    assert partials.hear("what time is it in") == " is"


def test_a_word_that_changes_is_waited_for():
    partials = Partials()
    partials.hear("turn the lie")
    assert partials.hear("turn the light") == "turn the"
    assert partials.hear("turn the lights on") == ""
    assert partials.hear("turn the lights on please") == " lights on"


def test_case_and_punctuation_are_no_disagreement():
    partials = Partials()
    partials.hear("Hello.")
    assert partials.hear("hello, how") == "hello,"


def test_what_has_been_told_is_not_taken_back():
    partials = Partials()
    partials.hear("a b c")
    assert partials.hear("a b c") == "a b c"
    assert partials.hear("x") == ""
    assert partials.hear("x y") == ""


def test_characters_are_told_where_no_spaces_part_words():
    partials = Partials()
    assert partials.hear("今天天") == ""
    assert partials.hear("今天天气怎么") == "今天天"
    assert partials.hear("今天天气怎么样？") == "气怎么"
    partials = Partials()
    partials.hear("こんにちは、東京の")
    assert partials.hear("こんにちは、東京は") == "こんにちは、東京"
    assert partials.hear("こんにちは。東京は晴れ") == "は"


def test_words_between_characters_stay_whole_and_keep_their_spaces():
    partials = Partials()
    partials.hear("打开 kitchen lig")
    assert partials.hear("打开 kitchen lights的") == "打开 kitchen"
    assert partials.hear("打开 kitchen lights的灯") == " lights的"


def test_marks_stay_with_their_letters():
    partials = Partials()
    partials.hear("ที่นี่")
    assert partials.hear("ที่นั่") == "ที่", "a guess that changes a vowel changes the letter below it"
    partials = Partials()
    partials.hear("राम की")
    assert partials.hear("राम का घर") == "राम"


def test_guesses_become_rarer_as_the_utterance_grows():
    partials, guessed_at = Partials(), []
    for step in range(1, 600):
        if partials.due(step / 10):
            guessed_at.append(step / 10)
            partials.hear("")
    assert guessed_at[0] == FIRST
    # Each hears the whole utterance again: all of them together cost a few times the last one, not its square.
    assert sum(guessed_at) < 6 * guessed_at[-1]


def test_no_second_guess_while_one_is_under_way():
    partials = Partials()
    assert partials.due(1.0)
    assert not partials.due(30.0)
    partials.miss()
    assert partials.due(30.0)


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c"]), max_size=6), max_size=12))
def test_told_words_only_ever_grow(guesses: list[list[str]]):
    partials, told = Partials(), ""
    for words in guesses:
        fresh = partials.hear(" ".join(words))
        assert not fresh or not told or fresh.startswith(" ")
        told += fresh
        assert told.count("  ") == 0
    longest = max((len(words) for words in guesses), default=0)
    assert len(told.split()) <= longest
