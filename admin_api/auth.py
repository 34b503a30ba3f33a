"""Who may use a route. Every route names one of these; the application does not start with one that does not."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

from fastapi import Depends, Path, Request
from fastapi.routing import APIRoute

from agentvoicebox.admin_api import visits
from agentvoicebox.admin_api.visits import MAX_BODY, Visit
from agentvoicebox.config.errors import BadInput, Forbidden, Refused, TooLarge
from agentvoicebox.tenancy import context, principals
from agentvoicebox.tenancy.database import NoTenant
from agentvoicebox.tenancy.keyring import Grant
from agentvoicebox.tenancy.limits import Rate
from agentvoicebox.tenancy.models import TenantStatus

Hosts = dict[context.Named, tuple[float, context.Known | None]]
"""Whose a host name is, and until when (monotonic seconds) that is believed."""

_HOST_AGE = 5.0
_MOST_HOSTS = 1_000


class Admission:
    """Lets a request through to its route, or raises why not."""

    told: str
    """Who may, in the document."""

    def __init__(self, told: str, body: int = MAX_BODY) -> None:
        self.told = told
        self._body = body

    def bound(self, visit: Visit, request: Request) -> None:
        """Refuse at once what says itself that it is too large."""
        visit.most = self._body
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._body:
            raise TooLarge(f"A request body holds at most {self._body} bytes here.")


class Public(Admission):
    """Anybody may; where it has a rate of its own, each network address no more often than that."""

    def __init__(self, kind: str = "", rate: Rate | None = None) -> None:
        super().__init__("anybody")
        self._kind = kind
        self._rate = rate

    async def __call__(self, request: Request) -> None:
        """Admit."""
        visit = visits.of(request.scope)
        if self._rate is not None:
            visit.held(request.app.state.limiter.admit_address(self._kind, visit.ip or "", self._rate))
        self.bound(visit, request)


class May(Admission):
    """Whoever has one of some permissions on the tenant: its own keys by their scopes, the operator on any tenant."""

    def __init__(self, *permissions: str, body: int = MAX_BODY) -> None:
        super().__init__(" or ".join(permissions), body)
        self._wanted = [permission.split(".") for permission in permissions]
        assert permissions
        assert all(len(each) == 2 for each in self._wanted)

    async def __call__(self, request: Request) -> None:
        """Admit."""
        visit = visits.of(request.scope)
        _somebody(visit)
        visit.tenant = await _tenant(request, visit)
        self._check(visit)
        self.bound(visit, request)

    def _check(self, visit: Visit) -> None:
        refusal: Forbidden | None = None
        for resource, permission in self._wanted:
            try:
                return principals.may(visit.principal, visit.tenant_id, resource, permission)
            except Forbidden as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal


class MayThere(May):
    """The same, on the tenant that the path names."""

    async def __call__(  # type: ignore[override]
        self, request: Request, tenant_id: Annotated[uuid.UUID, Path()]
    ) -> None:
        """Admit. What the path holds is read with the other places that may name a tenant."""
        await super().__call__(request)


class MayOverall(May):
    """The same, and the operator also without naming a tenant, which then means all of them."""

    async def __call__(self, request: Request) -> None:
        """Admit."""
        try:
            await super().__call__(request)
        except NoTenant:
            visit = visits.of(request.scope)
            if not visit.operator:
                raise
            self.bound(visit, request)


class Sysadmin(Admission):
    """The operator alone."""

    def __init__(self, body: int = MAX_BODY) -> None:
        super().__init__("the operator", body)

    async def __call__(self, request: Request) -> None:
        """Admit."""
        visit = visits.of(request.scope)
        _somebody(visit)
        if not visit.operator:
            raise Forbidden("Only the operator of the platform may do this.")
        self.bound(visit, request)


async def visiting(request: Request) -> Visit:
    """The visit, for a route that its admission has let through."""
    return visits.of(request.scope)


Visiting = Annotated[Visit, Depends(visiting)]


def public(kind: str = "", rate: Rate | None = None) -> list[Any]:
    """Dependencies of a route that is open to anybody; those of a `kind` together so often by address."""
    return [Depends(Public(kind, rate))]


def may(*permissions: str, body: int = MAX_BODY) -> list[Any]:
    """Dependencies of a route about the caller's tenant, for whoever has one of these permissions on it."""
    return [Depends(May(*permissions, body=body))]


def may_there(*permissions: str, body: int = MAX_BODY) -> list[Any]:
    """Dependencies of a route whose path names the tenant as `tenant_id`."""
    return [Depends(MayThere(*permissions, body=body))]


def may_overall(*permissions: str) -> list[Any]:
    """Dependencies of a route about the caller's tenant, or, for the operator, about all where none is named."""
    return [Depends(MayOverall(*permissions))]


def sysadmin(body: int = MAX_BODY) -> list[Any]:
    """Dependencies of a route that is the operator's."""
    return [Depends(Sysadmin(body))]


def admission(route: APIRoute) -> Admission:
    """Who may use `route`. Raises `AssertionError` where it does not say, or says more than one thing."""
    calls: list[object] = [dependency.call for dependency in route.dependant.dependencies]
    found = [call for call in calls if isinstance(call, Admission)]
    assert len(found) == 1, f"{route.path} must say who may use it, once: see agentvoicebox.admin_api.auth"
    return found[0]


def _somebody(visit: Visit) -> None:
    if visit.principal is None:
        raise Refused("A key is needed: send `Authorization: Bearer avb_…`.", code="authentication_failed")


async def _tenant(request: Request, visit: Visit) -> uuid.UUID:
    """Whom the request is about, by credential, header, host and path."""
    given = request.headers.getlist(context.HEADER)
    if len(given) > 1:
        raise BadInput(f"{context.HEADER} is given more than once.", param=context.HEADER)
    places = context.named(
        host=request.headers.get("host", ""),
        path=request.scope["path"],
        header=given[0] if given else None,
        base=request.app.state.base,
    )
    grant = visit.principal
    own = context.Known(grant.tenant_id, grant.tenant_slug, TenantStatus.ACTIVE) if isinstance(grant, Grant) else None
    caller = context.Caller(own, operator=visit.operator)
    return context.resolve(caller, places, await _known(request, caller, places))


async def _known(
    request: Request, caller: context.Caller, places: tuple[context.Named, ...]
) -> dict[context.Named, context.Known | None]:
    """Who the places name. Host names hardly ever change, and every request has one: they are remembered a while."""
    if not places:
        return {}
    remembered: Hosts = request.app.state.hosts
    now = time.monotonic()
    known = {}
    asked = []
    for each in places:
        held = remembered.get(each) if each.place == context.Place.DOMAIN else None
        if held is not None and now < held[0]:
            known[each] = held[1]
        else:
            asked.append(each)
    if asked:
        found = await context.look_up(request.app.state.database, caller, asked)
        known |= found
        if len(remembered) > _MOST_HOSTS:
            remembered.clear()
        remembered.update(
            {each: (now + _HOST_AGE, found[each]) for each in asked if each.place == context.Place.DOMAIN}
        )
    return known
