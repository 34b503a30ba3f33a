"""OpenAI's chat completions, as OpenAI and all who copy it speak them, through the `openai` SDK.

The SDK sends; of its answers the raw bytes are read, since building its models costs more than all else we do with a
chunk.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx2
from openai import AsyncOpenAI
from openai.resources.chat import AsyncChat, AsyncCompletions  # noqa: F401  (or the first question would: all wait for it)

from agentvoicebox.plugins.chat.connections import Lines, Reach, drain, expect, options
from agentvoicebox.plugins.chat.errors import ProviderFailed
from agentvoicebox.plugins.chat.pieces import MOST_CALLS
from agentvoicebox.plugins.chat.request import Delta, Endpoint, Request
from agentvoicebox.plugins.chat.tokens import Count


@dataclass(slots=True)
class Function:
    """A piece of a call: the name comes first, the arguments in pieces of JSON."""

    name: str | None = None
    arguments: str | None = None


@dataclass(slots=True)
class ToolCall:
    """A piece of the call at `index`."""

    index: int = 0
    id: str | None = None
    type: str | None = None
    function: Function | None = None


@dataclass(slots=True)
class Piece:
    """What a chunk adds to the answer. Reasoning has two names among those who copy OpenAI."""

    content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


@dataclass(slots=True)
class Choice:
    """One of the answers; we ask for one."""

    delta: Piece = field(default_factory=Piece)
    finish_reason: str | None = None


@dataclass(slots=True)
class Chunk:
    """One event of the stream."""

    choices: list[Choice] | None = None
    usage: Any = None
    x_groq: Any = None
    error: Any = None


class OpenAIShaped:
    """Talks through the client of any SDK made like OpenAI's."""

    limit = "max_completion_tokens"
    """What the provider calls the most tokens of an answer."""
    more: dict[str, Any] = {"stream_options": {"include_usage": True}}  # noqa: RUF012  (read only)

    def __init__(self, client: Any) -> None:
        import msgspec

        self._client = client
        self._decode = msgspec.json.Decoder(Chunk).decode
        self._convert = msgspec.convert

    async def deltas(
        self, model: str, request: Request, count: Count, *, temperature: float | None
    ) -> AsyncGenerator[Delta, None]:
        """The answer as it comes; `count` learns what it costs and how it ended. Raises errors of many kinds."""
        # Beside the SDK's own arguments, which it looks through member by member, for longer than the rest takes.
        body: dict[str, Any] = {"messages": request.messages, self.limit: request.max_tokens, **self.more}
        if temperature is not None:
            body["temperature"] = temperature
        if request.tools:
            body["tools"] = request.tools
            if request.tool_choice is not None:
                body["tool_choice"] = request.tool_choice
        create = self._client.chat.completions.with_streaming_response.create
        async with create(model=model, messages=[], stream=True, extra_body=body) as response:
            expect(response.headers)
            lines = Lines()
            async with aclosing(response.iter_bytes()) as content:
                async for data in content:
                    for line in lines.feed(data):
                        if line == b"[DONE]":
                            count.finish = count.finish or "stop"
                            await drain(content)
                            return
                        if (delta := self._delta(line, count)) is not None:
                            yield delta
            for line in lines.end():
                if line != b"[DONE]" and (delta := self._delta(line, count)) is not None:
                    yield delta
        if count.finish is None:
            raise ProviderFailed("provider_broke_off")

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    def _delta(self, line: bytes, count: Count) -> Delta | None:
        chunk = self._chunk(line)
        if chunk.error:
            raise ProviderFailed("provider_failed")
        usage = chunk.usage or (chunk.x_groq.get("usage") if isinstance(chunk.x_groq, dict) else None)
        if isinstance(usage, dict):
            details = usage.get("completion_tokens_details")
            hidden = details.get("reasoning_tokens") if isinstance(details, dict) else None
            count.told(input=usage.get("prompt_tokens"), output=usage.get("completion_tokens"), hidden=hidden)
        if not chunk.choices:
            return None
        choice = chunk.choices[0]
        piece = choice.delta
        count.finish = choice.finish_reason or count.finish
        if thought := piece.reasoning or piece.reasoning_content:
            count.think(thought)
        text = piece.content or piece.refusal or ""
        if piece.tool_calls:
            # One more than a whole answer may have is enough to refuse it.
            return Delta(text, [_wire(call) for call in piece.tool_calls[: MOST_CALLS + 1]])
        return Delta(text) if text else None

    def _chunk(self, line: bytes) -> Chunk:
        try:
            chunk: Chunk = self._decode(line)
        except ValueError:
            # Some write NaN and Infinity, which are not JSON; all else that is wrong here is wrong there, too.
            chunk = self._convert(json.loads(line), Chunk)
        return chunk


class OpenAI(OpenAIShaped):
    """OpenAI itself."""

    def __init__(self, endpoint: Endpoint, reach: Reach) -> None:
        super().__init__(
            AsyncOpenAI(
                api_key=endpoint.key or "none",  # taken out again before it is sent
                base_url=endpoint.address,
                max_retries=0,
                http_client=httpx2.AsyncClient(**options(httpx2, endpoint, reach)),
            )
        )


class Compatible(OpenAI):
    """Anything else that speaks like OpenAI; most know only the older name of the limit."""

    limit = "max_tokens"


def _wire(call: ToolCall) -> dict[str, Any]:
    """A piece of a call as OpenAI writes it."""
    return asdict(call, dict_factory=lambda pairs: {name: value for name, value in pairs if value is not None})
