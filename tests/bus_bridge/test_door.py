"""Who passes the door of the sockets: property tests on the door itself, rates and failures on real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentvoicebox.bus_bridge.door import KEY_SUBPROTOCOL
from agentvoicebox.config.errors import AvbError, Forbidden, RateLimited, Refused
from agentvoicebox.tenancy import limits, tenants

PLACES = ("authorization", "api-key", "subprotocol")
TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=60)


def scope(place: str, value: str, *more: tuple[str, str], query: str = "", ip: str = "192.0.2.1") -> dict[str, Any]:
    headers = [] if place == "subprotocol" else [(place.encode(), value.encode("latin-1"))]
    headers += [(name.encode(), text.encode("latin-1")) for name, text in more]
    offered = ["realtime", KEY_SUBPROTOCOL + value] if place == "subprotocol" else []
    return {
        "type": "websocket",
        "scheme": "ws",
        "path": "/v1/realtime",
        "query_string": query.encode(),
        "headers": headers,
        "subprotocols": offered,
        "client": (ip, 1),
    }


async def test_p10_websocket_authentication(stack: Any, new_customer: Any):
    """Whoever passes has a tenant and a key; whoever has no good key does not pass, whatever is sent."""
    customer = await new_customer()
    door = stack.gateway.door
    loop = asyncio.get_running_loop()

    for place in PLACES:
        sent = f"Bearer {customer.key}" if place == "authorization" else customer.key
        credential, grant = await door.admit(scope(place, sent))
        assert (grant.tenant_id, grant.key_id, credential.ip) == (customer.id, customer.key_id, "192.0.2.1")
        assert customer.key not in repr(credential)

    @settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.sampled_from(PLACES), st.one_of(TEXT, TEXT.map(lambda text: f"Bearer avb_{text}")), st.ip_addresses())
    def nobody_else(place: str, value: str, ip: Any) -> None:
        async def ask() -> None:
            with pytest.raises((Refused, RateLimited)):
                await door.admit(scope(place, value, ip=str(ip)))

        asyncio.run_coroutine_threadsafe(ask(), loop).result(30)

    await asyncio.to_thread(nobody_else)


async def test_a_tenant_named_beside_the_key_must_be_the_keys_own(stack: Any, customer: Any, new_customer: Any):
    other = await new_customer()
    door = stack.gateway.door
    bearer = f"Bearer {customer.key}"
    for name in (str(customer.id), customer.slug):
        await door.admit(scope("authorization", bearer, ("x-tenant-id", name)))
    for name in (str(other.id), other.slug, "", "nobody"):
        with pytest.raises(Forbidden):
            await door.admit(scope("authorization", bearer, ("x-tenant-id", name)))


@pytest.mark.usefixtures("still")
async def test_a_key_that_asks_too_often_gets_no_socket_and_is_told_when(stack: Any, sockets: Any, new_customer: Any):
    customer = await new_customer(rate_class="standard")
    bearer = f"Bearer {customer.key}"
    for _ in range(120):
        await stack.gateway.door.admit(scope("authorization", bearer))
    refusals = await asyncio.gather(
        *(stack.gateway.door.admit(scope("authorization", bearer)) for _ in range(60)), return_exceptions=True
    )
    assert isinstance(refusals[-1], RateLimited)
    assert 0 < refusals[-1].retry_after <= 60
    for path in sockets.paths:
        status, code, headers = await sockets.refused(path, customer)
        assert (status, code) == (429, "rate_limit_exceeded")
        assert int(headers["retry-after"]) >= 1
        assert (headers["x-ratelimit-limit"], headers["x-ratelimit-remaining"]) == ("120", "0")


@pytest.mark.usefixtures("still")
async def test_whoever_guesses_keys_is_soon_not_listened_to_and_nobody_else_suffers(
    stack: Any, sockets: Any, customer: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stack.limiter, "failures", limits.FAILURES)
    door = stack.gateway.door
    seen = []
    for n in range(40):
        with pytest.raises(AvbError) as caught:
            await door.admit(scope("authorization", f"Bearer avb_{n:043}", ip="198.51.100.7"))
        seen.append(caught.value.code)
    assert seen[0] == "invalid_api_key"
    assert seen[-1] == "rate_limit_exceeded"
    bearer = f"Bearer {customer.key}"
    await door.admit(scope("authorization", bearer, ip="198.51.100.8"))
    async with asyncio.timeout(30):
        while door.keyring.known(customer.key) is None:  # as when the node has heard of a change meanwhile
            await door.admit(scope("authorization", bearer, ip="198.51.100.8"))
    # A key that is known is good from the guesser's address as well.
    await door.admit(scope("authorization", bearer, ip="198.51.100.7"))
    async with sockets.realtime(customer):
        pass


@pytest.mark.usefixtures("still")
async def test_devices_of_a_suspended_tenant_do_not_wear_the_store_out(
    stack: Any, new_customer: Any, monkeypatch: pytest.MonkeyPatch
):
    """They ask again and again: the store is asked once a second, and after a while nobody listens."""
    customer = await new_customer()
    door = stack.gateway.door
    revoked: list[Any] = []
    door.keyring.on_revoked(revoked.append)
    await tenants.suspend(stack.database, customer.id, "unpaid")
    async with asyncio.timeout(30):
        while customer.key_id not in revoked:  # each change that is heard of has the store asked anew
            await asyncio.sleep(0.01)
    reads = 0
    real = door.keyring._read

    async def counted(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        return await real(*arguments)

    monkeypatch.setattr(door.keyring, "_read", counted)
    codes = []
    for _ in range(100):
        with pytest.raises(AvbError) as caught:
            await door.admit(scope("authorization", f"Bearer {customer.key}", ip="203.0.113.77"))
        codes.append(caught.value.code)
    assert codes[0] == "tenant_suspended"
    assert codes[-1] == "rate_limit_exceeded"
    assert reads < 20
    await tenants.activate(stack.database, customer.id)
    async with asyncio.timeout(30):
        while True:
            try:
                await door.admit(scope("authorization", f"Bearer {customer.key}", ip="203.0.113.78"))
                break
            except Forbidden:
                await asyncio.sleep(0.1)
