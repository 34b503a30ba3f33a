"""Kokoro's voice on a model built here, through the real kokoro-onnx."""

from __future__ import annotations

import asyncio
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.plugins.clauses import OPENERS, clauses
from agentvoicebox.plugins.kokoro import LANGUAGES, MODEL, RATE, VOICES, KokoroTTS, sample
from agentvoicebox.plugins.pool import EngineSpec, Pool
from agentvoicebox.plugins.pool.engine import Caller
from agentvoicebox.plugins.pool.runner import Voice

REPLY = "The weather will be mild, with some clouds in the morning. The highest temperature is 21.5 degrees, I think."


@pytest.fixture(scope="module")
def engine(tiny_kokoro: Path) -> KokoroTTS:
    return KokoroTTS({"model": str(tiny_kokoro)})


@pytest.fixture
def said(engine: KokoroTTS, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The phonemes of each clause that the model is given; no opener is kept before or after."""
    found: list[str] = []
    create = engine._kokoro.create

    def spy(phonemes: str, *rest: object, **more: object) -> object:
        found.append(phonemes)
        return create(phonemes, *rest, **more)

    monkeypatch.setattr(engine._kokoro, "create", spy)
    engine._openers.clear()
    yield found
    engine._openers.clear()


def streamed(engine: KokoroTTS, text: str, **choices: object) -> list[np.ndarray]:
    chunks = list(engine.stream(text, **choices))
    assert {rate for _, rate in chunks} == {RATE}
    return [np.frombuffer(pcm, "<i2") for pcm, _ in chunks]


def heard(engine: KokoroTTS, path: Path, text: str, **choices: object) -> np.ndarray:
    engine.get_tts(text, str(path), **choices)
    with wave.open(str(path)) as wav:
        assert (wav.getnchannels(), wav.getsampwidth(), wav.getframerate()) == (1, 2, 24_000)
        return np.frombuffer(wav.readframes(wav.getnframes()), "<i2")


def test_voices_differ_and_share_one_model(engine: KokoroTTS, tmp_path: Path):
    one, other = (heard(engine, tmp_path / "a.wav", "Hello world.", voice=v) for v in ("am_onyx", "af_sarah"))
    assert len(one) > 2_400
    assert not np.array_equal(one[:2_000], other[:2_000])


def test_speed_shortens(engine: KokoroTTS, tmp_path: Path):
    slow, fast = (len(heard(engine, tmp_path / "a.wav", "One two three.", speed=s)) for s in (0.5, 2.0))
    assert slow > 2 * fast


@pytest.mark.parametrize("text", ["", "  ", "?!…", "—", "\n\t", "___"])
def test_nothing_to_say_is_silence(engine: KokoroTTS, tmp_path: Path, text: str):
    audio = heard(engine, tmp_path / "a.wav", text)
    assert audio.size
    assert not audio.any()


@pytest.mark.parametrize(
    ("choices", "code"),
    [
        ({"voice": "nobody"}, "unknown_voice"),
        ({"speed": 2.1}, "bad_speed"),
        ({"speed": 0.4}, "bad_speed"),
        ({"lang": "de-DE"}, "unsupported_language"),
    ],
)
def test_what_it_cannot_do_is_said(engine: KokoroTTS, tmp_path: Path, choices: dict[str, object], code: str):
    with pytest.raises(BadInput) as caught:
        engine.get_tts("Hello.", str(tmp_path / "a.wav"), **choices)
    assert caught.value.code == code


def test_without_a_model_the_remedy_is_named(tmp_path: Path):
    with pytest.raises(Unavailable, match="avb models pull kokoro"):
        KokoroTTS({"model": str(tmp_path)})


def test_it_speaks_clause_by_clause(engine: KokoroTTS, tmp_path: Path, said: list[str]):
    parts = engine.stream(REPLY)
    assert said == []
    first, _ = next(parts)
    assert len(said) == 1
    rest = b"".join(pcm for pcm, _ in parts)
    assert len(said) == len(clauses(REPLY, "en-US")) > 2
    assert len(rest) > 3 * len(first)
    assert np.array_equal(heard(engine, tmp_path / "a.wav", REPLY), np.frombuffer(first + rest, "<i2"))


def test_clauses_join_without_clicks_or_piled_up_silence(engine: KokoroTTS):
    chunks = streamed(engine, REPLY)
    ends = [clause[-1] in ".," and (0.25 if clause[-1] == "." else 0.1) for clause in clauses(REPLY, "en-US")]
    for chunk, pause in zip(chunks, [0, *ends], strict=False):
        loud = np.flatnonzero(abs(chunk) > 500)
        # The pause stands before the clause and nothing after it; sound rises from zero and falls to it.
        assert loud[0] / RATE == pytest.approx(float(pause), abs=0.005)
        assert (len(chunk) - loud[-1]) / RATE < 0.005
        assert abs(int(chunk[-1])) < 500
        assert abs(int(chunk[int(pause * RATE)])) < 500


def test_sound_begins_and_ends_at_zero(engine: KokoroTTS, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine._kokoro, "create", lambda *_, **__: (np.full(2_400, 0.5, np.float32), RATE))
    for chunk in streamed(engine, REPLY):
        sound = chunk[np.flatnonzero(chunk)[0] - 1 :].astype(int)
        assert sound[-1] == 0
        assert sound.max() == int(0.5 * 32_767)
        assert abs(np.diff(sound)).max() < 200


def test_pauses_follow_the_speed(engine: KokoroTTS):
    slow, fast = (
        [len(chunk) for chunk in streamed(engine, "One two three, four five. Six.", speed=s)] for s in (0.5, 2)
    )
    assert len(slow) == len(fast)
    assert sum(slow) == pytest.approx(4 * sum(fast), rel=0.02)


def test_between_two_clauses_it_looks_whether_anybody_listens(engine: KokoroTTS, said: list[str]):
    caller = Caller()
    parts = engine.stream(REPLY)
    assert caller.run(lambda: next(parts))
    caller.leave()
    assert caller.run(lambda: list(parts)) == []
    assert len(said) == 1


def test_a_clause_nobody_waits_for_is_not_finished(engine: KokoroTTS):
    caller = Caller()
    caller.leave()
    assert not caller.run(lambda: engine._say("Nobody hears this.", "am_onyx", 1.0)).size
    assert engine._say("Somebody hears this.", "am_onyx", 1.0).size


def test_openers_are_kept_for_their_voice_and_speed(engine: KokoroTTS, said: list[str]):
    engine.warm("af_sarah", 1.5)
    assert len(said) == len(OPENERS["en"])
    said.clear()
    text = "Of course! The pharmacy closes at eight."
    kept = streamed(engine, text, voice="af_sarah", speed=1.5)
    assert len(said) == len(kept) - 1
    engine._openers.clear()
    assert all(map(np.array_equal, streamed(engine, text, voice="af_sarah", speed=1.5), kept))
    said.clear()
    for choices in ({"voice": "am_onyx", "speed": 1.5}, {"voice": "af_sarah", "speed": 1.0}):
        assert len(streamed(engine, text, **choices)) == len(said)
        said.clear()


def test_nobodys_wording_is_kept(engine: KokoroTTS, said: list[str]):
    streamed(engine, "Sure, your password is swordfish. Okay, and your balance is low.")
    streamed(engine, REPLY)
    assert {text for _, _, text in engine._openers} == {"Sure,"}


def test_openers_of_endless_speeds_take_no_endless_room(engine: KokoroTTS, said: list[str]):
    for number in range(600):
        next(iter(engine.stream("Sure, why not.", speed=1 + number / 1_000)))
    assert len(engine._openers) == 512


@pytest.mark.parametrize("language", OPENERS)
def test_every_opener_is_a_clause_of_its_own(language: str):
    # Otherwise it would be kept and never used.
    more = "今日の天気は晴れで気温は二十度です" if language in ("ja", "zh") else " Zzz zzz zzzz zzz zzzzz zzz zzzz zzz"
    assert [clauses(opener + more, language)[0] for opener in OPENERS[language]] == list(OPENERS[language])


def test_its_voices_have_languages_and_genders(engine: KokoroTTS):
    assert engine.voice_list() == [
        Voice("af_sarah", "en-US", "female"),
        Voice("am_onyx", "en-US", "male"),
        Voice("bf_emma", "en-GB", "female"),
        Voice("ff_siwis", "fr-FR", "female"),
        Voice("zm_yunxi", "zh-CN", "male"),
    ]


def test_without_a_voice_it_is_one_of_the_language(engine: KokoroTTS):
    assert np.array_equal(
        *(np.concatenate(streamed(engine, "Bonjour.", lang="fr-FR", voice=v)) for v in ("auto", "ff_siwis"))
    )
    with pytest.raises(BadInput) as caught:
        engine.stream("Bonjour.", lang="fr-FR", voice="am_onyx")
    assert caught.value.code == "unsupported_language"


def test_an_unknown_voice_is_told_the_known_ones(engine: KokoroTTS):
    with pytest.raises(BadInput, match="af_sarah, am_onyx"):
        engine.stream("Hello.", voice="am_nobody")


def test_the_names_of_languages_are_not_spoken(engine: KokoroTTS, said: list[str]):
    streamed(engine, "Le football et the weather is nice.", voice="ff_siwis")
    assert "(en)" in engine._kokoro.tokenizer.phonemize("the weather is nice", "fr-fr")
    assert not any("(" in phonemes for phonemes in said)


@pytest.mark.parametrize("text", ["", "?!…", "—\n"])
def test_nothing_to_say_is_one_chunk_of_silence(engine: KokoroTTS, text: str):
    (chunk,) = streamed(engine, text)
    assert chunk.size
    assert not chunk.any()


def test_letters_without_a_sound_are_silence(engine: KokoroTTS, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine._kokoro.tokenizer, "phonemize", lambda *_: " , ")
    (chunk,) = streamed(engine, "Hello.")
    assert not chunk.any()


@pytest.mark.parametrize("language", {language for language, _ in LANGUAGES.values()})
def test_every_language_has_a_sample(language: str):
    assert (sample(language) == sample("xx")) == language.startswith("en")


def other_model(path: Path) -> None:
    put = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    model = helper.make_model(
        helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "other", [put], [out]),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    model.ir_version = 9
    onnx.save(model, str(path / MODEL))


def voices(path: Path, shape: tuple[int, ...] = (510, 1, 256), name: str = "am_onyx") -> None:
    with (path / VOICES).open("wb") as out:
        np.savez(out, **{name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / MODEL).write_bytes(b"\0" * 1_000),
        lambda path: (path / MODEL).write_bytes((path / MODEL).read_bytes()[:300]),
        lambda path: (path / MODEL).write_bytes(b""),
        other_model,
        lambda path: (path / VOICES).write_bytes(b"<html>not found</html>"),
        lambda path: (path / VOICES).write_bytes((path / VOICES).read_bytes()[:3_000]),
        lambda path: (path / VOICES).write_bytes(b""),
        lambda path: voices(path, (510, 1, 2)),
        lambda path: voices(path, name="xx_nobody"),
    ],
    ids=["zeros", "cut", "empty", "other", "page", "cut voices", "no voices", "other voices", "foreign voices"],
)
def test_damaged_files_are_named_with_the_remedy(tiny_kokoro: Path, tmp_path: Path, damage: object):
    shutil.copytree(tiny_kokoro, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(Unavailable, match="avb models pull kokoro") as caught:
        KokoroTTS({"model": str(tmp_path)})
    assert caught.value.code == "model_broken"


async def test_a_pool_streams_it(tiny_kokoro: Path, engine: KokoroTTS):
    pool = Pool(threads=2)
    spec = EngineSpec("tts", "agentvoicebox-tts-kokoro", (("model", str(tiny_kokoro)),))
    try:
        found = [speech.pcm async for speech in pool.stream(spec, REPLY, "en-US")]
        assert found == [pcm for pcm, _ in engine.stream(REPLY)]
        assert [voice.name for voice in await pool.voices(spec)] == sorted(engine.voices)
    finally:
        await asyncio.to_thread(pool.close)


async def test_a_voice_pinned_by_a_session_does_not_make_it_mute_in_another_language(
    tiny_kokoro: Path, engine: KokoroTTS
):
    pool = Pool(threads=2)
    spec = EngineSpec("tts", "agentvoicebox-tts-kokoro", (("model", str(tiny_kokoro)),))
    try:
        found = await pool.speak(spec, "Bonjour.", "fr-FR", "am_onyx")
        assert found.pcm == b"".join(pcm for pcm, _ in engine.stream("Bonjour.", voice="ff_siwis"))
    finally:
        await asyncio.to_thread(pool.close)


def test_it_takes_no_more_cores_than_it_is_told(tiny_kokoro: Path):
    made = [KokoroTTS({"model": str(tiny_kokoro), "cores": cores}).parallel for cores in (1, 12)]
    assert made == [2, 3]


def test_files_of_other_speeds_and_voices_are_other_files(engine: KokoroTTS):
    contexts = [{}, {"voice": "af_sarah"}, {"speed": 1.5}]
    names = {engine._get_ctxt({"lang": "en-US", **choices}).tts_id for choices in contexts}
    assert len(names) == 3
    assert not engine.enable_cache
