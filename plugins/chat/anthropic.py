"""Anthropic's messages, through the `anthropic` SDK; OpenAI's forms are translated both ways.

As with OpenAI, the SDK sends, and the raw bytes of its answers are read.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import httpx2
from anthropic import AsyncAnthropic

from agentvoicebox.plugins.chat.connections import Lines, Reach, drain, expect, options
from agentvoicebox.plugins.chat.errors import ProviderFailed
from agentvoicebox.plugins.chat.request import Delta, Endpoint, Request, arguments, text_of
from agentvoicebox.plugins.chat.tokens import Count

FINISHES: Final = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


@dataclass(slots=True)
class Block:
    """The beginning of a block of the answer: text, a call, or thoughts."""

    type: str = ""
    text: str = ""
    id: str = ""
    name: str = ""


@dataclass(slots=True)
class Piece:
    """What an event adds to a block, or to the message (`stop_reason`)."""

    type: str = ""
    text: str = ""
    partial_json: str = ""
    thinking: str = ""
    stop_reason: str | None = None


@dataclass(slots=True)
class Start:
    """The beginning of a message."""

    usage: Any = None


@dataclass(slots=True)
class Event:
    """One event of the stream."""

    type: str
    index: int = 0
    message: Start | None = None
    content_block: Block | None = None
    delta: Piece | None = None
    usage: Any = None


class Anthropic:
    """Talks to Anthropic's API, or to one that copies it."""

    def __init__(self, endpoint: Endpoint, reach: Reach) -> None:
        import msgspec

        self._client = AsyncAnthropic(
            api_key=endpoint.key or "none",  # taken out again before it is sent
            base_url=endpoint.address,
            max_retries=0,
            http_client=httpx2.AsyncClient(**options(httpx2, endpoint, reach)),
        )
        self._decode = msgspec.json.Decoder(Event).decode
        self._convert = msgspec.convert

    async def deltas(
        self, model: str, request: Request, count: Count, *, temperature: float | None
    ) -> AsyncGenerator[Delta, None]:
        """The answer as it comes; `count` learns what it costs and how it ended. Raises errors of many kinds."""
        asked = messages(request)
        if temperature is not None:  # the SDK has no argument for it any more; the API takes it, up to 1
            asked["extra_body"] = {"temperature": min(temperature, 1.0)}
        create = self._client.messages.with_streaming_response.create
        async with create(model=model, max_tokens=request.max_tokens, stream=True, **asked) as response:
            expect(response.headers)
            lines, calls = Lines(), dict[int, int]()
            async with aclosing(response.iter_bytes()) as body:
                async for data in body:
                    for line in lines.feed(data):
                        event = self._event(line)
                        if event.type == "message_stop":
                            count.finish = count.finish or "stop"
                            await drain(body)
                            return
                        if (delta := _delta(event, calls, count)) is not None:
                            yield delta
        if count.finish is None:
            raise ProviderFailed("provider_broke_off")

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    def _event(self, line: bytes) -> Event:
        try:
            event: Event = self._decode(line)
        except ValueError:  # NaN and Infinity are not JSON, but numbers to some
            event = self._convert(json.loads(line), Event)
        return event


def messages(request: Request) -> dict[str, Any]:
    """A request's conversation and tools in Anthropic's form, as arguments of `create`."""
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    for message in request.messages:
        if message["role"] in ("system", "developer"):
            system.append(text_of(message))
            continue
        role = "assistant" if message["role"] == "assistant" else "user"
        blocks = _blocks(message)
        if turns and turns[-1]["role"] == role:  # results of tools must stand together
            turns[-1]["content"] += blocks
        elif blocks and (turns or role == "user"):  # a conversation begins with the user, and nothing is empty
            turns.append({"role": role, "content": blocks})
    if not turns and system:
        turns = [{"role": "user", "content": [{"type": "text", "text": system.pop()}]}]
    asked: dict[str, Any] = {"messages": turns}
    if text := "\n\n".join(filter(None, system)):
        asked["system"] = text
    if request.tools:
        asked["tools"] = [_tool(each["function"]) for each in request.tools]
        if (choice := _choice(request.tool_choice)) is not None:
            asked["tool_choice"] = choice
    return asked


def _blocks(message: dict[str, Any]) -> list[dict[str, Any]]:
    text = text_of(message)
    if message["role"] == "tool":
        return [{"type": "tool_result", "tool_use_id": str(message.get("tool_call_id", "")), "content": text}]
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text.strip() else []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        blocks.append(
            {"type": "tool_use", "id": str(call.get("id", "")), "name": function["name"], "input": arguments(function)}
        )
    return blocks


def _tool(function: dict[str, Any]) -> dict[str, Any]:
    tool = {"name": function["name"], "input_schema": function.get("parameters") or {"type": "object"}}
    return tool | ({"description": function["description"]} if function.get("description") else {})


def _choice(choice: Any) -> dict[str, Any] | None:
    if isinstance(choice, dict):
        return {"type": "tool", "name": str((choice.get("function") or choice).get("name", ""))}
    return {"auto": {"type": "auto"}, "none": {"type": "none"}, "required": {"type": "any"}}.get(choice)


def _delta(event: Event, calls: dict[int, int], count: Count) -> Delta | None:
    """What an event means; `calls` holds the index, among the calls, of each block that is one."""
    if event.type == "content_block_delta" and event.delta is not None:
        piece = event.delta
        if piece.thinking:
            count.think(piece.thinking)
        if piece.partial_json:
            call = {"index": calls.get(event.index, 0), "function": {"arguments": piece.partial_json}}
            return Delta(tool_calls=[call])
        return Delta(piece.text) if piece.text else None
    if event.type == "content_block_start" and event.content_block is not None:
        block = event.content_block
        if block.type == "tool_use":
            index = calls[event.index] = len(calls)
            function = {"name": block.name, "arguments": ""}
            return Delta(tool_calls=[{"index": index, "id": block.id, "type": "function", "function": function}])
        return Delta(block.text) if block.type == "text" and block.text else None
    if event.type == "error":
        raise ProviderFailed("provider_failed")
    if event.type == "message_start" and event.message is not None:
        usage = event.message.usage  # of the output it knows the beginning only
        _told({**usage, "output_tokens": None} if isinstance(usage, dict) else None, count)
    elif event.type == "message_delta":
        _told(event.usage, count)
        if event.delta is not None and event.delta.stop_reason:
            count.finish = FINISHES.get(event.delta.stop_reason, "stop")
    return None


def _told(usage: Any, count: Count) -> None:
    """Hand on a count of tokens; those read from and written to a cache are part of the prompt."""
    if not isinstance(usage, dict):
        return
    taken = usage.get("input_tokens")
    for name in ("cache_creation_input_tokens", "cache_read_input_tokens"):
        more = usage.get(name)
        if isinstance(taken, int) and isinstance(more, int):
            taken += more
    details = usage.get("output_tokens_details")
    hidden = details.get("thinking_tokens") if isinstance(details, dict) else None
    count.told(input=taken, output=usage.get("output_tokens"), hidden=hidden)
