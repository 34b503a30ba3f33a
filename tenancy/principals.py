"""Who asks, and whether they may: keys by their scopes, people by their roles, the operator always.

All of them pass the same guard, which names a permission of the schema in `permissions`, and a tenant. It returns when
they may and raises when they may not.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from agentvoicebox.config.errors import AvbError, BadInput, Forbidden, Refused
from agentvoicebox.tenancy import permissions
from agentvoicebox.tenancy.keyring import Grant
from agentvoicebox.tenancy.keys import Scope
from agentvoicebox.tenancy.models import PLATFORM, Role
from agentvoicebox.tenancy.permissions import ROLE_PERMISSIONS, Permissions
from agentvoicebox.tenancy.permissions.rules import EVALUATOR


@dataclass(frozen=True, slots=True)
class Operator:
    """Whoever holds the platform's own key: a sysadmin of every tenant."""


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who has signed in, for one tenant or for none in particular."""

    user_id: uuid.UUID
    tenant_id: uuid.UUID | None = None


Principal = Grant | Operator | Person


class Wanted(NamedTuple):
    """A permission on a resource; without an id, on whatever of that type the tenant has."""

    resource_type: str
    permission: str
    resource_id: object = None


SCOPE_PERMISSIONS: Mapping[str, frozenset[str]] = {
    # To speak: a client needs to see how the assistant is set up, and nothing of what others have said.
    Scope.REALTIME: frozenset({"tenant.create_session", "voice_config.view", "persona.view", "persona.use"}),
    # What an operator may do with sessions. Taking transcripts out in bulk (session.export) is not among it.
    Scope.SESSIONS: frozenset(
        {"tenant.create_session", "session.view", "session.view_transcript", "session.terminate", "tenant.view"}
    ),
    Scope.USAGE: frozenset({"tenant.view_usage", "tenant.view"}),
    Scope.BILLING: frozenset({"tenant.billing_access", "tenant.manage_billing"}),
    Scope.ADMIN: ROLE_PERMISSIONS[Role.ADMIN],
}
"""What a key of each scope may, as `type.permission`, on everything of that type that its tenant has."""

_PORTAL = {
    Role.ADMIN: ("sessions:view", "sessions:manage", "api_keys:view", "api_keys:manage", "billing:view"),
    Role.DEVELOPER: ("sessions:view", "sessions:manage", "api_keys:view", "api_keys:manage"),
    Role.OPERATOR: ("sessions:view", "sessions:manage"),
    Role.VIEWER: ("sessions:view",),
    Role.BILLING: ("billing:view",),
}
_PORTAL[Role.SYSADMIN] = _PORTAL[Role.ADMIN]


def may(
    principal: Grant | Operator | None,
    tenant_id: uuid.UUID,
    resource_type: str,
    permission: str,
    resource_id: object = None,
) -> None:
    """Let a key or the operator through, else raise.

    Raises `Refused` for nobody, `Forbidden` with the code `permission_denied` for another tenant's key and for people
    (whom `Guard.may` asks about) and `insufficient_scope` for a key without the right, `BadInput` for a permission that
    is not in the schema. `resource_id` is of no consequence for keys: a scope is for everything of a type.
    """
    EVALUATOR.require(resource_type, permission)
    if isinstance(principal, Operator):
        return
    if principal is None:
        raise Refused("Say who you are: send an API key.", code="authentication_required")
    if not isinstance(principal, Grant) or principal.tenant_id != tenant_id:
        raise _denied(resource_type, permission)
    if resource_type == "tenant" and resource_id is not None and str(resource_id) != str(tenant_id):
        raise _denied(resource_type, permission)
    wanted = f"{resource_type}.{permission}"
    if not any(wanted in SCOPE_PERMISSIONS.get(scope, ()) for scope in principal.scopes):
        enough = [scope.value for scope in Scope if wanted in SCOPE_PERMISSIONS[scope]]
        remedy = f"use one with the scope {' or '.join(enough)}" if enough else "no scope of keys is enough for this"
        raise Forbidden(f"This key lacks the right {wanted}; {remedy}.", code="insufficient_scope")


class Guard:
    """Asks about anybody."""

    def __init__(self, permissions: Permissions) -> None:
        self._permissions = permissions

    async def may(
        self,
        principal: Principal | None,
        tenant_id: uuid.UUID,
        resource_type: str,
        permission: str,
        resource_id: object = None,
    ) -> None:
        """Let the principal through, else raise, as the function `may`; without an id, a tenant is the tenant itself,
        and of other types it is asked what holds for all that the tenant has."""
        if not isinstance(principal, Person):
            may(principal, tenant_id, resource_type, permission, resource_id)
            return
        EVALUATOR.require(resource_type, permission)
        somebody = permissions.user(principal.user_id)
        if principal.tenant_id not in (None, tenant_id):
            # Only a sysadmin acts on another tenant than the one they have signed in for (CTX-03).
            if await self._permissions.check(PLATFORM, permissions.PLATFORM_ITSELF, "manage", somebody):
                return
            raise _denied(resource_type, permission)
        if resource_id is None:
            # The empty id is nobody's: no relationship names it, and only the tenant's own roles count.
            resource_id = tenant_id if resource_type == "tenant" else ""
        resource = permissions.resource(resource_type, resource_id)
        if not await self._permissions.check(tenant_id, resource, permission, somebody):
            raise _denied(resource_type, permission)

    async def may_any(self, principal: Principal | None, tenant_id: uuid.UUID, wanted: Iterable[Wanted]) -> None:
        """Let the principal through if any one of these is theirs, of whatever type; else raise as for the last.

        Every one of them must be in the schema, also those that are not needed any more (FLW-72).
        """
        each = tuple(wanted)
        if not each:
            raise BadInput("Name at least one permission.", param="permission")
        for one in each:
            EVALUATOR.require(one.resource_type, one.permission)
        refusal: AvbError | None = None
        for type, permission, resource_id in each:
            try:
                await self.may(principal, tenant_id, type, permission, resource_id)
            except Forbidden as error:
                refusal = error
            else:
                return
        assert refusal is not None
        raise refusal

    async def may_grant(self, principal: Principal | None, tenant_id: uuid.UUID, scopes: Iterable[str]) -> None:
        """Raise unless the principal has all that a key of these scopes would have (KEY-18)."""
        for scope in scopes:
            if scope not in SCOPE_PERMISSIONS:
                raise BadInput(f"scopes must be one or more of {', '.join(Scope)}.", param="scopes")
            for wanted in sorted(SCOPE_PERMISSIONS[scope]):
                await self.may(principal, tenant_id, *wanted.split("."))


def portal_permissions(roles: Iterable[str]) -> frozenset[str]:
    """The strings by which the portal knows what to show to somebody with these roles; unknown ones show nothing."""
    known = tuple(Role)
    return frozenset(word for role in roles if role in known for word in _PORTAL[Role(role)])


def _denied(resource_type: str, permission: str) -> Forbidden:
    return Forbidden(
        f"This needs the permission {permission!r} on the {resource_type}; ask an administrator of the tenant for it.",
        code="permission_denied",
    )
