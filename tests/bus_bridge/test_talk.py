"""What a session remembers, and the phrases by which its user chooses who answers."""

from __future__ import annotations

import sys
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentvoicebox.bus_bridge import talk
from agentvoicebox.bus_bridge.talk import MOST_CHARACTERS, MOST_TURNS, Ask, Reset, Switch, Talk

NAMES = [(uuid.uuid4(), name) for name in ("Aida", "The Pirate", "Dr. Müller", "Jean-Luc", "Zoë")]
IDS = {name: persona_id for persona_id, name in NAMES}


def test_a_conversation_is_told_as_models_read_it():
    mine = Talk()
    assert mine.messages() == []
    mine.note(" what is a quasar ", "A bright galaxy.")
    mine.note("how far", "Billions of light years.")
    assert mine.messages() == [
        {"role": "user", "content": "what is a quasar"},
        {"role": "assistant", "content": "A bright galaxy."},
        {"role": "user", "content": "how far"},
        {"role": "assistant", "content": "Billions of light years."},
    ]
    mine.forget()
    assert mine.messages() == []


def test_what_was_not_said_or_not_answered_is_not_remembered():
    mine = Talk()
    mine.note("hello", " ")
    mine.note("", "Hello.")
    assert mine.messages() == []


@given(st.lists(st.tuples(st.text(max_size=5_000), st.text(max_size=5_000)), max_size=30))
def test_memory_has_a_bound_and_drops_the_oldest_in_pairs(turns: list[tuple[str, str]]):
    mine = Talk()
    for user, assistant in turns:
        mine.note(user, assistant)
    held = mine.messages()
    assert len(held) <= 2 * MOST_TURNS
    assert sum(len(message["content"]) for message in held) <= MOST_CHARACTERS
    assert [message["role"] for message in held] == ["user", "assistant"] * (len(held) // 2)
    kept = [(user.strip(), assistant.strip()) for user, assistant in turns if user.strip() and assistant.strip()]
    if kept:
        newest = held[-2:]
        assert [message["content"] for message in newest] == [text[: MOST_CHARACTERS // 2] for text in kept[-1]]


def test_ten_thousand_idle_sessions_cost_little():
    assert not hasattr(Talk(), "__dict__")
    assert sys.getsizeof(Talk()) <= 120


@pytest.mark.parametrize(
    ("language", "text", "name"),
    [
        ("en-US", "talk to aida", "Aida"),
        ("en-US", "Can I please speak with Aida?", "Aida"),
        ("en-GB", "let me speak with the pirate please", "The Pirate"),
        ("en", "I'd like to talk to Dr Muller now", "Dr. Müller"),
        ("en", "switch to Pirate", "The Pirate"),
        ("en", "Switch over to jean luc.", "Jean-Luc"),
        ("en", "talk to ZOE", "Zoë"),
        ("de-DE", "Kann ich bitte mit Doktor Müller sprechen", None),
        ("de-DE", "Ich möchte gern mit Dr. Müller sprechen", "Dr. Müller"),
        ("de-DE", "Sprich mit Aida bitte", "Aida"),
        ("de-DE", "Wechsle zu Zoe", "Zoë"),
        ("fr-FR", "Je voudrais parler à Jean-Luc, s'il vous plaît", "Jean-Luc"),
        ("fr-FR", "passe-moi Aïda", "Aida"),
        ("es-ES", "¿Puedo hablar con Aída, por favor?", "Aida"),
        ("es-ES", "cambia a Zoë", "Zoë"),
    ],
)
def test_a_persona_is_asked_for_by_name(language: str, text: str, name: str | None):
    expected = Switch(IDS[name], name) if name else None
    assert talk.is_command(text, language)
    assert talk.command(text, language, NAMES) == expected


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "Who am I talking to?"),
        ("en", "who am i speaking with right now"),
        ("de", "Mit wem spreche ich gerade?"),
        ("fr", "À qui est-ce que je parle ?"),
        ("es", "¿Con quién estoy hablando?"),
    ],
)
def test_a_user_may_ask_who_it_is(language: str, text: str):
    assert talk.command(text, language, NAMES) == Ask()


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "go back to the default persona"),
        ("en", "please switch back to the normal assistant"),
        ("en", "talk to the default persona"),
        ("de", "Wechsle zurück zur Standard-Persona"),
        ("fr", "reviens à la persona par défaut"),
        ("es", "vuelve al asistente predeterminado"),
    ],
)
def test_a_user_may_go_back_to_the_default(language: str, text: str):
    assert talk.command(text, language, NAMES) == Reset()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "talk to",
        "talk to my mother",
        "what do you think of aida",
        "how do I talk to aida about money without hurting her",
        "tell me who the pirate is",
        "switch to " + "aida " * 40,
        "\0",
        "¿",
    ],
)
def test_everything_else_goes_its_usual_way(text: str):
    assert talk.command(text, "en-US", NAMES) is None


def test_a_language_without_phrases_has_no_commands():
    assert talk.command("talk to aida", "ja-JP", NAMES) is None
    assert not talk.is_command("talk to aida", "")
    assert talk.sentence("asked", "ja-JP", "Aida") == talk.sentence("asked", "en", "Aida")


def test_a_name_that_was_not_quite_understood_counts_only_when_it_is_clear():
    aida, eda, adam, mark = ((uuid.uuid4(), name) for name in ("Aida", "Ada!", "Adam", "Mark"))
    assert talk.command("talk to ada", "en", [aida, mark]) == Switch(*aida)
    assert talk.command("talk to ayda", "en", [aida, mark]) == Switch(*aida)
    assert talk.command("talk to ada", "en", [aida, eda]) == Switch(*eda), "the same name is nearer"
    assert talk.command("talk to ada", "en", [aida, adam]) is None, "either may be meant"
    assert talk.command("switch to dark", "en", [mark]) is None, "names are heard from their beginning"
    assert talk.command("talk to marc", "en", [mark]) == Switch(*mark)
    assert talk.command("talk to al", "en", [(uuid.uuid4(), "Ali")]) is None, "too short to guess"


def test_two_names_that_are_one_to_the_ear_are_nobodys():
    twins = [(uuid.uuid4(), "Zoe"), (uuid.uuid4(), "Zoë")]
    assert talk.command("talk to zoe", "en", twins) is None


@pytest.mark.parametrize("language", ["en", "de", "fr", "es"])
@pytest.mark.parametrize("kind", ["switched", "asked", "resetted"])
def test_a_sentence_names_the_persona(language: str, kind: str):
    assert "{Ada}" in talk.sentence(kind, language, "{Ada}")


@given(st.text(max_size=200), st.sampled_from(["en", "de", "fr", "es"]))
def test_whatever_is_said_is_read_without_harm(text: str, language: str):
    assert isinstance(talk.command(text, language, NAMES), Switch | Ask | Reset | None)
