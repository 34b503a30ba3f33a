"""People, and what they say about themselves."""

from __future__ import annotations

import asyncio
import uuid

import psycopg
import pytest

from agentvoicebox.config.errors import AvbError, BadInput, Conflict, NotFound, TooLarge
from agentvoicebox.tenancy import users
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import PLATFORM, User


@pytest.fixture
async def anna(database: Database) -> User:
    return await users.create(database, f"{uuid.uuid4().hex}@example.com", "Anna", "Arendt")


async def test_usr_01_a_person(database: Database) -> None:
    name = uuid.uuid4().hex
    made = await users.create(database, f"{name}@Example.COM", "Anna", "Arendt", keycloak_id=name)
    found = await users.get(database, made.id)
    assert (found.email, found.full_name, found.keycloak_id) == (f"{name}@example.com", "Anna Arendt", name)
    assert (found.is_active, found.is_staff, found.preferences, found.last_login) == (True, False, {}, None)
    assert found.date_joined is not None
    assert (await users.by_email(database, f"{name.upper()}@EXAMPLE.com")).id == made.id


async def test_usr_02_the_profile_has_defaults(anna: User) -> None:
    assert (anna.avatar_url, anna.timezone, anna.locale, anna.theme_id) == ("", "UTC", "en", None)
    assert anna.email_notifications is anna.push_notifications is True


@pytest.mark.parametrize(
    ("first", "last", "full"),
    [("Anna", "Arendt", "Anna Arendt"), ("Anna", "", "Anna"), ("", "Arendt", "Arendt"), ("", "", None)],
)
async def test_con_10_the_full_name(database: Database, first: str, last: str, full: str | None) -> None:
    email = f"{uuid.uuid4().hex}@example.com"
    assert (await users.create(database, email, first, last)).full_name == (full or email)


async def test_flw_20_an_address_is_one_persons_however_it_is_spelled(database: Database, anna: User) -> None:
    with pytest.raises(Conflict):
        await users.create(database, anna.email.upper())
    results = await asyncio.gather(
        *(users.create(database, f"{'Ab'[n % 2]}-{anna.id}@example.com") for n in range(8)), return_exceptions=True
    )
    assert sum(isinstance(one, User) for one in results) == 2
    assert all(isinstance(one, User | Conflict) for one in results)


async def test_the_database_holds_it_too(database: Database, anna: User, admin: psycopg.AsyncConnection) -> None:
    with pytest.raises(psycopg.errors.UniqueViolation):
        await admin.execute("INSERT INTO users (id, email) VALUES (gen_random_uuid(), %s)", (anna.email.upper(),))


async def test_an_identity_is_one_persons(database: Database) -> None:
    name = uuid.uuid4().hex
    await users.create(database, f"{name}@example.com", keycloak_id=name)
    with pytest.raises(Conflict):
        await users.create(database, f"x{name}@example.com", keycloak_id=name)


@pytest.mark.parametrize(
    "email", ["", "anna", "anna@", "@example.com", "a b@example.com", "a\0@example.com", "ä@x.com"]
)
async def test_what_is_no_address(database: Database, email: str) -> None:
    with pytest.raises(BadInput) as caught:
        await users.create(database, email)
    assert caught.value.param == "email"


async def test_unknown_people_are_not_found(database: Database) -> None:
    for asked in (
        users.get(database, uuid.uuid4()),
        users.by_email(database, f"{uuid.uuid4()}@example.com"),
        users.preferences(database, uuid.uuid4()),
        users.patch_profile(database, uuid.uuid4(), {"locale": "de"}),
        users.patch_preferences(database, uuid.uuid4(), {"a": 1}),
    ):
        with pytest.raises(NotFound):
            await asked


async def test_usr_03_the_profile_is_patched(database: Database, anna: User) -> None:
    theme = uuid.uuid4()
    changes = {
        "first_name": "Änne",
        "avatar_url": "https://images.example.com/anna.png",
        "timezone": "Europe/Vienna",
        "locale": "de-AT",
        "email_notifications": False,
        "push_notifications": False,
        "theme_id": str(theme),
    }
    after = await users.patch_profile(database, anna.id, changes)
    assert (after.full_name, after.timezone, after.locale, after.theme_id) == (
        "Änne Arendt",
        "Europe/Vienna",
        "de-AT",
        theme,
    )
    assert after.updated_at > anna.updated_at
    after = await users.patch_profile(database, anna.id, {"avatar_url": "", "theme_id": None})
    assert (after.avatar_url, after.theme_id, after.locale) == ("", None, "de-AT")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timezone", "Mars/Olympus"),
        ("timezone", "../../etc/passwd"),
        ("locale", "german please"),
        ("locale", "de-AT-1996-x"),
        ("locale", 7),
        ("avatar_url", "http://images.example.com/anna.png"),
        ("avatar_url", "javascript:alert(1)"),
        ("avatar_url", "https://user:secret@images.example.com/"),
        ("avatar_url", None),
        ("first_name", "x" * 151),
        ("first_name", "two\nlines"),
        ("first_name", "\0"),
        ("email_notifications", "yes"),
        ("theme_id", "blue"),
        ("email", "other@example.com"),
        ("keycloak_id", "other"),
        ("is_staff", True),
    ],
)
async def test_a_profile_takes_nothing_else(database: Database, anna: User, name: str, value: object) -> None:
    with pytest.raises(BadInput) as caught:
        await users.patch_profile(database, anna.id, {"last_name": "Changed", name: value})
    assert caught.value.param == name
    assert (await users.get(database, anna.id)).last_name == "Arendt"


async def test_flw_19_nothing_lets_a_disabled_person_in_again(
    database: Database, anna: User, admin: psycopg.AsyncConnection
) -> None:
    await admin.execute("UPDATE users SET is_active = false WHERE id = %s", (anna.id,))
    with pytest.raises(BadInput):
        await users.patch_profile(database, anna.id, {"is_active": True})
    await users.patch_profile(database, anna.id, {"first_name": "Änne"})
    await users.patch_preferences(database, anna.id, {"is_active": True})
    with pytest.raises(Conflict):
        await users.create(database, anna.email)
    assert (await users.get(database, anna.id)).is_active is False


async def test_preferences_are_merged(database: Database, anna: User) -> None:
    await users.patch_preferences(database, anna.id, {"theme": "dark", "table": {"rows": 20}})
    after = await users.patch_preferences(database, anna.id, {"theme": None, "sound": True})
    assert after == {"table": {"rows": 20}, "sound": True} == await users.preferences(database, anna.id)


async def test_preferences_of_many_tabs_at_once_are_all_kept(database: Database, anna: User) -> None:
    await asyncio.gather(*(users.patch_preferences(database, anna.id, {f"tab{n}": n}) for n in range(10)))
    assert await users.preferences(database, anna.id) == {f"tab{n}": n for n in range(10)}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"a": "x" * 20_000}, TooLarge),
        ({"a": "\0"}, BadInput),
        ({"a": float("nan")}, BadInput),
        ({"a": {1, 2}}, BadInput),
        (["a"], BadInput),
    ],
)
async def test_preferences_that_cannot_be_kept(
    database: Database, anna: User, changes: dict[str, object], error: type[AvbError]
) -> None:
    await users.patch_preferences(database, anna.id, {"kept": 1})
    with pytest.raises(error):
        await users.patch_preferences(database, anna.id, changes)
    assert await users.preferences(database, anna.id) == {"kept": 1}


async def test_preferences_do_not_grow_without_end(database: Database, anna: User) -> None:
    await users.patch_preferences(database, anna.id, {"a": "x" * 9_000})
    with pytest.raises(TooLarge):
        await users.patch_preferences(database, anna.id, {"b": "x" * 9_000})


async def test_the_audit_tells_which_fields_and_not_to_what(
    database: Database, anna: User, admin: psycopg.AsyncConnection
) -> None:
    await users.patch_profile(database, anna.id, {"first_name": "Confidential", "locale": "de"})
    await users.patch_profile(database, anna.id, {"locale": "de"})  # which changes nothing
    cursor = await admin.execute(
        "SELECT action, metadata, l::text FROM audit_log l WHERE tenant_id = %s AND resource_id = %s ORDER BY seq",
        (PLATFORM, str(anna.id)),
    )
    created, changed = await cursor.fetchall()
    assert created[0] == "create"
    assert changed[:2] == ("update", {"fields": ["first_name", "locale"]})
    assert "Confidential" not in changed[2]
