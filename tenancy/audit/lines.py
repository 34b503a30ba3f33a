"""Writing lines."""

from __future__ import annotations

import json
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import Forbidden, Unavailable
from agentvoicebox.tenancy.audit import redaction
from agentvoicebox.tenancy.database import Database, NoTenant
from agentvoicebox.tenancy.models import PLATFORM, Action, ActorType


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does something, and from where."""

    type: ActorType
    id: uuid.UUID | None
    email: str = ""
    ip: str | None = None
    user_agent: str = ""
    request_id: str = ""


_SYSTEM = Actor(ActorType.SYSTEM, None)
_actor: ContextVar[Actor] = ContextVar("actor", default=_SYSTEM)

_APPEND = text(
    "INSERT INTO audit_log (tenant_id, actor_type, actor_id, actor_email, ip_address, user_agent, action,"
    " resource_type, resource_id, description, old_values, new_values, metadata, request_id) "
    "VALUES (:tenant_id, :actor_type, :actor_id, :email, CAST(:ip AS inet), :user_agent, :action,"
    " :resource_type, :resource_id, :description, CAST(:old AS jsonb), CAST(:new AS jsonb), CAST(:details AS jsonb),"
    " :request_id)"
)


@contextmanager
def acting(actor: Actor) -> Iterator[None]:
    """Whatever is done in this block, and in tasks begun in it, is done by `actor`."""
    token = _actor.set(actor)
    try:
        yield
    finally:
        _actor.reset(token)


def actor() -> Actor:
    """Who acts now: the bound one, else the system itself."""
    return _actor.get()


async def append(
    session: AsyncSession,
    action: Action,
    resource_type: str,
    resource_id: object = "",
    description: str = "",
    *,
    tenant_id: uuid.UUID | None = None,
    old: Mapping[str, Any] | None = None,
    new: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write one line in the caller's transaction, so that it stands exactly when the change does.

    Values whose names say secret are replaced, what is too long is cut and marked so. In a system session `tenant_id`
    names the chain, `PLATFORM` what belongs to no tenant. Call it last: the tenant's other writers wait from here to
    the commit. Raises `NoTenant` without a tenant, `Forbidden` for another tenant's chain than the bound one's, and
    `Unavailable` when the line cannot be stored; the change must then fail too.
    """
    bound: uuid.UUID | None = session.info.get("tenant")
    if bound is not None and tenant_id not in (None, bound):
        raise Forbidden("A line can be written for the tenant of the transaction only.", param="tenant_id")
    chain = bound or tenant_id
    if chain is None:
        raise NoTenant("No tenant is bound: name the one this line is about, or PLATFORM.")
    who = actor()
    await session.flush()  # the change first: what is wrong with it is no failure of the audit
    try:
        await session.execute(
            _APPEND,
            {
                "tenant_id": chain,
                "actor_type": ActorType(who.type).value,
                "actor_id": who.id,
                "email": redaction.line(who.email, 320),
                "ip": address(who.ip),
                "user_agent": redaction.line(who.user_agent, 500),
                "action": Action(action).value,
                "resource_type": redaction.line(resource_type, 50),
                "resource_id": redaction.line(resource_id, 255),
                "description": redaction.line(description, 1_000),
                "old": _json(redaction.values(old)),
                "new": _json(redaction.values(new)),
                "details": _json(redaction.values(details or {})),
                "request_id": redaction.line(who.request_id, 100),
            },
        )
    except IntegrityError as error:
        # All that is left to be violated: no partition takes the line.
        raise Unavailable(
            "The audit log has no place for this month, so nothing may be changed: is the clock of the store right? "
            "A restart, or agentvoicebox.tenancy.audit.months, makes the places of the coming months.",
            code="audit_unavailable",
        ) from error


async def denied(
    database: Database,
    tenant_id: uuid.UUID | None,
    action: Action,
    resource_type: str,
    resource_id: object,
    description: str,
    code: str,
    status: int,
) -> None:
    """Write a line about something that was refused, in a transaction of its own.

    On the tenant's chain, or the platform's where no tenant is known. Whoever is refused all the time gets a few lines
    a minute, the next of which says how many went unwritten: each line costs a disk write, and refusals cost whoever
    provokes them nothing. Raises `Unavailable`.
    """
    who = actor()
    throttle = _throttles.setdefault(database, _Throttle())
    more = throttle.admit((tenant_id, who.id or who.ip, action, resource_type, code), time.monotonic())
    if more is None:
        return
    details: dict[str, object] = {"denied": True, "code": code, "status": status}
    if more:
        details["unwritten_before"] = more
    where = database.system() if tenant_id in (None, PLATFORM) else database.tenant(tenant_id)
    async with where as session:
        chain = PLATFORM if tenant_id in (None, PLATFORM) else None
        await append(session, action, resource_type, resource_id, description, tenant_id=chain, details=details)


class _Throttle:
    """How many denials are written: `each` a minute of one kind by one actor, `all_` a minute of all."""

    def __init__(self, each: int = 5, all_: int = 600, remembered: int = 10_000) -> None:
        self._each, self._all, self._remembered = each, all_, remembered
        self._kinds: OrderedDict[object, tuple[float, int, int]] = OrderedDict()
        self._total = (0.0, 0)

    def admit(self, kind: object, now: float) -> int | None:
        """How many of this kind went unwritten since the last that was, or None when this one does too."""
        begin, written, unwritten = self._kinds.pop(kind, (now, 0, 0))
        if now - begin >= 60:
            begin, written = now, 0
        since, total = self._total
        if now - since >= 60:
            since, total = now, 0
        admitted = written < self._each and total < self._all
        self._kinds[kind] = (begin, written + 1, 0) if admitted else (begin, written, unwritten + 1)
        if len(self._kinds) > self._remembered:
            self._kinds.popitem(last=False)
        self._total = (since, total + admitted)
        return unwritten if admitted else None


_throttles: WeakKeyDictionary[Database, _Throttle] = WeakKeyDictionary()


def _json(value: dict[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False)


def address(given: str | None) -> str | None:
    """As the database holds it; what is no address is none, since no change should fail for it."""
    try:
        return str(ip_address((given or "").partition("%")[0]))
    except ValueError:
        return None
