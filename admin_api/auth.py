"""Who may use the REST service: a tenant's API key, and what its scopes allow. Every route names one of these."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Request

from agentvoicebox.config.errors import Forbidden, Refused
from agentvoicebox.tenancy.keys import Grant, Keyring


def public() -> None:
    """Anybody may."""


def key(*scopes: str) -> Callable[[Request], Awaitable[Grant]]:
    """Whoever holds an API key with one of these scopes. Gives the route the key's `Grant`."""

    async def admit(request: Request) -> Grant:
        keyring: Keyring = request.app.state.keyring
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Refused("An API key is needed: send `Authorization: Bearer avb_…`.", code="authentication_failed")
        grant = await keyring.verify(secret.strip())
        if not set(scopes) & set(grant.scopes):
            raise Forbidden(f"This key lacks the scope {' or '.join(scopes)}.", code="insufficient_scope")
        return grant

    return admit
