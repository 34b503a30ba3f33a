"""The state of a node that is alone: plain dictionaries, and no await between a look and a change."""

from __future__ import annotations

import re
import time
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Sequence

from agentvoicebox.tenancy.state import DEBT, HOUR_MINUTES, Standing, Use

_CACHED = 10_000
_COUNTED = 100_000
"""Subjects; of one that is forgotten here, each limiter still knows what it has admitted itself."""
_DAY = 86_400


class _Counter:
    """One subject's rates: when its minute's bucket will be empty, and its requests by minute."""

    __slots__ = ("minutes", "tat")

    def __init__(self) -> None:
        self.tat = 0.0
        self.minutes: dict[int, int] = {}


class LocalState:
    """Shared by whoever holds this object. It is never degraded, and needs no heartbeat: it dies with its sessions."""

    degraded = False

    def __init__(
        self, node: str, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._node = node
        self._clock = clock
        self._wall = wall
        self._counters: OrderedDict[str, _Counter] = OrderedDict()
        self._live: defaultdict[uuid.UUID, set[uuid.UUID]] = defaultdict(set)
        self._peaks: dict[uuid.UUID, tuple[int, int]] = {}
        self._values: OrderedDict[str, tuple[bytes, float]] = OrderedDict()

    async def start(self) -> None:
        """There is nothing to begin."""

    async def close(self) -> None:
        """There is nothing to end."""

    async def reconcile(self, uses: Sequence[Use]) -> list[Standing]:
        """Add what was used, and say how each subject stands."""
        now = self._clock()
        standings = [self._add(use, now) for use in uses]
        while self._counters:
            oldest = next(iter(self._counters.values()))
            recent = oldest.tat > now or max(oldest.minutes, default=0) >= now // 60 - HOUR_MINUTES
            if recent and len(self._counters) <= _COUNTED:
                break
            self._counters.popitem(last=False)
        return standings

    def _add(self, use: Use, now: float) -> Standing:
        counter = self._counters.setdefault(use.key, _Counter())
        self._counters.move_to_end(use.key)
        minute = int(now // 60)
        counter.tat = min(max(counter.tat, now) + use.weight, now + DEBT)
        if use.requests:
            counter.minutes[minute - use.age] = counter.minutes.get(minute - use.age, 0) + use.requests
        for old in [each for each in counter.minutes if each < minute - HOUR_MINUTES]:
            del counter.minutes[old]
        return Standing(counter.tat - now, sum(counter.minutes.values()))

    async def enter(self, tenant_id: uuid.UUID, session_id: uuid.UUID, limit: int) -> bool:
        """Count a session as live, unless the tenant has `limit` others."""
        live = self._live.get(tenant_id, ())
        if session_id not in live and len(live) >= limit:
            return False
        self.hold(tenant_id, session_id)
        return True

    def hold(self, tenant_id: uuid.UUID, session_id: uuid.UUID) -> None:
        """Count a session that was admitted elsewhere."""
        live = self._live[tenant_id]
        live.add(session_id)
        day = self._today()
        held, peak = self._peaks.get(tenant_id, (day, 0))
        self._peaks[tenant_id] = (day, max(len(live), peak if held == day else 0))

    def drop(self, tenant_id: uuid.UUID, session_id: uuid.UUID) -> None:
        """Count it no longer."""
        live = self._live.get(tenant_id)
        if live is not None:
            live.discard(session_id)
            if not live:
                del self._live[tenant_id]

    def tenants(self) -> list[uuid.UUID]:
        """Those with live sessions."""
        return list(self._live)

    def live(self, tenant_id: uuid.UUID) -> Collection[uuid.UUID]:
        """The tenant's live sessions."""
        return self._live.get(tenant_id, ())

    async def leave(self, tenant_id: uuid.UUID, session_id: uuid.UUID) -> None:
        """The session is no longer live."""
        self.drop(tenant_id, session_id)

    async def count(self, tenant_id: uuid.UUID) -> int:
        """How many sessions of the tenant are live."""
        return len(self._live.get(tenant_id, ()))

    async def peak(self, tenant_id: uuid.UUID) -> int:
        """The most that were live at once on this day."""
        day, peak = self._peaks.get(tenant_id, (0, 0))
        return peak if day == self._today() else await self.count(tenant_id)

    def _today(self) -> int:
        return int(self._wall() // _DAY)

    async def where(self, tenant_id: uuid.UUID, session_id: uuid.UUID) -> str | None:
        """This node, if the session is live."""
        return self._node if session_id in self._live.get(tenant_id, ()) else None

    async def get(self, key: str) -> bytes | None:
        """What is kept under `key`."""
        value, until = self._values.get(key, (None, 0.0))
        if value is None or self._clock() >= until:
            return None
        self._values.move_to_end(key)
        return value

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep `value` for `ttl` seconds; the least used of too many goes."""
        self._values[key] = (value, self._clock() + ttl)
        self._values.move_to_end(key)
        if len(self._values) > _CACHED:
            self._values.popitem(last=False)

    async def take(self, key: str) -> bytes | None:
        """What is kept under `key`, which only one caller gets."""
        value = await self.get(key)
        self._values.pop(key, None)
        return value

    async def delete(self, key: str) -> None:
        """Keep it no longer."""
        self._values.pop(key, None)

    async def forget(self, pattern: Sequence[str | None]) -> None:
        """Delete all keys of that form."""
        form = re.compile("".join(".*" if part is None else re.escape(part) for part in pattern), re.DOTALL)
        for key in [key for key in self._values if form.fullmatch(key)]:
            del self._values[key]
