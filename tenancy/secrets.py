"""What tenants entrust to us, in envelopes: each secret sealed by its tenant's data key, that wrapped by a master key.

What an envelope belongs to is sealed with it: put in the place of another tenant, kind, name or version it does not
open. To take a master key out of use only the data keys are wrapped anew.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Select, select, text, tuple_, update
from sqlalchemy import delete as delete_from
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, NotFound, TooLarge
from agentvoicebox.tenancy import audit, pages
from agentvoicebox.tenancy.checks import shaped
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.masterkeys import MasterKeys, SecretUnreadable
from agentvoicebox.tenancy.models import PLATFORM, Action, DataKey, Secret, SecretVersion
from agentvoicebox.tenancy.pages import Page

__all__ = ["SecretInfo", "SecretUnreadable", "delete", "get", "list_", "put", "rotate_master", "rotate_tenant"]

LONGEST = 65_536
"""Bytes of a secret."""
_SHOWN = 12
"""Of a secret of more characters than this, four are shown."""
_NONCE = 12
_BATCH = 100
_KIND = re.compile(r"[a-z][a-z0-9_.-]{0,49}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,99}")


@dataclass(frozen=True, slots=True)
class SecretInfo:
    """What may be told of a secret. `last4` is empty where it would tell too much."""

    kind: str
    name: str
    version: int
    last4: str
    set_by: uuid.UUID | None
    set_at: datetime


async def put(
    database: Database,
    keys: MasterKeys,
    tenant_id: uuid.UUID,
    kind: str,
    name: str,
    value: bytes | str,
    set_by: uuid.UUID | None = None,
) -> int:
    """Keep a value in place of the one before; its version. Raises `BadInput`, `TooLarge`, `SecretUnreadable`."""
    plain = _checked(kind, name, value)
    async with database.tenant(tenant_id) as session:
        await _alone(session, tenant_id)
        data_key, key = await _data_key(session, keys, tenant_id)
        version = await _next(session, tenant_id, kind, name)
        nonce, sealed = _seal(key, _about(tenant_id, kind, name, version), plain)
        old = await session.scalars(
            delete_from(Secret).where(Secret.kind == kind, Secret.name == name).returning(Secret.version)
        )
        action = Action.UPDATE if old.all() else Action.CREATE
        session.add(
            Secret(
                tenant_id=tenant_id,
                kind=kind,
                name=name,
                version=version,
                data_key=data_key,
                nonce=nonce,
                sealed=sealed,
                last4=_last4(plain),
                set_by=set_by,
            )
        )
        await audit.append(session, action, "secret", f"{kind}/{name}", "secret set", details={"version": version})
    return version


async def get(database: Database, keys: MasterKeys, tenant_id: uuid.UUID, kind: str, name: str) -> bytes:
    """The value. Raises `NotFound`, `SecretUnreadable`, and `Unavailable` when the master keys cannot be used."""
    query = (
        select(Secret, DataKey)
        .join(DataKey, (DataKey.tenant_id == Secret.tenant_id) & (DataKey.version == Secret.data_key))
        .where(Secret.kind == kind, Secret.name == name)
        .order_by(Secret.version.desc())
        .limit(1)
    )
    _check_names(kind, name)
    async with database.tenant(tenant_id) as session:
        found = (await session.execute(query)).one_or_none()
    if found is None:
        raise _missing()
    secret, data_key = found
    return _opened(_unwrap(keys, data_key), secret)


async def list_(
    database: Database, tenant_id: uuid.UUID, kind: str | None = None, page: int = 1, page_size: int = 20
) -> Page[SecretInfo]:
    """A tenant's secrets, by kind and name, without their values. Raises `BadInput`."""
    query = select(Secret).order_by(Secret.kind, Secret.name)
    if kind is not None:
        query = query.where(Secret.kind == shaped(kind, "kind", _KIND, "a kind such as llm_provider"))
    async with database.tenant(tenant_id) as session:
        found = await pages.turn_to(session, query, page, page_size)
    items = [SecretInfo(one.kind, one.name, one.version, one.last4, one.set_by, one.created_at) for one in found.items]
    return Page(items, found.total, found.page, found.page_size)


async def delete(database: Database, tenant_id: uuid.UUID, kind: str, name: str) -> None:
    """Forget a secret. Raises `NotFound`."""
    _check_names(kind, name)
    async with database.tenant(tenant_id) as session:
        await _alone(session, tenant_id)
        gone = await session.scalars(
            delete_from(Secret).where(Secret.kind == kind, Secret.name == name).returning(Secret.version)
        )
        if not (versions := gone.all()):
            raise _missing()
        details = {"version": max(versions)}
        await audit.append(session, Action.DELETE, "secret", f"{kind}/{name}", "secret deleted", details=details)


async def rotate_master(database: Database, keys: MasterKeys) -> int:
    """Wrap every data key under the current master key that is not yet; how many were.

    Works through them in batches, each a transaction: broken off, the next call goes on; several at once share the
    work, and in the end wait for what others hold, so that none is left. Keys that cannot be unwrapped are left, and
    named at the end by `SecretUnreadable`.
    """
    # As weak a lock as the change takes itself: whoever stores a secret holds its data key, and is not in the way.
    done, _ = await _rewrap(database, keys, _waiting(keys).with_for_update(key_share=True, skip_locked=True))
    while True:
        more, lost = await _rewrap(database, keys, _waiting(keys).with_for_update(key_share=True))
        done += more
        if not more:
            break
    if lost:
        raise SecretUnreadable(f"{len(lost)} data keys could not be wrapped anew, {done} were. {lost[0].message}")
    return done


def _waiting(keys: MasterKeys) -> Select[DataKey]:
    current, _ = keys.current()
    return select(DataKey).where(DataKey.master_id != current).order_by(DataKey.tenant_id, DataKey.version)


async def _rewrap(database: Database, keys: MasterKeys, query: Select[DataKey]) -> tuple[int, list[SecretUnreadable]]:
    """Wrap the data keys that the query finds and locks under the current master key: how many, and what did not."""
    after, done = (uuid.UUID(int=0), 0), 0
    lost: list[SecretUnreadable] = []
    place = tuple_(DataKey.tenant_id, DataKey.version)
    while True:
        async with database.system() as session:
            batch = (await session.scalars(query.where(place > tuple_(*after)).limit(_BATCH))).all()
            if not batch:
                break
            rewrapped = 0
            for row in batch:
                try:
                    key = _unwrap(keys, row)
                except SecretUnreadable as error:
                    lost.append(error)
                    continue
                row.master_id, row.nonce, row.wrapped = _wrap(keys, row.tenant_id, row.version, key)
                rewrapped += 1
            if rewrapped:
                await audit.append(
                    session,
                    Action.UPDATE,
                    "master_key",
                    keys.current()[0],
                    "data keys wrapped anew",
                    tenant_id=PLATFORM,
                    details={"count": rewrapped},
                )
        after, done = (batch[-1].tenant_id, batch[-1].version), done + rewrapped
    return done, lost


async def rotate_tenant(database: Database, keys: MasterKeys, tenant_id: uuid.UUID) -> int:
    """Give a tenant a new data key and seal all its secrets with it; how many. Raises `SecretUnreadable`: none then."""
    async with database.tenant(tenant_id) as session:
        await _alone(session, tenant_id)
        old = {row.version: _unwrap(keys, row) for row in (await session.scalars(select(DataKey))).all()}
        version = max(old, default=0) + 1
        key = os.urandom(32)
        await _store(session, keys, tenant_id, version, key)
        held = (await session.scalars(select(Secret))).all()
        for secret in held:
            plain = _opened(old[secret.data_key], secret)
            nonce, sealed = _seal(key, _about(tenant_id, secret.kind, secret.name, secret.version), plain)
            await session.execute(
                update(Secret)
                .where(Secret.kind == secret.kind, Secret.name == secret.name, Secret.version == secret.version)
                .values(data_key=version, nonce=nonce, sealed=sealed)
            )
        await session.execute(delete_from(DataKey).where(DataKey.version < version))
        details = {"version": version, "count": len(held)}
        await audit.append(session, Action.UPDATE, "data_key", version, "secrets sealed anew", details=details)
    return len(held)


async def _alone(session: AsyncSession, tenant_id: uuid.UUID) -> None:
    """One writer of a tenant's secrets at a time, until the transaction ends."""
    await session.execute(
        text("SELECT pg_advisory_xact_lock(hashtextextended(:of, 0))"), {"of": f"secrets of {tenant_id}"}
    )


async def _next(session: AsyncSession, tenant_id: uuid.UUID, kind: str, name: str) -> int:
    """A version that no secret of that name had, deleted ones neither: in its place an old envelope would open."""
    first = insert(SecretVersion).values(tenant_id=tenant_id, kind=kind, name=name, version=1)
    count = first.on_conflict_do_update(
        index_elements=[SecretVersion.tenant_id, SecretVersion.kind, SecretVersion.name],
        set_={"version": SecretVersion.version + 1},
    )
    return (await session.scalars(count.returning(SecretVersion.version))).one()


async def _data_key(session: AsyncSession, keys: MasterKeys, tenant_id: uuid.UUID) -> tuple[int, bytes]:
    """The tenant's newest data key, made when there is none."""
    held = await session.scalar(select(DataKey).order_by(DataKey.version.desc()).limit(1))
    if held is not None:
        return held.version, _unwrap(keys, held)
    key = os.urandom(32)
    await _store(session, keys, tenant_id, 1, key)
    return 1, key


async def _store(session: AsyncSession, keys: MasterKeys, tenant_id: uuid.UUID, version: int, key: bytes) -> None:
    master_id, nonce, wrapped = _wrap(keys, tenant_id, version, key)
    await session.execute(
        insert(DataKey).values(tenant_id=tenant_id, version=version, master_id=master_id, nonce=nonce, wrapped=wrapped)
    )


def _wrap(keys: MasterKeys, tenant_id: uuid.UUID, version: int, key: bytes) -> tuple[str, bytes, bytes]:
    master_id, master = keys.current()
    return master_id, *_seal(master, _about_key(tenant_id, version), key)


def _unwrap(keys: MasterKeys, row: DataKey) -> bytes:
    try:
        return _open(keys.get(row.master_id), _about_key(row.tenant_id, row.version), row.nonce, row.wrapped)
    except (InvalidTag, ValueError) as error:
        raise SecretUnreadable(
            f"The data key of tenant {row.tenant_id} does not open under the master key {row.master_id!r}: one of them "
            "was changed. Bring back the right one, or set the tenant's secrets anew."
        ) from error


def _opened(key: bytes, row: Secret) -> bytes:
    try:
        return _open(key, _about(row.tenant_id, row.kind, row.name, row.version), row.nonce, row.sealed)
    except (InvalidTag, ValueError) as error:
        raise SecretUnreadable(
            f"The {row.kind} secret {row.name!r} does not open: its envelope was changed or put in another's place. "
            "Set it anew."
        ) from error


def _seal(key: bytes, about: bytes, plain: bytes) -> tuple[bytes, bytes]:
    nonce = os.urandom(_NONCE)
    return nonce, AESGCM(key).encrypt(nonce, plain, about)


def _open(key: bytes, about: bytes, nonce: bytes, sealed: bytes) -> bytes:
    return AESGCM(key).decrypt(nonce, sealed, about)


def _about(tenant_id: uuid.UUID, kind: str, name: str, version: int) -> bytes:
    return _label(["avb-secret-1", str(tenant_id), kind, name, version])


def _about_key(tenant_id: uuid.UUID, version: int) -> bytes:
    return _label(["avb-data-key-1", str(tenant_id), version])


def _label(parts: Sequence[str | int]) -> bytes:
    """JSON, in which no two lists read the same."""
    return json.dumps(parts).encode()


def _checked(kind: str, name: str, value: bytes | str) -> bytes:
    _check_names(kind, name)
    try:
        plain = value.encode() if isinstance(value, str) else bytes(value)
    except UnicodeEncodeError:
        # Not chained: the cause would carry the value.
        raise BadInput("The secret holds characters that are not text; give bytes.", param="value") from None
    if not plain:
        raise BadInput("The secret is empty.", param="value")
    if len(plain) > LONGEST:
        raise TooLarge(f"A secret may have {LONGEST} bytes.", param="value")
    return plain


def _check_names(kind: str, name: str) -> None:
    shaped(kind, "kind", _KIND, "1 to 50 of a-z, 0-9, _, . and -, beginning with a letter")
    shaped(name, "name", _NAME, "1 to 100 of A-Z, a-z, 0-9, _, ., :, / and -, beginning with a letter or digit")


def _last4(plain: bytes) -> str:
    try:
        shown = plain.decode()
    except UnicodeDecodeError:
        return ""
    return shown[-4:] if len(shown) > _SHOWN and shown[-4:].isprintable() else ""


def _missing() -> NotFound:
    return NotFound("There is no such secret.", code="secret_not_found")
