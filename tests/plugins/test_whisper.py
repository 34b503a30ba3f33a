"""faster-whisper through its stock plugin, by its stock name, on a model built here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soxr

from agentvoicebox.plugins.pool import EngineSpec, Pool


@pytest.mark.parametrize(("k", "sentence"), list(enumerate(("what time is it", "stop", "how are you", "good morning"))))
async def test_it_hears_what_the_model_hears(tiny_whisper: Path, tone: Callable[[int], bytes], k: int, sentence: str):
    config = {"model": str(tiny_whisper), "compute_type": "float32", "beam_size": 1, "cpu_threads": 1}
    pool = Pool(threads=1)
    try:
        spec = EngineSpec("stt", "ovos-stt-plugin-fasterwhisper", tuple(sorted(config.items())))
        assert (await pool.transcribe(spec, tone(k), 16_000, "en-US")).text == sentence
        for rate in (8_000, 24_000, 48_000):
            # 8 kHz cannot carry the highest tone.
            if k < 3 or rate > 8_000:
                samples = soxr.resample(np.frombuffer(tone(k), "<i2"), 16_000, rate)
                assert (await pool.transcribe(spec, samples.astype("<i2").tobytes(), rate, "en-US")).text == sentence
        assert (await pool.transcribe(spec, bytes(32_000), 16_000, "en-US")).text == ""
    finally:
        pool.close()
