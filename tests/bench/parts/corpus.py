"""Synthesised speech to hear wake words in: ten voices that say a phrase, and four minutes in which nobody does."""

from __future__ import annotations

import subprocess
import tempfile
import wave
from functools import cache

import numpy as np
import soxr

RATE = 16_000

VOICES = (
    ("slt",), ("rms",), ("awb",), ("kal16",), ("kal",),
    ("slt", "duration_stretch=1.25"), ("rms", "duration_stretch=0.85"), ("awb", "duration_stretch=1.2"),
    ("kal16", "int_f0_target_mean=140"), ("rms", "int_f0_target_mean=130"),
)  # fmt: skip
"""Five of flite, and five of those slower, faster or higher."""

COMMANDS = (
    "what time is it", "tell me a joke", "set a timer for five minutes", "what is the weather like today",
    "turn on the living room lights", "turn off the kitchen lights", "play some jazz music", "stop the music",
    "set the volume to fifty percent", "what is the date today", "wake me up at seven tomorrow morning",
    "add milk to my shopping list", "who is the president of france", "how far away is the moon",
    "what is two plus two", "remind me to call my mother", "cancel the timer", "what is your name", "good morning",
    "thank you very much", "pause", "next song please", "what day is it", "how are you", "will it rain tomorrow",
    "open the front door", "lock the back door", "set an alarm for six thirty", "tell me the news", "never mind",
)  # fmt: skip


@cache
def ten_voices(text: str) -> tuple[bytes, ...]:
    """Each of the voices says it: 16 kHz 16-bit mono."""
    return tuple(say(text, voice, *features) for voice, *features in VOICES)


@cache
def commands() -> bytes:
    """Four minutes of four voices that say all of the commands, and no wake word: 16 kHz 16-bit mono."""
    return b"".join(say(text, voice) for voice in ("slt", "rms", "awb", "kal16") for text in COMMANDS)


def say(text: str, voice: str, *features: str) -> bytes:
    """A voice of flite with these features changed, quarters of a second around it, with a noise floor."""
    changed = [part for feature in features for part in ("--setf", feature)]
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run(["flite", "-voice", voice, *changed, "-t", text, "-o", file.name], check=True)
        with wave.open(file.name) as wav:
            rate, pcm = wav.getframerate(), wav.readframes(wav.getnframes())
    samples = np.frombuffer(pcm, "<i2").astype(np.float32) / 32_768
    if rate != RATE:
        samples = soxr.resample(samples, rate, RATE)
    samples = np.pad(samples, RATE // 4)
    samples += np.random.default_rng(0).standard_normal(samples.size).astype(np.float32) / 1_000
    return (np.clip(samples, -1, 1) * 32_767).astype("<i2").tobytes()
