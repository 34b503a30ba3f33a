"""The stock message bus, started by us: on a socket we were given, for those who know its route, without delay."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

from ovos_messagebus import __main__ as stock
from tornado.httpserver import HTTPServer
from tornado.web import Application, HTTPError
from tornado.websocket import WebSocketClosedError


class Handler(stock.MessageBusEventHandler):  # type: ignore[misc]
    """One client of the bus."""

    filter = False  # the stock property merges all configuration files, for every message

    def prepare(self) -> None:
        """Refuse a host name that was made to point here (DNS rebinding); the Origin must then be our own address."""
        if self.request.host != self.settings["address"]:
            raise HTTPError(403)

    def check_origin(self, origin: str) -> bool:
        return origin == f"http://{self.settings['address']}"

    def open(self, *args: str, **kwargs: str) -> None:
        self.set_nodelay(True)
        super().open()

    def write_message(self, message: Any, binary: bool = False) -> asyncio.Future[None]:
        """Skip a client that is just closing: the stock error would end the connection of whoever sent `message`."""
        try:
            written: asyncio.Future[None] = super().write_message(message, binary)
        except WebSocketClosedError:
            written = asyncio.get_running_loop().create_future()
            written.set_result(None)
        return written


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

    stock.MessageBusEventHandler = Handler
    stock.web = SimpleNamespace(Application=OnSocket)
    stock.main()
