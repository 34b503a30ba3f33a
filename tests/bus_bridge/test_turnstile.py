"""Fair entry to core's matching."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agentvoicebox.bus_bridge.turnstile import Turnstile


def test_one_at_a_time_and_tenants_take_turns():
    order: list[str] = []
    turnstile = Turnstile()
    for number in range(100):
        turnstile.enter("busy", f"busy-{number}", lambda number=number: order.append(f"busy-{number}"))
    turnstile.enter("quiet", "quiet-0", lambda: order.append("quiet-0"))
    assert order == ["busy-0"]
    turnstile.leave("busy-0")
    turnstile.leave("busy-1")
    assert order == ["busy-0", "busy-1", "quiet-0"], "a hundred of one tenant delay another's first by one"


def test_a_turn_that_gives_up_does_not_block():
    order: list[str] = []
    turnstile = Turnstile()
    for name in ("a", "b", "c"):
        turnstile.enter("t", name, lambda name=name: order.append(name))
    turnstile.leave("b")
    turnstile.leave("a")
    assert order == ["a", "c"]
    turnstile.leave("unknown")
    turnstile.clear()
    turnstile.enter("t", "d", lambda: order.append("d"))
    assert order == ["a", "c", "d"]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 20))), st.integers(1, 3))
def test_never_too_many_inside_and_nobody_is_forgotten(steps: list[tuple[bool, int, int]], width: int):
    turnstile = Turnstile(width)
    entered: set[str] = set()
    queued: set[str] = set()
    inside: set[str] = set()

    def go(name: str) -> None:
        inside.add(name)
        entered.add(name)

    for enter, tenant, number in steps:
        name = f"{tenant}-{number}"
        if enter and name not in queued:
            queued.add(name)
            turnstile.enter(str(tenant), name, lambda name=name: go(name))
        elif not enter:
            inside.discard(name)
            if name not in entered:
                queued.discard(name)
            turnstile.leave(name)
        assert len(inside) <= width
    while inside:
        name = inside.pop()
        turnstile.leave(name)
    assert queued <= entered
