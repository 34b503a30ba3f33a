"""The offline ear hears commands from real voices, admits what it does not know, and stops when told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from ovos_plugin_manager.utils.audio import AudioData

from agentvoicebox.config.errors import BadInput
from agentvoicebox.plugins import sphinx
from agentvoicebox.plugins.pool import EngineSpec, Pool
from agentvoicebox.plugins.sphinx import SphinxSTT

Say = Callable[..., tuple[bytes, int]]


@pytest.fixture(scope="module")
def ear() -> SphinxSTT:
    return SphinxSTT({})


def hear(ear: SphinxSTT, pcm: bytes, rate: int = 16_000) -> str:
    return ear.execute(AudioData(pcm, rate, 2), "en-US")


def test_every_word_of_the_grammar_has_a_pronunciation():
    wanted = sphinx.words(sphinx.grammar())
    assert len(wanted) > 150
    known = {line.split()[0].split("(")[0] for line in sphinx.dictionary(wanted)}
    assert wanted == known


def test_every_word_of_the_vocabulary_has_a_pronunciation():
    wanted = sphinx.vocabulary()
    assert wanted == {line.split()[0].split("(")[0] for line in sphinx.dictionary(wanted)}


@pytest.mark.parametrize(
    ("heard", "sentence"),
    [
        ("what time is it", "what time is it"),
        ("what is the time in", "what is the time"),
        ("stop the", "stop"),
        ("set a timer for twenty five minutes", "set a timer for twenty five minutes"),
        ("time what", ""),
        ("", ""),
    ],
)
def test_only_whole_sentences_of_the_grammar_count(heard: str, sentence: str):
    assert sphinx.complete(heard, sphinx.grammar()) == sentence


def test_similarity_goes_by_letters():
    assert sphinx.similarity("what time is it", "what time is it") == 1
    assert sphinx.similarity("a lot", "alot") == 1
    assert sphinx.similarity("hello", "xyz") == 0


@pytest.mark.parametrize("voice", ["slt", "rms", "awb"])
@pytest.mark.parametrize("text", ["what time is it", "what is the date", "hello world", "how are you"])
def test_demo_sentences_are_heard_in_three_voices(ear: SphinxSTT, say: Say, voice: str, text: str):
    assert hear(ear, *say(text, voice)) == text


def test_most_commands_are_heard_in_three_voices(ear: SphinxSTT, say: Say):
    texts = ("what day is it", "tell me the time", "count to five", "count to ten", "thank you", "who am i talking to")
    texts += ("what is your name", "set a timer for five minutes", "turn on the kitchen lights", "repeat that")
    spoken = [(text, voice) for text in texts for voice in ("slt", "rms", "awb")]
    right = [text for text, voice in spoken if hear(ear, *say(text, voice)) == text]
    assert len(right) >= 0.75 * len(spoken)


def test_what_is_not_in_the_grammar_is_not_forced_into_it(ear: SphinxSTT, say: Say):
    heard = hear(ear, *say("translate this sentence into spanish"))
    assert sphinx.complete(heard, sphinx.grammar()) == ""
    assert "translate" in heard


def test_other_rates_are_resampled(ear: SphinxSTT, say: Say):
    assert hear(ear, *say("hello world", "kal")) == "hello world", "kal speaks at 8 kHz"


def _noise(level: float) -> bytes:
    return (
        (np.random.default_rng(1).standard_normal(32_000) * level * 32_767)
        .clip(-32_768, 32_767)
        .astype("<i2")
        .tobytes()
    )


HUM = (np.sin(2 * np.pi * 50 * np.arange(32_000) / 16_000) * 3_000).astype("<i2").tobytes()


@pytest.mark.parametrize(
    "pcm",
    [b"", b"\0", bytes(2), bytes(64_000), bytes(101), _noise(0.0003), _noise(0.03), _noise(0.2), HUM],
    ids=["empty", "half a sample", "one", "silence", "odd", "faint", "noise", "loud noise", "hum"],
)
def test_without_speech_nothing_is_heard(ear: SphinxSTT, pcm: bytes):
    assert hear(ear, pcm) == ""


def test_what_was_heard_before_changes_nothing(ear: SphinxSTT, say: Say):
    first = hear(ear, *say("can you recommend a good restaurant nearby"))
    hear(ear, _noise(0.2))
    hear(ear, *say("the quick brown fox", "awb"))
    assert hear(ear, *say("can you recommend a good restaurant nearby")) == first


def test_only_english_is_heard(ear: SphinxSTT, say: Say):
    pcm, rate = say("hello world")
    with pytest.raises(BadInput, match="English") as caught:
        ear.execute(AudioData(pcm, rate, 2), "de-DE")
    assert caught.value.code == "unsupported_language"
    assert ear.execute(AudioData(pcm, rate, 2), "en-gb") == "hello world"
    assert ear.available_languages == {"en-US"}


def test_others_run_while_it_decodes(ear: SphinxSTT, say: Say):
    pcm, rate = say("can you recommend a good restaurant nearby")
    turns, done = 0, threading.Event()

    def listen() -> None:
        hear(ear, pcm, rate)
        done.set()

    thread = threading.Thread(target=listen)
    thread.start()
    while not done.is_set():
        turns += 1
        time.sleep(0.001)
    thread.join()
    assert turns > 10, "the interpreter's lock was free"


def test_several_at_once_do_not_mix(say: Say):
    ear = SphinxSTT({"instances": 2})
    texts = ["what time is it", "hello world", "count to five", "how are you"] * 2
    heard: dict[int, str] = {}
    spoken = [say(text) for text in texts]
    threads = [
        threading.Thread(target=lambda n=n: heard.__setitem__(n, hear(ear, *spoken[n]))) for n in range(len(texts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [heard[n] for n in range(len(texts))] == texts


async def test_cancelling_stops_it_and_leaves_it_usable(say: Say):
    pool, spec = Pool(threads=1), EngineSpec("stt", "agentvoicebox-stt-sphinx")
    try:
        await pool.load(spec)
        pcm, rate = say("tell me about the history of rome. " * 20)
        task = asyncio.create_task(pool.transcribe(spec, pcm, rate, "en-US"))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await pool.transcribe(spec, *say("hello world"), "en-US")).text == "hello world"
    finally:
        await asyncio.to_thread(pool.close)
