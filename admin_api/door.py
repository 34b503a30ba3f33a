"""What every request passes before its route, in this order, and what becomes of its answer.

Failed credentials of the address → credential → networks of the tenant → rate limits → (route: permission, handler) →
audit of a refusal → metering → answer. A key's request is in the ledger before its answer is sent.
"""

from __future__ import annotations

import asyncio
import logging
import re
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

from agentvoicebox.admin_api import errors, visits
from agentvoicebox.admin_api.visits import Visit
from agentvoicebox.bus_bridge.connection import Message, Receive
from agentvoicebox.bus_bridge.outbox import Send
from agentvoicebox.config.errors import AvbError, BadInput, Refused
from agentvoicebox.tenancy import audit, keys
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keyring import Grant, Keyring
from agentvoicebox.tenancy.limits import ADMIN, Decision, Exceeded, Limiter
from agentvoicebox.tenancy.metering import Ledger, Usage
from agentvoicebox.tenancy.models import Action, ActorType, Metric
from agentvoicebox.tenancy.principals import Operator

log = logging.getLogger(__name__)

FREE = frozenset({"/health", "/health/ready", "/metrics"})
"""Exactly these paths are neither limited nor metered: those who ask are machines of the operator."""

_CONTROLS = re.compile("[\\x00-\\x1f\\x7f\ufffd]")
"""The last one is what stands for bytes that are no UTF-8."""
_ACTIONS = {"POST": Action.CREATE, "PUT": Action.UPDATE, "PATCH": Action.UPDATE, "DELETE": Action.DELETE}
_KINDS = (
    *("admin", "api-keys", "audit", "devices", "llm", "pairings", "personas", "projects", "sessions", "skills", "stt"),
    *("tenants", "usage", "voice", "wake-words"),
)
_IN_QUERY = frozenset({"key", "api-key", "apikey", "x-api-key", "token", "access_token", "authorization"})


class Door:
    """ASGI middleware around the routes."""

    def __init__(
        self, app: Any, *, database: Database, keyring: Keyring, limiter: Limiter, ledger: Ledger, operator: str
    ) -> None:
        self._app = app
        self._database = database
        self._keyring = keyring
        self._limiter = limiter
        self._ledger = ledger
        self._operator = operator

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] != "http" or scope["path"] in FREE:
            await self._app(scope, receive, send)
            return
        visit = visits.of(scope)
        try:
            await self._admit(scope, visit)
        except AvbError as error:
            # Answered here: outside of us there is only what makes a plain 500 of everything.
            visit.refusal = error.code
            await self._note(scope, visit, error.status)
            await _send(send, errors.known(error))
            return
        with audit.acting(_actor(visit)):
            await self._serve(scope, receive, send, visit)

    async def _admit(self, scope: dict[str, Any], visit: Visit) -> None:
        """Find out who asks, and whether they may ask now. Raises `AvbError`."""
        ip = visit.ip or ""
        try:
            try:
                _check_text(scope)
                secret = _secret(scope["headers"], scope["query_string"])
                if secret is not None:
                    operator = self._operator and keys.same_key(secret, self._operator)
                    visit.principal = Operator() if operator else self._keyring.known(secret)
                if visit.principal is None:
                    # Who guesses is not even looked up; who has a good key does not suffer from neighbours' guesses.
                    self._limiter.check_failures(ip)
                    if secret is not None:
                        visit.principal = await self._keyring.verify(secret)
                if isinstance(visit.principal, Grant):
                    visit.principal.admit(visit.ip)
            except Exceeded:
                raise
            except AvbError as error:
                if isinstance(error, Refused):
                    self._limiter.failed(ip)
                visit.held(self._limiter.admit_anonymous(ip))
                raise
            visit.held(self._count(visit.principal, ip))
        except Exceeded as error:
            visit.held(error.decision)
            raise
        if isinstance(visit.principal, Grant):
            self._keyring.used(visit.principal, visit.ip)

    def _count(self, principal: Grant | Operator | None, ip: str) -> Decision:
        """Count the request where it belongs. Raises `Exceeded`."""
        if isinstance(principal, Grant):
            return self._limiter.admit_request(principal, ip)
        if principal is not None:
            return self._limiter.admit(("operator", "key"), ADMIN, ip)
        return self._limiter.admit_anonymous(ip)

    async def _serve(self, scope: dict[str, Any], receive: Receive, send: Send, visit: Visit) -> None:
        # The entry is written while the route works, and waited for before the answer begins.
        metering = asyncio.ensure_future(self._ledger.record([_usage(visit)])) if _metered(visit) else None
        started = replaced = False

        async def reply(message: Message) -> None:
            nonlocal started, replaced
            if replaced:
                return
            if message["type"] == "http.response.start":
                started = True
                if metering is not None:
                    try:
                        await metering
                    except AvbError as error:
                        replaced = True
                        await _send(send, errors.known(error))
                        return
                await self._note(scope, visit, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, reply)
        except Exception as error:
            if started:
                raise
            visit.report(error)
            await _send(reply, errors.unexpected())
        finally:
            if metering is not None:
                await asyncio.wait([metering])
                if not metering.cancelled():
                    metering.exception()  # told above, or the route had failed before anything could be

    async def _note(self, scope: dict[str, Any], visit: Visit, status: int) -> None:
        """Write a refusal into the audit log; what succeeds is written by whoever does it."""
        denied = status in (401, 403)
        failed = 400 <= status < 500 and status != 429 and scope["method"] in _ACTIONS and visit.principal is not None
        if not (denied or failed):
            return
        tenant = visit.principal.tenant_id if isinstance(visit.principal, Grant) else visit.tenant
        path = scope["path"]
        kind = next((kind for kind in _KINDS if path.startswith(f"/api/v2/{kind}")), "request")
        action = _ACTIONS.get(scope["method"], Action.API_CALL)
        told = f"{scope['method']} {path}"
        try:
            with audit.acting(_actor(visit)):
                await audit.denied(self._database, tenant, action, kind, path, told, visit.refusal, status)
        except AvbError as error:
            log.error("audit_lost %s %s: %s", visit.request_id, status, error.message)


async def _send(send: Send, told: errors.Answer) -> None:
    await send({"type": "http.response.start", "status": told.status, "headers": told.headers})
    await send({"type": "http.response.body", "body": told.body})


def _secret(headers: list[tuple[bytes, bytes]], query: bytes) -> str | None:
    """The credential of a request, if it has one. Raises `Refused` for one that is in the wrong place or no key."""
    if query and any(
        name.lower() in _IN_QUERY or value.startswith("avb_") for name, value in parse_qsl(query.decode("latin-1"))
    ):
        raise Refused("Keys do not belong into a URL: send `Authorization: Bearer …`.", code="invalid_api_key")
    given = [(name, value.decode("latin-1")) for name, value in headers if name in (b"authorization", b"x-api-key")]
    found = dict(given)
    if len(found) < len(given):
        raise Refused("A credential is given more than once.", code="authentication_failed")
    if (bearer := found.get(b"authorization")) is not None:
        scheme, _, secret = bearer.partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Refused("Send `Authorization: Bearer avb_…`.", code="authentication_failed")
        return secret.strip()
    return found.get(b"x-api-key")


def _check_text(scope: dict[str, Any]) -> None:
    """Raise `BadInput` for an address that is not text, or holds what no text does."""
    try:
        query = unquote_to_bytes(scope["query_string"]).decode()
    except UnicodeDecodeError as error:
        raise BadInput("The query is not UTF-8.", param="query") from error
    for place, text in (("path", scope["path"]), ("query", query)):
        if _CONTROLS.search(text):
            raise BadInput(f"The {place} holds what is not text.", param=place)


def _actor(visit: Visit) -> audit.Actor:
    grant = visit.principal if isinstance(visit.principal, Grant) else None
    return audit.Actor(
        ActorType.API_KEY if grant is not None else ActorType.SYSTEM,
        grant.key_id if grant is not None else None,
        ip=visit.ip,
        user_agent=visit.user_agent,
        request_id=visit.request_id,
    )


def _metered(visit: Visit) -> bool:
    return isinstance(visit.principal, Grant)


def _usage(visit: Visit) -> Usage:
    grant = visit.grant
    now = datetime.now(UTC)
    return Usage(visit.request_id, grant.tenant_id, Metric.API_CALLS, 1, now, project_id=grant.project_id)
