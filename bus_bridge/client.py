"""A small client of the native session socket, for the command line, the demo and the benchmarks."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from agentvoicebox.config.errors import AvbError, BadInput, Unavailable

FRAME = 0.02
"""Seconds of audio in one outgoing frame, as a microphone delivers it."""

PATIENCE = 60.0
"""Seconds to wait for the end of a turn."""


@dataclass(slots=True)
class Answer:
    """One turn as the client saw it. Times are in milliseconds."""

    transcript: str = ""
    text: str = ""
    audio: bytearray = field(default_factory=bytearray)
    """16-bit mono at `rate` Hz."""
    rate: int = 24_000
    timings_ms: dict[str, float] = field(default_factory=dict)
    first_audio_at: float | None = None
    """When the first audio arrived, by `time.monotonic`."""
    error: dict[str, str] | None = None
    heard_seconds: float = 0.0
    """Length of what was recognised, as the node says."""

    @property
    def audio_seconds(self) -> float:
        """Length of the spoken answer in seconds."""
        return len(self.audio) / 2 / self.rate


class Client:
    """One connected session."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def say(self, pcm: bytes, rate: int) -> Answer:
        """Stream 16-bit mono audio as a microphone would, then silence, until the answer is complete.

        `rate` must be the session's input rate. Raises `AvbError`.
        """
        answer = asyncio.create_task(self._answer())
        speaking = asyncio.create_task(self._stream(pcm, rate))
        try:
            return await answer
        finally:
            speaking.cancel()
            await asyncio.gather(speaking, answer, return_exceptions=True)

    async def write(self, text: str) -> Answer:
        """Write instead of speaking. Raises `AvbError`."""
        message = {"type": "response.create", "messages": [{"role": "user", "content": text}]}
        await self.socket.send(json.dumps(message))
        return await self._answer()

    async def _stream(self, pcm: bytes, rate: int) -> None:
        size = int(rate * FRAME) * 2
        silence, begin, sent = bytes(size), time.monotonic(), 0
        while True:
            chunk = pcm[sent * size : (sent + 1) * size].ljust(size, b"\0") if sent * size < len(pcm) else silence
            await self.socket.send(json.dumps({"type": "audio.chunk", "audio": base64.b64encode(chunk).decode()}))
            sent += 1
            await asyncio.sleep(max(0.0, begin + sent * FRAME - time.monotonic()))

    async def _answer(self) -> Answer:
        answer = Answer()
        try:
            async with asyncio.timeout(PATIENCE):
                async for frame in self.socket:
                    if self._take(json.loads(frame), answer):
                        return answer
        except TimeoutError as error:
            raise Unavailable(f"There was no answer within {PATIENCE:.0f} s.", code="no_answer") from error
        except ConnectionClosed:
            pass
        raise Unavailable(f"The connection was closed ({self.socket.close_code} {self.socket.close_reason}).")

    @staticmethod
    def _take(message: dict[str, Any], answer: Answer) -> bool:
        data = message.get("data", {})
        match message["type"]:
            case "transcription.final":
                answer.transcript = data["text"]
                answer.heard_seconds = data["audio_seconds"]
            case "audio.delta":
                if answer.first_audio_at is None:
                    answer.first_audio_at = time.monotonic()
                answer.audio += base64.b64decode(data["audio"])
                answer.rate = data["rate"]
            case "response.done":
                answer.text = data["text"]
                answer.timings_ms = data["timings_ms"]
                answer.error = data.get("error")
                return True
            case "error":
                raise BadInput(message["error"]["message"], code=message["error"]["code"])
        return False


@asynccontextmanager
async def session(url: str, key: str, config: dict[str, Any] | None = None) -> AsyncIterator[Client]:
    """Create a session on the node at `url` and connect to it. Raises `AvbError`."""
    headers = {"Authorization": f"Bearer {key}"}
    try:
        async with httpx.AsyncClient(headers=headers, trust_env=False) as http:
            reply = await http.post(f"{url.rstrip('/')}/api/v2/sessions", json=config or {})
        if reply.status_code != 201:
            raise _refusal(reply.status_code, reply.text)
        socket = await connect(
            reply.json()["ws_url"], additional_headers=headers, compression=None, max_size=None, proxy=None
        )
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise BadInput(f"{url} is no address of a node; give http://host:port.", param="url") from error
    except InvalidStatus as error:
        raise _refusal(error.response.status_code, (error.response.body or b"").decode(errors="replace")) from error
    except (httpx.HTTPError, OSError, InvalidHandshake) as error:
        raise Unavailable(f"The node at {url} does not answer: start it with `avb up`. ({error})") from error
    async with socket:
        yield Client(socket)


def _refusal(status: int, body: str) -> AvbError:
    try:
        found = json.loads(body)
        code, message = found["error"], found["message"]
    except (ValueError, KeyError, TypeError):
        code, message = "http_error", f"The node answered {status}."
    kind = BadInput if status < 500 else Unavailable
    return kind(message, code=code)
