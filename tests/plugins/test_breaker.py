"""What keeps failing is left alone, then tried by one."""

from __future__ import annotations

import pytest

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins.breaker import Breaker


class Clock:
    """Stands still unless it is told."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock)


def refused(breaker: Breaker) -> bool:
    try:
        breaker.admit()
    except Unavailable as error:
        return error.code == "circuit_open"
    return False


def fail(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        breaker.admit()
        breaker.failed()


def test_five_failures_within_thirty_seconds_open_it(breaker: Breaker, clock: Clock):
    fail(breaker, 4)
    assert (breaker.state, refused(breaker)) == ("closed", False)
    clock.now += 30
    breaker.failed()
    assert (breaker.state, refused(breaker)) == ("open", True)


def test_five_failures_over_a_longer_time_do_not(breaker: Breaker, clock: Clock):
    for _ in range(20):
        fail(breaker, 1)
        clock.now += 7.6
    assert breaker.state == "closed"


def test_it_says_how_long_it_rests(breaker: Breaker, clock: Clock):
    fail(breaker, 5)
    clock.now += 17.5
    with pytest.raises(Unavailable, match="13 s"):
        breaker.admit()


def test_after_thirty_seconds_one_may_try_and_the_others_wait_for_it(breaker: Breaker, clock: Clock):
    fail(breaker, 5)
    clock.now += 29.9
    assert refused(breaker)
    clock.now += 0.1
    assert breaker.state == "half_open"
    assert [refused(breaker) for _ in range(3)] == [False, True, True]
    breaker.succeeded()
    assert (breaker.state, refused(breaker)) == ("closed", False)
    fail(breaker, 4)
    assert breaker.state == "closed", "it has forgotten the failures of before"


def test_a_probe_that_fails_opens_it_for_another_thirty_seconds(breaker: Breaker, clock: Clock):
    fail(breaker, 5)
    clock.now += 30
    fail(breaker, 1)
    assert breaker.state == "open"
    clock.now += 29.9
    assert refused(breaker)
    clock.now += 0.1
    assert not refused(breaker)


def test_a_probe_that_says_nothing_or_never_comes_back_does_not_lock_it(breaker: Breaker, clock: Clock):
    fail(breaker, 5)
    clock.now += 30
    breaker.admit()
    breaker.undecided()
    assert [refused(breaker), refused(breaker)] == [False, True]
    clock.now += 30
    assert [refused(breaker), refused(breaker)] == [False, True]


def test_an_answer_that_comes_late_does_not_close_it_before_its_time(breaker: Breaker, clock: Clock):
    fail(breaker, 5)
    breaker.succeeded()
    assert breaker.state == "open"


def test_one_whose_every_call_fails_does_not_lock_out_those_who_are_answered(breaker: Breaker):
    for _ in range(50):
        fail(breaker, 1)
        breaker.admit()
        breaker.succeeded()
    assert breaker.state == "closed"
