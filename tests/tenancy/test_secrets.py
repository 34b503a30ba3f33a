"""Secrets come back to whom they belong, and to nobody else, however the rows are moved about."""

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import os
import stat
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import AvbError, BadInput, NotFound, TooLarge, Unavailable
from agentvoicebox.tenancy import audit, secrets
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.masterkeys import EnvironmentKeys, FileKeys, SecretUnreadable
from agentvoicebox.tenancy.models import PLATFORM, AuditEntry, DataKey, Secret, Tenant

VALUE = "sk-abcdefghijklmnop"


@pytest.fixture
def keys(tmp_path: Path) -> FileKeys:
    return FileKeys(tmp_path / "master.keys")


def line(key_id: str, key: bytes | None = None) -> str:
    return f"{key_id}:{base64.b64encode(key or os.urandom(32)).decode()}"


async def lines_about(database: Database, tenant_id: uuid.UUID, resource_type: str) -> list[AuditEntry]:
    found = await audit.search(database, tenant_id, resource_type=resource_type, page_size=100)
    return list(reversed(found.items))


async def test_what_was_put_comes_back(database: Database, tenant: Tenant, keys: FileKeys) -> None:
    whom = uuid.uuid4()
    assert await secrets.put(database, keys, tenant.id, "llm_provider", "openai", VALUE, whom) == 1
    assert await secrets.put(database, keys, tenant.id, "webhook", "bytes", b"\0\xff" * 10) == 1
    assert await secrets.get(database, keys, tenant.id, "llm_provider", "openai") == VALUE.encode()
    assert await secrets.get(database, keys, tenant.id, "webhook", "bytes") == b"\0\xff" * 10
    found = await secrets.list_(database, tenant.id)
    assert [(one.kind, one.name, one.version, one.last4, one.set_by) for one in found.items] == [
        ("llm_provider", "openai", 1, "mnop", whom),
        ("webhook", "bytes", 1, "", None),
    ]
    assert (await secrets.list_(database, tenant.id, "webhook")).total == 1


async def test_the_value_is_nowhere_in_the_store(
    database: Database, tenant: Tenant, keys: FileKeys, admin: psycopg.AsyncConnection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await secrets.put(database, keys, tenant.id, "llm_provider", "openai", VALUE)
    async with database.tenant(tenant.id) as session:
        row = (await session.scalars(select(Secret))).one()
        key = (await session.scalars(select(DataKey))).one()
    assert VALUE.encode() not in row.sealed
    assert VALUE not in repr(row) + repr(key) + repr(keys)
    for table in ("secrets", "data_keys", "audit_log"):
        cursor = await admin.execute(f"SELECT t::text FROM {table} t WHERE tenant_id = %s", (tenant.id,))
        assert not [text for (text,) in await cursor.fetchall() if VALUE in text or VALUE.encode().hex() in text]
    assert VALUE not in caplog.text


async def test_a_new_version_replaces_the_old(database: Database, tenant: Tenant, keys: FileKeys) -> None:
    await secrets.put(database, keys, tenant.id, "k", "n", "one")
    assert await secrets.put(database, keys, tenant.id, "k", "n", "two") == 2
    assert await secrets.get(database, keys, tenant.id, "k", "n") == b"two"
    async with database.tenant(tenant.id) as session:
        assert [row.version for row in await session.scalars(select(Secret))] == [2]


async def test_what_is_told_of_short_secrets_is_nothing(database: Database, tenant: Tenant, keys: FileKeys) -> None:
    await secrets.put(database, keys, tenant.id, "k", "a", "a" * 8 + "word")
    await secrets.put(database, keys, tenant.id, "k", "b", "a" * 9 + "word")
    assert [one.last4 for one in (await secrets.list_(database, tenant.id)).items] == ["", "word"]


async def test_deleted_is_gone(database: Database, tenant: Tenant, keys: FileKeys) -> None:
    await secrets.put(database, keys, tenant.id, "k", "n", VALUE)
    await secrets.delete(database, tenant.id, "k", "n")
    for lost in (secrets.get(database, keys, tenant.id, "k", "n"), secrets.delete(database, tenant.id, "k", "n")):
        with pytest.raises(NotFound) as caught:
            await lost
        assert caught.value.code == "secret_not_found"


async def test_what_was_deleted_cannot_be_put_back(
    database: Database, tenant: Tenant, keys: FileKeys, admin: psycopg.AsyncConnection
) -> None:
    await secrets.put(database, keys, tenant.id, "k", "n", "leaked")
    query = "SELECT nonce, sealed FROM secrets WHERE tenant_id = %s"
    old = await (await admin.execute(query, (tenant.id,))).fetchone()
    assert old is not None
    await secrets.delete(database, tenant.id, "k", "n")
    assert await secrets.put(database, keys, tenant.id, "k", "n", VALUE) == 2
    assert await secrets.get(database, keys, tenant.id, "k", "n") == VALUE.encode()
    await admin.execute("UPDATE secrets SET nonce = %s, sealed = %s WHERE tenant_id = %s", (*old, tenant.id))
    with pytest.raises(SecretUnreadable):
        await secrets.get(database, keys, tenant.id, "k", "n")
    assert [one.action for one in await lines_about(database, tenant.id, "secret")] == ["create", "delete", "create"]


async def test_each_change_is_audited_without_the_value(database: Database, tenant: Tenant, keys: FileKeys) -> None:
    await secrets.put(database, keys, tenant.id, "k", "n", VALUE)
    await secrets.put(database, keys, tenant.id, "k", "n", VALUE)
    await secrets.delete(database, tenant.id, "k", "n")
    found = await lines_about(database, tenant.id, "secret")
    assert [(one.action, one.resource_id, one.details) for one in found] == [
        ("create", "k/n", {"version": 1}),
        ("update", "k/n", {"version": 2}),
        ("delete", "k/n", {"version": 2}),
    ]


async def test_another_tenant_sees_none(database: Database, tenant: Tenant, other: Tenant, keys: FileKeys) -> None:
    await secrets.put(database, keys, tenant.id, "k", "n", VALUE)
    assert (await secrets.list_(database, other.id)).items == []
    with pytest.raises(NotFound):
        await secrets.get(database, keys, other.id, "k", "n")


@pytest.mark.parametrize(
    ("kind", "name", "value", "error"),
    [
        ("Kind", "n", "v", BadInput),
        ("k" * 51, "n", "v", BadInput),
        ("k", "", "v", BadInput),
        ("k", "n|m", "v", BadInput),
        ("k", "n\0", "v", BadInput),
        ("k", "n", "", BadInput),
        ("k", "n", "\ud800", BadInput),
        ("k", "n", b"x" * 65_537, TooLarge),
    ],
)
async def test_what_cannot_be_kept_is_refused(
    database: Database, tenant: Tenant, keys: FileKeys, kind: str, name: str, value: str | bytes, error: type[AvbError]
) -> None:
    with pytest.raises(error) as caught:
        await secrets.put(database, keys, tenant.id, kind, name, value)
    assert caught.value.__cause__ is None
    assert (await secrets.list_(database, tenant.id)).total == 0


async def test_the_largest_fits(database: Database, tenant: Tenant, keys: FileKeys) -> None:
    value = os.urandom(65_536)
    await secrets.put(database, keys, tenant.id, "k", "n", value)
    assert await secrets.get(database, keys, tenant.id, "k", "n") == value


MOVES = {
    "another tenant": "UPDATE secrets s SET (nonce, sealed) = "
    "(SELECT nonce, sealed FROM secrets o WHERE o.tenant_id = %(other)s AND o.name = s.name AND o.kind = s.kind) "
    "WHERE tenant_id = %(tenant)s AND name = 'n'",
    "another tenant with its key": "WITH k AS (UPDATE data_keys d SET (nonce, wrapped) = "
    "(SELECT nonce, wrapped FROM data_keys o WHERE o.tenant_id = %(other)s) WHERE tenant_id = %(tenant)s) "
    "UPDATE secrets s SET (nonce, sealed) = "
    "(SELECT nonce, sealed FROM secrets o WHERE o.tenant_id = %(other)s AND o.name = s.name AND o.kind = s.kind) "
    "WHERE tenant_id = %(tenant)s AND name = 'n'",
    "another name": "UPDATE secrets s SET (nonce, sealed) = "
    "(SELECT nonce, sealed FROM secrets o WHERE o.tenant_id = s.tenant_id AND o.name = 'm' AND o.kind = 'k') "
    "WHERE tenant_id = %(tenant)s AND name = 'n'",
    "another kind": "UPDATE secrets s SET (nonce, sealed) = "
    "(SELECT nonce, sealed FROM secrets o WHERE o.tenant_id = s.tenant_id AND o.kind = 'other') "
    "WHERE tenant_id = %(tenant)s AND kind = 'k' AND name = 'n'",
    "another version": "UPDATE secrets SET version = 7 WHERE tenant_id = %(tenant)s AND name = 'n' AND kind = 'k'",
    "a flipped bit": "UPDATE secrets SET sealed = set_bit(sealed, 3, 1 - get_bit(sealed, 3)) "
    "WHERE tenant_id = %(tenant)s",
    "a flipped bit of the nonce": "UPDATE secrets SET nonce = set_bit(nonce, 3, 1 - get_bit(nonce, 3)) "
    "WHERE tenant_id = %(tenant)s",
    "a flipped bit of the key": "UPDATE data_keys SET wrapped = set_bit(wrapped, 3, 1 - get_bit(wrapped, 3)) "
    "WHERE tenant_id = %(tenant)s",
    "another version of the key": "WITH n AS (INSERT INTO data_keys SELECT tenant_id, 2, master_id, nonce, wrapped "
    "FROM data_keys WHERE tenant_id = %(tenant)s RETURNING 1) UPDATE secrets SET data_key = 2 "
    "WHERE tenant_id = %(tenant)s",
}


@pytest.mark.parametrize("move", MOVES)
async def test_an_envelope_in_the_wrong_place_does_not_open(
    database: Database, tenant: Tenant, other: Tenant, keys: FileKeys, admin: psycopg.AsyncConnection, move: str
) -> None:
    for whose in (tenant, other):
        for kind, name in (("k", "n"), ("k", "m"), ("other", "n")):
            await secrets.put(database, keys, whose.id, kind, name, VALUE)
    await admin.execute(MOVES[move], {"tenant": tenant.id, "other": other.id})
    with pytest.raises(SecretUnreadable) as caught:
        await secrets.get(database, keys, tenant.id, "k", "n")
    assert (caught.value.status, caught.value.code) == (503, "secret_unreadable")
    assert VALUE not in str(caught.value)
    assert await secrets.get(database, keys, other.id, "k", "n") == VALUE.encode()


async def test_a_lost_master_key(database: Database, tenant: Tenant, keys: FileKeys, tmp_path: Path) -> None:
    await secrets.put(database, keys, tenant.id, "k", "n", VALUE)
    fresh = FileKeys(tmp_path / "fresh.keys")
    lost, _ = keys.current()
    for attempt in (
        secrets.get(database, fresh, tenant.id, "k", "n"),
        secrets.put(database, fresh, tenant.id, "k", "n", "new"),
        secrets.rotate_tenant(database, fresh, tenant.id),
    ):
        with pytest.raises(SecretUnreadable, match=lost):
            await attempt
    assert await secrets.get(database, keys, tenant.id, "k", "n") == VALUE.encode()


@pytest.fixture
async def alone(admin: psycopg.AsyncConnection) -> None:
    """Other tests leave data keys whose master keys are gone."""
    await admin.execute("DELETE FROM secrets")
    await admin.execute("DELETE FROM data_keys")


@pytest.mark.usefixtures("alone")
async def test_the_master_key_is_rotated_while_nodes_run(
    database: Database, tenant: Tenant, other: Tenant, keys: FileKeys, tmp_path: Path
) -> None:
    await secrets.put(database, keys, other.id, "k", "n", VALUE)
    await secrets.put(database, keys, tenant.id, "k", "n", VALUE)
    running = FileKeys(tmp_path / "master.keys")
    assert await secrets.get(database, running, tenant.id, "k", "n") == VALUE.encode()
    old, _ = keys.current()
    new = keys.renew()
    assert keys.current()[0] == new != old
    await secrets.put(database, running, tenant.id, "k", "m", VALUE)
    assert await secrets.rotate_master(database, keys) == 2
    assert await secrets.rotate_master(database, keys) == 0
    async with database.system() as session:
        assert {row.master_id for row in await session.scalars(select(DataKey))} == {new}
    for node in (running, keys):
        for whose, name in ((tenant, "n"), (tenant, "m"), (other, "n")):
            assert await secrets.get(database, node, whose.id, "k", name) == VALUE.encode()
    line_ = (await lines_about(database, PLATFORM, "master_key"))[-1]
    assert (line_.resource_id, line_.details) == (new, {"count": 2})


@pytest.mark.usefixtures("alone")
async def test_rotation_goes_round_what_it_cannot_open(
    database: Database,
    new_tenant: Callable[[], Awaitable[Tenant]],
    keys: FileKeys,
    admin: psycopg.AsyncConnection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(secrets, "_BATCH", 2)
    whose = sorted([await new_tenant() for _ in range(5)], key=lambda tenant: tenant.id)
    for one in whose:
        await secrets.put(database, keys, one.id, "k", "n", VALUE)
    await admin.execute("UPDATE data_keys SET master_id = 'lost' WHERE tenant_id = %s", (whose[1].id,))
    new = keys.renew()
    with pytest.raises(SecretUnreadable, match=r"1 data keys could not be wrapped anew, 4 were.*'lost'"):
        await secrets.rotate_master(database, keys)
    async with database.system() as session:
        held = (await session.scalars(select(DataKey).order_by(DataKey.tenant_id))).all()
    assert [row.master_id for row in held] == [new, "lost", new, new, new]


@pytest.mark.usefixtures("alone")
async def test_rotation_leaves_out_no_key_that_a_writer_holds(
    database: Database, tenant: Tenant, keys: FileKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    await secrets.put(database, keys, tenant.id, "k", "n", VALUE)
    real, reached, go_on = audit.append, asyncio.Event(), asyncio.Event()

    async def slow(session: AsyncSession, *arguments: Any, **more: Any) -> None:
        if arguments[1] == "secret":
            await session.flush()
            reached.set()
            await go_on.wait()
        await real(session, *arguments, **more)

    monkeypatch.setattr(audit, "append", slow)
    new = keys.renew()
    writing = asyncio.create_task(secrets.put(database, keys, tenant.id, "k", "m", VALUE))
    await reached.wait()
    try:
        assert await secrets.rotate_master(database, keys) == 1
    finally:
        go_on.set()
        await writing
    async with database.system() as session:
        assert [row.master_id for row in await session.scalars(select(DataKey))] == [new]
    for name in ("n", "m"):
        assert await secrets.get(database, keys, tenant.id, "k", name) == VALUE.encode()


@pytest.mark.usefixtures("alone")
async def test_rotation_waits_for_who_holds_a_key_in_its_way(
    database: Database, tenant: Tenant, keys: FileKeys, admin: psycopg.AsyncConnection
) -> None:
    await secrets.put(database, keys, tenant.id, "k", "n", VALUE)
    new = keys.renew()
    async with admin.transaction():
        await admin.execute("SELECT FROM data_keys FOR UPDATE")
        rotating = asyncio.create_task(secrets.rotate_master(database, keys))
        await until_somebody_waits(database, rotating)
        assert not rotating.done()
    assert await rotating == 1
    async with database.system() as session:
        assert [row.master_id for row in await session.scalars(select(DataKey))] == [new]


async def until_somebody_waits(database: Database, for_whom: asyncio.Task[Any]) -> None:
    """Return when a transaction waits for another one, or there is nobody who could."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    while not for_whom.done():
        async with database.system() as session:
            if await session.scalar(text(waiting)):
                return
        await asyncio.sleep(0.01)


@pytest.mark.usefixtures("alone")
async def test_several_rotate_and_write_at_once(
    database: Database, new_tenant: Callable[[], Awaitable[Tenant]], keys: FileKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "_BATCH", 1)
    whose = [await new_tenant() for _ in range(4)]
    for one in whose:
        await secrets.put(database, keys, one.id, "k", "n", VALUE)
    new = keys.renew()
    done = await asyncio.gather(
        secrets.rotate_master(database, keys),
        secrets.rotate_master(database, keys),
        *(secrets.rotate_tenant(database, keys, one.id) for one in whose),
        *(secrets.put(database, keys, one.id, "k", "m", VALUE) for one in whose),
    )
    assert sum(done[:2]) <= 4
    async with database.system() as session:
        assert {row.master_id for row in await session.scalars(select(DataKey))} == {new}
    for one in whose:
        assert await secrets.get(database, keys, one.id, "k", "n") == VALUE.encode()
        assert await secrets.get(database, keys, one.id, "k", "m") == VALUE.encode()


async def test_a_tenants_data_key_is_rotated(database: Database, tenant: Tenant, keys: FileKeys) -> None:
    await secrets.put(database, keys, tenant.id, "k", "n", VALUE)
    await secrets.put(database, keys, tenant.id, "k", "m", VALUE)
    async with database.tenant(tenant.id) as session:
        before = {row.name: row.sealed for row in await session.scalars(select(Secret))}
    assert await secrets.rotate_tenant(database, keys, tenant.id) == 2
    async with database.tenant(tenant.id) as session:
        rows = (await session.scalars(select(Secret))).all()
        assert [row.version for row in await session.scalars(select(DataKey))] == [2]
    assert all(row.data_key == 2 and row.sealed != before[row.name] for row in rows)
    assert await secrets.get(database, keys, tenant.id, "k", "n") == VALUE.encode()
    assert [one.action for one in await lines_about(database, tenant.id, "data_key")] == ["update"]


async def test_a_rotation_that_fails_changes_nothing(
    database: Database, tenant: Tenant, keys: FileKeys, admin: psycopg.AsyncConnection
) -> None:
    await secrets.put(database, keys, tenant.id, "k", "n", VALUE)
    await secrets.put(database, keys, tenant.id, "k", "z", VALUE)
    await admin.execute("UPDATE secrets SET version = 9 WHERE tenant_id = %s AND name = 'z'", (tenant.id,))
    with pytest.raises(SecretUnreadable, match="'z'"):
        await secrets.rotate_tenant(database, keys, tenant.id)
    assert await secrets.get(database, keys, tenant.id, "k", "n") == VALUE.encode()


async def test_several_first_secrets_at_once(database: Database, tenant: Tenant, keys: FileKeys) -> None:
    await asyncio.gather(*(secrets.put(database, keys, tenant.id, "k", f"n{n}", VALUE) for n in range(8)))
    assert await asyncio.gather(*(secrets.put(database, keys, tenant.id, "k", "n", VALUE) for _ in range(5))) != [1] * 5
    for n in range(8):
        assert await secrets.get(database, keys, tenant.id, "k", f"n{n}") == VALUE.encode()


async def test_requests_cannot_move_envelopes(database: Database, tenant: Tenant, keys: FileKeys) -> None:
    await secrets.put(database, keys, tenant.id, "k", "n", VALUE)
    for change in (
        "secrets SET name = 'm'",
        "secrets SET version = 2",
        "data_keys SET version = 2",
    ):
        with pytest.raises(Exception, match="permission denied"):
            async with database.tenant(tenant.id) as session:
                await session.execute(text(f"UPDATE {change}"))


def test_the_file_is_made_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "master.keys"
    keys = FileKeys(path)
    key_id, key = keys.current()
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(key) == 32
    assert FileKeys(path).get(key_id) == key
    assert base64.b64encode(key).decode() not in repr(keys)
    assert [name.name for name in path.parent.iterdir()] == ["master.keys"]


def test_several_processes_make_one_file(tmp_path: Path) -> None:
    path = tmp_path / "master.keys"
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: FileKeys(path).current(), range(16)))
    assert len(found) == 1


def test_a_new_key_goes_on_top(keys: FileKeys, tmp_path: Path) -> None:
    old = keys.current()
    new = keys.renew()
    assert keys.current()[0] == new
    assert keys.get(old[0]) == old[1]
    assert (tmp_path / "master.keys").stat().st_mode & 0o777 == 0o600


def test_of_several_renewals_at_once_none_loses_a_key(tmp_path: Path) -> None:
    path = tmp_path / "master.keys"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: FileKeys(path).renew(), range(32)))
    keys = FileKeys(path)
    assert [len(keys.get(key_id)) for key_id in made] == [32] * 32


def test_a_renewal_is_on_disk_by_its_name(keys: FileKeys, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = os.fsync, list[bool]()

    def fsync(handle: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    keys.current()
    assert synced == [False, True]
    keys.renew()
    assert synced == [False, True, False, True]


def test_a_renewal_that_fails_leaves_no_key_about(
    keys: FileKeys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys.current()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable):
        keys.renew()
    assert {each.name for each in tmp_path.iterdir()} == {"master.keys", "master.keys.lock"}
    assert keys.current() == before


def test_a_file_others_can_read_is_refused(keys: FileKeys, tmp_path: Path) -> None:
    keys.current()
    (tmp_path / "master.keys").chmod(0o640)
    with pytest.raises(Unavailable, match="chmod 600") as caught:
        FileKeys(tmp_path / "master.keys").current()
    assert caught.value.code == "master_keys_exposed"


@pytest.mark.parametrize("content", ["", "# nothing\n", "a:AAAA\n", "no colon\n", "\udcff", "a b:" + "A" * 43 + "=\n"])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    path = tmp_path / "master.keys"
    path.touch(mode=0o600)
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(AvbError) as caught:
        FileKeys(path).current()
    assert caught.value.code == "master_keys_unusable"
    assert "AAAA" not in caught.value.message


def test_no_place_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable) as caught:
        FileKeys(tmp_path / "file" / "master.keys").current()
    assert caught.value.code == "master_keys_unusable"


def test_keys_of_the_environment() -> None:
    new, old = os.urandom(32), os.urandom(32)
    keys = EnvironmentKeys(f"{line('new', new)},{line('old', old)}")
    assert keys.current() == ("new", new)
    assert keys.get("old") == old
    assert repr(keys) == "EnvironmentKeys(new, old)"
    with pytest.raises(SecretUnreadable, match="older"):
        keys.get("older")


@pytest.mark.parametrize("text", ["", "nonsense", line("a") + "," + line("a"), line("a", b"short")])
def test_an_environment_that_cannot_be_read(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        EnvironmentKeys(text)
    assert "nonsense" not in caught.value.message
