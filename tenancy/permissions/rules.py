"""Our own schema, and what it takes for a relationship to be stored under it."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy.models import PLATFORM, Role
from agentvoicebox.tenancy.permissions.evaluator import EVERYBODY, Evaluator, Graph, Relationship, Resource, Subject
from agentvoicebox.tenancy.permissions.schema import parse

EVALUATOR = Evaluator(parse(Path(__file__).with_name("schema.zed").read_text(encoding="utf-8")))
"""Answers for `schema.zed`."""

PLATFORM_ITSELF = Resource("platform", "avb")
"""What sysadmins are sysadmins of."""

IMPLIED = frozenset({"tenant", "platform"})
"""Relations that follow from where a resource is found, and are never stored; see `schema.zed`."""

_ID = re.compile(r"[A-Za-z0-9/_|=+-]{1,100}")
"""Of those that SpiceDB takes."""


def resource(type: str, id: object) -> Resource:
    """A resource by its id, which may be a UUID."""
    return Resource(type, str(id))


def user(user_id: uuid.UUID) -> Subject:
    """A person as a subject, always by the id that this store gave them (AZN-13)."""
    return Subject("user", str(user_id))


def role(tenant_id: uuid.UUID, role: Role, user_id: uuid.UUID) -> Relationship:
    """Somebody's role in a tenant."""
    return Relationship(resource("tenant", tenant_id), role.value, user(user_id))


def sysadmin(user_id: uuid.UUID) -> Relationship:
    """Somebody's right to administrate the platform; it is the platform's (`PLATFORM`), no tenant's."""
    return Relationship(PLATFORM_ITSELF, Role.SYSADMIN.value, user(user_id))


def graph(tenant_id: uuid.UUID) -> Graph:
    """An empty graph for the relationships of a tenant, or of the platform."""
    if tenant_id == PLATFORM:
        return Graph()
    return Graph({"tenant": ("tenant", str(tenant_id)), "platform": (PLATFORM_ITSELF.type, PLATFORM_ITSELF.id)})


def check(tenant_id: uuid.UUID, relationship: Relationship) -> None:
    """Raise `BadInput` unless the relationship may stand among those of the tenant."""
    EVALUATOR.validate(relationship)
    on, relation, subject = relationship
    if relation in IMPLIED:
        raise BadInput(f"The relation {relation!r} follows from whose {on.type} it is; leave it out.", param="relation")
    if (on.type == PLATFORM_ITSELF.type) != (tenant_id == PLATFORM):
        raise BadInput("The platform's relationships are its own, and no tenant's.", param="resource")
    if on.type == "tenant" and on.id != str(tenant_id):
        raise BadInput("A tenant's roles are given among its own relationships only.", param="resource")
    if on.type == PLATFORM_ITSELF.type and on != PLATFORM_ITSELF:
        raise BadInput(f"There is one platform, {PLATFORM_ITSELF}.", param="resource")
    if not _ID.fullmatch(on.id):
        raise BadInput("A resource id is 1 to 100 of letters, digits and /_|=+-.", param="resource")
    if subject.type == "user" and subject.id != EVERYBODY:
        person(subject)
    elif subject.id != EVERYBODY and not _ID.fullmatch(subject.id):
        raise BadInput("A subject id is 1 to 100 of letters, digits and /_|=+-.", param="subject")


def person(subject: Subject) -> uuid.UUID:
    """The id of a person as a subject. Raises `BadInput` for what is no id of ours."""
    try:
        found = uuid.UUID(subject.id)
    except ValueError:
        found = None
    if found is None or str(found) != subject.id:
        raise BadInput("A person is named by the id that this platform gave them, a UUID.", param="subject")
    return found


def _granted(role: Role) -> frozenset[str]:
    tenant_id, somebody = uuid.UUID(int=1), Subject("user", "somebody")
    alone = graph(tenant_id)
    EVALUATOR.add(alone, [Relationship(resource("tenant", tenant_id), role.value, somebody)])
    return frozenset(
        f"{type}.{permission}"
        for type, permission in EVALUATOR.permissions
        if EVALUATOR.check([alone], Resource(type, str(tenant_id) if type == "tenant" else "any"), permission, somebody)
    )


ROLE_PERMISSIONS = {role: _granted(role) for role in Role}
"""What each role of a tenant allows on everything of that tenant, as `type.permission`."""
