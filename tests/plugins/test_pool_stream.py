"""Speech in parts: the first one at once, nothing for nobody, and what was said lately for nothing."""

from __future__ import annotations

import asyncio
import threading
import wave
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any, ClassVar

import pytest
from ovos_plugin_manager.templates.tts import TTS

from agentvoicebox.config.errors import AvbError, BadInput, Unavailable
from agentvoicebox.plugins.breaker import FAILURES
from agentvoicebox.plugins.pool import EngineSpec, Pool, Speech, Voice, cancelled, engine
from agentvoicebox.plugins.spoken import Spoken

PARTS, BROKEN, PLAIN = (EngineSpec("tts", name) for name in ("parts", "broken", "plain"))
FLITE = EngineSpec("tts", "agentvoicebox-tts-flite")


class Parts(TTS):
    """One part of speech per word, when the test lets it."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    made: ClassVar[list[str]] = []
    gate: ClassVar[threading.Semaphore]
    ended: ClassVar[threading.Event]

    def get_tts(self, sentence: str, wav_file: str, lang: str | None = None) -> tuple[str, None]:
        raise AssertionError("it can stream")

    def voice_list(self) -> list[Voice]:
        return [Voice("anna", "de-DE", "female"), Voice("bob", "en-US", "male")]

    @property
    def voices(self) -> set[str]:
        return {"anna", "bob"}

    def stream(self, sentence: str, lang: str, voice: str | None, speed: float) -> Iterator[tuple[bytes, int]]:
        Parts.calls.append((sentence, lang, voice, speed))
        try:
            for word in sentence.split():
                while not Parts.gate.acquire(timeout=0.005):
                    if cancelled():
                        return
                if word == "break":
                    raise RuntimeError("broken")
                if word == "refuse":
                    raise BadInput("no", code="unknown_voice")
                Parts.made.append(word)
                yield word.encode() * 2, 8_000 if word == "low" else 16_000
        finally:
            Parts.ended.set()


class Broken(Parts):
    """Gives what is no audio."""

    def stream(self, sentence: str, lang: str, voice: str | None, speed: float) -> Iterator[tuple[bytes, int]]:
        yield b"\0\0\0", 16_000


class Plain(TTS):
    """Speaks in one part only."""

    def get_tts(self, sentence: str, wav_file: str, lang: str | None = None) -> tuple[str, None]:
        with wave.open(wav_file, "wb") as wav:
            wav.setparams((1, 2, 16_000, 0, "NONE", ""))
            wav.writeframes(b"\1\0" * 160)
        return wav_file, None


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    found, real = {"parts": Parts, "broken": Broken, "plain": Plain}, engine.plugin_class
    monkeypatch.setattr(engine, "plugin_class", lambda kind, name: found.get(name) or real(kind, name))
    monkeypatch.setattr("agentvoicebox.plugins.pool.installed", lambda kind: frozenset(found))
    Parts.calls, Parts.made = [], []
    Parts.gate, Parts.ended = threading.Semaphore(0), threading.Event()


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    made = Pool(spoken=Spoken())
    yield made
    Parts.gate.release(10_000)
    await asyncio.to_thread(made.close)


async def words(stream: AsyncIterator[Speech]) -> list[str]:
    return [part.pcm[: len(part.pcm) // 2].decode() async for part in stream]


async def test_a_part_comes_as_soon_as_it_is_made(pool: Pool):
    async with aclosing(pool.stream(PARTS, "one two three", "en-US", "bob", 1.5)) as stream:
        for count, word in enumerate(("one", "two", "three"), 1):
            Parts.gate.release()
            assert await anext(stream) == Speech(word.encode() * 2, 16_000, "parts")
            assert len(Parts.made) == count, "the next one is not even begun"
        assert await anext(stream, None) is None
    assert Parts.calls == [("one two three", "en-US", "bob", 1.5)]


async def test_an_engine_without_parts_gives_one(pool: Pool):
    assert [part.seconds async for part in pool.stream(PLAIN, "Good day.", "en-US", "any")] == [0.01]
    assert [part.engine async for part in pool.stream(PLAIN, "Good day.", "en-US")] == ["plain"]


async def test_who_stops_listening_stops_the_work_at_once(pool: Pool):
    async with aclosing(pool.stream(PARTS, "one two three", "en-US")) as stream:
        Parts.gate.release()
        await anext(stream)
    assert await asyncio.to_thread(Parts.ended.wait, 30)
    assert Parts.made == ["one"]
    Parts.gate.release()
    assert await words(pool.stream(PARTS, "four", "en-US")) == ["four"], "its place is free again"


async def test_who_listens_slowly_keeps_the_engine_from_nobody(pool: Pool):
    Parts.gate.release(101)
    async with aclosing(pool.stream(PARTS, "word " * 100, "en-US", tenant="slow")) as stream:
        await anext(stream)
        assert await words(pool.stream(PARTS, "other", "en-US", tenant="quick")) == ["other"]
        assert len(await words(stream)) == 99


async def test_the_next_engine_speaks_unless_the_first_has_begun(pool: Pool):
    Parts.gate.release(100)
    assert [part.engine async for part in pool.stream((PARTS, PLAIN), "break it", "en-US")] == ["plain"]
    assert [part.engine async for part in pool.stream((BROKEN, PLAIN), "x", "en-US")] == ["plain"]
    stream = pool.stream((PARTS, PLAIN), "one break", "en-US")
    assert (await anext(stream)).engine == "parts"
    with pytest.raises(Unavailable) as broken:
        await anext(stream)
    assert broken.value.code == "engine_failed"
    assert (await pool.speak((PARTS, PLAIN), "refuse", "en-US")).engine == "plain"
    with pytest.raises(BadInput) as refused:
        await pool.speak((PARTS, BROKEN), "refuse", "en-US")
    assert refused.value.code == "unknown_voice", "nobody has spoken"


async def test_each_part_has_its_deadline_and_the_whole_of_speak_one(pool: Pool, deadlines: Any):
    Parts.gate.release()
    stream = pool.stream(PARTS, "one two", "en-US", deadline=20)
    assert (await anext(stream)).engine == "parts"
    second = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)  # it waits
    deadlines.end(20)
    with pytest.raises(Unavailable) as late:
        await second
    assert await asyncio.to_thread(Parts.ended.wait, 30)
    Parts.gate.release()
    speech = asyncio.create_task(pool.speak(PARTS, "one two", "en-US", deadline=20))
    async with asyncio.timeout(30):
        while Parts.made != ["one", "one"]:
            await asyncio.sleep(0.001)
    deadlines.end(20)
    with pytest.raises(Unavailable) as whole:
        await speech
    assert (late.value.code, whole.value.code) == ("engine_timeout", "engine_timeout")


async def test_the_same_words_cost_nothing_the_second_time_but_only_to_the_same_tenant(pool: Pool):
    Parts.gate.release(100)
    for tenant in ("a", "a", "b", "a"):
        assert await words(pool.stream(PARTS, "one two", "en-US", tenant=tenant)) == ["one", "two"]
    assert len(Parts.calls) == 2
    await pool.speak(PARTS, "one two", "en-US", "bob", tenant="a")
    await pool.speak(PARTS, "one two", "en-US", "bob", 2.0, tenant="a")
    await pool.speak(PARTS, "one two", "de-DE", "bob", 2.0, tenant="a")
    assert len(Parts.calls) == 5
    (metrics,) = pool.metrics()
    assert sum(metrics.requests.values()) == 7, "each use is counted"


async def test_what_was_not_said_to_its_end_is_not_kept(pool: Pool):
    Parts.gate.release()
    async with aclosing(pool.stream(PARTS, "one two", "en-US")) as stream:
        await anext(stream)
    assert await asyncio.to_thread(Parts.ended.wait, 30)
    Parts.gate.release(2)
    with pytest.raises(AvbError):
        await pool.speak(PARTS, "three break", "en-US")
    Parts.gate.release(3)
    assert await words(pool.stream(PARTS, "one two", "en-US")) == ["one", "two"]
    assert len(Parts.calls) == 3


async def test_the_whole_has_one_rate(pool: Pool):
    Parts.gate.release(3)
    speech = await pool.speak(PARTS, "high low high", "en-US")
    assert (speech.rate, len(speech.pcm)) == (16_000, 8 + 12 + 8)


async def test_nothing_to_say_is_silence_from_no_engine(pool: Pool):
    for text in ("", "  ", "?!…", "\n"):
        assert set((await pool.speak(PARTS, text, "en-US")).pcm) == {0}
    assert pool.metrics() == []
    with pytest.raises(BadInput) as caught:
        await pool.speak(PARTS, "one", "en-US", speed=float("nan"))
    assert caught.value.code == "bad_speed"


async def test_a_voice_it_does_not_have_is_its_own_choice(pool: Pool):
    Parts.gate.release(2)
    await pool.speak(PARTS, "one", "en-US", "carol")
    await pool.speak(PARTS, "one", "en-US", "auto")
    assert [call[2] for call in Parts.calls] == [None, None]


async def test_a_voice_of_another_language_is_the_engines_own_choice_where_it_has_one_of_that_language(pool: Pool):
    Parts.gate.release(5)
    for language in ("en-GB", "auto", "fr-FR", "de-DE"):
        await pool.speak(PARTS, "one", language, "bob")
    assert [call[2] for call in Parts.calls] == ["bob", "bob", "bob", None]


async def test_that_an_engine_tells_its_voices_says_nothing_of_whether_it_speaks(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
):
    Parts.gate.release(100)
    for _ in range(FAILURES):
        with pytest.raises(Unavailable):
            await pool.speak(PARTS, "break", "en-US")
    assert await pool.voices(PARTS), "also while it is left alone"
    monkeypatch.setattr("agentvoicebox.plugins.breaker.REST", 0.0)
    assert await pool.voices(PARTS)
    assert pool._lines[PARTS].breaker.state == "half_open"


async def test_voices_are_listed_with_what_is_known_of_them(pool: Pool):
    assert await pool.voices(PARTS) == [Voice("anna", "de-DE", "female"), Voice("bob", "en-US", "male")]
    assert Voice("slt", "en-US") in await pool.voices(FLITE)
    assert await pool.voices(PLAIN) == []


async def test_what_is_counted(pool: Pool):
    Parts.gate.release(10)
    await pool.speak(PARTS, "one", "de-DE", "anna")
    await pool.speak(PARTS, "one", "de-DE", "my own voice")
    with pytest.raises(Unavailable):
        await pool.speak(PARTS, "break", "en-US")
    (metrics,) = pool.metrics()
    assert (metrics.kind, metrics.plugin, metrics.model) == ("tts", "parts", "")
    assert metrics.requests == {("anna", "de"): 1, ("other", "de"): 1, ("auto", "en"): 1}
    assert metrics.failures == {"engine_failed": 1}
    assert metrics.characters == {"anna": 3, "other": 3}
    assert {voice: seconds.count for voice, seconds in metrics.seconds.items()} == {"anna": 1, "other": 1}
    assert metrics.audio.count == 2
    assert (metrics.loaded, metrics.waiting, metrics.open) == (1, 0, 0)
    async with asyncio.timeout(30):
        while pool.metrics()[0].working:
            await asyncio.sleep(0)


async def test_closing_within_the_loop_waits_for_speech_that_nobody_takes_meanwhile():
    pool = Pool()
    Parts.gate.release(1)
    stream = pool.stream(PARTS, "word " * 50, "en-US")
    await anext(stream)
    Parts.gate.release(49)
    pool.close()
    assert len(Parts.made) == 50
    assert len(await words(stream)) == 49, "what was begun is said to its end"
