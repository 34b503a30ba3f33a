"""Voices to listen to, and synthetic models small enough to build in a test."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import pytest
from ctranslate2.specs import common_spec, whisper_spec
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from agentvoicebox.plugins.flite import FliteTTS
from agentvoicebox.plugins.kokoro import MODEL, VOICES

Say = Callable[..., tuple[bytes, int]]

SENTENCES = ("what time is it", "stop", "how are you", "good morning")
TONES = (400, 900, 1900, 4200)


@pytest.fixture(scope="session")
def say(tmp_path_factory: pytest.TempPathFactory) -> Say:
    """`say(text, voice)` gives the 16-bit audio and rate of a flite voice, silence around it, with a noise floor."""
    directory, engine = tmp_path_factory.mktemp("voices"), FliteTTS()

    def speak(text: str, voice: str = "slt") -> tuple[bytes, int]:
        path = str(directory / "spoken.wav")
        engine.get_tts(text, path, voice=voice)
        with wave.open(path) as wav:
            rate, pcm = wav.getframerate(), wav.readframes(wav.getnframes())
        samples = np.pad(np.frombuffer(pcm, "<i2").astype(np.int32), rate // 4)
        noise = np.random.default_rng(0).integers(-30, 30, samples.size)
        return np.clip(samples + noise, -32_768, 32_767).astype("<i2").tobytes(), rate

    return speak


@pytest.fixture
def tone() -> Callable[[int], bytes]:
    """`tone(k)` is 1.5 s of the tone, at 16 kHz, that the tiny Whisper hears as sentence k."""

    def play(k: int) -> bytes:
        wave_form = 0.3 * np.sin(2 * np.pi * TONES[k] * np.arange(24_000) / 16_000)
        return (wave_form * 32_767).astype("<i2").tobytes()

    return play


@pytest.fixture(scope="session")
def tiny_kokoro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with Kokoro's inputs and outputs: every phoneme is 60 ms of a tone at a pitch of the voice."""
    directory = tmp_path_factory.mktemp("kokoro")
    numbers = {
        "flat": np.array([-1], np.int64), "hop": np.float32(1440), "zero": np.int64(0), "one": np.int64(1),
        "first": np.array([0], np.int64), "low": np.float32(0.05), "omega": np.float32(2 * np.pi / 24_000),
    }  # fmt: skip
    steps = (
        ("Reshape", ("tokens", "flat"), "row", {}),
        ("Size", ("row",), "count", {}),
        ("Cast", ("count",), "length", {"to": TensorProto.FLOAT}),
        ("Squeeze", ("speed", "first"), "pace", {}),
        ("Mul", ("length", "hop"), "whole", {}),
        ("Div", ("whole", "pace"), "seconds", {}),
        ("Cast", ("seconds",), "end", {"to": TensorProto.INT64}),
        ("Range", ("zero", "end", "one"), "clock", {}),
        ("Cast", ("clock",), "time", {"to": TensorProto.FLOAT}),
        ("ReduceMean", ("style",), "pitch", {"keepdims": 0}),
        ("Mul", ("time", "omega"), "turns", {}),
        ("Mul", ("turns", "pitch"), "angle", {}),
        ("Sin", ("angle",), "audio", {}),
    )
    graph = helper.make_graph(
        [helper.make_node(kind, list(inputs), [out], **extra) for kind, inputs, out, extra in steps],
        "kokoro",
        [
            helper.make_tensor_value_info("tokens", TensorProto.INT64, [1, "n"]),
            helper.make_tensor_value_info("style", TensorProto.FLOAT, [1, 256]),
            helper.make_tensor_value_info("speed", TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["s"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.save(model, str(directory / MODEL))
    pitches = {"am_onyx": 120, "af_sarah": 240, "bf_emma": 260, "ff_siwis": 220, "zm_yunxi": 140}
    with (directory / VOICES).open("wb") as out:
        np.savez(out, **{name: np.full((510, 1, 256), hertz, np.float32) for name, hertz in pitches.items()})
    return directory


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CTranslate2 Whisper of one layer with weights set by hand: a pure tone is heard as a sentence."""
    directory = tmp_path_factory.mktemp("whisper")
    _Tones().save(directory)
    return directory


@pytest.fixture(scope="session")
def build_whisper(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`build_whisper(short, languages)` is a tiny Whisper that needs 30 s, or that knows languages.

    On a window of less than 30 s one with `short="loops"` repeats the first word of a sentence for ever, and one with
    `short="guesses"` is not sure of any word; one with `short="hangs"` repeats the first word whatever the window.
    `languages` tells which sentences are of which language.
    """

    def build(short: str = "", languages: Mapping[str, tuple[int, ...]] = MappingProxyType({})) -> Path:
        directory = tmp_path_factory.mktemp("whisper")
        _Tones(short, languages).save(directory)
        return directory

    return build


class _Tones:
    """Encoder: one unit per tone, and one that marks the last frame of 30 s. Decoder: a table from (sentence, last
    word) to the next word, where it may depend on the mark."""

    width = 64
    mark = 0

    def __init__(self, short: str = "", languages: Mapping[str, tuple[int, ...]] = MappingProxyType({})) -> None:
        self.short, self.languages = short, languages
        self.words = sorted({f"\u0120{word}" for sentence in SENTENCES for word in sentence.split()})
        letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in letters]
        alphabet = dict(zip(letters, map(chr, letters), strict=True))
        alphabet |= {byte: chr(256 + n) for n, byte in enumerate(others)}
        # An empty token is what CTranslate2 knows a multilingual vocabulary by.
        self.text = [alphabet[byte] for byte in range(256)] + self.words + [""] * bool(languages)
        names = (
            *("endoftext", "startoftranscript", *languages, "translate", "transcribe"),
            *("startoflm", "startofprev", "nospeech", "notimestamps"),
        )
        self.special = [f"<|{name}|>" for name in names]
        self.stamps = [f"<|{n * 0.02:.2f}|>" for n in range(1501)]
        self.tokens = self.text + self.special + self.stamps
        self.id = {token: number for number, token in enumerate(self.tokens)}

    def save(self, directory: Path) -> None:
        spec = self._weights()
        spec.register_vocabulary(self.tokens)
        spec.config.suppress_ids = [self.id[f"<|{n}|>"] for n in ("startoftranscript", "nospeech", "transcribe")]
        spec.config.suppress_ids_begin = [self.id["<|endoftext|>"]]
        spec.config.lang_ids = [self.id[f"<|{language}|>"] for language in self.languages]
        spec.config.alignment_heads = [(0, 0)]
        spec.validate()
        spec.optimize()
        spec.save(str(directory))
        tokenizer = {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
            "added_tokens": [
                {"id": self.id[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": token in self.special}
                for token in self.special + self.stamps
            ],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
                      "vocab": {token: self.id[token] for token in self.text}, "merges": []},
        }  # fmt: skip
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))

    def _weights(self) -> Any:
        d, tones, size = self.width, len(TONES), len(self.tokens)
        spec = whisper_spec.WhisperSpec(1, 2, 1, 2)
        first = d - tones
        # (tone, last word, next word, and whether that needs the mark (1), or that there is none (-1))
        steps: list[tuple[int | None, str, str, int]] = [(None, "start", "<|nospeech|>", 0)]
        for k, sentence in enumerate(SENTENCES):
            chain = ["start", *(f"\u0120{word}" for word in sentence.split()), "<|endoftext|>"]
            if self.short == "hangs":
                steps += [(k, "start", chain[1], 0), (k, chain[1], chain[1], 0)]
                continue
            steps += [(k, *pair, 1 if self.short else 0) for pair in pairwise(chain)]
            if self.short == "guesses":
                steps += [(k, *pair, -1) for pair in pairwise(chain)]
            if self.short == "loops":
                steps += [(k, "start", chain[1], -1), (k, chain[1], chain[1], -1)]
        hidden = -(-len(steps) // 16) * 16

        encoder = spec.encoder
        encoder.conv1.weight, encoder.conv1.bias = _zeros(d, 80, 3), _zeros(d)
        encoder.conv2.weight, encoder.conv2.bias = _zeros(d, d, 3), _zeros(d)
        for k, hertz in enumerate(TONES):
            bands = np.argsort(abs(_mel_centres() - hertz))[:3]
            encoder.conv1.weight[first + k, :, 1] = -1 / 80
            encoder.conv1.weight[first + k, bands, 1] += 1 / 3
            encoder.conv1.bias[first + k] = -0.35  # no tone stays below it
            encoder.conv2.weight[first + k, first + k, 1] = 4
        encoder.position_encodings.encodings = _zeros(1500, d)
        encoder.position_encodings.encodings[-1, self.mark] = 1
        _norm(encoder.layer_norm, d)
        for layer in encoder.layer:
            _attention(layer.self_attention, 3, d)
            _feed(layer.ffn, d, hidden)

        rng = np.random.default_rng(7)
        codes = {}
        for name in ["start", "<|endoftext|>", "<|nospeech|>", *self.words]:
            code = rng.choice([-1.0, 1.0], first)
            code -= code.mean()
            code[self.mark] = 0
            codes[name] = (code / np.linalg.norm(code)).astype(np.float32)
        meaning, scores = _zeros(size, d), _zeros(size, d)
        for token in self.special + self.stamps:
            meaning[self.id[token], :first] = 6 * codes["start"]
        for token in [*self.words, "<|endoftext|>"]:
            meaning[self.id[token], :first] = 6 * codes[token]
            scores[self.id[token], :first] = 4 * codes[token]
        scores[self.id["<|nospeech|>"], :first] = 8 * codes["<|nospeech|>"]

        for language, sentences in self.languages.items():
            firsts = [codes[f"\u0120{SENTENCES[k].split()[0]}"] for k in sentences]
            scores[self.id[f"<|{language}|>"], :first] = np.sum(firsts, axis=0)

        decoder = spec.decoder
        decoder.embeddings.weight = meaning
        decoder.projection = common_spec.LinearSpec()
        decoder.projection.weight = scores
        decoder.position_encodings.encodings = _zeros(448, d)
        _norm(decoder.layer_norm, d)
        layer = decoder.layer[0]
        _attention(layer.self_attention, 3, d)
        cross = layer.attention
        for linear, rows in zip(cross.linear, (d, 2 * d, d), strict=True):
            linear.weight, linear.bias = _zeros(rows, d), _zeros(rows)
        _norm(cross.layer_norm, d)
        cross.linear[0].bias += 1
        cross.linear[1].weight[:d, first:] = 1
        diagonal = np.arange(first, d)
        cross.linear[1].weight[d + diagonal, diagonal] = 1
        cross.linear[2].weight[diagonal, diagonal] = 1
        # One of the two heads looks for the mark.
        cross.linear[1].weight[: d // 2] = 0
        cross.linear[1].weight[: d // 2, self.mark] = 1
        cross.linear[1].weight[d + self.mark, self.mark] = 1
        cross.linear[2].weight[self.mark, self.mark] = 1
        _feed(layer.ffn, d, hidden)
        layer.ffn.linear_0.bias -= 20
        for row, (k, here, following, marked) in enumerate(steps):
            layer.ffn.linear_0.weight[row, :first] = codes[here]
            layer.ffn.linear_0.weight[row, first:] = -2.0 if k is None else -0.5
            if k is not None:
                layer.ffn.linear_0.weight[row, first + k] = 1
            layer.ffn.linear_0.weight[row, self.mark] = 1 if k is None else 2 * marked
            layer.ffn.linear_0.bias[row] = -16 if marked == 1 else -6
            layer.ffn.linear_1.weight[:first, row] = 12 * codes[following]
            if self.short == "guesses" and marked == -1:
                # Just ahead of all other tokens together: right, but not sure.
                layer.ffn.linear_1.weight[:first, row] = 0.3 * codes[following] - 1.15 * codes[here]
        return spec


def _zeros(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


def _norm(spec: Any, d: int) -> None:
    spec.gamma, spec.beta = np.ones(d, np.float32), _zeros(d)


def _attention(spec: Any, times: int, d: int) -> None:
    for linear, rows in zip(spec.linear, (times * d, d), strict=True):
        linear.weight, linear.bias = _zeros(rows, d), _zeros(rows)
    _norm(spec.layer_norm, d)


def _feed(spec: Any, d: int, hidden: int) -> None:
    spec.linear_0.weight, spec.linear_0.bias = _zeros(hidden, d), _zeros(hidden)
    spec.linear_1.weight, spec.linear_1.bias = _zeros(d, hidden), _zeros(d)
    _norm(spec.layer_norm, d)


def _mel_centres() -> NDArray[np.float64]:
    """Centres in Hz of Whisper's 80 bands, on Slaney's scale: linear to 1 kHz, logarithmic above."""
    top = 15 + np.log(8) / (np.log(6.4) / 27)
    mels = np.linspace(0, top, 82)[1:-1]
    return np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
