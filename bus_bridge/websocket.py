"""The server side of a WebSocket under ASGI, with one extension: several text frames in one write.

ASGI sends one frame at a time, and uvicorn writes each by itself. On a loopback or local network the write costs more
than all that went into the frame, and a turn has several frames at once.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState

FRAMES = "agentvoicebox.frames"
"""Type of the ASGI message that carries `texts`, a list of frames, and key of the extension in the scope."""


class BatchingProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol for the `ws` setting, which also understands `FRAMES`."""

    async def run_asgi(self) -> None:
        extensions: dict[str, Any] = self.scope["extensions"]  # type: ignore[assignment, typeddict-item]
        extensions[FRAMES] = {}
        await super().run_asgi()

    async def send(self, message: Any) -> None:
        if message["type"] != FRAMES:
            await super().send(message)
            return
        await self.writable.wait()
        if self.disconnected or self.close_sent:
            raise ClientDisconnected
        try:
            for text in message["texts"]:
                self.conn.send_text(text.encode())
        except InvalidState as error:
            raise ClientDisconnected from error
        self.transport.write(b"".join(self.conn.data_to_send()))
