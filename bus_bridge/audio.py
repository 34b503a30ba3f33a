"""Audio between a client's rate and ours. Streams keep their filter state, so chunks join without clicks."""

from __future__ import annotations

import numpy as np
import soxr

from agentvoicebox.bus_bridge.models import LISTENING_RATE

CHUNK = 0.2
"""Seconds of audio in one outgoing frame: small enough to start early, large enough not to be all envelope."""


class Inlet:
    """The client's audio, brought to 16 kHz 16-bit mono and cut into windows."""

    __slots__ = ("_rest", "_stream", "rate")

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._stream = None
        if rate != LISTENING_RATE:
            self._stream = soxr.ResampleStream(rate, LISTENING_RATE, 1, dtype="int16", quality="LQ")
        self._rest = b""

    def take(self, pcm: bytes, window: int) -> bytes:
        """Add a chunk; return what now fills whole windows of `window` samples."""
        if self._stream is not None:
            pcm = self._stream.resample_chunk(np.frombuffer(pcm, "<i2")).tobytes()
        pcm = self._rest + pcm
        whole = len(pcm) - len(pcm) % (window * 2)
        self._rest = pcm[whole:]
        return pcm[:whole]


class Outlet:
    """A voice's audio, brought to the client's rate chunk by chunk."""

    __slots__ = ("_rate", "_source", "_stream")

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._source = rate
        self._stream = None

    def take(self, pcm: bytes, source: int) -> bytes:
        """Add 16-bit mono audio at `source` Hz; return what there is of it at the client's rate."""
        before = b""
        if source != self._source:
            before = self.end()
            self._source = source
            if source != self._rate:
                self._stream = soxr.ResampleStream(source, self._rate, 1, dtype="int16", quality="HQ")
        if self._stream is None:
            return before + pcm
        return before + bytes(self._stream.resample_chunk(np.frombuffer(pcm, "<i2")).tobytes())

    def end(self) -> bytes:
        """What the filter has held back."""
        stream, self._stream = self._stream, None
        self._source = self._rate
        return b"" if stream is None else bytes(stream.resample_chunk(np.zeros(0, "<i2"), last=True).tobytes())


def resample(pcm: bytes, source: int, target: int) -> bytes:
    """A whole stretch of 16-bit mono audio at another rate."""
    from agentvoicebox.plugins.pool.engine import (
        at_rate,
    )  # with OVOS behind it, which a command of clients does without

    return at_rate(pcm, source, target)


def chunks(pcm: bytes, rate: int) -> list[bytes]:
    """Cut audio into frames of `CHUNK` seconds."""
    size = int(rate * CHUNK) * 2
    return [pcm[i : i + size] for i in range(0, len(pcm), size)]
