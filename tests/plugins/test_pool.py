"""Engines are shared, work off the event loop, and stop when nobody waits."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading
import time
import wave
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import psutil
import pytest
from ovos_plugin_manager.templates.stt import STT
from ovos_plugin_manager.templates.tts import TTS

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins import pool
from agentvoicebox.plugins.pool import EngineSpec, Pool, cancelled, engine

FLITE = EngineSpec("tts", "agentvoicebox-tts-flite")


@pytest.fixture
async def engines() -> AsyncIterator[Pool]:
    made = Pool(threads=2)
    yield made
    await asyncio.to_thread(made.close)


class Plain(TTS):
    """A stock-shaped plugin: no voice, no speed, two channels, not made for threads."""

    loaded = 0
    inside = 0

    def __init__(self, config: Any = None) -> None:
        super().__init__(config=config)
        Plain.loaded += 1

    def get_tts(self, sentence: str, wav_file: str, lang: str | None = None) -> tuple[str, None]:
        Plain.inside += 1
        assert Plain.inside == 1
        time.sleep(0.01)
        with wave.open(wav_file, "wb") as wav:
            wav.setparams((2, 2, 22_050, 0, "NONE", ""))
            wav.writeframes(b"\1\0\3\0" * 22_050)
        Plain.inside -= 1
        return wav_file, None


class Slow(STT):
    """Works in steps, and looks whether anybody still waits."""

    begun = threading.Event()
    steps = 0

    def execute(self, audio: Any, language: str | None = None) -> str:
        if audio.frame_data == b"\0\0":
            raise ValueError("the secret text")
        for _ in range(500):
            if cancelled():
                return ""
            Slow.steps += 1
            Slow.begun.set()
            time.sleep(0.01)
        return "done"


class Formats(TTS):
    """Writes what its configuration says, as stock plugins do: half a second in many formats."""

    chosen: ClassVar[list[Any]] = []

    def get_tts(
        self, sentence: str, wav_file: str, lang: str | None = None, voice: str | None = None
    ) -> tuple[str, None]:
        Formats.chosen.append(voice)
        kind, codec = self.config["format"]
        rate = 24_000
        tone = np.sin(np.arange(rate // 2, dtype=np.float32) / 20).reshape(1, -1) / 2
        with av.open(wav_file, "w", format=kind) as file:
            stream = file.add_stream(codec, rate=rate, layout="mono")
            for start in range(0, tone.size, 960):
                frame = av.AudioFrame.from_ndarray(tone[:, start : start + 960], format="fltp", layout="mono")
                frame.sample_rate, frame.pts = rate, start
                for converted in av.AudioResampler(stream.format, "mono", rate).resample(frame):
                    file.mux(stream.encode(converted))
            file.mux(stream.encode(None))
        return wav_file, None


class Garbage(Formats):
    """Writes what is no audio."""

    def get_tts(self, sentence: str, wav_file: str, lang: str | None = None) -> tuple[str, None]:  # type: ignore[override]
        Path(wav_file).write_bytes(b"<html>your quota</html>")
        return wav_file, None


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"plain": Plain, "slow": Slow, "formats": Formats, "garbage": Garbage}
    monkeypatch.setattr(engine, "plugin_class", lambda kind, name: found.get(name))
    Formats.chosen = []
    Plain.loaded = Slow.steps = 0
    Slow.begun.clear()


async def test_a_real_engine_speaks(engines: Pool):
    speech = await engines.speak(FLITE, "It is noon.", "en-US", "rms", 1.0)
    assert speech.rate == 16_000
    assert 0.3 < speech.seconds < 3
    other = await engines.speak(FLITE, "It is noon.", "en-US", "a voice of another engine", 1.0)
    assert other == await engines.speak(FLITE, "It is noon.", "en-US"), "an unknown voice is the engine's own choice"
    assert other.pcm != speech.pcm


async def test_equal_configuration_shares_one_engine_loaded_once(engines: Pool, stand_ins: None):
    spec = EngineSpec("tts", "plain", (("a", 1),))
    await asyncio.gather(*(engines.speak(spec, "x", "en-US") for _ in range(4)))
    assert Plain.loaded == 1, "also when many ask at once; and the plugin was never entered twice"
    await engines.load(EngineSpec("tts", "plain", (("a", 2),)))
    assert Plain.loaded == 2


async def test_any_stock_plugin_serves_and_stereo_becomes_mono(engines: Pool, stand_ins: None):
    speech = await engines.speak(EngineSpec("tts", "plain"), "x", "en-US", "voice", 2.0)
    assert (speech.rate, len(speech.pcm)) == (22_050, 44_100)
    assert set(speech.pcm[::2]) == {2}


@pytest.mark.parametrize(
    "form", [("mp3", "libmp3lame"), ("ogg", "libopus"), *(("wav", f"pcm_{each}le") for each in ("s24", "s32", "f32"))]
)
async def test_whatever_format_a_stock_plugin_writes_is_read(engines: Pool, stand_ins: None, form: tuple[str, str]):
    speech = await engines.speak(EngineSpec("tts", "formats", (("format", form),)), "x", "en-US", "somebody")
    assert 0.4 < speech.seconds < 0.7
    assert np.abs(np.frombuffer(speech.pcm, "<i2")).max() > 10_000
    assert Formats.chosen == [None], "no voice is known to be one of its own"


async def test_what_is_no_audio_is_the_engines_failure(engines: Pool, stand_ins: None):
    with pytest.raises(Unavailable) as caught:
        await engines.speak(EngineSpec("tts", "garbage"), "x", "en-US")
    assert caught.value.code == "engine_failed"


async def test_a_missing_plugin_says_so_and_may_come_later(engines: Pool, monkeypatch: pytest.MonkeyPatch):
    spec = EngineSpec("tts", "no-such-plugin")
    with pytest.raises(Unavailable, match="not installed") as caught:
        await engines.speak(spec, "x", "en-US")
    assert caught.value.code == "engine_missing"
    monkeypatch.setattr(engine, "plugin_class", lambda kind, name: Plain)
    assert (await engines.speak(spec, "x", "en-US")).seconds == 1.0


async def test_a_failing_engine_is_named_and_its_input_is_not(
    engines: Pool, stand_ins: None, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(Unavailable) as caught:
        await engines.transcribe(EngineSpec("stt", "slow"), b"\0\0", 16_000, "en-US")
    assert caught.value.code == "engine_failed"
    assert "slow" in caught.value.message
    assert "secret" not in caught.value.message + caplog.text


async def test_cancelling_stops_work_that_runs_and_work_that_waits(stand_ins: None):
    engines = Pool(threads=1)
    spec = EngineSpec("stt", "slow")
    await engines.load(spec)
    running = asyncio.create_task(engines.transcribe(spec, bytes(320), 16_000, "en-US"))
    assert await asyncio.to_thread(Slow.begun.wait, 30)
    waiting = asyncio.create_task(engines.transcribe(spec, bytes(320), 16_000, "en-US"))
    await asyncio.sleep(0.05)
    waiting.cancel()
    running.cancel()
    await asyncio.gather(running, waiting, return_exceptions=True)
    await asyncio.to_thread(engines.close)  # waits for what still runs
    assert 0 < Slow.steps < 100, "it stopped early, and the other never began"


async def test_cancelling_kills_the_voice(engines: Pool):
    others = {child.pid for child in psutil.Process().children()}

    def voices() -> list[psutil.Process]:
        mine = [child for child in psutil.Process().children() if child.pid not in others]
        return [child for child in mine if named_flite(child)]

    def named_flite(child: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):  # it has ended since it was found
            return bool(child.name() == "flite")
        return False

    await engines.load(FLITE)
    speaking = asyncio.create_task(engines.speak(FLITE, "one two three. " * 500, "en-US", speed=0.5))
    while not voices():
        await asyncio.sleep(0.002)
    speaking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await speaking
    async with asyncio.timeout(30):
        while voices():
            await asyncio.sleep(0.002)


async def test_one_that_leaves_while_loading_does_not_take_the_engine_away(engines: Pool, stand_ins: None):
    spec = EngineSpec("tts", "plain", (("b", 1),))
    first = asyncio.create_task(engines.speak(spec, "x", "en-US"))
    second = asyncio.create_task(engines.speak(spec, "x", "en-US"))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).seconds == 1.0


def test_outside_a_pool_nobody_is_ever_gone():
    assert cancelled() is False
    with pool.when_cancelled(lambda: pytest.fail("nobody left")):
        pass


async def test_a_damaged_model_is_named_with_its_remedy_and_the_pool_survives(engines: Pool, tiny_whisper: Path):
    damaged = tiny_whisper.parent / "damaged"
    shutil.copytree(tiny_whisper, damaged)
    (damaged / "model.bin").write_bytes((damaged / "model.bin").read_bytes()[:1_000])
    spec = EngineSpec("stt", "ovos-stt-plugin-fasterwhisper", (("compute_type", "float32"), ("model", str(damaged))))
    with pytest.raises(Unavailable, match=r"damaged.*avb models pull") as caught:
        await engines.transcribe(spec, bytes(32_000), 16_000, "en-US")
    assert caught.value.code == "engine_failed"
    (damaged / "model.bin").write_bytes((tiny_whisper / "model.bin").read_bytes())
    assert (await engines.transcribe(spec, bytes(32_000), 16_000, "en-US")).text == ""


def test_only_the_plugin_that_is_asked_for_is_imported():
    script = """
import sys
from agentvoicebox.plugins.pool.engine import plugin_class
assert plugin_class("tts", "agentvoicebox-tts-flite").__name__ == "FliteTTS"
assert plugin_class("stt", "agentvoicebox-tts-flite") is None
assert not {"faster_whisper", "kokoro_onnx", "onnxruntime", "pocketsphinx", "redis"} & set(sys.modules)
assert plugin_class("stt", "ovos-stt-plugin-fasterwhisper").__name__ == "FasterWhisperSTT"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
