"""API keys from issue to revocation: the secret is seen once, and only its digest is kept."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import tempfile
import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, and_, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, Conflict, Forbidden, NotFound, Unavailable
from agentvoicebox.tenancy import audit, pages
from agentvoicebox.tenancy.checks import chosen, words
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import Action, ApiKey, Project, RateClass, Tenant, TenantStatus
from agentvoicebox.tenancy.pages import Page

PREFIX = "avb_"
LENGTH = 47
"""Characters of a key: the prefix, and 32 random bytes as URL-safe base64 without padding."""
SHOWN = 12
"""Characters of a key that people are shown to recognize it by."""

GRACE = 24 * 3600.0
LONGEST_GRACE = 7 * 24 * 3600.0
"""Seconds for which a key goes on working once it is replaced."""

_OPERATOR_PREFIX = "avb_operator_"

_log = logging.getLogger(__name__)


class Scope(StrEnum):
    """What a key may be used for."""

    REALTIME = "realtime"
    SESSIONS = "sessions"
    USAGE = "usage"
    BILLING = "billing"
    ADMIN = "admin"


class KeyStatus(StrEnum):
    """What has become of a key."""

    ACTIVE = "active"
    ROTATING = "rotating"
    """Replaced by another, and good until its grace ends."""
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Issued:
    """A new key; the only time its secret is seen."""

    id: uuid.UUID
    key: str = field(repr=False)
    prefix: str
    scopes: tuple[Scope, ...]
    expires_at: datetime | None


def status(key: ApiKey, now: datetime) -> KeyStatus:
    """What has become of the key by then."""
    if key.revoked_at is not None:
        return KeyStatus.REVOKED
    if key.expires_at is not None and key.expires_at <= now:
        return KeyStatus.EXPIRED
    return KeyStatus.ACTIVE if key.replaced_by is None else KeyStatus.ROTATING


async def issue(
    database: Database,
    tenant_id: uuid.UUID,
    name: str,
    scopes: Iterable[str] = (Scope.REALTIME,),
    expires_at: datetime | None = None,
    project_id: uuid.UUID | None = None,
    *,
    description: str = "",
    rate_class: str = RateClass.STANDARD,
    created_by: uuid.UUID | None = None,
    granter: Collection[str] | None = None,
) -> Issued:
    """Make a key of the tenant's project, by default its first one.

    `granter` are the scopes of whoever asks for it, None for the operator: nobody gives what they do not have.
    Raises `BadInput`, `NotFound`, and `Forbidden` for a scope that the granter lacks or when the tenant has its fill.
    """
    words(name, "name", 1, 100)
    _check_description(description)
    wanted = _scopes(scopes)
    check_granter(wanted, granter)
    secret = PREFIX + secrets.token_urlsafe(32)
    if expires_at is not None and (expires_at.tzinfo is None or expires_at <= datetime.now(UTC)):
        raise BadInput("expires_at must have a time zone and lie in the future.", param="expires_at")
    key = ApiKey(
        id=uuid.uuid4(),
        name=name,
        description=description,
        key_prefix=secret[:SHOWN],
        key_hash=_digest(secret),
        scopes=[scope.value for scope in wanted],
        rate_limit_tier=chosen(rate_class, "rate_class", RateClass),
        expires_at=expires_at,
        created_by=created_by,
    )
    async with database.tenant(tenant_id) as session:
        await add(session, tenant_id, key, project_id)
    _log.info("key_issued tenant_id=%s key_id=%s", tenant_id, key.id)
    return Issued(key.id, secret, key.key_prefix, wanted, expires_at)


async def add(session: AsyncSession, tenant_id: uuid.UUID, key: ApiKey, project_id: uuid.UUID | None = None) -> None:
    """Put a new key into the tenant's project, by default its first one, within a transaction of the caller's.

    That may be the system's. Raises `NotFound`, and what is translated to `Forbidden` when the tenant has its fill.
    """
    await _check_tenant(session, tenant_id)
    key.tenant_id = tenant_id
    key.project_id = await _project(session, tenant_id, project_id)
    session.add(key)
    await session.flush()
    await audit.append(session, Action.CREATE, "api_key", key.id, "issued", tenant_id=tenant_id, new=_told(key))


async def get(database: Database, tenant_id: uuid.UUID, key_id: uuid.UUID) -> ApiKey:
    """The key, whatever has become of it. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        return _known(await session.get(ApiKey, (tenant_id, key_id)))


async def list_(
    database: Database,
    tenant_id: uuid.UUID,
    *,
    status: str | None = None,
    project_id: uuid.UUID | None = None,
    page: int = 1,
    page_size: int = 20,
) -> Page[ApiKey]:
    """The tenant's keys, the newest first; those of one `KeyStatus`, or of one project. Raises `BadInput`."""
    query = select(ApiKey)
    if status is not None:
        query = query.where(_is(chosen(status, "status", KeyStatus)))
    if project_id is not None:
        query = query.where(ApiKey.project_id == project_id)
    async with database.tenant(tenant_id) as session:
        return await pages.turn_to(session, query.order_by(ApiKey.created_at.desc(), ApiKey.id), page, page_size)


async def update(
    database: Database,
    tenant_id: uuid.UUID,
    key_id: uuid.UUID,
    *,
    name: str | None = None,
    description: str | None = None,
    project_id: uuid.UUID | None = None,
    scopes: Iterable[str] | None = None,
    rate_class: str | None = None,
    granter: Collection[str] | None = None,
) -> ApiKey:
    """Change what is given; `granter` as in `issue`, for scopes that the key does not have yet.

    Raises `BadInput`, `NotFound`, `Forbidden`, and `Conflict` for a key that is revoked.
    """
    changes: dict[str, Any] = {}
    if name is not None:
        changes["name"] = words(name, "name", 1, 100)
    if description is not None:
        changes["description"] = _check_description(description)
    if rate_class is not None:
        changes["rate_limit_tier"] = chosen(rate_class, "rate_class", RateClass)
    wanted = None if scopes is None else _scopes(scopes)
    async with database.tenant(tenant_id) as session:
        if project_id is not None:
            changes["project_id"] = await _project(session, tenant_id, project_id)  # before the key: see hold_project
        key = await _locked(session, tenant_id, key_id)
        if key.revoked_at is not None:
            raise Conflict("This key has been revoked and stays as it is; issue a new one.", param="key_id")
        if wanted is not None:
            check_granter([scope for scope in wanted if scope not in key.scopes], granter)
            changes["scopes"] = [scope.value for scope in wanted]
        old = _told(key)
        for column, value in changes.items():
            setattr(key, column, value)
        new = _told(key)
        changed = [what for what in new if new[what] != old[what]]
        if changed:
            await session.flush()
            await session.refresh(key)
            await audit.append(
                session,
                Action.UPDATE,
                "api_key",
                key.id,
                "changed",
                old={what: old[what] for what in changed},
                new={what: new[what] for what in changed},
            )
    return key


async def rotate(
    database: Database,
    tenant_id: uuid.UUID,
    key_id: uuid.UUID,
    grace: float = GRACE,
    created_by: uuid.UUID | None = None,
    granter: Collection[str] | None = None,
) -> Issued:
    """Replace a key by a new one with the same name, project, scopes, class and, counted from now, lifetime.

    The old key goes on working for `grace` seconds, 0 to 7 days; at 0 it is revoked at once, which is what a key that
    leaked needs. `granter` as in `issue`. Raises `BadInput`, `NotFound`, `Forbidden`, and `Conflict` for a key that is
    revoked, expired or replaced already.
    """
    if isinstance(grace, bool) or not isinstance(grace, int | float) or not 0 <= grace <= LONGEST_GRACE:
        raise BadInput(f"grace must be 0 to {LONGEST_GRACE:.0f} seconds.", param="grace")
    secret = PREFIX + secrets.token_urlsafe(32)
    async with database.tenant(tenant_id) as session:
        await _check_tenant(session, tenant_id)
        await hold_project(session, key_id)
        old = await _locked(session, tenant_id, key_id)
        now = (await session.execute(select(func.clock_timestamp()))).scalar_one()
        _check_rotatable(old, status(old, now))
        scopes = tuple(Scope(scope) for scope in old.scopes)
        check_granter(scopes, granter)
        key = ApiKey(
            id=uuid.uuid4(),
            name=old.name,
            description=old.description,
            project_id=old.project_id,
            key_prefix=secret[:SHOWN],
            key_hash=_digest(secret),
            scopes=list(old.scopes),
            rate_limit_tier=old.rate_limit_tier,
            expires_at=None if old.expires_at is None else now + (old.expires_at - old.created_at),
            created_by=created_by,
            rotated_from=old.id,
        )
        session.add(key)
        await session.flush()  # while the old key is good, so that this one takes its place in the tenant's limit
        old.replaced_by = key.id
        if grace == 0:
            old.revoked_at, old.revoked_by = now, created_by
        else:
            end = now + timedelta(seconds=grace)
            old.expires_at = end if old.expires_at is None else min(old.expires_at, end)
        await session.flush()
        ends = {"expires_at": _iso(old.expires_at), "revoked_at": _iso(old.revoked_at)}
        await audit.append(
            session, Action.UPDATE, "api_key", old.id, "rotated", new=ends, details={"replaced_by": str(key.id)}
        )
        await audit.append(
            session, Action.CREATE, "api_key", key.id, "issued", new=_told(key), details={"rotated_from": str(old.id)}
        )
    _log.info("key_rotated tenant_id=%s key_id=%s new_key_id=%s", tenant_id, old.id, key.id)
    return Issued(key.id, secret, key.key_prefix, scopes, key.expires_at)


async def revoke(
    database: Database, tenant_id: uuid.UUID, key_id: uuid.UUID, revoked_by: uuid.UUID | None = None
) -> None:
    """End a key, everywhere within a second; ending it again changes nothing. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        await end(session, tenant_id, key_id, revoked_by)


async def end(
    session: AsyncSession, tenant_id: uuid.UUID, key_id: uuid.UUID, revoked_by: uuid.UUID | None = None
) -> None:
    """`revoke`, within a transaction of the tenant's that the caller ends."""
    key = await _locked(session, tenant_id, key_id)
    if key.revoked_at is not None:
        return
    # The log of changes is written by a trigger, so that no way of revoking can forget it.
    key.revoked_at, key.revoked_by = func.now(), revoked_by
    await session.flush()
    await audit.append(session, Action.DELETE, "api_key", key.id, "revoked", old=_told(key))
    _log.info("key_revoked tenant_id=%s key_id=%s", tenant_id, key_id)


def operator_key(data: Path) -> tuple[str, bool]:
    """The operator's key of this installation, and whether it was made just now (then show it once).

    `DIR/operator.key` holds the secret itself, readable by its owner only, since the operator's own commands send it;
    a server compares with `same_key`. Raises `Unavailable` when the file cannot be made or holds no key.
    """
    path = data / "operator.key"
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = not path.exists() and _place(path, _OPERATOR_PREFIX + secrets.token_urlsafe(32))
        key = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Unavailable(
            f"The operator key {path} cannot be used: {error}. Mend it, or remove it to get a new one.",
            code="store_unavailable",
        ) from error
    if not key.startswith(_OPERATOR_PREFIX) or len(key) < len(_OPERATOR_PREFIX) + 43:
        raise Unavailable(
            f"The operator key {path} is damaged: remove it, and the next start makes a new one.",
            code="store_unavailable",
        )
    return key, made


def same_key(given: str, expected: str) -> bool:
    """Whether two secrets are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(
        hashlib.sha256(given.encode(errors="replace")).digest(), hashlib.sha256(expected.encode()).digest()
    )


def _place(path: Path, secret: str) -> bool:
    """Write the file whole, unless another process was faster."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".operator")  # mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secret + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(name, path)
        except FileExistsError:
            return False
        return True
    finally:
        os.unlink(name)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _scopes(given: Iterable[str]) -> tuple[Scope, ...]:
    found = list(given)
    if not found or any(scope not in tuple(Scope) for scope in found):
        raise BadInput(f"scopes must be one or more of {', '.join(Scope)}.", param="scopes")
    return tuple(Scope(scope) for scope in dict.fromkeys(found))


def _check_description(given: str) -> str:
    return words(given, "description", 0, 1_000)


def check_granter(wanted: Iterable[str], granter: Collection[str] | None) -> None:
    """Raise `Forbidden` unless who asks has all these scopes; None is the operator, who has."""
    missing = [] if granter is None else [str(scope) for scope in wanted if scope not in granter]
    if missing:
        raise Forbidden(
            f"You cannot give the scope {missing[0]!r}, since you do not have it; ask somebody who has.",
            code="insufficient_scope",
            param="scopes",
        )


def _check_rotatable(key: ApiKey, now: KeyStatus) -> None:
    if now == KeyStatus.ROTATING:
        raise Conflict(f"This key has been replaced by {key.replaced_by}; rotate that one.", param="key_id")
    if now != KeyStatus.ACTIVE:
        raise Conflict(f"This key is {now.value}, so nothing can take its place; issue a new one.", param="key_id")


async def _check_tenant(session: AsyncSession, tenant_id: uuid.UUID) -> None:
    status = (await session.execute(select(Tenant.status).where(Tenant.id == tenant_id))).scalar_one_or_none()
    if status in (None, TenantStatus.DELETED):
        raise NotFound("There is no such tenant.", code="tenant_not_found")


async def _project(session: AsyncSession, tenant_id: uuid.UUID, project_id: uuid.UUID | None) -> uuid.UUID:
    """The tenant's project of that id, or its default one; nobody deletes it before the transaction ends."""
    mine = Project.is_default if project_id is None else Project.id == project_id
    query = select(Project.id).where(Project.tenant_id == tenant_id, mine)
    found = (await session.execute(query.with_for_update(read=True, key_share=True))).scalar_one_or_none()
    if found is None:
        raise NotFound("There is no such project.", param="project_id")
    return found


async def hold_project(session: AsyncSession, key_id: uuid.UUID) -> None:
    """Keep the key's project from being deleted before the transaction ends.

    Whoever deletes a project locks it before its keys, and so must others, or each could wait for the other.
    """
    of = select(ApiKey.project_id).where(ApiKey.id == key_id).scalar_subquery()
    await session.execute(select(Project.id).where(Project.id == of).with_for_update(read=True, key_share=True))


async def _locked(session: AsyncSession, tenant_id: uuid.UUID, key_id: uuid.UUID) -> ApiKey:
    """The key, which nobody else changes before the transaction ends."""
    return _known(await session.get(ApiKey, (tenant_id, key_id), with_for_update={"key_share": True}))


def _known(key: ApiKey | None) -> ApiKey:
    if key is None:
        raise NotFound("There is no such key.", param="key_id")
    return key


def _is(wanted: KeyStatus) -> ColumnElement[bool]:
    """`status`, as a condition."""
    over = func.coalesce(ApiKey.expires_at <= func.now(), False)
    if wanted == KeyStatus.REVOKED:
        return ApiKey.revoked_at.is_not(None)
    if wanted == KeyStatus.EXPIRED:
        return and_(ApiKey.revoked_at.is_(None), over)
    replaced = ApiKey.replaced_by.is_not(None) if wanted == KeyStatus.ROTATING else ApiKey.replaced_by.is_(None)
    return and_(ApiKey.revoked_at.is_(None), ~over, replaced)


def _told(key: ApiKey) -> dict[str, Any]:
    """What the audit log says of a key."""
    return {
        "name": key.name,
        "description": key.description,
        "prefix": key.key_prefix,
        "project_id": None if key.project_id is None else str(key.project_id),
        "scopes": list(key.scopes),
        "rate_class": str(key.rate_limit_tier),
        "expires_at": _iso(key.expires_at),
    }


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
