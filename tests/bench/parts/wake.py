"""Wake words: what hearing them costs, what is heard, and what is heard that nobody said.

The bare engine is pymicro-wakeword with one of its models, fed with the same audio in the chunks of a listener; ours is
the hotword plugin with the same phrase. The two take turns and their CPU is compared, as medians of the turns.
The speech is synthesised: ten voices of flite for the phrases, and four that say thirty commands for everything else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from parts import corpus
from parts.corpus import RATE
from parts.reports import report, tell
from pymicro_wakeword import MicroWakeWord, MicroWakeWordFeatures

from agentvoicebox.plugins import phrases
from agentvoicebox.plugins.wake_word import TenantWakeWord

CHUNK, TURNS = 4_096, 9


async def measure() -> None:
    """Print the lines of the part."""
    tell("saying phrases and commands")
    others = corpus.commands()
    _cost(others)
    _false_fires(others)
    for phrase in ("okay nabu", "alexa"):
        _recall(phrase, corpus.ten_voices(phrase))


def _cost(speech: bytes) -> None:
    tell("hearing a minute of speech, and one of a quiet room, ours and bare in turns")
    speech = speech[: 60 * 2 * RATE]
    room = np.random.default_rng(0).normal(0, 30, 60 * RATE).astype("<i2").tobytes()
    # A phrase without a model of its own is searched for while somebody speaks, and costs hardly anything else.
    spelt = {"speech": _cpu(_ours("hey computer"), speech), "idle": _cpu(_ours("hey computer"), room)}
    for name, pcm in (("speech", speech), ("idle", room)):
        ours, bare = [], []
        for _ in range(TURNS):
            ours.append(_cpu(_ours("okay nabu"), pcm))
            bare.append(_cpu(_Bare("okay nabu").hear, pcm))
        mine, theirs = statistics.median(ours), statistics.median(bare)
        turns: dict[str, Any] = {"phrase_without_model_ms": round(spelt[name], 3)}
        turns |= {"ours_ms": [round(each, 3) for each in ours], "bare_ms": [round(each, 3) for each in bare]}
        if name == "speech":
            report("wake.cpu", mine / theirs, "ratio", 1.2, "the bare engine with one model", **turns)
        else:
            report("wake.idle", mine, "ms/s", 3.0, f"the bare engine takes {theirs:.2f}", **turns)


def _false_fires(others: bytes) -> None:
    every = phrases.available()
    tell(f"hearing {len(others) / 2 / RATE:.0f} s of commands with {len(every)} phrases")
    fired = sum(_fires(_ours(phrase), others) for phrase in every)
    theirs = sum(_fires(_Bare(phrase).hear, others) for phrase in every)
    report(
        "wake.false_fires",
        fired,
        "times",
        0,
        f"the bare engines: {theirs}",
        phrases=every,
        seconds=len(others) / 2 / RATE,
    )


def _recall(phrase: str, spoken: Sequence[bytes]) -> None:
    ours = [_fires(_ours(phrase), pcm + bytes(2 * RATE)) > 0 for pcm in spoken]
    bare = [_fires(_Bare(phrase).hear, pcm + bytes(2 * RATE)) > 0 for pcm in spoken]
    report(
        f"wake.recall.{phrase.replace(' ', '_')}",
        sum(ours),
        f"of {len(spoken)} voices",
        sum(bare),
        "the bare engine",
        better="higher",
        same_voices=ours == bare,
    )


class _Bare:
    """pymicro-wakeword as it comes."""

    def __init__(self, phrase: str) -> None:
        self._model = MicroWakeWord.from_config(phrases.model_file(phrases.check(phrase).model))
        self._features = MicroWakeWordFeatures()
        self._over = False

    def hear(self, chunk: bytes) -> bool:
        """Whether the probability comes up to the cutoff in this chunk."""
        begins = False
        for row in self._features.process_streaming(chunk):
            probability = self._model.process_streaming_prob(row)
            over = probability is not None and probability > self._model.probability_cutoff
            begins = begins or (over and not self._over)
            # While it collects rows for a step it says 0, which is not that it came down.
            if probability:
                self._over = over
        return begins


def _ours(phrase: str) -> Callable[[bytes], bool]:
    engine = TenantWakeWord(phrase, {"module": "agentvoicebox-ww", "phrases": [phrase]})

    def hear(chunk: bytes) -> bool:
        engine.update(chunk)
        return engine.found_wake_word()

    return hear


def _cpu(hear: Callable[[bytes], bool], pcm: bytes) -> float:
    """Milliseconds for each second of audio."""
    begin = time.thread_time()
    for chunk in _chunks(pcm):
        hear(chunk)
    return (time.thread_time() - begin) * 1e3 / (len(pcm) / 2 / RATE)


def _fires(hear: Callable[[bytes], bool], pcm: bytes) -> int:
    return sum(hear(chunk) for chunk in _chunks(pcm))


def _chunks(pcm: bytes) -> Iterator[bytes]:
    return (pcm[start : start + CHUNK] for start in range(0, len(pcm), CHUNK))
