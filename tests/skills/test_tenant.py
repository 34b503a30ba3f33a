"""The tenant of a message: all of it, or none."""

from __future__ import annotations

from typing import Any

import pytest
from ovos_bus_client.message import Message

from agentvoicebox.skills import tenant

WHOLE = {"tenant_id": "t1", "tenant_name": "Acme", "persona_name": "Ada"}


def test_the_tenant_of_a_message() -> None:
    assert tenant.current(Message("any", {}, WHOLE)) == tenant.TenantContext("t1", "Acme", "Ada")


@pytest.mark.parametrize("missing", sorted(WHOLE))
@pytest.mark.parametrize("value", [None, "", 5, ["t1"], {"id": "t1"}])
def test_half_a_tenant_is_none(missing: str, value: Any) -> None:
    assert tenant.current(Message("any", {}, WHOLE | {missing: value})) is None
    assert tenant.current(Message("any", {}, {k: v for k, v in WHOLE.items() if k != missing})) is None


def test_it_survives_the_ways_a_message_goes_on() -> None:
    message = Message("any", {}, WHOLE)
    for onward in (message.forward("x"), message.reply("x"), message.response()):
        assert tenant.current(onward) == tenant.current(message)
