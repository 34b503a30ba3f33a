"""Whisper, stock and made fast, on models built here: what it hears, what that costs, and what it does not trust."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ctranslate2
import faster_whisper
import numpy as np
import pytest
import soxr
from ovos_plugin_manager.stt import load_stt_plugin
from ovos_plugin_manager.utils.audio import AudioData

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.plugins import whisper
from agentvoicebox.plugins.pool import EngineSpec, Pool
from agentvoicebox.plugins.pool.engine import Caller
from agentvoicebox.plugins.pool.line import Crowded
from agentvoicebox.plugins.pool.runner import Heard
from agentvoicebox.plugins.pool.threads import Threads
from agentvoicebox.plugins.whisper import WhisperSTT

SENTENCES = ("what time is it", "stop", "how are you", "good morning")
RATE = 16_000

Tone = Callable[[int], bytes]
Build = Callable[..., Path]


class Watched:
    """CTranslate2's model; remembers how much it was asked to do."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.encoded: list[tuple[int, int]] = []
        self.prompts: list[int] = []
        self.detected = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def encode(self, features: Any, **more: Any) -> Any:
        self.encoded.append((features.shape[0], features.shape[2]))
        return self._model.encode(features, **more)

    def generate(self, encoded: Any, prompts: list[list[int]], **more: Any) -> Any:
        self.prompts.append(len(prompts))
        return self._model.generate(encoded, prompts, **more)

    def detect_language(self, encoded: Any) -> Any:
        self.detected += 1
        return self._model.detect_language(encoded)


def engine(directory: Path, **config: Any) -> WhisperSTT:
    return WhisperSTT({"model": str(directory), "vad": False, "parallel": 2, **config})


def watch(plugin: WhisperSTT) -> Watched:
    watched = plugin._ear._whisper.model = Watched(plugin._ear._whisper.model)
    return watched


def heard(plugin: WhisperSTT, *pcm: bytes, language: str = "en-US", tentative: bool = False) -> list[Any]:
    return plugin.transcribe_batch([Heard(one, language, tentative) for one in pcm])


@pytest.fixture(scope="module")
def plugin(tiny_whisper: Path) -> WhisperSTT:
    return engine(tiny_whisper)


@pytest.fixture
def watched(plugin: WhisperSTT) -> Iterator[Watched]:
    before = plugin._ear._whisper.model
    yield watch(plugin)
    plugin._ear._whisper.model = before


@pytest.mark.parametrize("name", ["ovos-stt-plugin-fasterwhisper", "agentvoicebox-stt-whisper"])
async def test_it_hears_what_the_model_hears(tiny_whisper: Path, tone: Tone, name: str):
    config = {"model": str(tiny_whisper), "compute_type": "float32", "beam_size": 1, "cpu_threads": 1, "vad": False}
    pool = Pool(threads=1)
    try:
        spec = EngineSpec("stt", name, tuple(sorted(config.items())))
        await pool.load(spec)  # however long that takes
        for k, sentence in enumerate(SENTENCES):
            assert (await pool.transcribe(spec, tone(k), RATE, "en-US")).text == sentence
            for rate in (8_000, 24_000, 48_000):
                # 8 kHz cannot carry the highest tone.
                if k < 3 or rate > 8_000:
                    samples = soxr.resample(np.frombuffer(tone(k), "<i2"), RATE, rate)
                    assert (await pool.transcribe(spec, samples.astype("<i2").tobytes(), rate, "en")).text == sentence
        assert (await pool.transcribe(spec, bytes(32_000), RATE, "en-US")).text == ""
    finally:
        pool.close()


async def test_the_pool_passes_on_what_it_adds(build_whisper: Build, tone: Tone):
    directory = build_whisper(languages={"en": (0, 1, 2), "de": (3,)})
    pool = Pool(threads=2)
    try:
        spec = EngineSpec("stt", "agentvoicebox-stt-whisper", (("model", str(directory)), ("vad", False)))
        await pool.load(spec)
        found = await pool.transcribe(spec, tone(3), RATE, "auto")
        assert (found.text, found.language, found.engine) == ("good morning", "de", spec.plugin)
        assert found.confidence == pytest.approx(1, abs=0.01)
        with pytest.raises(BadInput, match="knows: de, en") as caught:
            await pool.transcribe(spec, tone(3), RATE, "fr-FR")
        assert caught.value.code == "unsupported_language"
        assert (await pool.transcribe(spec, tone(0), RATE, "en-US")).text == SENTENCES[0], "the engine survives"
    finally:
        pool.close()


def test_stock_ovos_loads_and_asks_it(tiny_whisper: Path, tone: Tone):
    plugin = load_stt_plugin("agentvoicebox-stt-whisper")(config={"model": str(tiny_whisper), "vad": False})
    louder = soxr.resample(np.frombuffer(tone(0), "<i2"), RATE, 48_000).astype("<i2").tobytes()
    for audio in (AudioData(tone(0), RATE, 2), AudioData(louder, 48_000, 2)):
        assert plugin.execute(audio, language="en-US") == SENTENCES[0]
        assert plugin.execute(audio) == SENTENCES[0]
        [(text, confidence)] = plugin.transcribe(audio, "auto")
        assert text == SENTENCES[0]
        assert 0.9 < confidence <= 1
    assert plugin.transcribe(AudioData(bytes(3_200), RATE, 2), "en") == [("", 0.0)]
    with pytest.raises(BadInput):
        plugin.execute(AudioData(tone(0), RATE, 2), language="de-DE")
    assert {"en", "de", "yue"} < plugin.available_languages
    assert plugin.parallel == min(8, os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("seconds", "frames"),
    [(0.2, 400), (1.4, 400), (1.5, 416), (5.0, 768), (7.5, 1008), (19.4, 2200), (19.5, 3000), (30.0, 3000)],
)
def test_it_encodes_the_utterance_and_a_margin(plugin: WhisperSTT, watched: Watched, seconds: float, frames: int):
    wave_form = 0.3 * np.sin(2 * np.pi * 900 * np.arange(int(seconds * RATE)) / RATE)
    pcm = (wave_form * 32_767).astype("<i2").tobytes()
    assert heard(plugin, pcm)[0][0] == "stop"
    assert watched.encoded == [(1, frames)]
    assert frames == 3000 or frames >= 100 * (seconds + whisper.MARGIN)


def test_equal_windows_are_decoded_together_and_answered_in_order(plugin: WhisperSTT, watched: Watched, tone: Tone):
    assert plugin.batch == 2
    short, long, longest = tone(3), tone(1) * 3, tone(2) * 10
    answers = heard(plugin, short, long, longest, short, long, short, longest)
    words = {short: "good morning", long: "stop", longest: "how are you"}
    assert [text for text, _, _ in answers] == [
        words[one] for one in (short, long, longest, short, long, short, longest)
    ]
    # Of a window of 22 s no two.
    assert watched.encoded == [(2, 416), (1, 416), (2, 720), (1, 1_760), (1, 1_760)]
    assert watched.prompts == [2, 1, 2, 1, 1]


def test_what_one_cannot_have_does_not_hurt_the_others(plugin: WhisperSTT, tone: Tone):
    jobs = [Heard(tone(0), "en"), Heard(tone(1), "tlh"), Heard(b"", "en"), Heard(tone(2), "auto")]
    first, refused, nothing, last = plugin.transcribe_batch(jobs)
    assert first[0] == SENTENCES[0]
    assert isinstance(refused, BadInput)
    assert refused.code == "unsupported_language"
    assert "'tlh'" in refused.message
    assert nothing == ("", None, "en")
    assert last[0] == SENTENCES[2]


def test_several_threads_are_served_at_once(plugin: WhisperSTT, tone: Tone):
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda k: heard(plugin, tone(k), tone(3 - k)), [0, 1, 2, 3] * 4))
    for k, (one, other) in zip([0, 1, 2, 3] * 4, found, strict=True):
        assert (one[0], other[0]) == (SENTENCES[k], SENTENCES[3 - k])


@pytest.mark.parametrize("short", ["loops", "guesses"])
def test_what_a_short_window_cannot_tell_30_s_can(build_whisper: Build, tone: Tone, short: str):
    plugin = engine(build_whisper(short))
    watched = watch(plugin)
    [first] = plugin._ear.hear([whisper._Utterance(plugin._audible(tone(0)), "en")])
    assert first.endless == first.looping == (short == "loops")
    assert (first.logprob < -1) == (short == "guesses")
    watched.encoded.clear()

    for k, sentence in enumerate(SENTENCES):
        text, confidence, _ = heard(plugin, tone(k))[0]
        assert text == sentence
        assert confidence == pytest.approx(1, abs=0.01)
    assert watched.encoded == [(1, 416), (1, 3_000)] * len(SENTENCES)

    watched.encoded.clear()
    assert heard(plugin, tone(0), tentative=True) == [("", None, "en")], "what is rough anyway is not worth 30 s"
    assert watched.encoded == [(1, 416)]


def test_what_repeats_itself_for_ever_says_nothing(build_whisper: Build, tone: Tone):
    plugin = engine(build_whisper("hangs"))
    assert heard(plugin, tone(0)) == [("", None, "en")]
    samples = plugin._audible(tone(0))
    stock, _ = plugin._ear._whisper.transcribe(samples, language="en", beam_size=1)
    assert "what what what" in "".join(segment.text for segment in stock), "stock tells it as what was said"


@pytest.mark.parametrize(("left_at", "tries"), [(None, 7), (2, 2), (1, 1)])
def test_nobody_tries_again_for_one_who_has_left(build_whisper: Build, tone: Tone, left_at: int | None, tries: int):
    plugin = engine(build_whisper("hangs"))
    watched, caller = watch(plugin), Caller()

    def generate(*args: Any, **more: Any) -> Any:
        watched.prompts.append(1)
        if len(watched.prompts) == left_at:
            caller.leave()
        return watched._model.generate(*args, **more)

    watched.generate = generate  # type: ignore[method-assign]
    assert caller.run(lambda: heard(plugin, tone(0)))[0][0] == ""
    assert len(watched.prompts) == tries


@pytest.mark.parametrize(
    ("guess", "doubtful", "silence"),
    [
        (("good morning", "en", -0.3, 0.1, False), False, False),
        (("good morning", "en", -0.3, 0.9, False), False, False),
        (("good morning", "en", -1.2, 0.1, False), True, False),
        (("good morning", "en", -1.2, 0.9, False), True, True),
        (("good morning", "en", -0.3, 0.1, True), True, False),
        (("good morning " * 20, "en", -0.3, 0.1, False), True, False),
    ],
)
def test_what_is_trusted(guess: tuple[str, str, float, float, bool], doubtful: bool, silence: bool):
    found = whisper._Guess(*guess)
    assert (found.doubtful, found.silence) == (doubtful, silence)
    assert found.found[1] == pytest.approx(np.exp(guess[2]))


def noise(kind: str) -> bytes:
    times = np.arange(3 * RATE) / RATE
    return {
        "nothing": b"",
        "half a sample": b"x",
        "a click": b"\x00\x40" * 40,
        "silence": bytes(96_000),
        "a quiet room": np.random.default_rng(0).integers(-8, 8, 48_000).astype("<i2").tobytes(),
        "white noise": (np.random.default_rng(0).standard_normal(48_000) * 3_000).astype("<i2").tobytes(),
        "faint noise": (np.random.default_rng(0).standard_normal(48_000) * 60).astype("<i2").tobytes(),
        "hum": (np.sin(2 * np.pi * 50 * times) * 8_000).astype("<i2").tobytes(),
    }[kind]


SILENT = ("nothing", "half a sample", "a click", "silence", "a quiet room")


@pytest.mark.parametrize("kind", [*SILENT, "white noise", "faint noise"])
def test_where_nobody_speaks_nothing_was_said(plugin: WhisperSTT, watched: Watched, kind: str):
    assert heard(plugin, noise(kind))[0][:2] == ("", None)
    assert len(watched.encoded) == (kind not in SILENT)


@pytest.mark.parametrize("kind", [*SILENT, "white noise", "faint noise", "hum"])
def test_with_vad_noise_is_not_even_encoded(tiny_whisper: Path, kind: str):
    plugin = engine(tiny_whisper, vad=True)
    watched = watch(plugin)
    assert heard(plugin, noise(kind)) == [("", None, "en")]
    assert watched.encoded == []


def test_vad_cuts_silence_out_before_encoding(tiny_whisper: Path, say: Callable[..., tuple[bytes, int]]):
    pcm, rate = say("what time is it")
    speech = soxr.resample(np.frombuffer(pcm, "<i2"), rate, RATE).astype("<i2").tobytes()
    plugin = engine(tiny_whisper, vad=True)
    kept = plugin._audible(speech + bytes(5 * 2 * RATE) + speech)
    assert 1.0 < kept.size / RATE < 2 * len(speech) / 2 / RATE + 1.0
    whole = engine(tiny_whisper)._audible(speech + bytes(5 * 2 * RATE) + speech)
    assert whole.size / RATE > 6


def test_the_language_is_found_with_the_same_encoding(build_whisper: Build, tone: Tone):
    plugin = engine(build_whisper(languages={"en": (0, 1, 2), "de": (3,), "he": (), "no": ()}))
    watched = watch(plugin)
    jobs = [Heard(tone(3), "auto"), Heard(tone(0), "auto"), Heard(tone(3), "en-US"), Heard(tone(2), "auto")]
    answers = plugin.transcribe_batch(jobs)
    assert [(answer[0], answer[2]) for answer in answers] == [
        ("good morning", "de"),
        ("what time is it", "en"),
        ("good morning", "en"),
        ("how are you", "en"),
    ]
    assert watched.encoded == [(2, 416), (2, 416)]
    assert watched.detected == 2
    assert heard(plugin, tone(2), language="de-AT")[0][2] == "de"
    assert plugin._ear.language("iw-IL") == "he"
    assert plugin._ear.language("nb_NO") == "no"
    assert plugin._ear.language("EN") == "en"
    with pytest.raises(BadInput, match="de, en, he, no"):
        plugin._ear.language("x" * 1_000)
    heard(plugin, tone(0))
    assert watched.detected == 2, "a language that is told is not looked for"


async def test_it_shares_the_cores_and_tells_its_memory(tiny_whisper: Path):
    spec = EngineSpec("stt", "agentvoicebox-stt-whisper", (("model", str(tiny_whisper)),))
    for cores in (1, 3):
        runner = Threads(cores)
        loaded = await runner.load(spec)
        await runner.close()
        assert loaded.parallel == cores
    weights = (tiny_whisper / "model.bin").stat().st_size
    assert loaded.memory == weights // 2 + (100 << 20)


def test_a_long_talk_is_heard_in_pieces_and_its_language_found_once(build_whisper: Build, tone: Tone):
    plugin = engine(build_whisper(languages={"en": (0, 1, 2), "de": (3,)}))
    watched = watch(plugin)
    long = b"".join(tone(k) * 12 + bytes(2 * RATE) for k in (3, 0, 1))
    assert heard(plugin, long, tone(0), language="auto") == [
        ("good morning what time is it stop", pytest.approx(1, abs=0.01), "de"),
        ("what time is it", pytest.approx(1, abs=0.01), "en"),
    ]
    assert watched.detected == 2
    assert len(watched.encoded) == 4
    [busy] = heard(plugin, long, tentative=True)
    assert isinstance(busy, Crowded), "which no pool holds against the engine"
    assert busy.code == "busy"


def lay_down(model: Path, directory: Path) -> Path:
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.mark.parametrize("missing", ["model.bin", "tokenizer.json", "config.json", None])
def test_a_missing_model_names_the_remedy(tiny_whisper: Path, tmp_path: Path, missing: str | None):
    directory = tmp_path / "faster-whisper-small"
    if missing:
        (lay_down(tiny_whisper, directory) / missing).unlink()
    with pytest.raises(Unavailable, match="avb models pull faster-whisper-small") as caught:
        engine(directory)
    assert caught.value.code == "models_missing"
    with pytest.raises(Unavailable, match="avb models pull faster-whisper-base"):
        WhisperSTT({})


def shorter(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.bin", shorter),
        ("model.bin", lambda content: content[:-1]),
        ("model.bin", lambda content: b""),
        ("model.bin", lambda content: b"<html>" + content),
        ("model.bin", lambda content: np.random.default_rng(0).bytes(100_000)),
        ("vocabulary.json", shorter),
        ("tokenizer.json", shorter),
        ("tokenizer.json", lambda content: b"{}"),
        ("config.json", lambda content: b"[]"),
        ("preprocessor_config.json", lambda content: json.dumps({"feature_size": 128}).encode()),
    ],
)
def test_a_broken_model_is_told_when_it_is_loaded(
    tiny_whisper: Path, tmp_path: Path, file: str, damage: Callable[[bytes], bytes]
):
    directory = lay_down(tiny_whisper, tmp_path / "faster-whisper-tiny")
    path = directory / file
    path.write_bytes(damage(path.read_bytes() if path.exists() else b""))
    with pytest.raises(Unavailable, match="avb models pull faster-whisper-tiny") as caught:
        engine(directory)
    assert caught.value.code == "model_broken"


@pytest.mark.parametrize(
    ("devices", "config", "asked"),
    [
        (0, {}, [("cpu", "int8")]),
        (1, {}, [("cuda", "float16"), ("cpu", "int8")]),
        (1, {"device": "cpu"}, [("cpu", "int8")]),
        (0, {"device": "cuda"}, [("cpu", "int8")]),
        (0, {"compute_type": "float32"}, [("cpu", "float32")]),
    ],
)
def test_cuda_is_used_where_there_is_some_and_it_works(
    tiny_whisper: Path,
    tone: Tone,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    devices: int,
    config: dict[str, str],
    asked: list[tuple[str, str]],
):
    seen: list[tuple[str, str]] = []

    class Model(faster_whisper.WhisperModel):
        def __init__(self, path: str, *, device: str, compute_type: str, **more: Any) -> None:
            seen.append((device, compute_type))
            assert more == {"cpu_threads": 1, "num_workers": 2}
            if device == "cuda":
                raise RuntimeError("CUDA driver version is insufficient")
            super().__init__(path, device=device, compute_type=compute_type, **more)

    monkeypatch.setattr(faster_whisper, "WhisperModel", Model)
    monkeypatch.setattr(ctranslate2, "get_cuda_device_count", lambda: devices)
    with caplog.at_level(logging.WARNING, logger=whisper.__name__):
        assert heard(engine(tiny_whisper, **config), tone(1))[0][0] == "stop"
    assert seen == asked
    assert len(caplog.records) == len(asked) - 1


def test_a_device_that_does_not_use_it_does_not_load_it():
    script = (
        "import sys; from agentvoicebox.plugins.whisper import WhisperSTT; assert WhisperSTT.available_languages;"
        "assert not {'faster_whisper', 'ctranslate2', 'av', 'onnxruntime', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
