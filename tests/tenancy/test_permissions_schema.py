"""The schema of permissions says what the requirements say, for every role, permission and resource."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from agentvoicebox.config.errors import BadInput
from agentvoicebox.tenancy.models import PLATFORM, Role
from agentvoicebox.tenancy.permissions import ROLE_PERMISSIONS, rules
from agentvoicebox.tenancy.permissions.evaluator import Graph, Relationship, Resource, Subject
from agentvoicebox.tenancy.permissions.rules import EVALUATOR
from agentvoicebox.tenancy.permissions.schema import Arrow, SchemaError, SubjectType, parse

# Section 5.2 of the requirements, as a table: which roles of a tenant have which of its permissions.
EVERYBODY_BUT_BILLING = {"sysadmin", "admin", "developer", "operator", "viewer"}
TENANT = {
    "manage": {"sysadmin"},
    "administrate": {"sysadmin", "admin"},
    "develop": {"sysadmin", "admin", "developer"},
    "operate": {"sysadmin", "admin", "developer", "operator"},
    "view": EVERYBODY_BUT_BILLING,
    "billing_access": {"sysadmin", "admin", "billing"},
    "create_project": {"sysadmin", "admin", "developer"},
    "create_api_key": {"sysadmin", "admin", "developer"},
    "invite_user": {"sysadmin", "admin"},
    "manage_billing": {"sysadmin", "admin", "billing"},
    "view_audit": {"sysadmin", "admin"},
    "configure_voice": {"sysadmin", "admin", "developer"},
    "manage_themes": {"sysadmin", "admin", "developer"},
    # Ours: what a key may be for alone.
    "create_session": {"sysadmin", "admin", "developer", "operator"},
    "view_usage": EVERYBODY_BUT_BILLING,
}
# For all else: which of its own relations grant a permission, and which permission of the tenant does.
OWNED = {"view": ({"owner"}, "view"), "edit": ({"owner"}, "develop"), "delete": ({"owner"}, "administrate")}
RESOURCES: dict[str, dict[str, tuple[set[str], str]]] = {
    "project": {
        "admin": (set(), "administrate"),
        "develop": ({"owner", "developer"}, "develop"),
        "view": ({"owner", "developer", "viewer"}, "view"),
        "delete": ({"owner"}, "administrate"),
    },
    "api_key": {
        "view": ({"owner"}, "develop"),
        "rotate": ({"owner"}, "administrate"),
        "revoke": ({"owner"}, "administrate"),
    },
    "session": {  # whose owner is of section 5.3 and AZN-12
        "view": ({"owner"}, "view"),
        "terminate": ({"owner"}, "operate"),
        "view_transcript": ({"owner"}, "view"),
        "export": (set(), "develop"),
    },
    "voice_config": {"view": (set(), "view"), "edit": (set(), "develop")},
    "theme": {
        "view": ({"owner", "public"}, "view"),
        "apply": ({"owner"}, "view"),
        "edit": ({"owner"}, "develop"),
        "delete": ({"owner"}, "administrate"),
    },
    "persona": {
        "view": ({"owner"}, "view"),
        "use": ({"owner"}, "operate"),
        "edit": ({"owner"}, "develop"),
        "delete": ({"owner"}, "administrate"),
    },
    "skill": OWNED,
    "wake_word": OWNED,
    "knowledge_base": OWNED,
    "recording": OWNED,
    "call": OWNED,
    "webhook": OWNED,
    "workflow": OWNED,
}
RELATIONS = {
    "user": set(),
    "platform": {"sysadmin"},
    "tenant": {"platform", "sysadmin", "admin", "developer", "operator", "viewer", "billing"},
    "project": {"tenant", "owner", "developer", "viewer"},
    "api_key": {"tenant", "owner"},
    "session": {"tenant", "project", "api_key", "owner"},
    "voice_config": {"tenant"},
    "theme": {"tenant", "owner", "public"},
    "persona": {"tenant", "owner"},
    **{type: {"tenant", "owner"} for type, permissions in RESOURCES.items() if permissions is OWNED},
}
ROLES = [role.value for role in Role]
T = uuid.UUID(int=7)
ANNA = Subject("user", str(uuid.UUID(int=1)))


def cases() -> Iterator[tuple[str, str, str, bool]]:
    for role in ROLES:
        for permission, granted in TENANT.items():
            yield role, "tenant", permission, role in granted
        for type, permissions in RESOURCES.items():
            for permission, (_, of_tenant) in permissions.items():
                yield role, type, permission, role in TENANT[of_tenant]


def own_cases() -> Iterator[tuple[str, str, str, bool]]:
    for type, permissions in RESOURCES.items():
        for relation in sorted(RELATIONS[type] - {"tenant", "project", "api_key"}):
            for permission, (own, _) in permissions.items():
                yield type, relation, permission, relation in own


def graphs(*relationships: Relationship, platform: tuple[Relationship, ...] = ()) -> tuple[Graph, Graph]:
    made = rules.graph(T), rules.graph(PLATFORM)
    EVALUATOR.add(made[0], relationships)
    EVALUATOR.add(made[1], platform)
    return made


def one(type: str) -> Resource:
    return Resource(type, str(T) if type == "tenant" else "one")


@pytest.mark.parametrize(("role", "type", "permission", "granted"), list(cases()))
def test_every_role_permission_and_resource(role: str, type: str, permission: str, granted: bool) -> None:
    with_role = graphs(Relationship(one("tenant"), role, ANNA))
    assert EVALUATOR.check(with_role, one(type), permission, ANNA) is granted
    assert (f"{type}.{permission}" in ROLE_PERMISSIONS[Role(role)]) is granted
    assert not EVALUATOR.check(with_role, one(type), permission, Subject("user", "another"))


@pytest.mark.parametrize(("type", "relation", "permission", "granted"), list(own_cases()))
def test_every_relation_to_a_resource_itself(type: str, relation: str, permission: str, granted: bool) -> None:
    subject = Subject("user", "*") if relation == "public" else ANNA
    related = graphs(Relationship(one(type), relation, subject))
    assert EVALUATOR.check(related, one(type), permission, ANNA) is granted
    assert not EVALUATOR.check(related, Resource(type, "another"), permission, ANNA)


@pytest.mark.parametrize("type", ["tenant", *RESOURCES])
def test_nobody_has_what_nothing_grants(type: str) -> None:
    for permission in TENANT if type == "tenant" else RESOURCES[type]:
        assert not EVALUATOR.check(graphs(), one(type), permission, ANNA)


def test_con_64_a_sysadmin_of_the_platform_is_one_of_every_tenant() -> None:
    platform = Relationship(rules.PLATFORM_ITSELF, "sysadmin", ANNA)
    everywhere = graphs(platform=(platform,))
    for type, permissions in {"tenant": TENANT, **RESOURCES}.items():
        for permission in permissions:
            assert EVALUATOR.check(everywhere, one(type), permission, ANNA)
    assert EVALUATOR.check(everywhere, rules.PLATFORM_ITSELF, "manage", ANNA)


def test_con_67_billing_sees_billing_and_nothing_else() -> None:
    assert ROLE_PERMISSIONS[Role.BILLING] == {"tenant.billing_access", "tenant.manage_billing"}


def test_the_schema_has_this_and_nothing_more() -> None:
    wanted = {(type, permission) for type, permissions in RESOURCES.items() for permission in permissions}
    wanted |= {("tenant", permission) for permission in TENANT} | {("platform", "manage")}
    assert EVALUATOR.permissions == wanted
    assert {name: set(definition.relations) for name, definition in EVALUATOR.schema.items()} == RELATIONS


@pytest.mark.parametrize(
    ("type", "name"), [("tenant", "admin"), ("project", "developer"), ("tenant", "fly"), ("a", "b")]
)
def test_con_63_checks_name_permissions(type: str, name: str) -> None:
    with pytest.raises(BadInput, match="no permission"):
        EVALUATOR.check(graphs(), Resource(type, "one"), name, ANNA)


def test_what_names_somebody_is_all_there_is_to_know_about_them() -> None:
    """`Relations` relies on it where it asks the database for a single answer."""
    for definition in EVALUATOR.schema.values():
        for types in definition.relations.values():
            assert not any(subject.relation for subject in types)
        for terms in definition.permissions.values():
            assert {term.relation for term in terms if isinstance(term, Arrow)} <= rules.IMPLIED


def test_azn_12_the_coarse_permissions() -> None:
    viewer = ROLE_PERMISSIONS[Role.VIEWER]
    assert {one.partition(".")[2] for one in viewer} <= {"view", "view_transcript", "view_usage", "apply"}
    assert ROLE_PERMISSIONS[Role.SYSADMIN] - ROLE_PERMISSIONS[Role.ADMIN] == {"tenant.manage"}


def test_the_language() -> None:
    schema = parse(
        """
        /* two
           lines */
        definition user {}  // and one
        definition team { relation member: user | team#member | user:*
                          permission all_in = member }
        definition folder {
            relation parent: folder
            relation reader: user | team#member
            permission read = reader + parent->read
        }
        """
    )
    assert schema["team"].relations["member"] == {
        SubjectType("user"),
        SubjectType("team", "member"),
        SubjectType("user", everybody=True),
    }
    assert schema["folder"].permissions == {"read": ("reader", Arrow("parent", "read"))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("definition user {", "line 1: expected permission, found the end"),
        ("relation user {}", "line 1: expected definition, found relation"),
        ("\ndefinition Us {}", "line 2: expected a name of 3 to 64 of a-z, 0-9 and _, found Us"),
        ("definition user {}\ndefinition user {}", "line 2: user is defined twice"),
        ("definition user {\n relation one: user\n permission one = one }", "line 3: user has one twice"),
        ("definition user {\n relation one: other }", "line 1: user#one names other, which is not defined"),
        ("definition user {\n relation one: user#two }", "line 1: user#one names user#two, which is not defined"),
        ("definition user {\n permission one = two }", "line 1: user#one names two, which user lacks"),
        ("definition user {\n permission one = two->one }", "line 1: user#one follows two, which is no relation"),
        ("definition user {\n relation two: user:*\n permission one = two->one }", "line 1: user#one cannot follow"),
        ("definition user {\n relation two: user\n permission one = two->three }", "line 1: user#one cannot follow"),
        ("definition user {\n permission one = two\n permission two = one }", "line 1: user#one is defined by itself"),
        ("definition user {\n relation two: user\n permission one = two & two }", "line 3: '&' is not understood"),
        ("definition user {\n relation two: user\n permission one = two - two }", "line 3: '-' is not understood"),
        ("definition user {\n relation two user }", "line 2: expected ':', found user"),
        ("definition permission {}", "line 1: expected a name"),
    ],
)
def test_what_is_not_of_the_language_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        parse(text)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("project:one#tenant@tenant:" + str(T), "relation"),
        ("tenant:" + str(T) + "#platform@platform:avb", "relation"),
        ("project:one#admin@user:" + ANNA.id, "relation"),
        ("nothing:one#owner@user:" + ANNA.id, "relation"),
        ("project:one#owner@project:two", "subject"),
        ("project:one#owner@user:*", "subject"),
        ("project:one#owner@user:anna", "subject"),
        ("project:one#owner@user:" + ANNA.id.replace("-", ""), "subject"),
        ("project:#owner@user:" + ANNA.id, "resource"),
        ("project:a b#owner@user:" + ANNA.id, "resource"),
        ("project:" + "x" * 101 + "#owner@user:" + ANNA.id, "resource"),
        ("session:one#project@project:a b", "subject"),
        ("tenant:" + str(uuid.UUID(int=8)) + "#admin@user:" + ANNA.id, "resource"),
        ("platform:avb#sysadmin@user:" + ANNA.id, "resource"),
    ],
)
def test_what_may_not_be_stored(text: str, param: str) -> None:
    on, _, rest = text.partition("#")
    relation, _, subject = rest.partition("@")
    relationship = Relationship(Resource(*on.split(":", 1)), relation, Subject(*subject.split(":", 1)))
    assert str(relationship) == text
    with pytest.raises(BadInput) as caught:
        rules.check(T, relationship)
    assert caught.value.param == param


def test_what_may_be_stored() -> None:
    rules.check(T, rules.role(T, Role.ADMIN, uuid.UUID(ANNA.id)))
    rules.check(T, Relationship(Resource("theme", "dark"), "public", Subject("user", "*")))
    rules.check(T, Relationship(Resource("session", "one"), "project", Subject("project", "two")))
    rules.check(PLATFORM, rules.sysadmin(uuid.UUID(ANNA.id)))
    with pytest.raises(BadInput):
        rules.check(PLATFORM, Relationship(Resource("platform", "other"), "sysadmin", ANNA))
    with pytest.raises(BadInput):
        rules.check(PLATFORM, Relationship(Resource("project", "one"), "owner", ANNA))
