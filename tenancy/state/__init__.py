"""What nodes share while they run: rate counters, live sessions, cached values. Nothing here outlives its lease.

One interface, `SharedState`; `LocalState` is for a single process, `RedisState` for several. When Redis is away
(refused, silent for five seconds, read-only, out of memory) `RedisState.degraded` is true, every call answers at once
without it, and a probe twice a second brings it back by itself:

| function       | while Redis is away                        | why that opens no door                               |
|----------------|--------------------------------------------|------------------------------------------------------|
| reconcile      | `Unavailable`; nodes decide by themselves  | each still holds every subject to its whole limit    |
| enter          | counts the sessions of this node alone     | at most the tenant's limit on each, never unlimited  |
| leave          | leaves here; in Redis the lease ends it    | counts too many for one lease, never too few         |
| count, peak    | of this node alone                         | is only shown; what admits is `enter`                |
| where          | knows the sessions of this node alone      | a session that is not found is not resumed           |
| get, take      | find nothing; after one second already     | the caller reads the truth from its source           |
| set            | keeps nothing, deletes when Redis is back  | an older value cannot come back                      |
| delete, forget | noted, and done when Redis is back, before | what was invalidated is not served afterwards        |
|                | anything else is asked of it               |                                                      |

Credentials are not kept here: keys are checked against the database and its log of changes. On return a node first
repeats its deletions and reports its sessions. What Redis has lost in a restart, nodes still know: rates never fall
below a node's own count, and sessions are reported anew.

Keys: `avb:t:{tenant}:…` cached values and what is needed to resume a session, `avb_session:t:{tenant}:…` live sessions,
`avb_rl:…` rates. One database holds all; the prefixes keep them apart. All of them expire; nevertheless give Redis a
`maxmemory` with the policy `volatile-ttl`, against whoever comes from millions of addresses.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from agentvoicebox.config.errors import Unavailable

HOUR_MINUTES = 60
"""Whole minutes, besides the current one, that the hour's count reaches back: any 60 minutes lie within."""

DEBT = 120.0
"""Seconds by which the minute's bucket can at most be filled: one window is the limit, one more a debt to pay off."""

LEASE = 30.0
"""Seconds after which the sessions of a node that died stop counting."""


class Use(NamedTuple):
    """What one subject consumed on this node since the last time."""

    key: str
    weight: float
    """Seconds that it fills the minute's bucket by: the number of requests times the time one takes to drain."""
    requests: int
    """Their number, for the hour."""
    age: int = 0
    """How many minutes ago."""


class Standing(NamedTuple):
    """What one subject consumed on all nodes."""

    level: float
    """Seconds until the minute's bucket is empty."""
    used: int
    """Requests in the past hour."""


class SharedState(Protocol):
    """What all nodes know together. Tenants and sessions are named by their ids; a key names its tenant itself."""

    @property
    def degraded(self) -> bool:
        """Whether this node is on its own at present."""
        ...

    async def start(self) -> None:
        """Begin to keep in touch. A store that is away is no error: it shows in `degraded`."""
        ...

    async def close(self) -> None:
        """Let go of everything; the sessions of this node end with their lease."""
        ...

    async def reconcile(self, uses: Sequence[Use]) -> list[Standing]:
        """Add what was used here, and say how each subject stands everywhere. Raises `Unavailable`."""
        ...

    async def enter(self, tenant_id: uuid.UUID, session_id: uuid.UUID, limit: int) -> bool:
        """Count a session as live here, unless the tenant has `limit` others; counted twice it counts once."""
        ...

    async def leave(self, tenant_id: uuid.UUID, session_id: uuid.UUID) -> None:
        """The session is no longer live here; if another node has taken it over, it stays there."""
        ...

    async def count(self, tenant_id: uuid.UUID) -> int:
        """How many sessions of the tenant are live."""
        ...

    async def peak(self, tenant_id: uuid.UUID) -> int:
        """The most that were live at once on this day (UTC)."""
        ...

    async def where(self, tenant_id: uuid.UUID, session_id: uuid.UUID) -> str | None:
        """The node on which the session is live."""
        ...

    async def get(self, key: str) -> bytes | None:
        """What is kept under `key`."""
        ...

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep `value` for `ttl` seconds."""
        ...

    async def take(self, key: str) -> bytes | None:
        """What is kept under `key`, which only one caller gets."""
        ...

    async def delete(self, key: str) -> None:
        """Keep it no longer."""
        ...

    async def forget(self, pattern: Sequence[str | None]) -> None:
        """Delete all keys that consist of these texts, taken literally, with anything where `None` stands."""
        ...


def connect(url: str | None, node: str) -> SharedState:
    """The state for the setting `redis`, under this node's name; start it. Raises `Unavailable` without the client."""
    from agentvoicebox.tenancy.state.local import LocalState

    if url is None:
        return LocalState(node)
    try:
        from agentvoicebox.tenancy.state.redis import RedisState
    except ModuleNotFoundError as error:
        raise Unavailable(
            "AVB_REDIS is set, but the Redis client is not installed: pip install 'agentvoicebox[redis]'.",
            code="store_unavailable",
        ) from error
    return RedisState(url, node)
