"""Whisper base against stock faster-whisper: alone, and with four clients.

The model has the real shapes and random weights: what it says means nothing, what it costs is true. Both write exactly
twelve tokens for each utterance of 5 s, greedily and without timestamps, and neither checks its answers; so what
differs is the window, the batches and the workers. Stock is one `WhisperModel` with the threads the stock plugin gives
it, called from as many threads as there are clients; alone it also runs with one thread for each core, and the better
of both counts. Ours is the plugin in a real pool. The two take turns, and medians of the turns are compared; the CPU
of one utterance, which others on the machine change least, is told beside them.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from ctranslate2.specs import whisper_spec
from faster_whisper import WhisperModel
from faster_whisper.tokenizer import _LANGUAGE_CODES
from parts.reports import percentile, report, tell

from agentvoicebox.plugins import whisper
from agentvoicebox.plugins.pool import EngineSpec, Pool

TOKENS, SECONDS, RATE, CLIENTS, TURNS = 12, 5, 16_000, 4, 3

STOCK_THREADS = 4
"""What the stock plugin asks for."""

Hear = Callable[[int], Awaitable[Any]]
"""Has what client k says transcribed."""


async def measure() -> None:
    """Print the three lines of the part."""
    with tempfile.TemporaryDirectory(prefix="avb-bench-") as name:
        tell("building a model of random weights in the shapes of Whisper base")
        directory = Path(name) / "faster-whisper-base"
        random_base(directory)
        await _compare(directory)


async def _compare(directory: Path) -> None:
    # Random weights never end a text, and no answer of theirs would pass a check.
    whisper._Utterance.most_tokens = property(lambda self: TOKENS)
    whisper._Guess.doubtful = property(lambda self: False)
    spec = EngineSpec("stt", "agentvoicebox-stt-whisper", (("model", str(directory)), ("parallel", 2), ("vad", False)))
    rng = np.random.default_rng(0)
    pcm = [(rng.standard_normal(SECONDS * RATE) * 3_000).astype("<i2").tobytes() for _ in range(CLIENTS)]
    samples = [np.frombuffer(one, "<i2").astype(np.float32) / 32_768 for one in pcm]
    pool = Pool(threads=2)
    try:
        await pool.load(spec)
        with ThreadPoolExecutor(CLIENTS) as threads:

            def stock(count: int) -> Hear:
                hear = _stock(directory, count)
                return lambda k: asyncio.get_running_loop().run_in_executor(threads, hear, samples[k])

            def ours(k: int) -> Awaitable[Any]:
                return pool.transcribe(spec, pcm[k], RATE, "en", tenant=str(k))

            await _alone(ours, {count: stock(count) for count in (2, STOCK_THREADS)})
            await _together(ours, stock(STOCK_THREADS))
    finally:
        pool.close()


async def _alone(ours: Hear, stock: dict[int, Hear]) -> None:
    tell("one client")
    mine = Turns(ours, 1)
    theirs = {count: Turns(hear, 1) for count, hear in stock.items()}
    for _ in range(2 * TURNS):
        for each in theirs.values():
            await each.take(1)
        await mine.take(2)
    best = min(theirs.values(), key=lambda each: each.middle)
    report(
        "speech.whisper_alone",
        best.middle / mine.middle,
        "x",
        3.5,
        "stock WhisperModel.transcribe",
        better="higher",
        ours_ms=round(mine.middle * 1e3),
        **{f"stock_{count}_threads_ms": round(each.middle * 1e3) for count, each in theirs.items()},
    )


async def _together(ours: Hear, stock: Hear) -> None:
    tell(f"{CLIENTS} clients")
    mine, theirs = Turns(ours, CLIENTS), Turns(stock, CLIENTS)
    for _ in range(TURNS):
        await theirs.take(2)
        await mine.take(8)
    against = f"stock, {CLIENTS} threads calling"
    report(
        "speech.whisper_throughput",
        mine.rate / theirs.rate,
        "x",
        5.0,
        against,
        better="higher",
        ours_per_second=round(mine.rate, 2),
        stock_per_second=round(theirs.rate, 2),
        ours_cpu_ms=round(mine.work * 1e3),
        stock_cpu_ms=round(theirs.work * 1e3),
    )
    report(
        "speech.whisper_p95",
        percentile(mine.took, 0.95) * 1e3,
        "ms",
        500.0,
        against,
        ours_p50_ms=round(mine.middle * 1e3),
        stock_p95_ms=round(percentile(theirs.took, 0.95) * 1e3),
        clients=CLIENTS,
        utterances=len(mine.took),
    )


class Turns:
    """Rounds in which each of some clients asks, one question after the other."""

    def __init__(self, hear: Hear, clients: int) -> None:
        self._hear, self._clients = hear, clients
        self.took: list[float] = []
        self._rates: list[float] = []
        self._work: list[float] = []

    async def take(self, times: int) -> None:
        """Let every client ask `times` times."""
        begin, worked = time.perf_counter(), time.process_time()
        await asyncio.gather(*(self._client(k, times) for k in range(self._clients)))
        count = self._clients * times
        self._rates.append(count / (time.perf_counter() - begin))
        self._work.append((time.process_time() - worked) / count)

    async def _client(self, k: int, times: int) -> None:
        for _ in range(times):
            begin = time.perf_counter()
            await self._hear(k)
            self.took.append(time.perf_counter() - begin)

    @property
    def middle(self) -> float:
        """Seconds an answer takes."""
        return statistics.median(self.took)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return statistics.median(self._rates)

    @property
    def work(self) -> float:
        """Seconds of CPU an answer takes."""
        return statistics.median(self._work)


def _stock(directory: Path, threads: int) -> Callable[[Any], None]:
    model = WhisperModel(str(directory), device="cpu", compute_type="int8", cpu_threads=threads)

    def hear(samples: Any) -> None:
        segments, _ = model.transcribe(
            samples,
            language="en",
            beam_size=1,
            temperature=0,
            without_timestamps=True,
            max_new_tokens=2 * TOKENS - 4,  # CTranslate2 takes half of this and the prompt's four
            compression_ratio_threshold=None,
            log_prob_threshold=None,
            no_speech_threshold=None,
        )
        count = sum(len(segment.tokens) for segment in segments)
        if count != TOKENS:
            raise RuntimeError(f"stock wrote {count} tokens, not {TOKENS}")

    return hear


def random_base(directory: Path) -> None:
    """A CTranslate2 Whisper of 6 and 6 layers, 512 wide, of random weights in int8, with a tokenizer of its size."""
    layers, width, heads, bands, size = 6, 512, 8, 80, 51_865
    rng = np.random.default_rng(0)

    def linear(spec: Any, rows: int, columns: int) -> None:
        spec.weight = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
        spec.bias = np.zeros(rows, np.float32)

    def norm(spec: Any) -> None:
        spec.gamma, spec.beta = np.ones(width, np.float32), np.zeros(width, np.float32)

    def layer(spec: Any) -> None:
        norm(spec.self_attention.layer_norm)
        linear(spec.self_attention.linear[0], 3 * width, width)
        linear(spec.self_attention.linear[1], width, width)
        norm(spec.ffn.layer_norm)
        linear(spec.ffn.linear_0, 4 * width, width)
        linear(spec.ffn.linear_1, width, 4 * width)

    spec = whisper_spec.WhisperSpec(layers, heads, layers, heads)
    for conv, inputs in ((spec.encoder.conv1, bands), (spec.encoder.conv2, width)):
        conv.weight = rng.standard_normal((width, inputs, 3), dtype=np.float32) * np.float32(0.02)
        conv.bias = np.zeros(width, np.float32)
    spec.encoder.position_encodings.encodings = rng.standard_normal((1_500, width), dtype=np.float32)
    spec.decoder.position_encodings.encodings = rng.standard_normal((448, width), dtype=np.float32)
    spec.decoder.embeddings.weight = rng.standard_normal((size, width), dtype=np.float32) * np.float32(0.02)
    spec.decoder.projection.weight = spec.decoder.embeddings.weight
    norm(spec.encoder.layer_norm)
    norm(spec.decoder.layer_norm)
    for each in spec.encoder.layer:
        layer(each)
    for each in spec.decoder.layer:
        layer(each)
        norm(each.attention.layer_norm)
        for part, rows in zip(each.attention.linear, (width, 2 * width, width), strict=True):
            linear(part, rows, width)

    names = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
    languages = [code for code in _LANGUAGE_CODES if code != "yue"]  # large-v3 alone knows it
    special = [f"<|{name}|>" for name in ("endoftext", "startoftranscript", *languages, *names)]
    stamps = [f"<|{n * 0.02:.2f}|>" for n in range(1_501)]
    # The alphabet of all bytes, as the tokenizer writes them; the empty token says that the vocabulary is multilingual.
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    text = [*letters, *(f"w{n}" for n in range(size - len(letters) - 1 - len(special) - len(stamps))), ""]
    tokens = text + special + stamps
    spec.register_vocabulary(tokens)
    number = {token: place for place, token in enumerate(tokens)}
    spec.config.suppress_ids = [number[f"<|{name}|>"] for name in ("endoftext", "startoftranscript", *names[:5])]
    spec.config.suppress_ids_begin = [number["<|endoftext|>"]]
    spec.config.lang_ids = [number[f"<|{code}|>"] for code in languages]
    spec.config.alignment_heads = [(0, 0)]
    spec.validate()
    spec.optimize(quantization="int8")
    directory.mkdir()
    spec.save(str(directory))
    added = [
        {"id": number[token], "content": token, "special": token in special}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token in special + stamps
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "model": {"type": "BPE", "vocab": {token: number[token] for token in text}, "merges": []},
    }
    tokenizer["decoder"] = tokenizer["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


if __name__ == "__main__":
    asyncio.run(measure())
