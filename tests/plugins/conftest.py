"""Voices to listen to, and synthetic models small enough to build in a test."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise, repeat
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from ctranslate2.specs import common_spec, whisper_spec
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from ovos_utils.log import LOG
from parts import corpus
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from agentvoicebox.plugins.device import connection, wire
from agentvoicebox.plugins.device.choices import Choices
from agentvoicebox.plugins.device.link import Link, State
from agentvoicebox.plugins.device.section import Section
from agentvoicebox.plugins.flite import FliteTTS
from agentvoicebox.plugins.kokoro import MODEL, VOICES
from agentvoicebox.plugins.pool import line

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


@pytest.fixture(scope="session")
def ten_voices() -> Callable[[str], Sequence[bytes]]:
    """`ten_voices(text)` is 16 kHz audio of ten voices: five, and five of those slower, faster or higher."""
    return corpus.ten_voices


@pytest.fixture(scope="session")
def commands() -> bytes:
    """Four minutes at 16 kHz of four voices that say thirty commands each, and no wake word."""
    return corpus.commands()


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


class Breaks(Exception):
    """Raised by what a `Platform` is to do: the connection ends there, without a word."""


class Platform:
    """What answers a device's link, as a test tells it to: `hear` and `say` may be replaced at any time.

    `say` gives the parts of what is spoken: (samples, rate), a problem, or None for a moment of work; both may raise
    `Breaks`. Without them nothing is ever said or understood, but for signs of work.
    """

    breaks = Breaks

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.heard: list[tuple[str, bytes]] = []
        self.said: list[tuple[str, str, str]] = []
        self.reports: list[dict[str, Any]] = []
        self.received = 0
        self.refusal = 0
        self.cancelled: list[int] = []
        self.hear: Callable[[bytes, str], str | wire.Problem] = lambda pcm, language: f"{len(pcm)}"
        self.say: Callable[[str], Iterator[tuple[bytes, int] | wire.Problem | None]] | None = lambda text: iter(
            [(bytes(3_200), 16_000)]
        )
        self.choices = Choices(tenant=tenant, voice="af_heart")
        self._sockets: set[ServerConnection] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: Server = self._do(self._serve(0))
        self.port: int = next(iter(self._server.sockets)).getsockname()[1]

    def configure(self, choices: Choices) -> None:
        """Tell all devices what the tenant has chosen."""
        self.choices = choices
        said = wire.encode(wire.Configured(choices.etag, choices.as_dict()))
        self._do(asyncio.wait([asyncio.ensure_future(each.send(said), loop=self._loop) for each in self._sockets]))

    def die(self) -> None:
        """Be gone, without a word."""

        async def die() -> None:
            self._server.close(close_connections=False)
            for each in list(self._sockets):
                each.transport.abort()

        self._do(die())

    def turn_away(self, code: int) -> None:
        """Close all connections, and those that come, with this code."""
        self.refusal = code
        self._do(asyncio.wait([asyncio.ensure_future(each.close(code), loop=self._loop) for each in self._sockets]))

    def live(self) -> None:
        """Be there again, at the same address."""
        self._server = self._do(self._serve(self.port))

    def close(self) -> None:
        self.die()
        self._do(self._server.wait_closed())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(_awaited(work), self._loop).result(30)

    async def _serve(self, port: int) -> Server:
        return await serve(self._meet, "127.0.0.1", port, compression=None)

    async def _meet(self, socket: ServerConnection) -> None:
        audio: dict[int, bytearray] = {}
        languages: dict[int, str] = {}
        tasks: set[asyncio.Task[None]] = set()
        await socket.recv()
        if self.refusal:
            return await socket.close(self.refusal)
        await socket.send(wire.encode(wire.Welcome(f"{self.tenant}-id", self.tenant, "device", 0.0)))
        await socket.send(wire.encode(wire.Configured(self.choices.etag, self.choices.as_dict())))
        self._sockets.add(socket)
        beats = asyncio.create_task(self._beat(socket, audio))
        try:
            async for frame in socket:
                if isinstance(frame, bytes):
                    number, pcm = wire.split(frame)
                    self.received += len(pcm)
                    audio.get(number, bytearray()).extend(pcm)
                    continue
                said = wire.decode(frame, wire.FROM_DEVICE)
                if isinstance(said, wire.Listen):
                    audio[said.id], languages[said.id] = bytearray(), said.language
                    await socket.send(wire.encode(wire.Working(said.id)))
                elif isinstance(said, wire.Finish) and self.hear is not None:
                    await self._hear(socket, said.id, bytes(audio.pop(said.id)), languages[said.id])
                elif isinstance(said, wire.Cancel):
                    self.cancelled.append(said.id)
                    audio.pop(said.id, None)
                elif isinstance(said, wire.Speak):
                    self.said.append((said.text, said.language, said.voice))
                    tasks.add(asyncio.create_task(self._say(socket, said)))
                elif isinstance(said, wire.Report):
                    self.reports += said.events
                    await socket.send(wire.encode(wire.Done(said.id)))
        except (Breaks, ConnectionClosed):
            socket.transport.abort()
        finally:
            self._sockets.discard(socket)
            for task in (beats, *tasks):
                task.cancel()

    async def _beat(self, socket: ServerConnection, audio: Mapping[int, bytearray]) -> None:
        while True:
            await asyncio.sleep(wire.BEAT)
            for number in list(audio):
                await socket.send(wire.encode(wire.Working(number)))

    async def _hear(self, socket: ServerConnection, number: int, pcm: bytes, language: str) -> None:
        self.heard.append((language, pcm))
        answer = self.hear(pcm, language)
        if isinstance(answer, wire.Problem):
            await socket.send(wire.encode(wire.Problem(number, answer.code, answer.message)))
        else:
            await socket.send(wire.encode(wire.Transcript(number, answer, confidence=0.9)))

    async def _say(self, socket: ServerConnection, said: wire.Speak) -> None:
        await socket.send(wire.encode(wire.Working(said.id)))
        try:
            for part in self.say(said.text) if self.say else repeat(None):
                if isinstance(part, wire.Problem):
                    await socket.send(wire.encode(wire.Problem(said.id, part.code, part.message)))
                    return
                if part is None:
                    await socket.send(wire.encode(wire.Working(said.id)))
                    await asyncio.sleep(0.01)
                    continue
                await socket.send(wire.encode(wire.Sound(said.id, part[1])))
                for start in range(0, len(part[0]), 65_536):
                    await socket.send(wire.audio(said.id, part[0][start : start + 65_536]))
        except (Breaks, ConnectionClosed):
            socket.transport.abort()
        else:
            await socket.send(wire.encode(wire.Done(said.id)))


async def _awaited(work: Any) -> Any:
    return await work


@pytest.fixture
def platforms() -> Iterator[Callable[..., Platform]]:
    """`platforms(tenant)` is a platform of that tenant."""
    made: list[Platform] = []

    def make(tenant: str = "acme") -> Platform:
        made.append(Platform(tenant))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Platform, str], Link]]:
    """`links(platform, process)` is a link that is up and knows what the tenant has chosen.

    It bears with a machine that stalls: how it notices a platform that is silent is for the tests of the link.
    """
    monkeypatch.setattr(connection, "SILENT", 30.0)
    monkeypatch.setattr(connection, "FORGOTTEN", 60.0)
    made: list[Link] = []

    def make(platform: Platform, process: str) -> Link:
        key = tmp_path / f"{platform.tenant}.key"
        key.write_text("avb_" + "k" * 43)
        section = Section(f"http://127.0.0.1:{platform.port}", key, state=tmp_path / f"{platform.tenant}-{len(made)}")
        link = Link(section, process, name="device")
        made.append(link)
        until(lambda: link.state is State.UP and link.choices == platform.choices)
        return link

    yield make
    for each in made:
        each.close()


def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    """Return when it is; fail when it takes too long."""
    still = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if true():
            return
        still.wait(0.01)
    raise AssertionError("it never came to be")


@pytest.fixture(name="until")
def _until() -> Callable[..., None]:
    return until


class Waits:
    """Stands for `asyncio` in a module, whose time-outs are then over when a test says so.

    A short one in place of that may be over before what should come first has come: machines stand still at times.
    """

    def __init__(self) -> None:
        self.granted: list[float] = []
        """The seconds of each wait that has begun."""
        self._begun: list[asyncio.Timeout] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    def timeout(self, delay: float) -> asyncio.Timeout:
        """What the module calls in place of `asyncio.timeout`."""
        return self.timeout_at(asyncio.get_running_loop().time() + delay)

    def timeout_at(self, when: float) -> asyncio.Timeout:
        """What the module calls in place of `asyncio.timeout_at`."""
        self.granted.append(when - asyncio.get_running_loop().time())
        self._begun.append(asyncio.timeout_at(when))
        return self._begun[-1]

    def end(self, most: float = math.inf) -> None:
        """Those who were granted so many seconds, or fewer, have waited long enough."""
        for seconds, wait in zip(self.granted, self._begun, strict=True):
            if seconds <= most:
                with suppress(RuntimeError):  # it has ended otherwise
                    wait.reschedule(asyncio.get_running_loop().time())

    async def end_all(self, task: asyncio.Future[Any]) -> None:
        """End each wait, now and as they begin, until `task` is done."""
        while not task.done():
            self.end()
            await asyncio.sleep(0.001)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], Waits]:
    """`waits(module)` are those of this module from now on."""

    def take(module: ModuleType) -> Waits:
        made = Waits()
        monkeypatch.setattr(module, "asyncio", made)
        return made

    return take


@pytest.fixture
def deadlines(waits: Callable[[ModuleType], Waits]) -> Waits:
    """Those of who waits for an engine of a pool."""
    return waits(line)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said in the log of the OVOS service, line by line."""
    written: list[str] = []

    def write(line: object, *values: object, **_: object) -> None:
        written.append(str(line) % values if values else str(line))

    for name in ("info", "warning", "error", "exception"):
        monkeypatch.setattr(LOG, name, write)
    return written
