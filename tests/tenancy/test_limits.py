"""Rates: what is let through and what is not, on one node and on several, with and without the state they share."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from agentvoicebox.config.errors import RateLimited
from agentvoicebox.tenancy import limits
from agentvoicebox.tenancy.limits import (
    ADMIN,
    API_KEY,
    DEFAULT,
    FAILURES,
    KEYS,
    LOOKS,
    PAIRINGS,
    SESSIONS,
    SOCKET_MESSAGES,
    TENANTS,
    Budget,
    Decision,
    Exceeded,
    Limiter,
    Rate,
    Reconciler,
)
from agentvoicebox.tenancy.limits.limiter import STRANGERS, network
from agentvoicebox.tenancy.limits.rates import CROWD
from agentvoicebox.tenancy.models import RateClass, Tier
from agentvoicebox.tenancy.state import HOUR_MINUTES, SharedState, Use
from agentvoicebox.tenancy.state.local import LocalState
from agentvoicebox.tenancy.state.redis import RedisState

WALL = 1_800_000_000.0
X = ("key", "x")
PATIENT = effort(deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Clock:
    """Time that passes when the test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.wall = WALL

    def __call__(self) -> float:
        return self.now

    def limiter(self, **options: Any) -> Limiter:
        return Limiter(self, lambda: self.wall, **options)

    def go(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


@dataclass(frozen=True)
class Holder:
    """What a `Grant` says about who is held to what."""

    tenant_id: uuid.UUID = field(default_factory=uuid.uuid4)
    key_id: uuid.UUID = field(default_factory=uuid.uuid4)
    tier: Tier = Tier.ENTERPRISE
    rate_class: RateClass = RateClass.STANDARD


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(clock: Clock) -> Limiter:
    return clock.limiter()


def admitted(limiter: Limiter, subject: limits.Subject, rate: Rate, tries: int) -> int:
    return sum(limiter.decide(subject, rate).allowed for _ in range(tries))


def asked(limiter: Limiter, subject: limits.Subject, rate: Rate) -> tuple[Decision, Exceeded | None]:
    try:
        return limiter.admit(subject, rate), None
    except RateLimited as refused:
        assert isinstance(refused, Exceeded)  # noqa: PT017 - a step of the story, not its end
        return refused.decision, refused


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_flw_16_every_class_of_key_has_its_numbers() -> None:
    assert {name: KEYS[name] for name in RateClass} == {
        RateClass.STANDARD: Rate(120, 5_000),
        RateClass.ELEVATED: Rate(300, 10_000),
        RateClass.UNLIMITED: None,
    }
    assert (Rate(60, 1_000), Rate(120, 5_000), Rate(300, 10_000)) == (DEFAULT, API_KEY, ADMIN)
    assert Rate(10, 100) == FAILURES
    assert set(TENANTS) == set(Tier)
    assert all(rate.per_minute >= 300 and rate.per_hour >= 10_000 for rate in TENANTS.values())


def test_gap_05_every_tier_has_its_sessions() -> None:
    assert [SESSIONS[tier] for tier in Tier] == [2, 10, 50, 500]


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (-1, 5)])
def test_a_rate_that_lets_nothing_through_is_none(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Rate(*numbers)


@pytest.mark.parametrize("rate", [DEFAULT, API_KEY, ADMIN, FAILURES, CROWD, *TENANTS.values()])
@pytest.mark.parametrize("uptime", [0.0, 1e7])
def test_con_23_a_minutes_requests_at_once_and_then_one_at_a_time(rate: Rate, uptime: float) -> None:
    clock = Clock(uptime)
    limiter = clock.limiter()
    assert admitted(limiter, X, rate, rate.per_minute + 5) == rate.per_minute
    clock.go(rate.interval * 1.01)
    assert admitted(limiter, X, rate, 5) == 1
    clock.go(60)
    assert admitted(limiter, X, rate, rate.per_minute + 5) == min(rate.per_minute, rate.per_hour - rate.per_minute - 1)


# --- the promise ------------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(st.floats(0, 400) | st.sampled_from([0.0, 0.5, 60.0, 3600.0]), st.integers(1, 40)), max_size=60
)
RATES = st.builds(Rate, st.integers(1, 30), st.integers(1, 120))


@given(RATES, STEPS, st.floats(0, 1e7))
@PATIENT
def test_p14_rate_limit_enforcement(rate: Rate, steps: list[tuple[float, int]], start: float) -> None:
    """Above the limit → 429 with headers and retry_after; never more than burst + rate · t, nor the hour's limit."""
    clock = Clock(start)
    limiter = clock.limiter()
    times: list[float] = []
    for pause, tries in steps:
        clock.go(pause)
        for _ in range(tries):
            decision, refused = asked(limiter, X, rate)
            told = dict(limits.headers(decision))
            assert decision.reset >= math.floor(clock.wall)
            if refused is None:
                times.append(clock.now)
                assert set(told) == {"X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"}
                continue
            assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
            assert refused.retry_after == math.ceil(decision.retry_after) >= 1
            assert set(told) == {"X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "Retry-After"}
            assert told["X-RateLimit-Remaining"] == "0"
            assert int(told["X-RateLimit-Limit"]) in (rate.per_minute, rate.per_hour)
            assert told["Retry-After"] == str(refused.retry_after)
            assert f"{refused.retry_after} s" in refused.message
    for i, begin in enumerate(times):
        hour = 0
        for n, at in enumerate(times[i:], 1):
            assert n <= rate.per_minute + (at - begin) / rate.interval + 0.01
            hour += at - begin < 3600
        assert hour <= rate.per_hour


@given(RATES, STEPS)
@PATIENT
def test_who_waits_as_told_is_let_through_and_not_a_moment_before(rate: Rate, steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    limiter = clock.limiter()
    for pause, tries in steps:
        clock.go(pause)
        admitted(limiter, X, rate, tries)
    while (decision := limiter.decide(X, rate)).allowed:
        pass
    clock.go(decision.retry_after - 0.01)
    assert decision.retry_after <= 0.01 or not limiter.decide(X, rate).allowed
    clock.go(0.011)
    assert limiter.decide(X, rate).allowed


@given(RATES, st.lists(st.sampled_from([-3600.0, -60.0, -1.0, 0.0, 1.0]), max_size=30))
@PATIENT
def test_a_clock_that_goes_back_neither_opens_nor_jams_a_bucket(rate: Rate, jumps: list[float]) -> None:
    clock = Clock(20_000)
    limiter = clock.limiter()
    passed = 0.0
    count = 0
    for jump in jumps:
        clock.now += jump
        passed += max(0.0, jump)
        count += admitted(limiter, X, rate, 50)
    assert count <= min(rate.per_hour, rate.per_minute + passed / rate.interval + 0.01)
    clock.now += 3700
    assert limiter.decide(X, rate).allowed


def test_the_wall_clock_decides_nothing(clock: Clock, limiter: Limiter) -> None:
    for jump in (0, -1e6, 1e6):
        clock.wall = WALL + jump
        assert admitted(limiter, ("key", jump), DEFAULT, 100) == 60
        assert admitted(limiter, X, DEFAULT, 100) == (60 if jump == 0 else 0)


def test_flw_15_at_the_turn_of_a_minute_or_an_hour_nobody_gets_twice_as_much(clock: Clock, limiter: Limiter) -> None:
    clock.now = 3599.0
    assert admitted(limiter, X, API_KEY, 500) == 120
    clock.go(2)
    assert admitted(limiter, X, API_KEY, 500) == 4
    slow = Rate(1000, 1000)
    clock.now = 2 * 3600 - 1.0
    assert admitted(limiter, ("key", "y"), slow, 2000) == 1000
    for later in (2, 60, 3500):
        clock.now = 2 * 3600 - 1.0 + later
        assert admitted(limiter, ("key", "y"), slow, 2000) == 0
    clock.go(160)
    assert admitted(limiter, ("key", "y"), slow, 2000) == 1000


def test_flw_48_the_hour_is_enforced_too(clock: Clock, limiter: Limiter) -> None:
    """Who never exceeds the minute meets the hour."""
    count = 0
    for _ in range(59):
        count += admitted(limiter, X, DEFAULT, 60)
        clock.go(60)
    assert count == 1000
    decision = limiter.decide(X, DEFAULT)
    assert (decision.limit, decision.remaining) == (1000, 0)
    assert 0 < decision.retry_after <= 120
    assert decision.reset == math.ceil(clock.wall + decision.retry_after)
    clock.go(decision.retry_after)
    assert admitted(limiter, X, DEFAULT, 100) == 60


def test_a_cost_counts_as_many_and_one_that_never_fits_is_a_mistake(limiter: Limiter) -> None:
    assert limiter.decide(X, DEFAULT, 59).remaining == 1
    refused = limiter.decide(X, DEFAULT, 2)
    assert not refused.allowed
    assert refused.retry_after == pytest.approx(1, abs=0.01)
    assert limiter.decide(X, DEFAULT).allowed
    with pytest.raises(ValueError, match="never fit"):
        limiter.decide(X, DEFAULT, 61)


def test_what_is_refused_costs_nothing(clock: Clock, limiter: Limiter) -> None:
    admitted(limiter, X, DEFAULT, 100_000)
    clock.go(1.01)
    assert limiter.decide(X, DEFAULT).allowed


def test_rat_04_headers_tell_limit_rest_and_when_it_is_whole_again(clock: Clock, limiter: Limiter) -> None:
    assert limits.headers(limiter.decide(X, API_KEY)) == [
        ("X-RateLimit-Limit", "120"),
        ("X-RateLimit-Remaining", "119"),
        ("X-RateLimit-Reset", str(int(WALL) + 1)),
    ]
    admitted(limiter, X, API_KEY, 119)
    assert limits.headers(limiter.decide(X, API_KEY)) == [
        ("X-RateLimit-Limit", "120"),
        ("X-RateLimit-Remaining", "0"),
        ("X-RateLimit-Reset", str(int(WALL) + 60)),
        ("Retry-After", "1"),
    ]


# --- who is held to what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate_class", "limit"), [("standard", 120), ("elevated", 300), ("unlimited", 60_000)])
def test_a_key_is_held_to_its_class_and_an_unlimited_one_to_its_tenant(
    limiter: Limiter, rate_class: str, limit: int
) -> None:
    holder = Holder(rate_class=RateClass(rate_class))
    assert limiter.admit_request(holder).limit == limit
    for _ in range(limit - 1):
        limiter.admit_request(holder)
    with pytest.raises(Exceeded) as caught:
        limiter.admit_request(holder, "192.0.2.1")
    assert caught.value.decision.limit == limit


def test_all_keys_of_a_tenant_share_its_rate_and_a_refusal_there_costs_the_key_nothing(limiter: Limiter) -> None:
    holders = [Holder(uuid.UUID(int=1), uuid.UUID(int=n), Tier.FREE) for n in range(1, 5)]
    other = Holder(uuid.UUID(int=2), uuid.UUID(int=9), Tier.FREE)
    counts = [0] * 4
    for n, holder in enumerate(holders):
        for _ in range(120):
            try:
                decision = limiter.admit_request(holder)
                counts[n] += 1
            except Exceeded as refused:
                decision = refused.decision
    assert counts == [120, 120, 60, 0]
    assert (decision.limit, decision.remaining) == (300, 0)
    assert limiter.decide(("key", holders[3].key_id), API_KEY).remaining == 119
    assert limiter.admit_request(other).remaining == 119


def test_the_tighter_one_is_told(limiter: Limiter) -> None:
    holders = [Holder(uuid.UUID(int=1), uuid.UUID(int=n), Tier.FREE) for n in range(1, 4)]
    assert limiter.admit_request(holders[0]).limit == 120
    admitted(limiter, ("tenant", uuid.UUID(int=1)), TENANTS[Tier.FREE], 298)
    decision = limiter.admit_request(holders[1])
    assert (decision.limit, decision.remaining) == (300, 0)


def test_strangers_are_held_by_address_and_a_customers_ipv6_network_is_one(limiter: Limiter) -> None:
    for n in range(60):
        assert limiter.admit_anonymous(f"2001:db8:1:2::{n:x}").limit == 60
    with pytest.raises(Exceeded):
        limiter.admit_anonymous("2001:db8:1:2:ffff::1")
    limiter.admit_anonymous("2001:db8:1:3::1")
    limiter.admit_anonymous("192.0.2.1")


def test_what_an_address_may_do_seldom_is_counted_apart(limiter: Limiter) -> None:
    for left in (4, 3, 2, 1, 0):
        assert limiter.admit_address("pairings", "192.0.2.1", PAIRINGS).remaining == left
    with pytest.raises(Exceeded):
        limiter.admit_address("pairings", "192.0.2.1", PAIRINGS)
    assert limiter.admit_address("pairings", "192.0.2.2", PAIRINGS).remaining == 4
    assert limiter.admit_address("looks", "192.0.2.1", LOOKS).remaining == 29
    assert limiter.admit_anonymous("192.0.2.1").remaining == 59


@pytest.mark.parametrize("kind", ["ip", "pairings", "looks"])
def test_no_kind_of_strangers_takes_unbounded_memory(clock: Clock, kind: str) -> None:
    limiter = clock.limiter(strangers=100)
    for address in addresses(0, 1_000):
        for _ in range(3):
            asked(limiter, (kind, address), PAIRINGS)
    assert len(limiter) <= 101


@pytest.mark.parametrize(
    ("address", "one"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8::1", "2001:db8::"),
        ("fe80::1%eth0", "fe80::"),
        ("", "unknown"),
        ("no address\n", "unknown"),
    ],
)
def test_what_counts_as_one_address(address: str, one: str) -> None:
    assert network(address) == one


def test_flw_54_who_guesses_keys_is_refused_before_the_next_look(clock: Clock, limiter: Limiter) -> None:
    for _ in range(10):
        limiter.check_failures("192.0.2.1")
        limiter.failed("192.0.2.1")
    with pytest.raises(Exceeded) as caught:
        limiter.check_failures("192.0.2.1")
    assert caught.value.retry_after == 6
    limiter.check_failures("192.0.2.2")
    limiter.admit_anonymous("192.0.2.1")
    clock.go(6)
    limiter.check_failures("192.0.2.1")


def test_flw_69_asking_costs_nothing_as_long_as_nothing_failed(limiter: Limiter) -> None:
    for n in range(1000):
        limiter.check_failures(f"192.0.2.{n % 256}")
    assert len(limiter) == 0


def test_failures_that_were_under_way_together_are_all_counted(clock: Clock, limiter: Limiter) -> None:
    for _ in range(15):
        limiter.failed("192.0.2.1")
    clock.go(30)
    with pytest.raises(Exceeded):
        limiter.check_failures("192.0.2.1")
    for _ in range(10_000):
        limiter.failed("192.0.2.1")
    clock.go(3721)
    limiter.check_failures("192.0.2.1")


def test_failures_have_an_hour_too(clock: Clock, limiter: Limiter) -> None:
    count = 0
    for _ in range(50):
        for _ in range(10):
            try:
                limiter.check_failures("192.0.2.1")
            except Exceeded:
                continue
            limiter.failed("192.0.2.1")
            count += 1
        clock.go(60)
    assert count == 100


def test_rat_11_a_refusal_is_logged_once_a_minute_and_names_nobody(
    clock: Clock, limiter: Limiter, caplog: pytest.LogCaptureFixture
) -> None:
    holder = Holder()
    for _ in range(500):
        try:
            limiter.admit_request(holder, "192.0.2.77")
        except Exceeded:
            clock.go(0.1)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith("rate_limit_exceeded subject=key:")
    assert "limit=120" in record.message
    assert str(holder.key_id) not in record.message
    assert "192.0.2.77" not in record.message


# --- memory -----------------------------------------------------------------------------------------------------------


def addresses(first: int, last: int) -> Iterator[str]:
    return (f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}" for n in range(first, last))


def test_who_is_full_again_is_forgotten(clock: Clock, limiter: Limiter) -> None:
    for address in addresses(0, 2000):
        limiter.admit_anonymous(address)
    assert len(limiter) == 2000
    clock.go((HOUR_MINUTES + 1) * 60)
    for address in addresses(2000, 4100):
        limiter.admit_anonymous(address)
    assert len(limiter) <= 2100
    assert len(limiter._touched) == len(limiter)


def test_any_number_of_addresses_takes_bounded_memory_and_the_last_share_one_bucket(clock: Clock) -> None:
    limiter = clock.limiter(strangers=500)
    for address in addresses(0, 500):
        for _ in range(20):
            limiter.admit_anonymous(address)
    clock.go(60)
    count = 0
    for address in addresses(500, 2500):
        decision, refused = asked(limiter, ("ip", address), DEFAULT)
        assert refused is None or decision.limit == CROWD.per_minute
        count += refused is None
    assert count == CROWD.per_minute
    assert len(limiter) == 501
    limiter.admit_request(Holder())
    assert limiter.admit_anonymous("10.0.0.0").limit == 60
    assert len(limiter._touched) == len(limiter) == 503


def test_a_table_that_is_full_forgets_first_who_used_next_to_nothing(clock: Clock) -> None:
    limiter = clock.limiter(strangers=500)
    for address in addresses(0, 400):
        limiter.admit_anonymous(address)
    for address in addresses(400, 500):
        for _ in range(20):
            limiter.admit_anonymous(address)
    clock.go(60)
    for address in addresses(500, 900):
        assert limiter.admit_anonymous(address).limit == 60
    assert limiter.admit_anonymous("10.0.1.200").remaining == 59
    assert limiter._buckets["ip", "10.0.1.200"].used == 21
    assert STRANGERS == 100_000


def test_failures_of_a_crowd_are_counted_together_and_do_not_grow(clock: Clock) -> None:
    limiter = clock.limiter(strangers=100)
    for address in addresses(0, 100):
        for _ in range(5):
            limiter.failed(address)
    for address in addresses(100, 100 + CROWD.per_minute):
        limiter.check_failures(address)
        limiter.failed(address)
    with pytest.raises(Exceeded):
        limiter.check_failures("10.99.0.1")
    limiter.check_failures("10.0.0.1")
    assert len(limiter) == 101


# --- several nodes ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def states(redis: Any, patient_state: None) -> AsyncIterator[list[RedisState]]:
    """Two nodes' views of one Redis."""
    found = [RedisState(redis.url, name) for name in ("one", "two")]
    yield found
    for state in found:
        await state.close()


@pytest.fixture(params=["local", "redis"])
def shared(request: pytest.FixtureRequest, states: list[RedisState]) -> SharedState:
    return LocalState("n") if request.param == "local" else states[0]


@pytest.mark.parametrize("piece", [1, 5, 40])
async def test_rat_07_two_nodes_together_admit_the_limit_and_what_one_admits_between_two_calls(
    shared: SharedState, piece: int
) -> None:
    """Each alone would admit 120."""
    nodes = [Limiter() for _ in range(2)]
    reconcilers = [Reconciler(node, shared) for node in nodes]
    begin = time.monotonic()
    count = 0
    for _ in range(300 // piece):
        for node in nodes:
            count += admitted(node, X, API_KEY, piece)
        for reconciler in reconcilers:
            await reconciler.once()
    drained = (time.monotonic() - begin) / API_KEY.interval
    assert 120 <= count <= 120 + piece + drained + 1


async def test_what_was_admitted_too_much_is_paid_off_before_anybody_goes_on(shared: SharedState) -> None:
    nodes = [Limiter() for _ in range(2)]
    reconcilers = [Reconciler(node, shared) for node in nodes]
    rate = Rate(600, 100_000)
    begin = time.monotonic()
    assert [admitted(node, X, rate, 400) for node in nodes] == [400, 400]
    for reconciler in reconcilers:
        await reconciler.once()
    assert [node.decide(X, rate).allowed for node in nodes] == [True, False], "one of them has heard of the other"
    for reconciler in reconcilers:
        await reconciler.once()
    for node in nodes:
        told = node.decide(X, rate).retry_after
        assert 20 - (time.monotonic() - begin) - 1 <= told <= 21, "the 200 too many at ten a second"


async def test_the_hour_counts_what_all_nodes_admitted(shared: SharedState) -> None:
    nodes = [Limiter() for _ in range(3)]
    reconcilers = [Reconciler(node, shared) for node in nodes]
    rate = Rate(1000, 1000)
    for node, reconciler in zip(nodes, reconcilers, strict=True):
        assert admitted(node, X, rate, 300) == 300
        await reconciler.once()
    for reconciler in reconcilers:
        await reconciler.once()
    for node in nodes:
        node.decide(X, rate)
    for reconciler in reconcilers:
        await reconciler.once()
    assert admitted(nodes[0], X, rate, 1000) <= 99
    assert nodes[0]._buckets[X].used == 1000
    assert nodes[0]._buckets[X].foreign in (600, 601, 602)


async def test_a_node_that_refuses_learns_when_others_say_there_is_room(shared: SharedState, clock: Clock) -> None:
    """Its view of the hour is as old as its last call; that others' requests fell out, it hears by asking."""
    limiter = clock.limiter()
    reconciler = Reconciler(limiter, shared)
    rate = Rate(100, 100)
    admitted(limiter, X, rate, 10)
    await reconciler.once()
    limiter._buckets[X].foreign += 90
    limiter._buckets[X].used += 90
    clock.go(60)
    assert not limiter.decide(X, rate).allowed
    await reconciler.once()
    assert limiter.decide(X, rate).allowed


async def test_subjects_of_different_kinds_never_meet(shared: SharedState) -> None:
    limiter = Limiter()
    same = uuid.uuid4()
    for kind in ("key", "tenant", "user"):
        limiter.decide((kind, same), API_KEY)
    limiter.admit_anonymous("192.0.2.1")
    limiter.failed("192.0.2.1")
    await Reconciler(limiter, shared).once()
    assert {bucket.used for bucket in limiter._buckets.values()} == {1}


async def test_rat_08_flw_53_without_redis_every_node_holds_to_the_whole_rate_and_says_so(
    redis: Any, states: list[RedisState], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "agentvoicebox.tenancy.limits")
    nodes = [Limiter() for _ in states]
    reconcilers = [Reconciler(node, state) for node, state in zip(nodes, states, strict=True)]
    begin = time.monotonic()
    assert admitted(nodes[0], X, API_KEY, 50) == 50
    await reconcilers[0].once()
    redis.stop()
    for _ in range(3):
        for node, reconciler in zip(nodes, reconcilers, strict=True):
            admitted(node, X, API_KEY, 100)
            node.failed("192.0.2.1")
            await reconciler.once()
            assert node.degraded
    drained = (time.monotonic() - begin) / API_KEY.interval
    assert all(120 <= node._buckets[X].used <= 120 + drained + 1 for node in nodes)
    for node in nodes:
        for _ in range(8):
            node.failed("192.0.2.1")
        with pytest.raises(Exceeded):
            node.check_failures("192.0.2.1")

    redis.start()
    async with asyncio.timeout(30):
        while any(node.degraded for node in nodes):
            await asyncio.sleep(0.05)
            for reconciler in reconcilers:
                await reconciler.once()
    for node in nodes:
        node.decide(X, API_KEY)
    for _ in range(2):
        for reconciler in reconcilers:
            await reconciler.once()
    assert nodes[1]._buckets[X].used >= 180, "its own, and what the other did since Redis forgot"
    said = [record.message.split(":")[0] for record in caplog.records if record.message.startswith("rates_")]
    assert said == ["rates_local"] * 2 + ["rates_shared"] * 2


class Away(LocalState):
    """A state that can be told to be away."""

    degraded = False


@given(
    st.lists(st.tuples(st.floats(0, 300), st.integers(0, 30)), min_size=1, max_size=40),
    st.builds(Rate, st.integers(5, 30), st.integers(50, 2000)),
)
@PATIENT
async def test_what_a_node_reports_after_an_outage_is_what_has_not_drained_meanwhile(
    steps: list[tuple[float, int]], rate: Rate
) -> None:
    """The other node then believes no less than the first, and not that all of it came just now."""
    clock = Clock()
    state = Away("n", clock=clock)
    first, second = clock.limiter(), clock.limiter()
    reconcile = Reconciler(first, state)
    state.degraded = True
    for pause, tries in steps:
        clock.go(pause)
        admitted(first, X, rate, tries)
        await reconcile.once()
    mine = first._buckets.get(X)
    level, used = 0.0, 0
    if mine is not None:
        if clock.now >= mine.turn:
            mine.advance(clock.now)
        level, used = max(0.0, mine.tat - clock.now), mine.used
    state.degraded = False
    await reconcile.once()
    second._touch(second._open(X, rate, clock.now), rate, clock.now)
    await Reconciler(second, state).once()
    theirs = second._buckets[X]
    assert level - 1e-6 <= theirs.tat - clock.now <= level + 1 + 1e-6
    assert theirs.used == used


async def test_redis_that_has_lost_everything_empties_no_bucket(redis: Any, states: list[RedisState]) -> None:
    limiter = Limiter()
    reconciler = Reconciler(limiter, states[0])
    begin = time.monotonic()
    assert admitted(limiter, X, API_KEY, 200) >= 120
    await reconciler.once()
    redis.stop()
    redis.start()
    limiter.decide(X, API_KEY)
    async with asyncio.timeout(30):
        while limiter.degraded or limiter._touched:
            await reconciler.once()
            await asyncio.sleep(0.05)
    admitted(limiter, X, API_KEY, 200)
    drained = (time.monotonic() - begin) / API_KEY.interval
    assert 120 <= limiter._buckets[X].used <= 120 + drained + 1


async def test_the_reconciler_runs_by_itself_and_tells_the_rest_when_it_ends(clock: Clock) -> None:
    state = LocalState("n", clock=clock)
    nodes = [clock.limiter() for _ in range(2)]
    running = Reconciler(nodes[0], state, interval=0.001)
    await running.start()
    nodes[0].decide(X, API_KEY)
    async with asyncio.timeout(30):
        while nodes[0]._touched:
            await asyncio.sleep(0.001)
    nodes[0].decide(X, API_KEY)
    await running.close()
    nodes[1].decide(X, API_KEY)
    await Reconciler(nodes[1], state).once()
    assert nodes[1]._buckets[X].used == 3


async def test_a_call_that_is_cancelled_or_fails_loses_nothing(clock: Clock) -> None:
    class Slow(LocalState):
        async def reconcile(self, uses: Any) -> Any:
            await asyncio.sleep(3600)

    limiter = clock.limiter()
    limiter.decide(X, API_KEY, 3)
    call = asyncio.create_task(Reconciler(limiter, Slow("n")).once())
    await asyncio.sleep(0)
    limiter.decide(X, API_KEY, 2)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert [told.fresh for told in limiter.collect()] == [5]


async def test_a_mistake_in_the_state_stops_neither_the_limiter_nor_the_reconciler(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    class Mistaken(LocalState):
        wrong = True

        async def reconcile(self, uses: Any) -> Any:
            return await super().reconcile(None if self.wrong else uses)  # type: ignore[arg-type]

    limiter = clock.limiter()
    state = Mistaken("n", clock=clock)
    running = Reconciler(limiter, state, interval=0.001)
    await running.start()
    limiter.decide(X, API_KEY)
    async with asyncio.timeout(30):
        while not limiter.degraded:
            await asyncio.sleep(0.001)
        state.wrong = False
        while limiter.degraded or limiter._touched:
            await asyncio.sleep(0.001)
    await running.close()
    assert "rates_not_reconciled" in caplog.messages
    assert (await state.reconcile([Use("key:x", 0, 0)]))[0].used == 1


# --- one socket -------------------------------------------------------------------------------------------------------


def test_a_socket_sends_its_burst_at_once_and_then_rests() -> None:
    budget = Budget(*SOCKET_MESSAGES)
    assert [budget.spend(50.0) for _ in range(300)] == [0.0] * 300
    assert budget.spend(50.0) == pytest.approx(0.01)
    assert budget.spend(50.0, 100) == pytest.approx(1.01)
    assert budget.spend(60.0) == 0.0


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 500)), max_size=60))
@PATIENT
def test_who_rests_as_told_is_never_read_faster_than_the_budget_and_no_slower(steps: list[tuple[float, int]]) -> None:
    budget = Budget(10, 50)
    now, read = 100.0, 0
    for idle, amount in steps:
        now += idle
        rest = budget.spend(now, amount)
        read += amount
        now += rest
        assert read <= 50 + 10 * (now - 100) + 1e-6
        assert rest <= max(0.0, amount / 10) + 1e-6
