"""What was spoken lately, so that a sentence said again costs nothing: a cache that no two tenants share.

It saves work, never metering: a hit gives the very chunks that the miss gave, and whoever counts seconds counts theirs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentvoicebox.plugins.pool import EngineSpec, Speech

_SHARE = 4
"""One tenant may fill a quarter of the room, so that nobody's flood of sentences pushes out everybody's."""

_OVERHEAD = 1_024
"""Bytes that an entry costs beside its audio and text, generously: empty ones must not be free."""


@dataclass(frozen=True, slots=True)
class Said:
    """What makes audio the same audio. The tenant comes first: wording and voices of one are nobody else's."""

    tenant: str
    engine: EngineSpec
    voice: str
    speed: float
    language: str
    text: str = field(repr=False)


class Spoken:
    """The audio of the latest sentences, at most `most_bytes` of it. Safe to use from several threads."""

    def __init__(self, most_bytes: int = 64 * 1024 * 1024) -> None:
        self._most = most_bytes
        self._lock = threading.Lock()
        self._chunks: OrderedDict[Said, tuple[Speech, ...]] = OrderedDict()
        self._sizes: dict[str, OrderedDict[Said, int]] = {}
        self._used: dict[str, int] = {}
        self.size = 0
        """Bytes that are kept."""

    def get(self, said: Said) -> tuple[Speech, ...] | None:
        """The chunks that were put there, in order; None when they are not kept (any more)."""
        with self._lock:
            chunks = self._chunks.get(said)
            if chunks is not None:
                self._chunks.move_to_end(said)
                self._sizes[said.tenant].move_to_end(said)
            return chunks

    def put(self, said: Said, chunks: Iterable[Speech]) -> None:
        """Keep the whole of what was spoken. What is larger than a tenant's share is not kept."""
        kept = tuple(chunks)
        size = _OVERHEAD + 4 * len(said.text) + sum(len(chunk.pcm) for chunk in kept)
        share = self._most // _SHARE
        if size > share:
            return
        with self._lock:
            if said in self._chunks:
                self._drop(said)
            while self._used.get(said.tenant, 0) + size > share:
                self._drop(next(iter(self._sizes[said.tenant])))
            while self.size + size > self._most:
                self._drop(next(iter(self._chunks)))
            self._chunks[said] = kept
            self._sizes.setdefault(said.tenant, OrderedDict())[said] = size
            self._used[said.tenant] = self._used.get(said.tenant, 0) + size
            self.size += size

    def _drop(self, said: Said) -> None:
        del self._chunks[said]
        size = self._sizes[said.tenant].pop(said)
        self._used[said.tenant] -= size
        self.size -= size
        if not self._sizes[said.tenant]:
            del self._sizes[said.tenant], self._used[said.tenant]
