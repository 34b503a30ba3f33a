"""The unmodified `openai` package holds its turns here with nothing changed but the base URL."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import pytest
import soxr
from openai import AsyncOpenAI, OpenAI


def at_24k(pcm: bytes) -> bytes:
    return soxr.resample(np.frombuffer(pcm, "<i2"), 16_000, 24_000).astype("<i2").tobytes()


@pytest.fixture
def client(stack: Any, customer: Any) -> AsyncOpenAI:
    return AsyncOpenAI(api_key=customer.key, base_url=f"{stack.url}/v1", max_retries=0)


async def test_a_spoken_turn_with_server_vad(client: AsyncOpenAI, speech: Any):
    pcm = at_24k(speech("what time is it")) + bytes(48_000)
    types: list[str] = []
    transcript = answer = ""
    audio = b""
    async with client.realtime.connect(model="gpt-realtime") as connection:
        await connection.session.update(
            session={
                "type": "realtime",
                "output_modalities": ["audio"],
                "audio": {"input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": 300}}},
            }
        )
        for i in range(0, len(pcm), 4_800):
            await connection.input_audio_buffer.append(audio=base64.b64encode(pcm[i : i + 4_800]).decode())
        async with asyncio.timeout(60):
            async for event in connection:
                types.append(event.type)
                if event.type == "conversation.item.input_audio_transcription.completed":
                    transcript = event.transcript
                elif event.type == "response.output_audio.delta":
                    audio += base64.b64decode(event.delta)
                elif event.type == "response.output_audio_transcript.done":
                    answer = event.transcript
                elif event.type == "response.done":
                    assert event.response.status == "completed"
                    break
                else:
                    assert event.type != "error", event
    assert transcript == "what time is it"
    assert answer
    assert len(audio) > 24_000, "at least half a second was spoken"
    assert types[:2] == ["session.created", "session.updated"]
    assert types.index("input_audio_buffer.speech_started") < types.index("input_audio_buffer.committed")
    assert types.index("response.created") < types.index("response.output_audio.delta")


async def test_a_written_turn(client: AsyncOpenAI):
    async with client.realtime.connect(model="gpt-realtime") as connection:
        await connection.session.update(session={"type": "realtime", "output_modalities": ["text"]})
        await connection.conversation.item.create(
            item={
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "who am i talking to"}],
            }
        )
        await connection.response.create()
        text = ""
        async with asyncio.timeout(60):
            async for event in connection:
                if event.type == "response.output_text.delta":
                    text += event.delta
                elif event.type == "response.done":
                    break
    assert "Ada" in text


async def test_the_synchronous_client_too(stack: Any, customer: Any):
    def turn() -> str:
        client = OpenAI(api_key=customer.key, base_url=f"{stack.url}/v1", max_retries=0)
        with client.realtime.connect(model="gpt-realtime") as connection:
            item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello world"}]}
            connection.conversation.item.create(item=item)
            connection.response.create(response={"output_modalities": ["text"]})
            for event in connection:
                if event.type == "response.done":
                    return event.response.output[0].content[0].text
        return ""

    assert await asyncio.to_thread(turn)


async def test_a_bad_key_fails_the_handshake(stack: Any):
    client = AsyncOpenAI(api_key="avb_" + "x" * 43, base_url=f"{stack.url}/v1", max_retries=0)
    with pytest.raises(Exception, match="401"):
        async with client.realtime.connect(model="gpt-realtime"):
            pass
