"""Values kept for a while, each for one tenant: a key of one tenant is no key of another's.

Keys are `avb:t:{tenant}:{key}`, values JSON, in the shared state. The tenant's id is checked to be one: so its part of
a key has one length, and nothing that a caller puts into the rest reaches across.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar, cast

from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy.models import PLATFORM
from agentvoicebox.tenancy.state import SharedState

TTL = 300.0
"""Seconds for which a value is kept, unless it says otherwise."""

LONGEST_TTL = 86_400
LONGEST_KEY = 512

Value = TypeVar("Value")
Arguments = ParamSpec("Arguments")

_NOTHING = object()


class Cache:
    """Counts what it found and what it did not."""

    def __init__(self, state: SharedState) -> None:
        self._state = state
        self.hits = 0
        self.misses = 0

    def of(self, tenant_id: uuid.UUID | None) -> TenantCache:
        """The part that belongs to one tenant. Raises `BadInput` without one: there is no part that belongs to all."""
        if not isinstance(tenant_id, uuid.UUID) or tenant_id == PLATFORM:
            raise BadInput("Name the tenant that the value belongs to.", code="tenant_required")
        return TenantCache(self, self._state, tenant_id)

    def cached(
        self, ttl: float = TTL
    ) -> Callable[[Callable[Arguments, Awaitable[Value]]], Callable[Arguments, Awaitable[Value]]]:
        """Keep what a coroutine function returns, by its arguments; the one named `tenant_id` says whose it is.

        Arguments and result must be representable in JSON; ids count as such.
        """

        def wrap(function: Callable[Arguments, Awaitable[Value]]) -> Callable[Arguments, Awaitable[Value]]:
            signature = inspect.signature(function)
            name = f"{function.__module__}.{function.__qualname__}"

            @functools.wraps(function)
            async def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                tenant = self.of(bound.arguments.get("tenant_id"))
                text = json.dumps(bound.arguments, sort_keys=True, default=_id)
                key = f"{name}:{hashlib.sha256(text.encode()).hexdigest()}"
                return await tenant.get_or_set(key, lambda: function(*args, **kwargs), ttl)

            return call

        return wrap


class TenantCache:
    """The values of one tenant. Without the shared state every look is a miss."""

    def __init__(self, cache: Cache, state: SharedState, tenant_id: uuid.UUID) -> None:
        self._cache = cache
        self._state = state
        self._prefix = f"avb:t:{tenant_id}:"

    async def get(self, key: str, default: Any = None) -> Any:
        """The value, which may be None, or `default`. Raises `BadInput` for what cannot be a key."""
        return self._read(await self._state.get(self._key(key)), default)

    async def set(self, key: str, value: Any, ttl: float = TTL) -> None:
        """Keep a value that JSON can represent for `ttl` seconds. Raises `BadInput`."""
        if not 0 < ttl <= LONGEST_TTL:
            raise BadInput(f"ttl must be a number of seconds above 0, at most {LONGEST_TTL}.", param="ttl")
        try:
            data = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise BadInput("Only what JSON can represent is cached.", param="value") from error
        await self._state.set(self._key(key), data, ttl)

    async def get_or_set(self, key: str, make: Callable[[], Awaitable[Value]], ttl: float = TTL) -> Value:
        """The value; if there is none, what `make` returns, which is kept for `ttl` seconds."""
        found = await self.get(key, _NOTHING)
        if found is _NOTHING:
            found = await make()
            await self.set(key, found, ttl)
        return cast("Value", found)

    async def take(self, key: str, default: Any = None) -> Any:
        """The value, which goes to one caller only, or `default`."""
        return self._read(await self._state.take(self._key(key)), default)

    async def delete(self, key: str) -> None:
        """Forget the value."""
        await self._state.delete(self._key(key))

    async def invalidate(self, pattern: str, *texts: str) -> None:
        """Forget all values whose key has the form of `pattern`: `*` is any text, `{}` each of `texts`, literally."""
        pieces = pattern.split("{}")
        if len(pieces) != len(texts) + 1:
            raise BadInput("Each {} of the pattern needs a text.", param="pattern")
        parts: list[str | None] = [self._prefix]
        for i, piece in enumerate(pieces):
            literal, *others = piece.split("*")
            parts.append(literal)
            for other in others:
                parts += [None, other]
            parts += texts[i : i + 1]
        await self._state.forget(parts)

    def _key(self, key: str) -> str:
        if not 0 < len(key) <= LONGEST_KEY or not key.isprintable():
            raise BadInput(f"A cache key is 1 to {LONGEST_KEY} printable characters.", param="key")
        return self._prefix + key

    def _read(self, data: bytes | None, default: Any) -> Any:
        try:
            value = _NOTHING if data is None else json.loads(data)
        except ValueError:
            value = _NOTHING  # what nobody here has written
        if value is _NOTHING:
            self._cache.misses += 1
            return default
        self._cache.hits += 1
        return value


def _id(value: object) -> str:
    if isinstance(value, uuid.UUID):
        return str(value)
    raise BadInput("What is cached by its arguments takes only such as JSON can represent.", param="arguments")
