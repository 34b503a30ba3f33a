"""The tenant's ears and voice with a real node: what a device says and hears there, and what is metered."""

from __future__ import annotations

import asyncio
import time
import wave
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agentvoicebox.plugins.device.link import Link, State
from agentvoicebox.plugins.device.section import Section
from agentvoicebox.plugins.stt import TenantSTT
from agentvoicebox.plugins.tts import TenantTTS

PATIENCE = 60.0
"""Seconds for what comes at some time; as long as a device may wait for an answer."""


@pytest.fixture
async def link(stack: Any, new_customer: Any, tmp_path: Path) -> AsyncIterator[Link]:
    customer = await new_customer(language="en-US")
    key = tmp_path / "device.key"
    key.write_text(customer.key)
    link = Link(Section(stack.url, key, state=tmp_path), "listener", name="device")
    until = time.monotonic() + PATIENCE
    while link.state is not State.UP:
        assert time.monotonic() < until, link.reason
        await asyncio.sleep(0.02)
    yield link
    await asyncio.to_thread(link.close)


async def test_a_node_hears_what_is_said_to_a_device(link: Link, speech: Callable[..., bytes]):
    ear = TenantSTT({"fallback": "", "patience": PATIENCE}, link=link)
    pcm = speech("what time is it")

    def say() -> list[tuple[str, float]]:
        ear.stream_start()
        for start in range(0, len(pcm), 2_048):
            ear.stream_data(pcm[start : start + 2_048])
            time.sleep(0.03)
        return ear.transcribe(lang=ear.lang)

    assert [text for text, _ in await asyncio.to_thread(say)] == ["what time is it"]
    assert [text for text, _ in await asyncio.to_thread(ear.transcribe, pcm, "en-US")] == ["what time is it"]
    assert await asyncio.to_thread(ear.transcribe, bytes(32_000), "en-US") == [("", 0.0)]


async def test_a_node_speaks_for_a_device(link: Link, tmp_path: Path):
    voice = TenantTTS({"fallback": "", "patience": PATIENCE, "lang": "en-US"}, link=link)
    path, _ = await asyncio.to_thread(voice.get_tts, "It is five o'clock.", str(tmp_path / "a.wav"))
    with wave.open(path) as wav:
        assert wav.getnframes() / wav.getframerate() > 0.7
    voice.shutdown()
