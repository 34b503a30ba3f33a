"""What nodes share: the same promises in process and on a real Redis, and what is left of them when Redis is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.tenancy import state as states
from agentvoicebox.tenancy.state import SharedState, Standing, Use
from agentvoicebox.tenancy.state.local import LocalState
from agentvoicebox.tenancy.state.redis import RedisState

MakeNode = Callable[..., Awaitable[RedisState]]
Choose = Callable[..., None]
A, B = uuid.UUID(int=0xA), uuid.UUID(int=0xB)


async def until(condition: Callable[[], Any]) -> None:
    """Returns when it holds; a test that waits in vain is ended by the time limit of its run."""
    async with asyncio.timeout(30):
        while True:
            found = condition()
            if asyncio.iscoroutine(found):
                found = await found
            if found:
                return
            await asyncio.sleep(0.02)


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Sets for how long nodes wait: for long, unless Redis is away. A machine that stalls for seconds is not."""

    def choose(*, glance: float = 30, deadline: float = 60) -> None:
        for name, seconds in (("_GLANCE", glance), ("_DEADLINE", deadline), ("_PATIENCE", 60)):
            monkeypatch.setattr(f"agentvoicebox.tenancy.state.redis.{name}", seconds)

    choose()
    return choose


@pytest.fixture
async def node(redis: Any, patience: Choose) -> AsyncIterator[MakeNode]:
    """Makes nodes that share one Redis."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(name: str = "node-1", **options: Any) -> RedisState:
            found = RedisState(redis.url, name, **options)
            stack.push_async_callback(found.close)
            await found.start()
            return found

        yield make


@pytest.fixture(params=["local", "redis"])
async def pair(request: pytest.FixtureRequest, node: MakeNode) -> tuple[SharedState, SharedState]:
    """Two holders of one state: two nodes on one Redis, or one process twice."""
    if request.param == "local":
        only = LocalState("node-1")
        return only, only
    return await node("node-1"), await node("node-1")


@pytest.fixture
def state(pair: tuple[SharedState, SharedState]) -> SharedState:
    return pair[0]


# --- rates ------------------------------------------------------------------------------------------------------------


async def test_what_both_use_adds_up(pair: tuple[SharedState, SharedState]) -> None:
    one, two = pair
    await one.reconcile([Use("key:x", 3.0, 3)])
    [standing] = await two.reconcile([Use("key:x", 20.0, 2)])
    assert standing.used == 5
    assert standing.level == pytest.approx(23, abs=5)
    assert [each.used for each in await one.reconcile([Use("key:y", 0, 0), Use("key:x", 0, 0)])] == [0, 5]


async def test_the_minutes_bucket_takes_on_one_window_of_debt_at_most(state: SharedState) -> None:
    [standing] = await state.reconcile([Use("key:x", 1e6, 1)])
    assert standing.level == pytest.approx(states.DEBT, abs=1)


async def test_what_is_older_than_an_hour_does_not_count(state: SharedState) -> None:
    await state.reconcile([Use("key:x", 0, 7, 58), Use("key:x", 0, 1, 0)])
    [standing] = await state.reconcile([Use("key:x", 0, 0)])
    assert standing == Standing(0, 8)


async def test_more_subjects_than_fit_into_one_script_call(state: SharedState) -> None:
    uses = [Use(f"key:{i}", 0, i + 1) for i in range(1203)]
    assert [each.used for each in await state.reconcile(uses)] == [i + 1 for i in range(1203)]
    assert [each.used for each in await state.reconcile(uses)] == [2 * (i + 1) for i in range(1203)]


async def test_the_hour_moves_on_in_process() -> None:
    now = 1000.0
    state = LocalState("node-1", clock=lambda: now)
    await state.reconcile([Use("key:x", 5, 5)])
    for later, used in ((3599, 5), (3661, 0)):
        now = 1000.0 + later
        assert await state.reconcile([Use("key:x", 0, 0)]) == [Standing(0, used)]
    await state.reconcile([Use("key:x", 5, 5)])
    now += 7300
    await state.reconcile([Use("key:y", 1, 1)])
    assert list(state._counters) == ["key:y"]


async def test_in_process_only_so_many_subjects_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentvoicebox.tenancy.state.local._COUNTED", 10)
    state = LocalState("node-1")
    for i in range(50):
        await state.reconcile([Use(f"ip:{i}", 1, 1)])
    assert list(state._counters) == [f"ip:{i}" for i in range(40, 50)]


@pytest.mark.parametrize("shift", [-61, -60, -1, 1, 61])
async def test_the_hour_moves_on_in_redis_and_a_shifted_clock_neither_opens_nor_jams(
    node: MakeNode, redis: Any, shift: int
) -> None:
    """The server's clock cannot be set, so what it wrote is: as if that had been `shift` minutes from now."""
    state = await node()
    async with Redis.from_url(redis.url, decode_responses=True) as client:
        minute = now = 0
        while minute == 0 or now != minute:  # again when the next minute has begun meanwhile, which is no part of this
            await client.delete("avb_rl:key:x")
            await state.reconcile([Use("key:x", 30, 5)])
            held = await client.hgetall("avb_rl:key:x")
            minute = int(held.pop("m"))
            assert held.pop(str(minute)) == "5"
            assert set(held) == {"t", "u"}
            await client.hdel("avb_rl:key:x", str(minute))
            moved = {str(minute + shift): "5", "m": str(minute + shift), "t": str(int(held["t"]) + shift * 60_000_000)}
            await client.hset("avb_rl:key:x", mapping=moved)
            [standing] = await state.reconcile([Use("key:x", 0, 0)])
            now = (await client.time())[0] // 60
        assert standing.used == (0 if shift == -61 else 5)
        assert 0 <= standing.level <= states.DEBT
        left = await client.hgetall("avb_rl:key:x")
        assert all(int(slot) <= minute + 1 for slot in left if slot.isdigit())
        assert 0 < await client.ttl("avb_rl:key:x") <= 3720


async def test_a_script_that_redis_has_forgotten_is_sent_again(node: MakeNode, redis: Any) -> None:
    state = await node()
    await state.reconcile([Use("key:x", 0, 1)])
    async with Redis.from_url(redis.url) as client:
        await client.script_flush()
    assert (await state.reconcile([Use("key:x", 0, 1)]))[0].used == 2
    assert not state.degraded


# --- sessions ---------------------------------------------------------------------------------------------------------


async def test_200_at_once_never_pass_the_limit_by_one(pair: tuple[SharedState, SharedState]) -> None:
    asked = [pair[i % 2].enter(A, uuid.uuid4(), 50) for i in range(200)]
    assert sum(await asyncio.gather(*asked)) == 50
    assert await pair[1].count(A) == 50
    assert not pair[0].degraded


async def test_each_tenant_has_its_own_limit_and_a_place_left_is_free_again(state: SharedState) -> None:
    first, second = uuid.uuid4(), uuid.uuid4()
    assert await state.enter(A, first, 1)
    assert not await state.enter(A, second, 1)
    assert await state.enter(B, second, 1)
    await state.leave(A, first)
    assert await state.enter(A, second, 1)
    assert (await state.count(A), await state.count(B)) == (1, 1)


async def test_a_session_that_enters_again_counts_once_and_one_that_leaves_again_changes_nothing(
    state: SharedState,
) -> None:
    session = uuid.uuid4()
    assert [await state.enter(A, session, 1) for _ in range(3)] == [True] * 3
    assert await state.count(A) == 1
    for _ in range(2):
        await state.leave(A, session)
    assert await state.count(A) == 0


async def test_a_limit_of_nothing_admits_nobody(state: SharedState) -> None:
    assert not await state.enter(A, uuid.uuid4(), 0)


async def test_the_peak_is_the_most_there_were_at_once(state: SharedState) -> None:
    sessions = [uuid.uuid4() for _ in range(3)]
    for session in sessions:
        await state.enter(A, session, 10)
    for session in sessions[:2]:
        await state.leave(A, session)
    assert (await state.count(A), await state.peak(A), await state.peak(B)) == (1, 3, 0)


async def test_a_new_day_begins_its_peak_with_who_is_there() -> None:
    day = 20_000
    state = LocalState("node-1", wall=lambda: day * 86_400)
    for session in (first := uuid.uuid4(), uuid.uuid4()):
        await state.enter(A, session, 10)
    await state.leave(A, first)
    day += 1
    assert await state.peak(A) == 1
    await state.enter(A, uuid.uuid4(), 10)
    assert await state.peak(A) == 2


async def test_the_directory_names_the_node(pair: tuple[SharedState, SharedState]) -> None:
    session = uuid.uuid4()
    await pair[0].enter(A, session, 1)
    assert await pair[1].where(A, session) == "node-1"
    assert await pair[1].where(B, session) is None
    await pair[1].leave(A, session)
    assert await pair[0].where(A, session) is None


async def test_sessions_of_a_node_that_died_stop_counting_and_those_of_a_living_one_do_not(
    node: MakeNode, redis: Any
) -> None:
    """The lease is longer than this process stalls, for no heartbeat comes meanwhile."""
    dead, living = await node("dead", lease=4), await node("living", lease=4)
    ours, lost = uuid.uuid4(), uuid.uuid4()
    assert await dead.enter(A, lost, 2)
    assert await living.enter(A, ours, 2)
    async with Redis.from_url(redis.url) as client:
        first_lease = await client.zscore(f"avb_session:t:{A}:live", str(ours))
        assert not await living.enter(A, uuid.uuid4(), 2)
        await dead.close()

        async def only_ours() -> bool:
            return await living.count(A) == 1

        async def it_would_be_over() -> bool:
            seconds, microseconds = await client.time()
            return bool(seconds + microseconds / 1e6 > first_lease)

        await until(only_ours)
        await until(it_would_be_over)
    assert await living.where(A, ours) == "living"
    assert await living.where(A, lost) is None
    assert await living.enter(A, uuid.uuid4(), 2)


async def test_a_session_that_moved_belongs_to_the_node_it_is_on(node: MakeNode) -> None:
    old, new = await node("old", lease=0.3), await node("new", lease=60)
    session = uuid.uuid4()
    await old.enter(A, session, 1)
    assert await new.enter(A, session, 1)
    await until(lambda: not old._local.tenants())  # its heartbeat has learnt of it
    await old.leave(A, session)
    assert await new.where(A, session) == "new"


# --- values -----------------------------------------------------------------------------------------------------------


async def test_a_value_is_kept_for_its_time(pair: tuple[SharedState, SharedState]) -> None:
    one, two = pair
    await one.set("avb:k", b"v", 60)
    await one.set("avb:brief", b"v", 0.001)
    assert await two.get("avb:k") == b"v"
    await asyncio.sleep(0.02)
    assert await two.get("avb:brief") is None
    assert await two.get("avb:other") is None
    await two.delete("avb:k")
    assert await one.get("avb:k") is None


async def test_only_one_takes_it(pair: tuple[SharedState, SharedState]) -> None:
    await pair[0].set("avb:k", b"v", 60)
    taken = await asyncio.gather(*(pair[i % 2].take("avb:k") for i in range(20)))
    assert sorted(taken, key=bool) == [None] * 19 + [b"v"]


@pytest.mark.parametrize("odd", ["*", "?", "[ab]", "[^x]", "\\", "a\\*b", "^", "-", "]", "é"])
async def test_a_pattern_takes_its_texts_literally(state: SharedState, odd: str) -> None:
    names = ["", "a", "b", "ab", "aXb", "*", "?", "[ab]", "[^x]", "\\", "a\\*b", "^", "-", "]", "é"]
    for name in names:
        await state.set(f"avb:{name}:1", b"v", 60)
    await state.forget(("avb:", odd, ":", None))
    assert [name for name in names if await state.get(f"avb:{name}:1") is None] == [odd]


async def test_thousands_are_forgotten_and_no_others(state: SharedState) -> None:
    for i in range(2500):
        await state.set(f"avb:a:{i}", b"v", 60)
    await state.set("avb:b:1", b"v", 60)
    await state.forget(("avb:a:", None))
    assert [i for i in range(2500) if await state.get(f"avb:a:{i}")] == []
    assert await state.get("avb:b:1") == b"v"


async def test_in_process_the_least_used_value_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentvoicebox.tenancy.state.local._CACHED", 2)
    state = LocalState("node-1")
    for key in ("a", "b"):
        await state.set(key, b"v", 60)
    await state.get("a")
    await state.set("c", b"v", 60)
    assert [key for key in "abc" if await state.get(key)] == ["a", "c"]


# --- outage: the rows of the table in the package's docstring ---------------------------------------------------------


@pytest.fixture(params=["stopped", "hanging"])
async def outage(request: pytest.FixtureRequest, redis: Any, patience: Choose) -> Any:
    """Takes Redis away and brings it back."""

    class Outage:
        forgets = request.param == "stopped"

        @staticmethod
        def begin() -> None:
            if request.param == "stopped":
                redis.stop()
            else:
                patience(deadline=0.5)
                redis.hang()

        @staticmethod
        def end() -> None:
            patience()
            if request.param == "stopped":
                redis.start()
            else:
                redis.go_on()

    yield Outage
    if not Outage.forgets:
        redis.go_on()


async def test_flw_53_without_redis_each_function_does_what_is_written(
    node: MakeNode, outage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "agentvoicebox.tenancy.state.redis")
    one, two = await node("one"), await node("two")
    before, there = uuid.uuid4(), uuid.uuid4()
    assert await one.enter(A, before, 2)
    assert await two.enter(A, there, 2)
    for key in ("deleted", "set", "many:1", "kept"):
        await one.set(f"avb:{key}", b"old", 60)
    outage.begin()

    with pytest.raises(Unavailable):
        await one.reconcile([Use("key:x", 1, 1)])
    assert one.degraded
    asked = await asyncio.gather(*(one.enter(A, uuid.uuid4(), 2) for _ in range(200)))
    assert sum(asked) == 1, "one was here before; what the other node has is unknown"
    assert (await one.count(A), await one.peak(A)) == (2, 2)
    assert (await one.where(A, before), await one.where(A, there)) == ("one", None)
    assert (await one.get("avb:kept"), await one.take("avb:kept")) == (None, None)
    await one.set("avb:set", b"new", 60)
    await one.delete("avb:deleted")
    await one.forget(("avb:many:", None))
    await one.leave(A, before)
    assert await one.count(A) == 1

    outage.end()
    await until(lambda: not one.degraded)
    assert await one.get("avb:kept") == (None if outage.forgets else b"old")
    assert [await one.get(f"avb:{key}") for key in ("deleted", "set", "many:1")] == [None] * 3
    assert await one.enter(A, uuid.uuid4(), 9)
    assert (await one.reconcile([Use("key:x", 1, 1)]))[0].used == 1
    assert [record.message.split()[0] for record in caplog.records if record.message.startswith("shared_state")] == [
        "shared_state_away",
        "shared_state_back",
    ]


async def test_after_a_restart_redis_is_told_of_the_sessions_it_forgot(node: MakeNode, redis: Any) -> None:
    one, two = await node("one"), await node("two")
    sessions = [uuid.uuid4() for _ in range(3)]
    for state, session in zip((one, two, two), sessions, strict=True):
        assert await state.enter(A, session, 3)
    redis.stop()
    for state in (one, two):
        await state.get("avb:k")
        assert state.degraded
    redis.start()
    await until(lambda: not one.degraded and not two.degraded)

    async def all_three() -> bool:
        return await one.count(A) == 3

    await until(all_three)
    assert not await one.enter(A, uuid.uuid4(), 3)
    assert await one.where(A, sessions[1]) == "two"


async def test_before_a_node_goes_back_to_redis_it_has_reported_its_sessions(node: MakeNode) -> None:
    state, other = await node("one"), await node("two")
    state._local.hold(A, uuid.uuid4())  # as one that entered meanwhile
    await state._catch_up()
    assert await other.count(A) == 1


async def test_who_looks_up_a_value_does_not_wait_until_a_silent_redis_is_given_up(
    node: MakeNode, redis: Any, patience: Choose
) -> None:
    state = await node()
    patience(glance=0.2)
    redis.hang()
    looks = [asyncio.create_task(state.get("avb:k")) for _ in range(3)]
    entry = asyncio.create_task(state.enter(A, uuid.uuid4(), 1))
    await asyncio.wait([*looks, entry], return_when=asyncio.FIRST_COMPLETED)
    assert not entry.done()
    assert not state.degraded, "it may only be slow"
    assert await asyncio.gather(*looks) == [None] * 3
    redis.go_on()
    assert await entry
    assert not state.degraded
    assert await state.count(A) == 1


async def test_a_redis_that_stays_silent_is_given_up_though_only_values_are_looked_up(
    node: MakeNode, redis: Any, patience: Choose
) -> None:
    state = await node()
    patience(glance=0.1, deadline=0.5)
    redis.hang()
    assert await state.get("avb:k") is None
    await until(lambda: state.degraded)
    patience()
    redis.go_on()
    await until(lambda: not state.degraded)


async def test_too_many_missed_deletions_empty_the_cache_and_leave_the_sessions(
    node: MakeNode, redis: Any, monkeypatch: pytest.MonkeyPatch, patience: Choose
) -> None:
    monkeypatch.setattr("agentvoicebox.tenancy.state.redis._MOST_MISSED", 10)
    state, other = await node("one"), await node("two")
    await state.set("avb:k", b"old", 60)
    await other.enter(A, uuid.uuid4(), 1)
    patience(deadline=0.5)
    redis.hang()
    for i in range(12):
        await state.delete(f"avb:{i}")
    patience()
    redis.go_on()
    await until(lambda: not state.degraded)
    assert await state.get("avb:k") is None
    assert await state.count(A) == 1
    await state.set("avb:k", b"new", 60)
    assert await state.get("avb:k") == b"new"


async def test_a_node_that_starts_without_redis_begins_alone_and_finds_it(redis: Any, patience: Choose) -> None:
    redis.stop()
    state = RedisState(redis.url, "node-1")
    await state.start()
    assert state.degraded
    assert await state.enter(A, uuid.uuid4(), 1)
    redis.start()
    await until(lambda: not state.degraded)
    assert await state.count(A) == 1
    await state.close()


async def test_a_redis_that_refuses_to_write_is_away(node: MakeNode, redis: Any) -> None:
    state = await node()
    async with Redis.from_url(redis.url) as client:
        await client.config_set("maxmemory", "1")
        await state.set("avb:k", b"v", 60)
        assert state.degraded
        assert await state.enter(A, uuid.uuid4(), 1)
        assert not await state.enter(A, uuid.uuid4(), 1)


async def test_who_is_cancelled_meanwhile_leaves_no_connection_behind_that_answers_another(node: MakeNode) -> None:
    state = await node()
    for i in range(20):
        await state.set(f"avb:{i}", str(i).encode(), 60)
    for _ in range(20):
        asked = [asyncio.create_task(state.get(f"avb:{i}")) for i in range(20)]
        await asyncio.sleep(0)
        for task in asked[::2]:
            task.cancel()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert found[1::2] == [str(i).encode() for i in range(1, 20, 2)]


# --- where it is ------------------------------------------------------------------------------------------------------


async def test_the_setting_decides(redis: Any) -> None:
    assert isinstance(states.connect(None, "n"), LocalState)
    found = states.connect(redis.url, "n")
    assert isinstance(found, RedisState)
    await found.close()


@pytest.mark.parametrize(
    "url", ["http://h", "redis://:hunter2@h?db=hunter2", "redis://h:hunter2", "redis://h?hunter2=1"]
)
def test_an_address_that_cannot_be_is_named_and_not_shown(url: str) -> None:
    with pytest.raises(BadInput) as caught:
        RedisState(url, "n")
    assert caught.value.param == "redis"
    assert "hunter2" not in f"{caught.value} {caught.value.__cause__}"
    assert caught.value.__suppress_context__


def test_the_pool_is_as_asked_for() -> None:
    pool = RedisState("redis://h", "n")._redis.connection_pool
    assert pool.max_connections == 50
    assert pool.connection_kwargs["socket_connect_timeout"] == pool.connection_kwargs["socket_timeout"] == 5


async def test_flw_42_everything_has_one_of_our_prefixes(node: MakeNode, redis: Any) -> None:
    state = await node()
    await state.enter(A, uuid.uuid4(), 1)
    await state.reconcile([Use("key:x", 1, 1)])
    async with Redis.from_url(redis.url, decode_responses=True) as client:
        keys = sorted([key async for key in client.scan_iter()])
    assert keys == ["avb_rl:key:x", *(f"avb_session:t:{A}:{name}" for name in ("live", "nodes", "peak"))]
