"""The dispatcher that serves everything on one port: sockets go to the bridge, the rest to the REST application."""

from __future__ import annotations

import ipaddress
import uuid
from typing import Any

from agentvoicebox.bus_bridge.connection import Message, Receive
from agentvoicebox.bus_bridge.outbox import Send


class Node:
    """The ASGI application of a node."""

    def __init__(self, gateway: Any, rest: Any) -> None:
        self._gateway = gateway
        self._rest = rest

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        scope["client"] = _address(scope.get("client"))
        if scope["type"] == "websocket":
            await self._gateway(scope, receive, send)
            return
        request_id = uuid.uuid4().hex.encode()

        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        await self._rest(scope, receive, reply)


def _address(client: tuple[str, int] | None) -> tuple[str, int] | None:
    """Where a client is, if that is an address: sockets of files have none, and a proxy passes on what it was told."""
    try:
        # The store knows no zones, the `%eth0` of an address that is good on one link only.
        return (str(ipaddress.ip_address(client[0].partition("%")[0])), client[1]) if client else None
    except ValueError:
        return None
