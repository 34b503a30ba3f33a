"""Rates and windows: chunks of any size join into the same sound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentvoicebox.bus_bridge.audio import Inlet, Outlet, chunks, resample


def tone(rate: int, seconds: float = 1.0) -> bytes:
    return (np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate) * 12_000).astype("<i2").tobytes()


def pitch(pcm: bytes, rate: int) -> float:
    samples = np.frombuffer(pcm, "<i2").astype(float)
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * rate / len(samples))


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 48_000])
def test_any_rate_becomes_sixteen_kilohertz(rate: int):
    inlet = Inlet(rate)
    pcm = tone(rate)
    heard = b"".join(inlet.take(pcm[i : i + 960], 512) for i in range(0, len(pcm), 960))
    assert len(heard) % 1024 == 0
    assert 0.9 < len(heard) / 32_000 <= 1.0
    assert pitch(heard, 16_000) == pytest.approx(440, abs=5)


@given(st.lists(st.integers(0, 3_000), max_size=20))
def test_windows_lose_nothing(sizes: list[int]):
    inlet = Inlet(16_000)
    sound = np.arange(sum(sizes), dtype="<i2").tobytes()
    heard, at = b"", 0
    for size in sizes:
        part = inlet.take(sound[at * 2 : (at + size) * 2], 512)
        assert len(part) % 1024 == 0
        heard += part
        at += size
    assert sound.startswith(heard)
    assert len(sound) - len(heard) < 1024


def test_a_reply_at_the_clients_rate():
    assert resample(b"", 16_000, 24_000) == b""
    assert resample(b"\1\0", 24_000, 24_000) == b"\1\0"
    out = resample(tone(16_000), 16_000, 24_000)
    assert len(out) == 48_000
    assert pitch(out, 24_000) == pytest.approx(440, abs=2)


def test_chunks_cut_whole_samples():
    parts = chunks(bytes(24_001 * 2), 24_000)
    assert b"".join(parts) == bytes(24_001 * 2)
    assert all(len(part) % 2 == 0 for part in parts)
    assert len(parts[0]) == 9_600


@pytest.mark.parametrize("source", [16_000, 24_000, 22_050])
def test_a_reply_in_pieces_sounds_like_one(source: int):
    outlet, said = Outlet(24_000), tone(source)
    heard = b"".join(outlet.take(said[i : i + 4_410], source) for i in range(0, len(said), 4_410)) + outlet.end()
    assert len(heard) == pytest.approx(48_000, abs=8)
    assert pitch(heard, 24_000) == pytest.approx(440, abs=2)
    # A click is a step that no sine of this pitch can make.
    steps = np.abs(np.diff(np.frombuffer(heard, "<i2").astype(int)))
    assert steps.max() < 2 * np.pi * 440 / 24_000 * 12_000 * 1.2
    assert outlet.end() == b"", "nothing is said twice"


def test_a_voice_that_changes_its_rate_loses_nothing():
    outlet = Outlet(24_000)
    heard = outlet.take(tone(16_000), 16_000) + outlet.take(tone(24_000), 24_000) + outlet.end()
    assert len(heard) == pytest.approx(2 * 48_000, abs=16)
