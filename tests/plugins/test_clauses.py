"""Sentences and clauses end where a speaker pauses, whatever the language and however the text arrives."""

from __future__ import annotations

import re
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentvoicebox.plugins.clauses import MOST_CLAUSE, MOST_SENTENCE, OPENERS, Sentences, clauses, speakable

SENTENCES = [
    ("en", ["Dr. Smith pays $3.14 at 10:30 a.m. for it.", "Really?", "Yes!", "Then he left."]),
    ("en", ["See https://a.example/b.c?d=1.2&e=f!", "Write to j.doe@mail.example.org, e.g. today.", "Bye."]),
    ("en", ["The U.S. has 1,000,000 of them.", "J. R. R. Tolkien, Ph.D. and Mr. T. know.", "It was 1990.", "Then"]),
    ("en", ["Wait... what?", "Well… maybe.", "Is it No. 5?", "No.", "It is p. 12."]),
    ("en", ['He said "Stop. Now!" and left.', "“Go on. Do it.”", "(Or not.)", "She did."]),
    ("en", ["Great!", "😀👍🏽 Let's go.", "👨‍👩‍👧 is a family."]),
    ("en", ["Here is what I found:", "1. Apples are red.", "2. Pears", "- one", "- two", "A last line\nthat goes on."]),
    ("en", ["One paragraph", "and another one."]),
    ("de", ["Am 21. November 2026, z. B. um 10.30 Uhr, kommt Hr. Dr. Weiß für 1.000,50 Euro.", "Gut."]),
    ("de-DE", ["»Gut. Schön«, sagte er.", "„Wirklich? Ja.“", "Dann ging er bzw. Sie."]),
    ("fr", ["« Oui ! » dit-il.", "Comment ça va ?", "M. Dupont arrive à 10 h 30, p. ex. demain.", "Bien !"]),
    ("es", ["¿Qué tal?", "¡Muy bien!", "El Sr. Pérez tiene 3,14 euros.", "¿Y Ud. también?"]),
    ("it", ["Il sig. Rossi arriva.", "Va bene?", "Certo!"]),
    ("pt-BR", ["O Sr. Silva chegou.", "Tudo bem?", "Sim."]),
    ("hi", ["नमस्ते।", "आप कैसे हैं?", "डॉ. शर्मा 3.5 बजे आए।", "ठीक है।"]),
    ("ja", ["こんにちは。", "「元気です。はい」と言った。", "そうですか？", "はい！"]),
    ("zh-CN", ["你好！", "今天是2026年11月21日。", "“很好。谢谢。”", "再见。"]),
    ("xx", ["One.", "Two."]),
]


def joined(language: str, sentences: list[str]) -> str:
    if language[:2] in ("ja", "zh"):
        return "".join(sentences)
    text = " ".join(sentences)
    for mark in ("1. Apples", "2. Pears", "- one", "- two", "A last"):
        text = text.replace(f" {mark}", f"\n{mark}")
    return text.replace("paragraph and", "paragraph\n\nand")


def fed(language: str, pieces: list[str]) -> list[str]:
    sentences = Sentences(language)
    found = [sentence for piece in pieces for sentence in sentences.feed(piece)]
    return found + sentences.end()


def bare(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(("language", "sentences"), SENTENCES)
def test_sentences_end_where_they_end(language: str, sentences: list[str]):
    text = joined(language, sentences)
    assert fed(language, [text]) == sentences
    assert fed(language, list(text)) == sentences


@pytest.mark.parametrize(
    ("said", "leaves"),
    [
        ("It is ten. ", []),
        ("It is ten. S", ["It is ten."]),
        ("Stop! N", ["Stop!"]),
        ("I saw Dr. Smith", []),
        ("It is 3. 5", []),
        ("It costs 3.", []),
        ("好。是", ["好。"]),
        ('He said "Stop. Now', []),
    ],
)
def test_a_sentence_leaves_when_it_surely_ended(said: str, leaves: list[str]):
    assert Sentences("de" if "3. 5" in said else "en").feed(said) == leaves


def test_after_the_end_it_begins_anew():
    sentences = Sentences("en")
    sentences.feed("```\ncode")
    assert sentences.end() == []
    assert sentences.feed("One. Two") == ["One."]
    assert sentences.end() == ["Two"]


def test_code_is_left_out_however_it_arrives():
    text = "Try this:\n```python\nprint('A. B')\nx = '``'\n```\nThen run it. ```"
    assert fed("en", [text]) == fed("en", list(text)) == ["Try this:", "Then run it."]


def test_a_sentence_without_end_is_cut_at_a_space():
    words = [f"word{number}" for number in range(300)]
    found = fed("en", [" ".join(words)])
    assert max(map(len, found)) <= MOST_SENTENCE
    assert " ".join(found).split() == words
    assert max(map(len, fed("en", ["x" * 5_000]))) <= MOST_SENTENCE
    # It does not wait, and keep, for ever.
    assert len(Sentences("en").feed(" ".join(words))) > 2


fragments = st.sampled_from(
    [*"abcXYZ12 \n.!?…,;:\"'“”«»()-–*_`#।。、！「」あ你", "Dr. ", "e.g. ", "3.14", "10:30 ", "21. ", "U.S. ", "Smith ",
     "https://a.b/c?d=e. ", "x@y.zz ", "...", "😀", "👨‍👩‍👧", "é", "\u0301", "\n\n", "\n- ", "```", "\n```\n",
     "a long word after another ", "and so on, but then ", "word " * 30]
)  # fmt: skip
texts = st.lists(fragments, max_size=60).map("".join)
plain = texts.filter(lambda text: "```" not in text)
languages = st.sampled_from([*OPENERS, "de", "ko", "tlh"])


@given(languages, texts, st.data())
@settings(max_examples=150, deadline=None)
def test_any_cutting_gives_the_same_sentences(language: str, text: str, data: st.DataObject):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    pieces = [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]
    whole = fed(language, [text])
    assert fed(language, pieces) == whole
    assert fed(language, list(text)) == whole


@given(languages, plain)
@settings(max_examples=150, deadline=None)
def test_sentences_lose_and_double_nothing(language: str, text: str):
    found = fed(language, [text])
    assert bare("".join(found)) == bare(text)
    assert all(sentence == sentence.strip() and 0 < len(sentence) <= MOST_SENTENCE for sentence in found)


@given(languages, texts)
@settings(max_examples=150, deadline=None)
def test_clauses_lose_and_double_nothing(language: str, text: str):
    found = clauses(text, language)
    assert bare("".join(found)) == bare(text)
    says = [bool(re.search(r"[^\W_]", clause)) for clause in found]
    assert all(says) or len(found) == 1
    assert all(len(clause) > 0 for clause in found)


@given(st.lists(st.sampled_from(["word", "and", "Dr. Smith", "3.14", "yes,", "so.", "1,000 km", "(well)"]), min_size=1))
@settings(max_examples=100, deadline=None)
def test_clauses_keep_words_whole(words: list[str]):
    assert " ".join(clauses(" ".join(words), "en")) == " ".join(words)


@pytest.mark.parametrize(
    ("language", "text", "first"),
    [
        ("en", "Sure, I can help you with that.", "Sure,"),
        ("en", "Of course! The nearest pharmacy is open until eight.", "Of course!"),
        ("en", "In the morning, there will be some rain in the north.", "In the morning,"),
        ("en", "The weather in Berlin will be mild tomorrow and dry.", "The weather"),
        ("en", "Dr. Smith and Mr. Jones are waiting for you in the hall.", "Dr. Smith"),
        ("en", "Hello, world.", "Hello, world."),
        ("de", "Das Wetter wird morgen schön und am Abend kommt Regen.", "Das Wetter"),
        ("fr", "Bien sûr ! Je vous aide avec plaisir dès demain matin.", "Bien sûr !"),
        ("es", "¡Claro! La farmacia más cercana está abierta ahora.", "¡Claro!"),
        ("hi", "ठीक है, मैं कल सुबह आपकी मदद करूँगा और फिर बताऊँगा।", "ठीक है,"),
        ("ja", "はい、今日の天気は晴れで、気温は二十度です。", "はい、"),
        ("zh", "好的，今天天气很好，最高气温二十一度，适合出门。", "好的，"),
    ],
)
def test_the_first_clause_is_short(language: str, text: str, first: str):
    found = clauses(text, language)
    assert found[0] == first
    assert bare("".join(found)) == bare(text)


@pytest.mark.parametrize(
    ("language", "whole"),
    [
        ("en", "3.14 percent"), ("en", "1,000,000 people"), ("en", "10:30 a.m."), ("en", "1.5 km"), ("en", "Mr. Jones"),
        ("en", "the U.S. Army"), ("en", "J. R. R. Tolkien"), ("en", "https://a.example/b,c;d:e"),
        ("en", "me@mail.example"), ("en", "wait... what"), ("en", '"yes, we can, and more"'), ("en", "👨‍👩‍👧"),
        ("de", "21.11.2026"), ("de", "21. November 2026"), ("de", "z. B."), ("fr", "« oui, bien sûr »"),
        ("fr", "10 h 30"), ("es", "Sr. Pérez"), ("en", "5 o'clock"),
    ],
)  # fmt: skip
def test_clauses_never_cut_inside(language: str, whole: str):
    for before in range(0, 60, 5):
        filler = "so " * (before // 3)
        text = f"{filler}{whole} " + "and later, when the day was over, they went home again. " * 4
        assert sum(whole in clause for clause in clauses(text, language)) == 1


def test_clauses_grow_with_what_is_heard_meanwhile():
    lengths = [len(clause) for clause in clauses("Then they went home again, and it was late. " * 60, "en")]
    assert lengths[0] <= 40
    assert max(lengths) > 200
    assert max(lengths) <= MOST_CLAUSE
    assert all(
        later <= max(40, 2 * longest) for longest, later in zip(accumulate(lengths, max), lengths[1:], strict=False)
    )


@pytest.mark.parametrize("text", ["", "  \n"])
def test_nothing_has_no_clauses(text: str):
    assert clauses(text, "en") == []
    assert fed("en", [text]) == []


def test_marks_alone_stay_together():
    assert clauses("?! … — 😀", "en") == ["?! … — 😀"]


@pytest.mark.parametrize(
    ("unit", "size"),
    [
        ("word and more, ", 1_000_000), (".", 1_000_000), ("a", 200_000), ("! ", 200_000), (" ", 200_000),
        ('"', 200_000), ("「あ。", 200_000), ("Dr. ", 200_000), ("[", 200_000), ("| ", 200_000), ("*a ", 200_000),
        ("a\u0301", 200_000), ("7 ", 200_000),
    ],
)  # fmt: skip
def test_a_megabyte_ends(unit: str, size: int):
    # A scan that begins again for every character would take hours; the test would not come back.
    text = unit * (size // len(unit))
    assert bare("".join(clauses(text, "en"))) == bare(text)
    assert bare("".join(fed("en", [text]))) == bare(text)
    assert len(speakable(text)) <= len(text)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("**Note:** this is *very* __important__ and ~~wrong~~.", "Note: this is very important and wrong."),
        ("## A heading\n- one\n* two\n1. three", "A heading\none\ntwo\n1. three"),
        ("Use `avb up` and [read this](https://a.example/b).", "Use avb up and read this."),
        ("See https://www.example.com/a/b?c=d for more.", "See example.com for more."),
        ("![A cat](cat.png) sits", "A cat sits"),
        ("```python\nprint(1)\n```\nDone.", "Done."),
        ("| a | b |\n|---|:-:|\n| 1 | 2 |", "a, b\n1, 2"),
        ("> quoted\n\n---\n", "quoted"),
        ("- [x] done", "done"),
        ("2*3 is 6, snake_case, 5 * 4, -3", "2*3 is 6, snake_case, 5 * 4, -3"),
        ("Great! 😀👍🏽", "Great!"),
        ("line<br>break", "line break"),
        ("a < b and c > d", "a < b and c > d"),
        ("***", ""),
        ("😀", ""),
        ("", ""),
    ],
)
def test_markdown_becomes_speech(written: str, said: str):
    assert speakable(written) == said


@given(plain)
@settings(max_examples=100, deadline=None)
def test_what_is_speakable_stays_so(text: str):
    said = speakable(text)
    assert said == "" or re.search(r"[^\W_]", said)
    assert "😀" not in said
