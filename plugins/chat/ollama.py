"""Models on one's own machines, through the `ollama` SDK; OpenAI's forms are translated both ways."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import httpx
from ollama import AsyncClient

from agentvoicebox.plugins.chat.connections import Reach, drain, options
from agentvoicebox.plugins.chat.errors import ProviderFailed
from agentvoicebox.plugins.chat.request import Delta, Endpoint, Request, arguments, text_of
from agentvoicebox.plugins.chat.tokens import Count


class Ollama:
    """Talks to an Ollama server. Its calls come whole; it knows no `tool_choice` but all tools, one or none."""

    def __init__(self, endpoint: Endpoint, reach: Reach) -> None:
        chosen = options(httpx, endpoint, reach)
        if endpoint.key:
            chosen["headers"] |= {"Authorization": f"Bearer {endpoint.key}"}
        self._client = AsyncClient(host=endpoint.address, **chosen)

    async def deltas(
        self, model: str, request: Request, count: Count, *, temperature: float | None
    ) -> AsyncGenerator[Delta, None]:
        """The answer as it comes; `count` learns what it costs and how it ended. Raises errors of many kinds."""
        limits = {"num_predict": request.max_tokens}
        parts: Any = await self._client.chat(
            model=model,
            messages=messages(request),
            tools=tools(request) or None,
            stream=True,
            options=limits if temperature is None else limits | {"temperature": temperature},
        )
        calls = 0
        async with aclosing(parts):
            async for part in parts:
                message = part.message
                if message.thinking:
                    count.think(message.thinking)
                made = [_call(calls + more, each) for more, each in enumerate(message.tool_calls or ())]
                calls += len(made)
                if message.content or made:
                    yield Delta(message.content or "", made or None)
                if part.done:
                    count.told(input=part.prompt_eval_count, output=part.eval_count)
                    count.finish = "tool_calls" if calls else "length" if part.done_reason == "length" else "stop"
                    await drain(parts)
                    return
        raise ProviderFailed("provider_broke_off")

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()  # type: ignore[no-untyped-call]


def messages(request: Request) -> list[dict[str, Any]]:
    """A request's conversation in Ollama's form: results of tools name the tool, arguments are objects."""
    names: dict[str, str] = {}
    found = []
    for message in request.messages:
        role = "system" if message["role"] == "developer" else message["role"]
        turn: dict[str, Any] = {"role": role, "content": text_of(message)}
        if calls := message.get("tool_calls"):
            names |= {str(each.get("id")): each["function"]["name"] for each in calls}
            turn["tool_calls"] = [
                {"function": {"name": each["function"]["name"], "arguments": arguments(each["function"])}}
                for each in calls
            ]
        if role == "tool":
            turn["tool_name"] = names.get(str(message.get("tool_call_id")), "")
        found.append(turn)
    return found


def tools(request: Request) -> list[dict[str, Any]]:
    """The tools that the model may use: those of the request, unless `tool_choice` forbids them or names one."""
    choice = request.tool_choice
    if choice == "none":
        return []
    if isinstance(choice, dict):
        name = (choice.get("function") or choice).get("name")
        return [each for each in request.tools or () if each["function"]["name"] == name]
    return request.tools or []


def _call(index: int, call: Any) -> dict[str, Any]:
    made = {"name": call.function.name, "arguments": json.dumps(dict(call.function.arguments))}
    return {"index": index, "id": f"call_{index}", "type": "function", "function": made}
