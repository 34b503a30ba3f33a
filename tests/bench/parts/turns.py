"""What our plugins add to a turn on a device: end of speech to first audio, against plain plugins."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parts.node import beside
from parts.ovos import Device, running, silence, spoken
from parts.reports import percentile, report, tell

ROUNDS = 2
TURNS = 8
QUESTIONS = ("what time is it", "what day is it", "what date is it")
WAKE = "alexa"

PLAIN: dict[str, Any] = {
    "stt": {"module": "agentvoicebox-stt-sphinx"},
    "tts": {"module": "agentvoicebox-tts-flite"},
    "hotwords": {"agentvoicebox": {"phrases": [WAKE]}},
}
"""The same engines on the device, as plain plugins of ovos-plugin-manager."""


def ours(url: str, key: Path) -> dict[str, Any]:
    """Our plugins, with a platform."""
    return {
        "agentvoicebox": {"url": url, "key_file": str(key)},
        "stt": {"module": "agentvoicebox-stt", "agentvoicebox-stt": {"fallback": "agentvoicebox-stt-sphinx"}},
        "tts": {"module": "agentvoicebox-tts", "agentvoicebox-tts": {"fallback": "agentvoicebox-tts-flite"}},
        "hotwords": {"agentvoicebox": {"phrases": [WAKE]}},
    }


async def turn(device: Device, question: str) -> float:
    """Ask something; seconds from the end of the speech to the first audio of the answer."""
    place, played = len(device.messages), len(device.played)
    ended = await device.speak(silence(0.3), spoken(WAKE), silence(0.2), spoken(question))
    await device.speak(silence(1.5))
    heard, _ = (await device.plays(played + 1))[played]
    await device.wait_for("recognizer_loop:audio_output_end", place)
    return heard - ended


async def turns(directory: Path, changes: Mapping[str, Any], count: int) -> list[float]:
    """The same for some questions on a fresh device, after one that warms it up."""
    async with running(directory, changes) as device:
        await turn(device, QUESTIONS[0])
        return [await turn(device, QUESTIONS[n % len(QUESTIONS)]) for n in range(count)]


async def measure() -> None:
    """Print what a turn takes with our plugins, and without a platform, beyond plain ones."""
    with beside() as (directory, node):
        key = directory / "device.key"
        key.write_text(node.admit("bench", "--voice", "slt", "--wake-word", WAKE))
        offline = ours("http://127.0.0.1:9", key)
        kinds = {"plain": PLAIN, "ours": ours(node.url, key), "offline": offline}
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for round_ in range(ROUNDS):
            for kind, changes in kinds.items():
                tell(f"{TURNS} spoken turns, {kind}, round {round_ + 1} of {ROUNDS}")
                found[kind] += await turns(directory / f"{kind}-{round_}", changes, TURNS)
    middle = {kind: statistics.median(times) * 1000 for kind, times in found.items()}
    detail = {f"{kind}_p50_ms": round(value, 1) for kind, value in middle.items()}
    detail |= {f"{kind}_p95_ms": round(percentile(times, 0.95) * 1000, 1) for kind, times in found.items()}
    against = "the same engines as plain plugins on the same stock device, end of speech to first audio"
    report(
        "device.added_first_audio_p50",
        middle["ours"] - middle["plain"],
        "ms",
        10,
        against,
        turns=ROUNDS * TURNS,
        **detail,
    )
    report(
        "device.added_offline_p50",
        middle["offline"] - middle["plain"],
        "ms",
        10,
        against,
        turns=ROUNDS * TURNS,
        **detail,
    )
