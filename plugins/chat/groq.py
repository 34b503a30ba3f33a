"""Groq, which speaks like OpenAI, through the `groq` SDK."""

from __future__ import annotations

from typing import Any

import httpx
from groq import AsyncGroq
from groq.resources.chat import AsyncChat, AsyncCompletions  # noqa: F401  (or the first question would: all wait for it)

from agentvoicebox.plugins.chat.connections import Reach, options
from agentvoicebox.plugins.chat.openai import OpenAIShaped
from agentvoicebox.plugins.chat.request import Endpoint


class Groq(OpenAIShaped):
    """Counts of tokens come in the last chunk without asking, under a name of Groq's own."""

    more: dict[str, Any] = {}  # noqa: RUF012  (read only)

    def __init__(self, endpoint: Endpoint, reach: Reach) -> None:
        super().__init__(
            AsyncGroq(
                api_key=endpoint.key or "none",  # taken out again before it is sent
                base_url=endpoint.address,
                max_retries=0,
                http_client=httpx.AsyncClient(**options(httpx, endpoint, reach)),
            )
        )
