"""The server side of HTTP, with an end to patience: uvicorn waits for ever for what a client has begun to say.

Nothing here knows routes or keys. It bounds what one connection may cost before an application has seen it: the time
that headers, bodies and answers take, and the bytes that are held for headers and for the packaging of bodies.
"""

from __future__ import annotations

import asyncio
import http
import uuid
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from agentvoicebox.admin_api import errors


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a client may take. Times are seconds."""

    headers: float = 10.0
    """From the first byte of a request, or from connecting, to the end of its headers."""
    body: float = 30.0
    """From there to the end of the body."""
    answer: float = 30.0
    """For which a client may leave unread what it is sent."""
    leftover: float = 2.0
    """For which the rest of a body is thrown away that was answered before it had ended."""
    head_bytes: int = 32 * 1024
    """Of the request line and headers, and of what surrounds the chunks of a body."""
    head_fields: int = 100


DEFAULT = Bounds()


class _TooMuch(Exception):
    """The headers are larger than we take."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol for its `http` setting, within `bounds`."""

    def __init__(self, *args: Any, bounds: Bounds = DEFAULT, **options: Any) -> None:
        super().__init__(*args, **options)
        self._bounds = bounds
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._in_body = False
        self._in_head = False
        self._refused = False
        self._packaging = 0
        """Bytes of this request that are not its body."""
        self._fields = 0
        self._head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm(self._bounds.headers)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._timer is None:
            self._arm(self._bounds.headers)  # empty lines before a request begins no request, but ends our patience
        self._packaging += len(data)
        super().data_received(data)
        if self._refused or not (self._in_head or self._in_body):
            self._packaging = 0
        elif self._packaging > self._bounds.head_bytes:
            self._refuse(431, "headers_too_large", f"Headers hold at most {self._bounds.head_bytes} bytes.")

    def handle_websocket_upgrade(self) -> None:
        self._disarm()
        super().handle_websocket_upgrade()

    def on_message_begin(self) -> None:
        self._in_head, self._in_body = True, False
        self._fields = self._head = 0
        self._arm(self._bounds.headers)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._packaging = 0
        self._arm(self._bounds.body)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._packaging -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._arm(self._bounds.leftover)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self._bounds.answer, self.transport.abort)

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP; the parser tells us by this also that a callback of ours has refused."""
        if self._fields > self._bounds.head_fields or self._head > self._bounds.head_bytes:
            most = f"{self._bounds.head_fields} headers and {self._bounds.head_bytes} bytes"
            self._refuse(431, "headers_too_large", f"A request holds at most {most} before its body.")
        else:
            self._refuse(400, "bad_request", "This is not a well-formed HTTP request.")

    def _count(self, size: int) -> None:
        self._head += size
        if self._fields > self._bounds.head_fields or self._head > self._bounds.head_bytes:
            raise _TooMuch

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._lose_patience, seconds)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _lose_patience(self, seconds: float) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        answering = self.cycle is not None and not self.cycle.response_complete
        if self.flow.read_paused or (answering and not self._in_body):
            self._arm(seconds)  # it is we who are slow
        elif answering or self._in_head:
            self._refuse(408, "request_timeout", "The request did not arrive in time; send it again.")
        else:
            self.transport.close()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer in the application's place where it has not begun to, and hang up."""
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete
        if answering:
            cycle.disconnected = True
            cycle.message_event.set()
        if not (answering and cycle.response_started) and not (cycle and self._in_body and cycle.response_complete):
            told = errors.answer(status, code, message)
            head = [(b"x-request-id", uuid.uuid4().hex.encode()), (b"connection", b"close"), *told.headers]
            line = b"HTTP/1.1 %d %s\r\n" % (status, http.HTTPStatus(status).phrase.encode())
            self.transport.write(line + b"".join(b"%s: %s\r\n" % pair for pair in head) + b"\r\n" + told.body)
        self._refused = True
        self._disarm()
        if status == 408 or not self.transport.can_write_eof():
            self.transport.close()
        else:
            # Hanging up on what is still coming resets the connection, and the client would not read why.
            self.transport.write_eof()
            self._timer = self.loop.call_later(self._bounds.leftover, self.transport.close)
