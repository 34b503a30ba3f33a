"""Language models by many providers, asked in one way: `Chats.stream`. Importing this imports no SDK."""

from __future__ import annotations

from agentvoicebox.plugins.chat.chats import Answer, Chats, Patience
from agentvoicebox.plugins.chat.connections import Reach
from agentvoicebox.plugins.chat.errors import ProviderFailed
from agentvoicebox.plugins.chat.metrics import ChatMetrics
from agentvoicebox.plugins.chat.request import Delta, Endpoint, Request
from agentvoicebox.plugins.chat.tokens import Tokens

__all__ = [
    "Answer",
    "ChatMetrics",
    "Chats",
    "Delta",
    "Endpoint",
    "Patience",
    "ProviderFailed",
    "Reach",
    "Request",
    "Tokens",
]
