"""For skill authors: whose assistant is speaking?"""

from __future__ import annotations

from dataclasses import dataclass

from ovos_bus_client.message import Message


@dataclass(frozen=True, slots=True)
class TenantContext:
    """The tenant on whose behalf a message was sent."""

    id: str
    name: str
    persona: str
    """What the tenant's assistant is called."""


def current(message: Message) -> TenantContext | None:
    """The tenant of `message`; none if it does not carry one completely, and then nothing of any tenant may be said."""
    values = [message.context.get(key) for key in ("tenant_id", "tenant_name", "persona_name")]
    tenant, name, persona = (value if isinstance(value, str) else "" for value in values)
    return TenantContext(tenant, name, persona) if tenant and name and persona else None
