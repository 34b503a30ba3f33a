"""What nodes and workers agree on in Redis: the names of streams and groups, how long what lasts, how to connect."""

from __future__ import annotations

from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError

from agentvoicebox.config.errors import BadInput

KINDS = ("stt", "tts")
GROUP = "workers"

BEGIN = 60.0
"""Seconds within which work must be begun. Nodes and workers agree on the time of day to some seconds."""
BLOCK = 1.0
"""Seconds of one wait for something to come: less than `_PATIENCE`, by which a Redis that hangs is noticed."""
SEEN = 6
"""Seconds since a worker was heard of, after which it does not count."""
AGAIN = 0.2
"""Seconds between two attempts to reach a Redis that is away."""

AWAY = (RedisError, OSError)
"""What is raised when Redis does not answer."""

_PATIENCE = 5.0
"""Seconds for a connection to Redis, and for an answer on it."""
_CONNECTIONS = 64

Entries = list[tuple[bytes, dict[bytes, bytes]]]


def stream(kind: str) -> str:
    """Where the work of that kind waits."""
    return f"avb:{kind}"


def present(kind: str) -> str:
    """Where workers of that kind are listed, with the time at which they were heard of last."""
    return f"avb:{kind}:workers"


def connected(url: str) -> Any:
    """A client of redis-py; its types describe all versions of the protocol at once. Raises `BadInput`."""
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            protocol=2,
            max_connections=_CONNECTIONS,
            timeout=_PATIENCE,
            socket_connect_timeout=_PATIENCE,
            socket_timeout=_PATIENCE,
            # Once more, for a connection that was closed while it lay in the pool: all that is said can be repeated.
            retry=Retry(ConstantBackoff(0.01), 1),
        )
        pool.connection_class(**pool.connection_kwargs)
    except (TypeError, ValueError):  # whose texts may show what was meant to be a password
        raise BadInput("redis must be an address such as redis://host:6379/0.", param="redis") from None
    return Redis(connection_pool=pool)


async def disconnect(redis: Any) -> None:
    """Close all connections."""
    await redis.aclose()
    await redis.connection_pool.disconnect()


def entries(found: Any) -> Entries:
    """What was read from one stream."""
    return list(found[0][1]) if found else []
