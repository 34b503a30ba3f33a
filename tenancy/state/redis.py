"""The state of several nodes, in one Redis. What happens without it is written in the package's docstring."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as AnswerTimeout

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.config.tasks import begin, end
from agentvoicebox.tenancy.state import DEBT, HOUR_MINUTES, LEASE, Standing, Use
from agentvoicebox.tenancy.state.local import LocalState

Result = TypeVar("Result")

_CONNECTIONS = 50
_PATIENCE = 5.0
"""Seconds for a connection, and for an answer on it."""
_DEADLINE = 5.0
"""Seconds for anything altogether, after which Redis counts as away. A node that is merely busy must not get there."""
_GLANCE = 1.0
"""Seconds to look up a value: who waits longer is better served without."""
_PROBE = 0.5
_MOST_MISSED = 1000
_CHUNK = 500
"""Subjects in one script call, so that Redis is not held up by any."""
_SCANNED = 1000

# A hash per subject: t, when the minute's bucket will be empty (µs); m, the minute of the last change; u, the requests
# of the hour; and by minute their number. Whatever the server's clock does, none counts longer than an hour from now.
_RECONCILE = f"""
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local minute = math.floor(time[1] / 60)
local out, given = {{}}, string.gmatch(ARGV[1], '%d+')
for i, key in ipairs(KEYS) do
    local weight, count, age = tonumber(given()), tonumber(given()), tonumber(given())
    local held = redis.call('HMGET', key, 't', 'm', 'u')
    local tat = math.min(math.max(tonumber(held[1] or now), now) + weight, now + {DEBT * 1e6:.0f})
    local used = tonumber(held[3] or 0)
    if held[2] and tonumber(held[2]) ~= minute then
        local all = redis.call('HGETALL', key)
        for j = 1, #all, 2 do
            local slot, n = tonumber(all[j]), tonumber(all[j+1])
            if slot and (slot < minute - {HOUR_MINUTES} or slot > minute) then
                redis.call('HDEL', key, all[j])
                if slot > minute then
                    redis.call('HINCRBY', key, minute, n)
                else
                    used = used - n
                end
            end
        end
    end
    if count > 0 then
        used = used + count
        redis.call('HINCRBY', key, minute - age, count)
    end
    if count > 0 or weight > 0 or held[2] then
        redis.call('HSET', key, 't', string.format('%.0f', tat), 'm', minute, 'u', used)
        if count > 0 or weight > 0 then redis.call('EXPIRE', key, {(HOUR_MINUTES + 2) * 60}) end
    end
    out[i] = string.format('%.0f %d', math.ceil(tat - now), used)
end
return table.concat(out, ' ')
"""

# live: sessions by the time their lease ends; nodes: who holds them; peak: the most on a day.
_SESSIONS = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local live, nodes, peak = KEYS[1], KEYS[2], KEYS[3]
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', live, '-inf', now)) do
    redis.call('ZREM', live, gone)
    redis.call('HDEL', nodes, gone)
end
local function keep(session, node, lease)
    redis.call('ZADD', live, string.format('%.6f', now + lease), session)
    redis.call('HSET', nodes, session, node)
end
local function settle(lease)
    redis.call('EXPIRE', live, math.ceil(lease) + 60)
    redis.call('EXPIRE', nodes, math.ceil(lease) + 60)
    local day, held = math.floor(time[1] / 86400), redis.call('HMGET', peak, 'day', 'most')
    local count = redis.call('ZCARD', live)
    if tonumber(held[1] or 0) ~= day or tonumber(held[2] or 0) < count then
        redis.call('HSET', peak, 'day', day, 'most', count)
        redis.call('EXPIRE', peak, 172800)
    end
end
"""
_ENTER = (
    _SESSIONS
    + """
local session, node, limit, lease = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
if not redis.call('ZSCORE', live, session) and redis.call('ZCARD', live) >= limit then return 0 end
keep(session, node, lease)
settle(lease)
return 1
"""
)
_BEAT = (
    _SESSIONS
    + """
local node, lease, lost = ARGV[1], tonumber(ARGV[2]), {}
for i = 3, #ARGV do
    local owner = redis.call('HGET', nodes, ARGV[i])
    if owner and owner ~= node then
        lost[#lost + 1] = ARGV[i]
    else
        keep(ARGV[i], node, lease)
    end
end
settle(lease)
return lost
"""
)
_LEAVE = (
    _SESSIONS
    + """
if redis.call('HGET', nodes, ARGV[1]) == ARGV[2] then
    redis.call('ZREM', live, ARGV[1])
    redis.call('HDEL', nodes, ARGV[1])
end
"""
)
_COUNT = _SESSIONS + "return redis.call('ZCARD', live)"
_PEAK = (
    _SESSIONS
    + """
local held, count = redis.call('HMGET', peak, 'day', 'most'), redis.call('ZCARD', live)
if tonumber(held[1] or 0) ~= math.floor(time[1] / 86400) then return count end
return math.max(tonumber(held[2]), count)
"""
)
_WHERE = _SESSIONS + "return redis.call('HGET', nodes, ARGV[1])"

_log = logging.getLogger(__name__)


class RedisState:
    """Shared by all nodes that name the same Redis."""

    def __init__(self, url: str, node: str, lease: float = LEASE) -> None:
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS,
                timeout=_PATIENCE,
                socket_connect_timeout=_PATIENCE,
                socket_timeout=_PATIENCE,
                # Once more, for a connection that was closed while it lay in the pool: every call can be repeated.
                retry=Retry(ConstantBackoff(0.01), 1),
                retry_on_error=[AnswerTimeout],
            )
            pool.connection_class(**pool.connection_kwargs)
        except (TypeError, ValueError):  # whose texts may show what was meant to be a password
            raise BadInput("redis must be an address such as redis://host:6379/0.", param="redis") from None
        self._redis = Redis(connection_pool=pool)
        self._node = node
        self._lease = lease
        self._local = LocalState(node)
        self._degraded = False
        self._suspected = False
        self._missed: list[tuple[str | None, ...]] | None = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._reconcile = self._redis.register_script(_RECONCILE)
        self._enter = self._redis.register_script(_ENTER)
        self._beat = self._redis.register_script(_BEAT)
        self._leave = self._redis.register_script(_LEAVE)
        self._count = self._redis.register_script(_COUNT)
        self._peak = self._redis.register_script(_PEAK)
        self._where = self._redis.register_script(_WHERE)

    @property
    def degraded(self) -> bool:
        """Whether Redis is away."""
        return self._degraded

    async def start(self) -> None:
        """Begin to keep this node's sessions alive."""
        with contextlib.suppress(Unavailable):
            await self._attempt(self._redis.ping)
        self._spawn(self._keep_alive())

    async def close(self) -> None:
        """Let go of Redis; this node's sessions end with their lease."""
        await end(*self._tasks)
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    # --- rates --------------------------------------------------------------------------------------------------------

    async def reconcile(self, uses: Sequence[Use]) -> list[Standing]:
        """Add what was used here, and say how each subject stands everywhere; one round trip. Raises `Unavailable`."""
        return await self._attempt(lambda: self._reconciled(uses))

    async def _reconciled(self, uses: Sequence[Use]) -> list[Standing]:
        calls: list[tuple[Any, ...]] = []
        for i in range(0, len(uses), _CHUNK):
            some = uses[i : i + _CHUNK]
            # One text each way: the client would spend more on two thousand numbers than Redis does on counting.
            given = " ".join([f"{weight * 1e6:.0f} {requests} {age}" for _, weight, requests, age in some])
            calls.append((self._reconcile.sha, len(some), *[f"avb_rl:{use.key}" for use in some], given))
        answers = await self._evaluate(calls)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            await self._redis.script_load(_RECONCILE)
            unknown = [i for i, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
            for i, answer in zip(unknown, await self._evaluate([calls[i] for i in unknown]), strict=True):
                answers[i] = answer
        found = []
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
            numbers = [int(each) for each in answer.split()]
            found += [Standing(level / 1e6, used) for level, used in zip(numbers[::2], numbers[1::2], strict=True)]
        return found

    async def _evaluate(self, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for call in calls:
                pipe.evalsha(*call)
            return await pipe.execute(raise_on_error=False)

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def enter(self, tenant_id: uuid.UUID, session_id: uuid.UUID, limit: int) -> bool:
        """Count a session as live here, unless the tenant has `limit` others."""
        args: list[str | float] = [str(session_id), self._node, limit, self._lease]
        try:
            admitted = await self._attempt(lambda: self._enter(_session_keys(tenant_id), args))
        except Unavailable:
            return await self._local.enter(tenant_id, session_id, limit)
        if admitted:
            self._local.hold(tenant_id, session_id)
        return bool(admitted)

    async def leave(self, tenant_id: uuid.UUID, session_id: uuid.UUID) -> None:
        """The session is no longer live here."""
        self._local.drop(tenant_id, session_id)
        with contextlib.suppress(Unavailable):
            await self._attempt(lambda: self._leave(_session_keys(tenant_id), [str(session_id), self._node]))

    async def count(self, tenant_id: uuid.UUID) -> int:
        """How many sessions of the tenant are live."""
        try:
            return int(await self._attempt(lambda: self._count(_session_keys(tenant_id))))
        except Unavailable:
            return await self._local.count(tenant_id)

    async def peak(self, tenant_id: uuid.UUID) -> int:
        """The most that were live at once on this day."""
        try:
            return int(await self._attempt(lambda: self._peak(_session_keys(tenant_id))))
        except Unavailable:
            return await self._local.peak(tenant_id)

    async def where(self, tenant_id: uuid.UUID, session_id: uuid.UUID) -> str | None:
        """The node on which the session is live."""
        try:
            node = await self._attempt(lambda: self._where(_session_keys(tenant_id), [str(session_id)]))
        except Unavailable:
            return await self._local.where(tenant_id, session_id)
        return node.decode() if node else None

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self._lease / 3)
            try:
                await self._attempt(self._report)
            except Unavailable:
                pass  # the way back has a report of its own
            except Exception:
                _log.exception("sessions_not_reported")

    async def _report(self) -> None:
        """Renew the leases of this node's sessions; also of those that Redis has forgotten, for they are live."""
        for tenant_id in self._local.tenants():
            live = list(self._local.live(tenant_id))
            for i in range(0, len(live), _CHUNK):
                args: list[str | float] = [self._node, self._lease, *map(str, live[i : i + _CHUNK])]
                for lost in await self._beat(_session_keys(tenant_id), args):
                    self._local.drop(tenant_id, uuid.UUID(lost.decode()))  # it has moved to another node
            for gone in set(live).difference(self._local.live(tenant_id)):  # it left meanwhile, perhaps before this
                await self._leave(_session_keys(tenant_id), [str(gone), self._node])

    # --- values -------------------------------------------------------------------------------------------------------

    async def get(self, key: str) -> bytes | None:
        """What is kept under `key`."""
        try:
            return await self._glance(lambda: self._redis.get(key))
        except Unavailable:
            return None

    async def _glance(self, call: Callable[[], Awaitable[Any]]) -> bytes | None:
        try:
            async with asyncio.timeout(_GLANCE):
                return cast("bytes | None", await self._attempt(call))
        except TimeoutError:
            if not self._suspected:
                self._suspected = True
                self._spawn(self._suspect())
            raise _away() from None

    async def _suspect(self) -> None:
        """Find out whether Redis is away or only slow."""
        with contextlib.suppress(Unavailable):
            await self._attempt(self._redis.ping)
        self._suspected = False

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        """Keep `value` for `ttl` seconds."""
        try:
            await self._attempt(lambda: self._redis.set(key, value, px=max(1, round(ttl * 1000))))
        except Unavailable:
            self._miss((key,))

    async def take(self, key: str) -> bytes | None:
        """What is kept under `key`, which only one caller gets."""
        try:
            return await self._glance(lambda: self._redis.getdel(key))
        except Unavailable:
            return None

    async def delete(self, key: str) -> None:
        """Keep it no longer."""
        await self.forget((key,))

    async def forget(self, pattern: Sequence[str | None]) -> None:
        """Delete all keys of that form, without holding up Redis."""
        try:
            await self._attempt(lambda: self._forget(pattern))
        except Unavailable:
            self._miss(tuple(pattern))

    async def _forget(self, pattern: Sequence[str | None]) -> None:
        if None not in pattern:
            await self._redis.delete("".join(cast("Sequence[str]", pattern)))
            return
        glob = "".join("*" if part is None else re.sub(r"([\\*?\[\]])", r"\\\1", part) for part in pattern)
        found = []
        async for key in self._redis.scan_iter(match=glob, count=_SCANNED):
            found.append(key)
            if len(found) == _SCANNED:
                await self._redis.unlink(*found)
                found.clear()
        if found:
            await self._redis.unlink(*found)

    def _miss(self, pattern: tuple[str | None, ...]) -> None:
        """Note what must be deleted before Redis is asked again; of too many, everything."""
        if self._missed is not None:
            self._missed.append(pattern)
            if len(self._missed) > _MOST_MISSED:
                self._missed = None

    # --- outage -------------------------------------------------------------------------------------------------------

    async def _attempt(self, call: Callable[[], Awaitable[Result]]) -> Result:
        if self._degraded:
            raise _away()
        try:
            async with asyncio.timeout(_DEADLINE):
                return await call()
        except (RedisError, OSError) as error:  # that of asyncio.timeout is one of the latter
            self._lose(error)
            raise _away() from error

    def _lose(self, error: Exception) -> None:
        if not self._degraded:
            self._degraded = True
            _log.warning("shared_state_away error=%s %s", type(error).__name__, error)
            self._spawn(self._regain())

    async def _regain(self) -> None:
        while self._degraded:
            await asyncio.sleep(_PROBE)
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self._catch_up()
            except (RedisError, OSError):
                continue
            except Exception:
                _log.exception("shared_state_not_regained")
                continue
            self._degraded = False
        _log.info("shared_state_back")
        with contextlib.suppress(Unavailable):
            await self._attempt(self._report)  # those that entered during the first report

    async def _catch_up(self) -> None:
        await self._redis.ping()
        if self._missed is None:
            await self._forget(("avb:", None))
            self._missed = []
        while self._missed:
            await self._forget(self._missed[-1])
            self._missed.pop()
        await self._report()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = begin(work, "shared state")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _session_keys(tenant_id: uuid.UUID) -> list[str]:
    return [f"avb_session:t:{tenant_id}:{name}" for name in ("live", "nodes", "peak")]


def _away() -> Unavailable:
    return Unavailable("The shared state does not answer; this node goes on alone.", code="store_unavailable")
