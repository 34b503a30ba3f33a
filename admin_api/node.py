"""The dispatcher that serves everything on one port: sockets go to the bridge, the rest to the REST application."""

from __future__ import annotations

import uuid
from typing import Any

from agentvoicebox.bus_bridge.connection import Message, Receive, Send


class Node:
    """The ASGI application of a node."""

    def __init__(self, gateway: Any, rest: Any) -> None:
        self._gateway = gateway
        self._rest = rest

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        if scope["type"] == "websocket":
            await self._gateway(scope, receive, send)
            return
        request_id = uuid.uuid4().hex.encode()

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        await self._rest(scope, receive, reply)
