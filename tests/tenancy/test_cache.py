"""The cache: what one tenant keeps, another neither reads nor removes."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy.cache import LONGEST_KEY, TTL, Cache
from agentvoicebox.tenancy.models import PLATFORM
from agentvoicebox.tenancy.state import SharedState
from agentvoicebox.tenancy.state.local import LocalState
from agentvoicebox.tenancy.state.redis import RedisState

A, B = uuid.UUID(int=0xA), uuid.UUID(int=0xB)
PATIENT = effort(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
KEYS = st.text(min_size=1, max_size=40).filter(str.isprintable)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(params=["local", "redis"])
async def state(request: pytest.FixtureRequest, redis: Any, patient_state: None) -> AsyncIterator[SharedState]:
    found: SharedState = LocalState("n") if request.param == "local" else RedisState(redis.url, "n")
    await found.start()
    yield found
    assert not found.degraded
    await found.close()


@pytest.fixture
def cache(state: SharedState) -> Cache:
    return Cache(state)


class Spy(LocalState):
    """Remembers under which keys it was asked."""

    def __init__(self) -> None:
        super().__init__("n")
        self.asked: list[str] = []

    async def get(self, key: str) -> bytes | None:
        self.asked.append(key)
        return await super().get(key)

    async def set(self, key: str, value: bytes, ttl: float) -> None:
        self.asked.append(key)
        await super().set(key, value, ttl)

    async def take(self, key: str) -> bytes | None:
        self.asked.append(key)
        return await super().take(key)

    async def delete(self, key: str) -> None:
        self.asked.append(key)
        await super().delete(key)

    async def forget(self, pattern: Any) -> None:
        self.asked.append(pattern[0])
        await super().forget(pattern)


@given(st.uuids(), st.uuids(), KEYS, JSON)
@PATIENT
async def test_p13_cache_isolation(tenant: uuid.UUID, other: uuid.UUID, key: str, value: Any) -> None:
    spy = Spy()
    cache = Cache(spy)
    mine = cache.of(tenant)
    await mine.set(key, value)
    assert await mine.get(key, "nothing") == value
    assert await mine.get_or_set(key, unasked) == value
    await mine.invalidate(key.replace("{}", ""))
    await mine.take(key)
    await mine.delete(key)
    assert all(asked.startswith(f"avb:t:{tenant}:") for asked in spy.asked)
    assert len(spy.asked) >= 6
    await mine.set(key, value)
    if other != tenant:
        assert await cache.of(other).get(key, "nothing") == "nothing"
        await cache.of(other).delete(key)
        await cache.of(other).invalidate("*")
        assert await mine.get(key, "nothing") == value


async def unasked() -> Any:
    raise AssertionError("it was in the cache")


@given(KEYS, st.lists(KEYS, max_size=3), JSON)
@PATIENT
async def test_what_is_kept_is_got_until_its_form_is_invalidated(
    cache: Cache, key: str, others: list[str], value: Any
) -> None:
    mine = cache.of(A)
    for name in (key, *others):
        await mine.set(name, value)
    await mine.invalidate("{}", key)
    assert await mine.get(key, "nothing") == "nothing"
    for name in others:
        assert await mine.get(name, "nothing") == ("nothing" if name == key else value)
    await mine.invalidate("*")


@pytest.mark.parametrize("nobody", [None, PLATFORM, "", str(A), "*", 7])
async def test_flw_34_without_a_tenant_there_is_no_cache(nobody: Any) -> None:
    spy = Spy()
    with pytest.raises(BadInput) as caught:
        Cache(spy).of(nobody)
    assert caught.value.code == "tenant_required"

    @Cache(spy).cached()
    async def plan(tenant_id: Any) -> str:
        raise AssertionError("it was asked for")

    with pytest.raises(BadInput):
        await plan(nobody)
    assert spy.asked == []


async def test_flw_34_none_is_a_value(cache: Cache) -> None:
    mine = cache.of(A)
    await mine.set("k", None)
    assert await mine.get("k", "nothing") is None
    assert await mine.get_or_set("k", unasked) is None
    assert (cache.hits, cache.misses) == (2, 0)


async def test_get_or_set_makes_a_value_once(cache: Cache) -> None:
    made = []

    async def make() -> list[int]:
        made.append(len(made))
        return [len(made)]

    assert [await cache.of(A).get_or_set("k", make) for _ in range(3)] == [[1]] * 3
    assert await cache.of(B).get_or_set("k", make) == [2]
    assert (cache.hits, cache.misses) == (2, 2)


async def test_flw_34_the_decorator_keys_by_arguments_however_they_are_given(cache: Cache) -> None:
    calls = []

    @cache.cached(ttl=60)
    async def plan(tenant_id: uuid.UUID, month: int, *, detail: bool = False, of: uuid.UUID = A) -> str:
        """How much."""
        calls.append(month)
        return f"{tenant_id.int} {month} {detail}"

    @cache.cached()
    async def other(tenant_id: uuid.UUID, month: int, *, detail: bool = False, of: uuid.UUID = A) -> str:
        return "other"

    assert await plan(A, 1) == await plan(A, month=1) == await plan(month=1, tenant_id=A, detail=False) == "10 1 False"
    assert calls == [1]
    assert await plan(A, 1, detail=True) == "10 1 True"
    assert await plan(A, 11) == "10 11 False"
    assert await plan(B, 1) == "11 1 False"
    assert await other(A, 1) == "other"
    assert len(calls) == 4
    assert plan.__doc__ == "How much."
    with pytest.raises(BadInput):
        await plan(A, object())  # type: ignore[arg-type]


async def test_flw_35_a_pattern_invalidates_what_it_says_and_texts_in_it_are_only_texts(cache: Cache) -> None:
    mine = cache.of(A)
    for key in ("user:*:plan", "user:ann:plan", "user:ann:voice", "user:bob:plan", "users"):
        await mine.set(key, 1)
        await cache.of(B).set(key, 1)
    await mine.invalidate("user:{}:*", "*")
    assert await mine.get("user:*:plan") is None
    assert await mine.get("user:ann:plan") == 1
    await mine.invalidate("user:{}:*", "ann")
    assert [await mine.get(key) for key in ("user:ann:plan", "user:ann:voice", "user:bob:plan")] == [None, None, 1]
    await mine.invalidate("user:*:plan")
    assert [await mine.get(key) for key in ("user:bob:plan", "users")] == [None, 1]
    await mine.invalidate("*")
    assert await mine.get("users") is None
    assert await cache.of(B).get("user:*:plan") == 1
    for pattern, texts in (("{}", ()), ("x", ("y",)), ("{}{}", ("y",))):
        with pytest.raises(BadInput):
            await mine.invalidate(pattern, *texts)


async def test_to_resume_a_session_is_for_one_only(cache: Cache) -> None:
    mine = cache.of(A)
    await mine.set("resume:1", {"turn": 3}, ttl=60)
    assert await cache.of(B).take("resume:1", "nothing") == "nothing"
    assert await mine.take("resume:1") == {"turn": 3}
    assert await mine.take("resume:1", "nothing") == "nothing"


async def test_a_value_lives_five_minutes_unless_it_says_otherwise() -> None:
    now = 0.0
    mine = Cache(LocalState("n", clock=lambda: now)).of(A)
    await mine.set("usual", 1)
    await mine.set("brief", 1, ttl=5)
    assert TTL == 300
    for now, alive in ((4.9, {"usual", "brief"}), (5.0, {"usual"}), (299.9, {"usual"}), (300.0, set())):  # noqa: B007
        assert {key for key in ("usual", "brief") if await mine.get(key)} == alive


@pytest.mark.parametrize("key", ["", "a\0b", "a\nb", "x" * (LONGEST_KEY + 1), "\ud800"])
async def test_what_cannot_be_a_key(cache: Cache, key: str) -> None:
    mine = cache.of(A)
    asked: list[Awaitable[Any]] = [mine.get(key), mine.set(key, 1), mine.take(key)]
    for each in asked:
        with pytest.raises(BadInput):
            await each


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan"), b"x", {"a": uuid.uuid4()}])
async def test_what_json_cannot_represent(cache: Cache, value: Any) -> None:
    with pytest.raises(BadInput):
        await cache.of(A).set("k", value)


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf")])
async def test_a_time_that_makes_no_sense(cache: Cache, ttl: float) -> None:
    with pytest.raises(BadInput):
        await cache.of(A).set("k", 1, ttl)


async def test_what_nobody_here_has_written_is_a_miss(state: SharedState) -> None:
    cache = Cache(state)
    for data in (b"{", b"\xff", b""):
        await state.set(f"avb:t:{A}:k", data, 60)
        assert await cache.of(A).get_or_set("k", made) == "made"
    assert json.loads(await state.get(f"avb:t:{A}:k") or b"") == "made"
    assert (cache.hits, cache.misses) == (0, 3)


async def made() -> str:
    return "made"


async def test_without_redis_the_cache_misses_and_goes_on(redis: Any) -> None:
    state = RedisState(redis.url, "n")
    cache = Cache(state)
    await cache.of(A).set("k", "old")
    redis.stop()
    assert [await cache.of(A).get_or_set("k", made) for _ in range(2)] == ["made"] * 2
    assert state.degraded
    assert cache.misses == 2
    await state.close()
