"""The dispatcher that serves everything on one port: sockets go to the bridge, the rest to the REST application.

It is also the outermost boundary: every answer has an id of ours, and nothing that is raised anywhere below comes out
as anything else than an error in our format.
"""

from __future__ import annotations

import ipaddress
import re
import uuid
from typing import Any

from agentvoicebox.admin_api import errors
from agentvoicebox.admin_api.visits import VISIT, Visit
from agentvoicebox.bus_bridge.chat import ChatDoor
from agentvoicebox.bus_bridge.connection import Message, Receive
from agentvoicebox.bus_bridge.outbox import Send
from agentvoicebox.config.errors import AvbError

OLD, CURRENT = "/api/v1", "/api/v2"
DEPRECATED = (
    (b"deprecation", b"@1763683200"),  # RFC 9745: since when
    (b"link", b'</api/v2/openapi.json>; rel="successor-version"'),
)

_CORRELATION = re.compile(rb"[A-Za-z0-9._:/+=-]{1,100}")


class Node:
    """The ASGI application of a node."""

    def __init__(self, gateway: Any, rest: Any, chat: ChatDoor | None = None) -> None:
        self._gateway = gateway
        self._rest = rest
        self._chat = chat

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        scope["client"] = _address(scope.get("client"))
        if scope["type"] == "websocket":
            await self._gateway(scope, receive, _named(send))
        elif self._chat is not None and self._chat.serves(scope["path"]):
            await self._chat(scope, receive, _named(send))
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        scope, headers = _canonical(scope)
        visit = Visit(
            request_id=uuid.uuid4().hex,
            ip=scope["client"][0] if scope["client"] else None,
            asked=f"{scope['method']} {scope['path']}"[:300],
            user_agent=_header(scope, b"user-agent").decode("latin-1")[:500],
        )
        scope[VISIT] = visit
        headers.append((b"x-request-id", visit.request_id.encode()))
        # The client's own id never takes the place of ours: it may be sent twice, or hold anything.
        if _CORRELATION.fullmatch(correlation := _header(scope, b"x-request-id")):
            headers.append((b"x-correlation-id", correlation))
        started = complete = False

        async def reply(message: Message) -> None:
            nonlocal started, complete
            if message["type"] == "http.response.start":
                started = True
                message = {**message, "headers": [*message.get("headers", []), *headers, *visit.headers()]}
            elif not message.get("more_body"):
                complete = True
            await send(message)

        try:
            await self._rest(scope, receive, reply)
        except Exception as error:
            if not isinstance(error, AvbError) or started:
                visit.report(error)
            if complete:
                return
            if started:
                raise  # the server cuts the connection: half an answer must not look whole
            told = errors.known(error) if isinstance(error, AvbError) else errors.unexpected()
            await reply({"type": "http.response.start", "status": told.status, "headers": told.headers})
            await reply({"type": "http.response.body", "body": told.body})


def _named(send: Send) -> Send:
    """Sends what it is given, and gives an id to what begins an answer, or opens a socket, or refuses to."""
    request_id = (b"x-request-id", uuid.uuid4().hex.encode())

    async def reply(message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.accept", "websocket.http.response.start"):
            message = {**message, "headers": [*message.get("headers", []), request_id]}
        await send(message)

    return reply


def _canonical(scope: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[bytes, bytes]]]:
    """The request as its route knows it, without an older prefix or a slash at the end; and the headers that says."""
    path = scope["path"]
    headers: list[tuple[bytes, bytes]] = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
    if path == OLD or path.startswith(OLD + "/"):
        path = CURRENT + path.removeprefix(OLD)
        headers += DEPRECATED
    if len(path) > 1 and path.endswith("/"):
        path = path[:-1]
    # Of a GET the server leaves out the body where the request was a HEAD.
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": path, "method": method}, headers


def _header(scope: dict[str, Any], name: bytes) -> bytes:
    return next((bytes(value) for found, value in scope["headers"] if found == name), b"")


def _address(client: tuple[str, int] | None) -> tuple[str, int] | None:
    """Where a client is, if that is an address: sockets of files have none, and a proxy passes on what it was told."""
    try:
        # The store knows no zones, the `%eth0` of an address that is good on one link only.
        return (str(ipaddress.ip_address(client[0].partition("%")[0])), client[1]) if client else None
    except ValueError:
        return None
