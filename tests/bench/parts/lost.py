"""The platform dies while somebody speaks: how much later is the answer than on a device that never had one?"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable

from parts.node import beside
from parts.ovos import Device, running, silence, spoken
from parts.reports import report, tell
from parts.turns import WAKE, ours, turn

from agentvoicebox.plugins.device.link import STEADY

TIMES = 4
QUESTION = "what time is it"


async def interrupted(device: Device, disaster: Callable[[], None]) -> float:
    """A turn in whose middle something happens; seconds from the end of the speech to the first audio of the answer."""
    place, played = len(device.messages), len(device.played)
    question = spoken(QUESTION)
    half = len(question) // 4 * 2
    await device.speak(silence(0.3), spoken(WAKE), silence(0.2), question[:half])
    disaster()
    ended = await device.speak(question[half:])
    await device.speak(silence(1.5))
    heard, _ = (await device.plays(played + 1))[played]
    await device.wait_for("recognizer_loop:audio_output_end", place)
    return heard - ended


async def well(device: Device) -> None:
    """Wait until the device has had its platform for so long that it comes back soon after the next disaster."""
    await device.linked()
    await asyncio.sleep(STEADY)


async def measure() -> None:
    """Print how much later an answer is when the platform is killed, or its cable pulled, in mid-utterance."""
    with beside() as (directory, node):
        key = directory / "device.key"
        key.write_text(node.admit("bench", "--voice", "slt", "--wake-word", WAKE))
        tell(f"{TIMES} turns without a platform")
        async with running(directory / "offline", ours("http://127.0.0.1:9", key)) as device:
            await turn(device, QUESTION)
            never = [await turn(device, QUESTION) for _ in range(TIMES)]
        killed, pulled = [], []
        async with running(directory / "device", ours(node.url, key)) as device:
            await device.linked()
            await turn(device, QUESTION)
            for n in range(TIMES):
                tell(f"the platform is killed while somebody speaks, {n + 1} of {TIMES}")
                killed.append(await interrupted(device, node.kill))
                node.start()
                await well(device)
            for n in range(TIMES):
                tell(f"the cable is pulled while somebody speaks, {n + 1} of {TIMES}")
                pulled.append(await interrupted(device, node.freeze))
                node.thaw()
                await well(device)
    against = "the same turn on a device that never had a platform, end of speech to first audio"
    base = statistics.median(never)
    detail = {"never_p50_s": round(base, 3), "times": TIMES}
    for what, times in (("killed", killed), ("pulled", pulled)):
        report(
            f"device.{what}_in_mid_utterance",
            max(times) - base,
            "s",
            1.5,
            against,
            **detail,
            seconds=[round(t, 3) for t in times],
        )
