"""One request, and what is known about whoever makes it."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from typing import Any

from agentvoicebox.config.errors import BadInput, Refused
from agentvoicebox.tenancy.keyring import Grant
from agentvoicebox.tenancy.limits import Decision, headers
from agentvoicebox.tenancy.principals import Operator

log = logging.getLogger(__name__)

VISIT = "agentvoicebox.visit"
"""Where the scope of a request holds its `Visit`."""

MAX_BODY = 64 * 1024
"""Bytes of a body, unless its route says otherwise."""


@dataclass(slots=True)
class Visit:
    """The facts of one request, filled in as they become known."""

    request_id: str
    ip: str | None
    asked: str = ""
    """Method and path."""
    user_agent: str = ""
    principal: Grant | Operator | None = None
    tenant: uuid.UUID | None = None
    """Whom the request is about, once its route has admitted it."""
    rate: Decision | None = None
    """The tightest of the rates that it was held to."""
    most: int = MAX_BODY
    """Bytes of its body."""
    refusal: str = ""
    """The code of the error that it ended with."""

    @property
    def tenant_id(self) -> uuid.UUID:
        """Whom the request is about. Raises `BadInput` where no tenant is named."""
        if self.tenant is None:
            raise BadInput("Name the tenant: send its id as X-Tenant-ID.", code="tenant_required")
        return self.tenant

    @property
    def grant(self) -> Grant:
        """The key that was used. Raises `Refused` when it was none of a tenant's."""
        if not isinstance(self.principal, Grant):
            raise Refused("A key of the tenant is needed here: send `Authorization: Bearer avb_…`.")
        return self.principal

    @property
    def operator(self) -> bool:
        """Whether it is the operator's."""
        return isinstance(self.principal, Operator)

    @property
    def lockable_ip(self) -> str | None:
        """The address that must stay admitted, so that nobody locks themselves out; the operator is always let in."""
        return None if self.operator else self.ip

    def report(self, error: Exception) -> None:
        """Write down what nobody thought of; the client learns the id only."""
        asked = self.asked.encode("unicode_escape").decode()  # no line breaks of a client's in the log
        log.error("unexpected_exception request_id=%s %s", self.request_id, asked, exc_info=error)

    def held(self, rate: Decision) -> None:
        """It was held to this rate too."""
        if self.rate is None or rate.remaining <= self.rate.remaining:
            self.rate = rate

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What every answer to it carries; when to come again is said by the error itself."""
        if self.rate is None:
            return []
        told = headers(self.rate)
        return [(name.lower().encode(), value.encode()) for name, value in told if name != "Retry-After"]


def of(scope: Any) -> Visit:
    """The visit of a request's scope."""
    visit = scope[VISIT]
    assert isinstance(visit, Visit)
    return visit
