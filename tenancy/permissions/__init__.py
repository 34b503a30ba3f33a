"""Who may do what: checks of a schema's permissions over relationships between resources and people.

`Relations` answers in process from the table of that name. A SpiceDB may stand behind the same `Permissions` later: it
takes `schema.zed` as it is, and the rows of the table as relationships `type:id#relation@type:id`, plus the implied
`#tenant@tenant:T` of each resource and `tenant:T#platform@platform:avb` of each tenant.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Protocol

from agentvoicebox.tenancy.permissions.evaluator import EVERYBODY, Relationship, Resource, Subject
from agentvoicebox.tenancy.permissions.relations import Relations
from agentvoicebox.tenancy.permissions.rules import PLATFORM_ITSELF, ROLE_PERMISSIONS, resource, role, sysadmin, user

__all__ = [
    "EVERYBODY",
    "PLATFORM_ITSELF",
    "ROLE_PERMISSIONS",
    "Permissions",
    "Relations",
    "Relationship",
    "Resource",
    "Subject",
    "resource",
    "role",
    "sysadmin",
    "user",
]


class Permissions(Protocol):
    """What decides, and what the decisions follow from."""

    async def check(self, tenant_id: uuid.UUID, resource: Resource, permission: str, subject: Subject, /) -> bool:
        """Whether the subject may; no when that cannot be found out. Raises `BadInput` for unknown permissions."""

    async def lookup_subjects(
        self, tenant_id: uuid.UUID, resource: Resource, permission: str, subject_type: str = "user", /
    ) -> set[Subject]:
        """All who may. Raises `BadInput`, `Unavailable`."""

    async def write(self, tenant_id: uuid.UUID, relationships: Iterable[Relationship], /) -> None:
        """Make these stand, all or none, however often it is said. Raises `BadInput`, `Unavailable`."""

    async def delete(self, tenant_id: uuid.UUID, relationships: Iterable[Relationship], /) -> None:
        """Make these not stand, all or none. Raises `Unavailable`."""
