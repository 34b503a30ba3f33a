"""Both detectors on real speech."""

from __future__ import annotations

import subprocess
import sys
import wave
from pathlib import Path

import pytest

from agentvoicebox.bus_bridge import vad
from agentvoicebox.bus_bridge.models import TurnDetection
from agentvoicebox.bus_bridge.turns import Change, Listener


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Half a second of silence, a question at 16 kHz, one second of silence."""
    file = tmp_path_factory.mktemp("vad") / "speech.wav"
    subprocess.run(["flite", "-voice", "slt", "-t", "what time is it", "-o", str(file)], check=True)
    with wave.open(str(file)) as wav:
        assert wav.getframerate() == 16_000
        return bytes(16_000) + wav.readframes(wav.getnframes()) + bytes(32_000)


@pytest.mark.parametrize("name", ["silero", "webrtc"])
def test_speech_is_told_from_silence(name: str, speech: bytes):
    vad.warm(name)
    stream = vad.STREAMS[name]()
    size = stream.window * 2
    listener = Listener(TurnDetection(silence=0.2))
    found: list[tuple[Change, float]] = []
    for i in range(0, len(speech) - size + 1, size):
        (probability,) = stream.probabilities(speech[i : i + size])
        if change := listener.hear(speech[i : i + size], probability):
            found.append((change, listener.position))
            if change is Change.ENDED:
                break
    assert found[0][0] is Change.BEGAN
    assert found[-1][0] is Change.ENDED
    assert 0.5 < found[0][1] < 1.0
    ends = len(speech) / 32_000 - 1.0
    assert ends < found[-1][1] < ends + 0.6


def test_a_chunk_of_many_windows_is_the_same_as_many_chunks(speech: bytes):
    speech = speech[: len(speech) // 1024 * 1024]
    at_once = vad.SileroStream().probabilities(speech)
    stream = vad.SileroStream()
    one_by_one = [p for i in range(0, len(speech), 1024) for p in stream.probabilities(speech[i : i + 1024])]
    assert at_once == pytest.approx(one_by_one, abs=1e-4)


def test_streams_do_not_mix(speech: bytes):
    one, other = vad.SileroStream(), vad.SileroStream()
    speech = speech[: len(speech) // 1024 * 1024]
    alone = vad.SileroStream().probabilities(speech)
    mixed = []
    for i in range(0, len(speech), 1024):
        mixed += one.probabilities(speech[i : i + 1024])
        other.probabilities(bytes(1024))
    assert mixed == pytest.approx(alone, abs=1e-4)


def test_the_model_is_found_without_importing_its_package(tmp_path: Path):
    code = (
        "import sys; from agentvoicebox.bus_bridge import vad; vad.warm('silero');"
        "assert 'faster_whisper' not in sys.modules and 'ctranslate2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
