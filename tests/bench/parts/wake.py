"""Wake words: what hearing them costs, what is heard, and what is heard that nobody said.

The bare engine is pymicro-wakeword with one of its models, fed with the same audio in the chunks of a listener; ours is
the hotword plugin with the same phrase. The two take turns and their CPU is compared, as medians of the turns.
The speech is synthesised: ten voices of flite for the phrases, and four that say thirty commands for everything else.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from parts.reports import report, tell
from pymicro_wakeword import MicroWakeWord, MicroWakeWordFeatures

from agentvoicebox.plugins import phrases
from agentvoicebox.plugins.wake_word import TenantWakeWord

RATE, CHUNK, TURNS = 16_000, 4_096, 9

VOICES = (
    ("slt",), ("rms",), ("awb",), ("kal16",), ("kal",),
    ("slt", "duration_stretch=1.25"), ("rms", "duration_stretch=0.85"), ("awb", "duration_stretch=1.2"),
    ("kal16", "int_f0_target_mean=140"), ("rms", "int_f0_target_mean=130"),
)  # fmt: skip

COMMANDS = (
    "what time is it", "tell me a joke", "set a timer for five minutes", "what is the weather like today",
    "turn on the living room lights", "turn off the kitchen lights", "play some jazz music", "stop the music",
    "set the volume to fifty percent", "what is the date today", "wake me up at seven tomorrow morning",
    "add milk to my shopping list", "who is the president of france", "how far away is the moon",
    "what is two plus two", "remind me to call my mother", "cancel the timer", "what is your name", "good morning",
    "thank you very much", "pause", "next song please", "what day is it", "how are you", "will it rain tomorrow",
    "open the front door", "lock the back door", "set an alarm for six thirty", "tell me the news", "never mind",
)  # fmt: skip


async def measure() -> None:
    """Print the lines of the part."""
    tell("saying phrases and commands")
    with tempfile.TemporaryDirectory(prefix="avb-bench-") as name:
        file = Path(name) / "spoken.wav"
        spoken = {
            phrase: [_say(file, phrase, voice, *features) for voice, *features in VOICES]
            for phrase in ("okay nabu", "alexa")
        }
        others = b"".join(_say(file, text, voice) for voice in ("slt", "rms", "awb", "kal16") for text in COMMANDS)
    _cost(others)
    _false_fires(others)
    for phrase, each in spoken.items():
        _recall(phrase, each)


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


def _recall(phrase: str, spoken: list[bytes]) -> None:
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


def _say(file: Path, text: str, voice: str, *features: str) -> bytes:
    """A voice of flite with these features changed, quarters of a second around it, with a noise floor."""
    changed = [part for feature in features for part in ("--setf", feature)]
    subprocess.run(["flite", "-voice", voice, *changed, "-t", text, "-o", str(file)], check=True)
    with wave.open(str(file)) as wav:
        rate, pcm = wav.getframerate(), wav.readframes(wav.getnframes())
    samples = np.frombuffer(pcm, "<i2").astype(np.float32) / 32_768
    if rate != RATE:
        samples = soxr.resample(samples, rate, RATE)
    samples = np.pad(samples, RATE // 4)
    samples += np.random.default_rng(0).standard_normal(samples.size).astype(np.float32) / 1_000
    return (np.clip(samples, -1, 1) * 32_767).astype("<i2").tobytes()
