"""The stock message bus, started by us: on a socket we were given, for those who know its route, without delay."""

from __future__ import annotations

import asyncio
import re
import socket
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from ovos_messagebus import __main__ as stock
from tornado.httpserver import HTTPServer
from tornado.web import Application, HTTPError
from tornado.websocket import WebSocketClosedError

from agentvoicebox.bus_bridge.child import replace

# Seconds that a message may wait for others on the bridge's connection. Waking the bridge costs more than a message,
# and one turn is half a dozen of them. The bridge acts on these; all others are signs of life, of which the latest of
# a turn is enough, and none when one of these comes in time.
_PATIENCE = {
    "ovos.utterance.handled": 0.0,
    "speak": 0.0,
    "mycroft.skill.handler.start": 0.01,
}
_SIGNS = 0.25
_TYPE = re.compile(r'"type":\s*"([^"]+)"')
_TURN = re.compile(r'"avb_(?:turn|canary)":\s*"([^"]+)"')
_ECHO = "recognizer_loop:"


class Handler(stock.MessageBusEventHandler):  # type: ignore[misc]
    """One client of the bus."""

    _gathered: list[str] | None = None
    _timer: asyncio.TimerHandle | None = None

    filter = False  # the stock property merges all configuration files, for every message

    def prepare(self) -> None:
        """Refuse a host name that was made to point here (DNS rebinding); the Origin must then be our own address."""
        if self.request.host != self.settings["address"]:
            raise HTTPError(403)

    def check_origin(self, origin: str) -> bool:
        return origin == f"http://{self.settings['address']}"

    def open(self, *args: str, **kwargs: str) -> None:
        self.set_nodelay(True)
        if self.get_query_argument("gather", None):
            self._gathered = []
            self._signs: dict[str, str] = {}
        super().open()

    def on_close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().on_close()

    def write_message(self, message: Any, binary: bool = False) -> asyncio.Future[None]:
        """Skip a client that is just closing: the stock error would end the connection of whoever sent `message`."""
        if self._gathered is not None and isinstance(message, str):
            self._gather(self._gathered, message)
        else:
            try:
                written: asyncio.Future[None] = super().write_message(message, binary)
                return written
            except WebSocketClosedError:
                pass
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def _gather(self, gathered: list[str], message: str) -> None:
        kind = found.group(1) if (found := _TYPE.search(message, 0, 120)) else ""
        turn = _TURN.search(message)
        if turn is None or kind.startswith(_ECHO):
            return
        patience = _PATIENCE.get(kind)
        if patience is None:
            patience = _SIGNS
            self._signs[turn.group(1)] = message
        else:
            self._signs.pop(turn.group(1), None)
            gathered.append(message)
        loop = asyncio.get_running_loop()
        if patience == 0.0:
            self._deliver()
        elif self._timer is None or loop.time() + patience < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_later(patience, self._ring)

    def _ring(self) -> None:
        if self._gathered is not None:
            self._gathered += self._signs.values()
        self._signs.clear()
        self._deliver()

    def _deliver(self) -> None:
        if self._timer is not None and not self._signs:
            self._timer.cancel()
            self._timer = None
        if self._gathered:
            frame, self._gathered = "\n".join(self._gathered), []
            with suppress(WebSocketClosedError):
                super().write_message(frame)


def main(descriptor: str) -> None:
    """Serve clients that come to the listening socket `descriptor`: nobody can take its port before we do."""

    class OnSocket(Application):
        def listen(self, port: int, address: str | None = None, **options: Any) -> HTTPServer:
            self.settings["address"] = f"{address}:{port}"
            server = HTTPServer(self, **options)
            given = socket.socket(fileno=int(descriptor))
            given.setblocking(False)
            server.add_socket(given)
            return server

    replace(stock, "MessageBusEventHandler", Handler)
    replace(stock, "web", SimpleNamespace(Application=OnSocket))
    stock.main()
