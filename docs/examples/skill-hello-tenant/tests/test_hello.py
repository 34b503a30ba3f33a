"""The greeting: by name, in the tenant's own words, and of nobody when nobody is known."""

from __future__ import annotations

import pytest
from hello_tenant import HelloTenantSkill
from ovos_bus_client.message import Message
from ovos_utils.fakebus import FakeBus

from agentvoicebox.plugins import tenant

ACME = {"tenant_id": "1", "tenant_name": "Acme", "persona_name": "Ada"}


def answer(context: dict[str, str]) -> str:
    """What the skill says to a message with this context."""
    bus, said = FakeBus(), []
    bus.on("speak", lambda message: said.append(message.data["utterance"]))
    skill = HelloTenantSkill(bus=bus, skill_id="skill-hello-tenant.example")
    skill.handle_hello(Message("hello", {}, context))
    skill.default_shutdown()
    return said[0]


def test_it_greets_by_name() -> None:
    assert answer(ACME) == "Hello from Ada of Acme."


def test_a_tenant_chooses_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    acme = tenant.TenantContext("1", "Acme", "Ada", settings={"greeting": "Ahoy"})
    monkeypatch.setattr(tenant, "current", lambda message: acme)
    assert answer(ACME) == "Ahoy from Ada of Acme."


def test_it_knows_nobody_without_a_tenant() -> None:
    assert answer({}) == "I do not know whose assistant I am."
