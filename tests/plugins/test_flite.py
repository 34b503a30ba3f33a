"""The offline voice, as the stock framework loads it."""

from __future__ import annotations

import subprocess
import wave
from pathlib import Path

import pytest
from ovos_plugin_manager.tts import OVOSTTSFactory, find_tts_plugins

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins import flite
from agentvoicebox.plugins.flite import VOICES, FliteTTS


def seconds(file: Path | str) -> float:
    with wave.open(str(file)) as wav:
        assert (wav.getsampwidth(), wav.getnchannels()) == (2, 1)
        return wav.getnframes() / wav.getframerate()


def test_the_stock_factory_loads_it():
    assert find_tts_plugins()["agentvoicebox-tts-flite"] is FliteTTS
    engine = OVOSTTSFactory.create({"module": "agentvoicebox-tts-flite", "agentvoicebox-tts-flite": {"voice": "rms"}})
    assert isinstance(engine, FliteTTS)
    assert engine.available_languages == {"en-US"}


@pytest.mark.parametrize("voice", VOICES)
def test_every_voice_speaks(voice: str, tmp_path: Path):
    path, phonemes = FliteTTS().get_tts("It is noon.", str(tmp_path / "a.wav"), voice=voice)
    assert phonemes is None
    assert 0.3 < seconds(path) < 3


def test_voices_and_speeds_differ(tmp_path: Path):
    engine = FliteTTS()
    files = {}
    for voice, speed in (("slt", 1.0), ("rms", 1.0), ("slt", 0.5), ("slt", 2.0), ("nobody", 1.0)):
        file = tmp_path / f"{voice}-{speed}.wav"
        engine.get_tts("It is noon.", str(file), voice=voice, speed=speed)
        files[voice, speed] = file
    assert files["slt", 1.0].read_bytes() != files["rms", 1.0].read_bytes()
    assert files["nobody", 1.0].read_bytes() == files["slt", 1.0].read_bytes(), "an unknown voice is the default"
    assert seconds(files["slt", 0.5]) > seconds(files["slt", 1.0]) * 1.5
    assert seconds(files["slt", 2.0]) < seconds(files["slt", 1.0]) * 0.7


@pytest.mark.parametrize("text", ["", "   ", "...", "?!", "\x00\x01"])
def test_nothing_to_say_is_silence(text: str, tmp_path: Path):
    path, _ = FliteTTS().get_tts(text, str(tmp_path / "a.wav"))
    with wave.open(path) as wav:
        assert set(wav.readframes(wav.getnframes())) == {0}


@pytest.mark.parametrize("text", ["-o x", "--version", "$(id) `id` ; id", "two\nlines", "a\x00b", "ünïcödé", "<a>&"])
def test_text_is_text(text: str, tmp_path: Path):
    path, _ = FliteTTS().get_tts(text, str(tmp_path / "a.wav"))
    assert seconds(path) > 0.1
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]


def test_the_text_is_nowhere_for_others_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commands = []
    real = subprocess.Popen

    def watched(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        commands.append(command)
        return real(command, **options)

    monkeypatch.setattr(flite.subprocess, "Popen", watched)
    FliteTTS().get_tts("a secret", str(tmp_path / "a.wav"))
    assert "secret" not in " ".join(commands[0])


def test_a_very_long_text_ends(tmp_path: Path):
    path, _ = FliteTTS().get_tts("one two three. " * 3_000, str(tmp_path / "a.wav"), speed=2.0)
    assert seconds(path) > 60


def test_without_flite_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Unavailable, match="apt-get install flite"):
        FliteTTS()


def test_the_stock_cache_does_not_mix_voices():
    """Its key has no speed and no tenant, and it lies in shared memory: here it is off, and voices are in the key."""
    engine = FliteTTS({"voice": "slt"})
    assert engine.enable_cache is False
    assert engine._get_ctxt({"voice": "rms"}).tts_id != engine._get_ctxt({"voice": "awb"}).tts_id
