"""The server side of a WebSocket under ASGI, with one extension: several frames in one write.

ASGI sends one frame at a time, and uvicorn writes each by itself. On a loopback or local network the write costs more
than all that went into the frame, and a turn has several frames at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

FRAMES = "agentvoicebox.frames"
"""Key of the extension in the scope. Its value is a function that writes a list of frames (texts, or bytes) at once
and returns true, or returns false when the client is slow or gone, and the ASGI way, which waits, has to be taken."""


ABORT = "agentvoicebox.abort"
"""Key of the extension whose value is a function that cuts the connection, whatever is still unsent."""


class BatchingProtocol(WebSocketsSansIOProtocol):
    """uvicorn's protocol for its `ws` setting, with the extensions `FRAMES` and `ABORT`."""

    async def run_asgi(self) -> None:
        extensions: dict[str, Any] = self.scope["extensions"]
        extensions[FRAMES] = self.write_frames
        extensions[ABORT] = self.abort
        await super().run_asgi()

    async def send(self, message: Any) -> None:
        await super().send(message)
        # Who was refused has had an answer; without this the server complains of each that there was none.
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True

    def write_frames(self, frames: Sequence[str | bytes]) -> bool:
        """Write all of `frames`, or none."""
        if not self.writable.is_set() or self.disconnected or self.close_sent or self.conn.state is not State.OPEN:
            return False
        for frame in frames:
            if isinstance(frame, str):
                self.conn.send_text(frame.encode())
            else:
                self.conn.send_binary(frame)
        self.transport.write(b"".join(self.conn.data_to_send()))
        return True

    def abort(self) -> None:
        """End the connection now: closing waits for a client to take what it does not read."""
        self.transport.abort()
