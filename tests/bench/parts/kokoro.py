"""How soon Kokoro is heard: the first audio of replies of about 170 characters, ours over one call for the whole text.

The weights are random, the shapes are the real ones: decoder and generator of Kokoro-82M, where nearly all of its
time goes (the text encoder, some percent, is left out). Both ways speak with the same model and voice and take turns:
`KokoroTTS.stream` up to its first chunk, with no opener kept, and `Kokoro.create` of kokoro-onnx as it comes. Each
reply gives a ratio of medians; the result is the median of the replies. A second line says how soon a reply is heard
whose opener is kept.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from kokoro_onnx import Kokoro
from onnx import TensorProto, helper, numpy_helper
from parts.reports import report, tell

from agentvoicebox.plugins.kokoro import DEFAULT_VOICE, MODEL, VOICES, KokoroTTS

ROUNDS = 3

REPLIES = (
    "The weather in Berlin will be mild tomorrow, with some clouds in the morning and sunshine later on. The highest "
    "temperature is 21.5 degrees, so a light jacket should be enough.",
    "I have set a timer for twenty minutes and another one for an hour, and I will tell you when each of them is over. "
    "If you need more time, just ask me to add some to either.",
    "Your meeting with Dr. Smith begins at 10:30 a.m. and takes place in the large room on the second floor. Two other "
    "people have accepted, and one of them has not answered.",
)
"""None begins with an opener."""
OPENED = (
    "Sure, I can help you with that. The nearest pharmacy is about 1.5 km away and closes at eight in the evening, so "
    "there is enough time to walk there and to come back today."
)


class _Graph:
    """An ONNX graph that grows operation by operation; random weights, always the same."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._random = np.random.default_rng(0)

    def value(self, value: Any, kind: Any = np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def put(self, operation: str, *inputs: str, named: str = "", **more: Any) -> str:
        name = named or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, list(inputs), [name], **more))
        return name

    def longer(self, signal: str, channels: int, length: str) -> str:
        shape = self.put("Concat", self.value([1, channels], np.int64), length, axis=0)
        return self.put("Resize", signal, "", "", shape, mode="nearest")

    def convolved(self, signal: str, inside: int, outside: int, width: int, spread: int = 1) -> str:
        weights = self._random.standard_normal((outside, inside, width)) / (2 * np.sqrt(inside * width))
        return self.put(
            "Conv", signal, self.value(weights), self.value(np.zeros(outside)),
            kernel_shape=[width], dilations=[spread], pads=[spread * (width // 2)] * 2,
        )  # fmt: skip

    def normal(self, signal: str, channels: int) -> str:
        scale, shift = self.value(np.ones(channels)), self.value(np.zeros(channels))
        return self.put("InstanceNormalization", signal, scale, shift, epsilon=1e-5)

    def active(self, signal: str, channels: int, width: int, spread: int = 1) -> str:
        """Norm, snake activation and convolution, as in the generator."""
        even = self.normal(signal, channels)
        wave = self.put("Sin", even)
        return self.convolved(self.put("Add", even, self.put("Mul", wave, wave)), channels, channels, width, spread)

    def residual(self, signal: str, channels: int, width: int) -> str:
        for spread in (1, 3, 5):
            step = self.active(self.active(signal, channels, width, spread), channels, width)
            signal = self.put("Add", signal, step)
        return signal

    def leaky(self, signal: str, channels: int) -> str:
        even = self.put("LeakyRelu", self.normal(signal, channels), alpha=0.2)
        return self.convolved(even, channels, channels, 3)


def build(directory: Path) -> None:
    """Write a model with Kokoro's inputs, outputs and cost, and a voice: a phoneme is 50 ms of noise at speed 1."""
    graph = _Graph()
    flat = graph.value([-1], np.int64)
    tokens = graph.put("Reshape", "tokens", flat)
    count = graph.put("Reshape", graph.put("Size", tokens), flat)
    frames = graph.put("Cast", graph.put("Round", graph.put("Div", graph.value([2.0]), "speed")), to=TensorProto.INT64)
    slow = graph.put("Mul", count, graph.put("Max", frames, graph.value([1], np.int64)))
    fast = graph.put("Mul", slow, graph.value([2], np.int64))

    table = graph.value(np.random.default_rng(1).standard_normal((178, 512)) / 20)
    text = graph.put("Unsqueeze", graph.put("Gather", table, tokens), graph.value([0], np.int64))
    # Decoder: one block and three more of 1024 channels at 40 frames/s, and what leads to 512 at 80.
    signal = graph.convolved(graph.longer(graph.put("Transpose", text, perm=[0, 2, 1]), 512, slow), 512, 1024, 3)
    for _ in range(4):
        signal = graph.put("Add", signal, graph.leaky(graph.leaky(signal, 1024), 1024))
    signal = graph.longer(signal, 1024, fast)
    signal = graph.convolved(graph.convolved(signal, 1024, 512, 3), 512, 512, 3)
    # Generator: 10 and 6 times as many frames, each with its noise branch and three residual blocks.
    inside = 512
    for outside, width, stride, noise in ((256, 20, 10, 7), (128, 12, 6, 11)):
        weights = graph.value(np.random.default_rng(2).standard_normal((inside, outside, width)) / 50)
        signal = graph.put(
            "ConvTranspose", graph.put("LeakyRelu", signal, alpha=0.1), weights,
            kernel_shape=[width], strides=[stride], pads=[(width - stride) // 2] * 2,
        )  # fmt: skip
        quiet = graph.put("Mul", signal, graph.value(0.1))
        signal = graph.put("Add", signal, graph.residual(quiet, outside, noise))
        first, second, third = (graph.residual(signal, outside, size) for size in (3, 7, 11))
        both = graph.put("Add", graph.put("Add", first, second), third)
        signal, inside = graph.put("Mul", both, graph.value(1 / 3)), outside
    # Five channels at 4800 frames/s are 24 000 samples/s: what stands for the inverse Fourier transform.
    signal = graph.put("Tanh", graph.convolved(signal, 128, 5, 7))
    samples = graph.put("Reshape", graph.put("Transpose", signal, perm=[0, 2, 1]), flat)
    graph.put("Mul", samples, graph.value(0.3), named="audio")

    inputs = (("tokens", TensorProto.INT64, [1, "n"]), ("style", TensorProto.FLOAT, [1, 256]))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "kokoro",
            [helper.make_tensor_value_info(*put) for put in (*inputs, ("speed", TensorProto.FLOAT, [1]))],
            [helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["s"])],
            graph.weights,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    model.ir_version = 9
    onnx.save(model, str(directory / MODEL))
    with (directory / VOICES).open("wb") as out:
        np.savez(out, **{DEFAULT_VOICE: np.zeros((510, 1, 256), np.float32)})


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _first(engine: KokoroTTS, text: str) -> float:
    return _seconds(lambda: next(iter(engine.stream(text))))


async def measure() -> None:
    """Print the results."""
    await asyncio.to_thread(_measure)


def _measure() -> None:
    with tempfile.TemporaryDirectory(prefix="avb-bench-") as name:
        directory = Path(name)
        build(directory)
        engine = KokoroTTS({"model": str(directory)})
        stock = Kokoro(str(directory / MODEL), str(directory / VOICES))
        found: dict[str, tuple[list[float], list[float]]] = {text: ([], []) for text in REPLIES}
        # The first call of a model is not like the others.
        _first(engine, "Here and there.")
        stock.create("Here and there.", DEFAULT_VOICE)
        for number in range(ROUNDS):
            for text, (ours, whole) in found.items():
                tell(f"kokoro: round {number + 1} of {ROUNDS}, {len(text)} characters in clauses and as a whole")
                ours.append(_first(engine, text))
                whole.append(_seconds(lambda text=text: stock.create(text, DEFAULT_VOICE)))
        stock.voices.close()
        medians = [(statistics.median(ours), statistics.median(whole)) for ours, whole in found.values()]
        report(
            "speech.kokoro_first_audio",
            statistics.median(whole / ours for ours, whole in medians),
            "times sooner",
            8.0,
            "Kokoro.create of the whole reply",
            "higher",
            stream_s=[round(ours, 3) for ours, _ in medians],
            whole_s=[round(whole, 3) for _, whole in medians],
            characters=[len(text) for text in REPLIES],
            rounds=ROUNDS,
        )
        engine.warm()
        report(
            "speech.kokoro_kept_opener",
            statistics.median(_first(engine, OPENED) for _ in range(100)) * 1e3,
            "ms",
            200.0,
            "first audio of TTS-05",
            characters=len(OPENED),
        )


if __name__ == "__main__":
    _measure()
