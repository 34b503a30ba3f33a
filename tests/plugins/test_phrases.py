"""Which phrases can wake a device."""

from __future__ import annotations

import pytest

from agentvoicebox.config.errors import BadInput
from agentvoicebox.plugins import phrases
from agentvoicebox.plugins.phrases import Phrase, check


@pytest.mark.parametrize(
    ("written", "kept", "model"),
    [
        ("Okay, Nabu!", "okay nabu", "micro/okay_nabu"),
        ("  ALEXA ", "alexa", "micro/alexa"),
        ("hey\tMycroft.", "hey mycroft", "micro/hey_mycroft"),
        ("hey-jarvis", "hey jarvis", "micro/hey_jarvis"),
        ("hey_jarvis", "hey jarvis", "micro/hey_jarvis"),
        ("\uff28\uff45\uff59 Computer", "hey computer", "sphinx"),
        ("Computer", "computer", "sphinx"),
        ("what\u2019s up doctor", "what's up doctor", "sphinx"),
        ("good morning to the house", "good morning to the house", "sphinx"),
    ],
)
def test_a_phrase_is_kept_as_it_is_spoken(written: str, kept: str, model: str):
    assert check(written) == Phrase(kept, model)
    assert check(kept) == Phrase(kept, model)


@pytest.mark.parametrize(
    ("written", "code", "named"),
    [
        ("", "phrase_invalid", "okay nabu"),
        ("?!", "phrase_invalid", "no letter"),
        ("room 101", "phrase_invalid", "101"),
        ("hey r2d2", "phrase_invalid", "r2d2"),
        ("hey xqzzt", "phrase_unpronounceable", "xqzzt"),
        ("\u043f\u0440\u0438\u0432\u0435\u0442 \u0434\u043e\u043c", "phrase_unpronounceable", "\u043f\u0440"),
        ("yo", "phrase_too_short", "yo"),
        ("stop", "phrase_too_short", "add a word"),
        ("a b", "phrase_too_short", "a b"),
        ("one two three four five six", "phrase_too_long", "5 words"),
        ("word " * 100, "phrase_too_long", "60"),
        ("hey " + "a" * 10_000, "phrase_too_long", "60"),
        ("hey (2)", "phrase_invalid", "2"),
    ],
)
def test_what_cannot_wake_a_device_is_said(written: str, code: str, named: str):
    with pytest.raises(BadInput, match=named) as refused:
        check(written)
    assert (refused.value.code, refused.value.param) == (code, "phrase")


def test_other_languages_have_the_models_that_were_made_for_them():
    assert check("okay nabu", "de-DE") == check("okay nabu", "fr") == check("okay nabu", "nl_NL")
    assert check("alexa", "en-GB").model == "micro/alexa"
    with pytest.raises(BadInput, match="“okay nabu”") as refused:
        check("hallo haus", "de-DE")
    assert refused.value.code == "phrase_language"
    with pytest.raises(BadInput, match="in English"):
        check("alexa", "ja-JP")


def test_phrases_with_a_model_of_their_own_are_listed():
    assert phrases.available() == ["alexa", "hey jarvis", "hey mycroft", "okay nabu"]
    for phrase in phrases.available():
        assert phrases.model_file(check(phrase).model).is_file()


@pytest.mark.parametrize("model", ["", "sphinx", "okay_nabu", "micro/", "micro/../../etc/passwd", "micro/hey_you"])
def test_a_model_that_is_not_shipped_is_refused(model: str):
    with pytest.raises(BadInput) as refused:
        phrases.model_file(model)
    assert refused.value.code == "model_unknown"


def test_a_word_may_be_said_in_several_ways():
    assert phrases.pronunciations("hello") == ["HH AH L OW", "HH EH L OW"]
    assert phrases.pronunciations("hel") == []
    assert phrases.pronunciations("'bout") == ["B AW T"], "the first of the dictionary"
    assert phrases.sounds("hello hal") == 7
