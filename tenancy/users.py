"""People: one row each, however many tenants they work for.

Whether somebody is let in (`is_active`) is decided elsewhere: nothing here, and no sign-in, ever sets it (FLW-19).
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, Conflict, NotFound
from agentvoicebox.tenancy import audit, checks
from agentvoicebox.tenancy.database import Database, sqlstate
from agentvoicebox.tenancy.models import PLATFORM, Action, User

MOST_PREFERENCES = 16 * 1024
"""Bytes of JSON."""

_LOCALE = re.compile(r"(?=.{2,10}$)[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")
_UNIQUE_VIOLATION = "23505"

_log = logging.getLogger(__name__)


async def create(
    database: Database, email: str, first_name: str = "", last_name: str = "", keycloak_id: str | None = None
) -> User:
    """A new person. Raises `BadInput`, and `Conflict` when the address is somebody's, however it is spelled."""
    person = User(
        id=uuid.uuid4(),
        email=checks.email(email),
        first_name=_name(first_name, "first_name"),
        last_name=_name(last_name, "last_name"),
        keycloak_id=None if keycloak_id is None else checks.words(keycloak_id, "keycloak_id", 1, 255),
    )
    try:
        async with database.system() as session:
            session.add(person)
            await session.flush()
            await session.refresh(person)
            await audit.append(session, Action.CREATE, "user", person.id, "user created", tenant_id=PLATFORM)
    except IntegrityError as error:
        if sqlstate(error) != _UNIQUE_VIOLATION:
            raise
        raise Conflict("There is somebody with this address or identity already.", param="email") from error
    _log.info("user_created user_id=%s", person.id)
    return person


async def get(database: Database, user_id: uuid.UUID) -> User:
    """The person of that id. Raises `NotFound`."""
    async with database.system() as session:
        return await _one(session, User.id == user_id)


async def by_email(database: Database, email: str) -> User:
    """The person of that address, however it is spelled. Raises `BadInput`, `NotFound`."""
    async with database.system() as session:
        return await _one(session, func.lower(User.email) == checks.email(email))


async def patch_profile(database: Database, user_id: uuid.UUID, changes: Mapping[str, object]) -> User:
    """Change what people say about themselves, all or nothing: `first_name`, `last_name`, `avatar_url`, `timezone`,
    `locale`, `email_notifications`, `push_notifications`, `theme_id`. Raises `BadInput`, `NotFound`."""
    values: dict[str, object] = {}
    for name, value in changes.items():
        if (read := _PROFILE.get(name)) is None:
            raise BadInput(f"A profile has {', '.join(_PROFILE)}, and no {name[:50]!r}.", param=name[:50])
        values[name] = read(value)
    async with database.system() as session:
        person = await _one(session, User.id == user_id, lock=True)
        changed = [name for name, value in values.items() if getattr(person, name) != value]
        if changed:
            for name in changed:
                setattr(person, name, values[name])
            await session.flush()
            await session.refresh(person)
            await _note(session, person, "profile changed", changed)
    return person


async def preferences(database: Database, user_id: uuid.UUID) -> dict[str, Any]:
    """What the person has set for themselves, as the portal wrote it. Raises `NotFound`."""
    return (await get(database, user_id)).preferences


async def patch_preferences(database: Database, user_id: uuid.UUID, changes: Mapping[str, object]) -> dict[str, Any]:
    """Set some preferences, and remove those that are None; the others stay. Returns all of them.

    Raises `BadInput`, `NotFound`, and `TooLarge` when all together would be more than 16 KiB.
    """
    given = checks.document(changes, "preferences", MOST_PREFERENCES)
    async with database.system() as session:
        person = await _one(session, User.id == user_id, lock=True)
        after = {name: value for name, value in {**person.preferences, **given}.items() if value is not None}
        if after != person.preferences:
            person.preferences = checks.document(after, "preferences", MOST_PREFERENCES)
            await _note(session, person, "preferences changed", list(given))
        return after


async def _one(session: AsyncSession, which: ColumnElement[bool], *, lock: bool = False) -> User:
    query = select(User).where(which)
    found = (await session.execute(query.with_for_update() if lock else query)).scalar_one_or_none()
    if found is None:
        raise NotFound("There is no such person.", code="user_not_found")
    return found


async def _note(session: AsyncSession, person: User, what: str, names: list[str]) -> None:
    """What people say of themselves is theirs: the log tells which fields they changed, not to what."""
    await audit.append(
        session, Action.UPDATE, "user", person.id, what, tenant_id=PLATFORM, details={"fields": sorted(names)}
    )


def _name(value: object, param: str) -> str:
    return checks.words(value, param, 0, 150)


def _avatar(value: object) -> str:
    return "" if value == "" else checks.public_url(value, "avatar_url")


def _theme(value: object) -> uuid.UUID | None:
    if value is None or isinstance(value, uuid.UUID):
        return value
    try:
        return uuid.UUID(str(value))
    except ValueError as error:
        raise BadInput("theme_id must be the id of a theme.", param="theme_id") from error


_PROFILE: Mapping[str, Callable[[object], object]] = {
    "first_name": lambda value: _name(value, "first_name"),
    "last_name": lambda value: _name(value, "last_name"),
    "avatar_url": _avatar,
    "timezone": checks.timezone,
    "locale": lambda value: checks.shaped(value, "locale", _LOCALE, "a language tag such as en or de-AT"),
    "email_notifications": lambda value: checks.yes_or_no(value, "email_notifications"),
    "push_notifications": lambda value: checks.yes_or_no(value, "push_notifications"),
    "theme_id": _theme,
}
