"""Kokoro's voice on a model built here, through the real kokoro-onnx."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.plugins.kokoro import KokoroTTS


@pytest.fixture(scope="module")
def engine(tiny_kokoro: Path) -> KokoroTTS:
    return KokoroTTS({"model": str(tiny_kokoro)})


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


def test_files_of_other_speeds_and_voices_are_other_files(engine: KokoroTTS):
    contexts = [{}, {"voice": "af_sarah"}, {"speed": 1.5}]
    names = {engine._get_ctxt({"lang": "en-US", **choices}).tts_id for choices in contexts}
    assert len(names) == 3
    assert not engine.enable_cache
