"""Who may open a socket here, or ask for an answer: the checks before, and the answer to those who may not.

A tenant's API key with the scope `realtime` passes, from `Authorization: Bearer …`, `api-key: …`, or the subprotocol
`openai-insecure-api-key.…` for browsers, and never from the query string; from an address that the tenant allows, and
within the rates of key and tenant. Everything else is refused with the JSON error of the door's protocol. Requests are
admitted alike, with `realtime` or `admin`, also where the tenant has switched its voice off: nothing is spoken there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import msgspec

from agentvoicebox.bus_bridge.outbox import Send
from agentvoicebox.config.errors import AvbError, Forbidden, NotFound, RateLimited, Refused
from agentvoicebox.config.settings import Settings
from agentvoicebox.tenancy import limits
from agentvoicebox.tenancy.keyring import Grant, Keyring
from agentvoicebox.tenancy.limits import Decision, Exceeded, Limiter
from agentvoicebox.tenancy.models import VoiceProvider

log = logging.getLogger(__name__)

Scope = dict[str, Any]

KEY_SUBPROTOCOL = "openai-insecure-api-key."


@dataclass(frozen=True, slots=True)
class Credential:
    """A key that passed, and where it came from."""

    secret: str = field(repr=False)
    ip: str | None


@dataclass(slots=True)
class Door:
    """Checks whoever comes, the cheapest first."""

    settings: Settings
    keyring: Keyring
    limiter: Limiter

    async def admit(self, scope: Scope) -> tuple[Credential, Grant]:
        """Whose key this is. Raises `RateLimited`, `Forbidden`, `Refused`, `NotFound`, `Unavailable`."""
        headers = _headers(scope)
        self._check_origin(headers, scope["scheme"])
        credential, grant = await self._identify(scope, headers)
        check(grant, credential.ip)
        self._count(grant, credential)
        return credential, grant

    async def admit_request(self, scope: Scope) -> tuple[Grant, Decision]:
        """Whose key an HTTP request carries, and how that one now stands with its rates. Raises as `admit`."""
        credential, grant = await self._identify(scope, _headers(scope))
        if not grant.scopes & {"realtime", "admin"}:
            grant.require("realtime")
        grant.admit(credential.ip)
        return grant, self._count(grant, credential)

    async def _identify(self, scope: Scope, headers: dict[str, str]) -> tuple[Credential, Grant]:
        ip = address(scope)
        place = ip or ""
        try:
            if _names(scope["query_string"]) & {"key", "api_key", "api-key", "token", "access_token"}:
                raise Refused("Keys do not belong into a URL: send `Authorization: Bearer …`.", code="invalid_api_key")
            secret = _secret(headers, scope.get("subprotocols", []))
            if secret is None:
                raise Refused("An API key is needed: send `Authorization: Bearer avb_…`.", code="authentication_failed")
            grant = self.keyring.known(secret)
            if grant is None:
                # Who guesses is not even looked up; who has a good key does not suffer from the neighbours' guesses.
                self.limiter.check_failures(place)
                grant = await self.keyring.verify(secret)
        except Refused:
            self.limiter.failed(place)
            raise
        except (Forbidden, NotFound):
            self.limiter.admit_anonymous(place)  # a tenant that is not active pays nothing, and may not ask for ever
            raise
        _check_tenant(headers, grant)
        return Credential(secret, ip), grant

    def _count(self, grant: Grant, credential: Credential) -> Decision:
        decision = self.limiter.admit_request(grant, credential.ip or "")
        self.keyring.used(grant, credential.ip)
        return decision

    async def check_again(self, credential: Credential) -> Grant:
        """As `admit`, for a connection that is open: what its key allows may have changed. Raises as `admit`."""
        grant = await self.keyring.verify(credential.secret)
        check(grant, credential.ip)
        return grant

    def _check_origin(self, headers: dict[str, str], scheme: str) -> None:
        """Browsers say whose page opens the socket; only our own and declared ones may (cross-site hijacking)."""
        origin = headers.get("origin")
        if origin is None or origin in self.settings.allowed_origins:
            return
        own = "https" if scheme == "wss" else "http"
        if origin != f"{own}://{headers.get('host')}":
            raise Forbidden(
                "This page may not open a socket here; the operator allows origins with AVB_ALLOWED_ORIGINS.",
                code="origin_not_allowed",
            )


def check(grant: Grant, ip: str | None) -> None:
    """Raise `Forbidden` unless the grant lets somebody at `ip` speak."""
    grant.require("realtime")
    grant.admit(ip)
    if grant.voice_provider == VoiceProvider.DISABLED:
        raise Forbidden("This tenant has switched its voice off (default_voice_provider).", code="voice_disabled")


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def address(scope: Scope) -> str | None:
    """Where the client is, as far as trusted proxies tell."""
    return scope["client"][0] if scope.get("client") else None


async def reject(send: Send, error: AvbError, realtime: bool) -> None:
    """Answer the upgrade with an HTTP error in the door's own format."""
    status, headers, body = refusal(error, realtime)
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


def refusal(error: AvbError, openai: bool) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body that tell of an error, in OpenAI's format or in ours."""
    body: dict[str, Any] = {"error": error.code, "message": error.message}
    if openai:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        body = {"error": {"message": error.message, "type": kind, "code": error.code, "param": error.param}}
    headers = [(b"content-type", b"application/json")]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, RateLimited):
        wait = max(1, -int(-error.retry_after // 1))
        headers.append((b"retry-after", str(wait).encode()))
        if isinstance(error, Exceeded):
            told = limits.headers(error.decision)
            headers += [(name.lower().encode(), text.encode()) for name, text in told if name != "Retry-After"]
        if not openai:
            body["retry_after"] = wait
    return error.status, headers, msgspec.json.encode(body)


def _check_tenant(headers: dict[str, str], grant: Grant) -> None:
    """A tenant that is named beside the key must be the key's."""
    named = headers.get("x-tenant-id")
    if named is not None and named.strip().lower() not in (str(grant.tenant_id), grant.tenant_slug):
        raise Forbidden("This key is not of the tenant that X-Tenant-ID names.", code="permission_denied")


def _secret(headers: dict[str, str], subprotocols: list[str]) -> str | None:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    if headers.get("api-key"):
        return headers["api-key"]
    return next((p.removeprefix(KEY_SUBPROTOCOL) for p in subprotocols if p.startswith(KEY_SUBPROTOCOL)), None)


def _names(query: bytes) -> set[str]:
    return {name.lower() for name in parse_qs(query.decode("latin-1"), keep_blank_values=True)}
