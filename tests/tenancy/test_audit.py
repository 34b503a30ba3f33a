"""The audit log keeps every line as it was written, and says which one somebody has touched."""

from __future__ import annotations

import asyncio
import csv
import gzip
import hashlib
import io
import json
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text

from agentvoicebox.config.errors import BadInput, Conflict, Forbidden, NotFound, Unavailable
from agentvoicebox.tenancy import audit, roles
from agentvoicebox.tenancy.audit import PLATFORM, Action, Actor, ActorType, redaction
from agentvoicebox.tenancy.audit import reading as audit_reading
from agentvoicebox.tenancy.audit.lines import _Throttle
from agentvoicebox.tenancy.audit.reading import Filter
from agentvoicebox.tenancy.database import Address, Database, NoTenant
from agentvoicebox.tenancy.models import AuditEntry, AuditHead, Project, Tenant

Chain = Callable[[int], Awaitable[uuid.UUID]]
FAST = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def chain(database: Database) -> Chain:
    """Chains of so many lines, of tenants that have no others."""

    async def make(lines: int) -> uuid.UUID:
        tenant_id = uuid.uuid4()
        for n in range(lines):
            async with database.tenant(tenant_id) as session:
                await audit.append(session, Action.UPDATE, "project", n, f"change {n}", new={"n": n}, details={"n": n})
        return tenant_id

    return make


@pytest.fixture
async def vandal(admin: psycopg.AsyncConnection) -> psycopg.AsyncConnection:
    """A superuser who has switched the triggers off."""
    await admin.execute("SET session_replication_role = replica")
    return admin


async def lines_of(database: Database, tenant_id: uuid.UUID) -> list[AuditEntry]:
    async with database.system() as session:
        found = await session.scalars(
            select(AuditEntry).where(AuditEntry.tenant_id == tenant_id).order_by(AuditEntry.seq)
        )
        return list(found)


async def run(connection: psycopg.AsyncConnection, statement: str, **values: Any) -> None:
    await connection.execute(statement, values)


async def make_project(database: Database, tenant: Tenant, error: Exception | None = None) -> None:
    async with database.tenant(tenant.id) as session:
        session.add(Project(id=uuid.uuid4(), name="Not made", environment="development"))
        await audit.append(session, Action.CREATE, "project")
        if error is not None:
            raise error


# Writing


async def test_a_line_tells_who_did_what(database: Database) -> None:
    tenant_id, who = uuid.uuid4(), uuid.uuid4()
    someone = Actor(ActorType.API_KEY, who, "a@example.com", "192.0.2.7", "curl/8", "req-1")
    with audit.acting(someone):
        async with database.tenant(tenant_id) as session:
            await audit.append(
                session,
                Action.UPDATE,
                "project",
                who,
                "renamed",
                old={"name": "a"},
                new={"name": "b"},
                details={"n": 1},
            )
    (line,) = await lines_of(database, tenant_id)
    assert (line.actor_type, line.actor_id, line.actor_email) == ("api_key", who, "a@example.com")
    assert (str(line.ip_address), line.user_agent, line.request_id) == ("192.0.2.7", "curl/8", "req-1")
    assert (line.action, line.resource_type, line.resource_id) == ("update", "project", str(who))
    assert (line.description, line.old_values, line.new_values) == ("renamed", {"name": "a"}, {"name": "b"})
    assert (line.seq, line.details, line.prev) == (1, {"n": 1}, b"\0")


async def test_the_actor_belongs_to_its_task() -> None:
    async def who(actor: Actor) -> Actor:
        with audit.acting(actor):
            await asyncio.sleep(0)
            return audit.actor()

    actors = [Actor(ActorType.USER, uuid.uuid4()) for _ in range(5)]
    assert await asyncio.gather(*map(who, actors)) == actors
    assert audit.actor() == Actor(ActorType.SYSTEM, None)


async def test_the_line_stands_exactly_when_the_change_does(database: Database, tenant: Tenant) -> None:
    before = len(await lines_of(database, tenant.id))
    with pytest.raises(RuntimeError, match="after all"):
        await make_project(database, tenant, RuntimeError("after all"))
    assert len(await lines_of(database, tenant.id)) == before
    assert (await audit.verify(database, tenant.id)).broken == ()


async def test_a_line_that_cannot_be_stored_takes_the_change_with_it(
    database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
) -> None:
    name = f"audit_log_{datetime.now(UTC):%Y_%m}"
    await admin.execute(f"ALTER TABLE audit_log DETACH PARTITION {name}")
    try:
        with pytest.raises(Unavailable) as caught:
            await make_project(database, tenant)
    finally:
        begin = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        end = (begin + timedelta(days=32)).replace(day=1)
        await admin.execute(f"ALTER TABLE audit_log ATTACH PARTITION {name} FOR VALUES FROM ('{begin}') TO ('{end}')")
    assert caught.value.code == "audit_unavailable"
    async with database.tenant(tenant.id) as session:
        assert "Not made" not in [project.name for project in await session.scalars(select(Project))]


async def test_the_chain_is_that_of_the_transaction(database: Database, tenant: Tenant, other: Tenant) -> None:
    async with database.tenant(tenant.id) as session:
        with pytest.raises(Forbidden):
            await audit.append(session, Action.CREATE, "project", tenant_id=other.id)
    async with database.system() as session:
        with pytest.raises(NoTenant):
            await audit.append(session, Action.CREATE, "project")
        await audit.append(session, Action.CREATE, "project", "of the platform", tenant_id=PLATFORM)
        await audit.append(session, Action.CREATE, "project", "of the tenant", tenant_id=tenant.id)
    assert (await lines_of(database, PLATFORM))[-1].resource_id == "of the platform"
    assert (await lines_of(database, tenant.id))[-1].resource_id == "of the tenant"


async def test_concurrent_writers_make_one_chain(database: Database) -> None:
    tenant_id = uuid.uuid4()

    async def write(n: int) -> None:
        async with database.tenant(tenant_id) as session:
            await audit.append(session, Action.UPDATE, "project", n)

    await asyncio.gather(*map(write, range(40)))
    assert [line.seq for line in await lines_of(database, tenant_id)] == list(range(1, 41))
    assert (await audit.verify(database, tenant_id)) == audit.Verdict(40, 1, ())


@pytest.mark.parametrize("ip", ["", "unknown", "1.2.3.4, 5.6.7.8", "999.1.1.1", "\0"])
async def test_no_change_fails_for_who_made_it(database: Database, ip: str) -> None:
    tenant_id = uuid.uuid4()
    ugly = "Mozilla \0 \ud800 \n" + "x" * 10_000
    with audit.acting(Actor(ActorType.USER, None, ugly, ip, ugly, ugly)):
        async with database.tenant(tenant_id) as session:
            await audit.append(session, Action.LOGIN, ugly, ugly, ugly, new={ugly: ugly})
    (line,) = await lines_of(database, tenant_id)
    assert line.ip_address is None
    assert (len(line.user_agent), len(line.actor_email), len(line.request_id)) == (500, 320, 100)
    assert (line.user_agent[:7], line.user_agent[-1]) == ("Mozilla", "…")
    assert "\n" not in line.description
    assert (len(line.resource_type), len(line.resource_id)) == (50, 255)


async def test_an_address_with_a_zone(database: Database) -> None:
    tenant_id = uuid.uuid4()
    with audit.acting(Actor(ActorType.USER, None, ip="fe80::1%eth0")):
        async with database.tenant(tenant_id) as session:
            await audit.append(session, Action.LOGIN, "user")
    assert str((await lines_of(database, tenant_id))[0].ip_address) == "fe80::1"


# What may stand in it


@pytest.mark.parametrize(
    "name",
    [
        *("key", "api_key", "apiKey", "API-Key", "apikey", "secret", "client_secret", "webhookSecret", "password"),
        *("new_password", "token", "access_token", "refreshToken", "authorization", "Authorization", "key_hash"),
        *("credential", "credentials", "private_key", "cookie", "Set-Cookie", "passphrase", "otp", "pin"),
    ],
)
def test_what_its_name_says_is_secret_is_not_written(name: str) -> None:
    assert redaction.values({"a": [{name: "hunter2"}]}) == {"a": [{name: "[redacted]"}]}
    assert redaction.values({name: {"deep": ["hunter2"]}}) == {name: "[redacted]"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("key_id", "x"), ("key_prefix", "avb_12345678"), ("max_api_keys", 5), ("input_tokens", 17)],
        *[("token_type", "bearer"), ("monkey", "x"), ("keyboard", "x"), ("author", "x"), ("secret", None)],
        *[("require_password", True), ("name", "x")],
    ],
)
def test_what_is_no_secret_is_written(name: str, value: object) -> None:
    assert redaction.values({name: value}) == {name: value}


def test_a_number_can_be_a_secret() -> None:
    assert redaction.values({"pin": 1234, "password": 5}) == {"pin": "[redacted]", "password": "[redacted]"}


@pytest.mark.parametrize(
    "secret",
    [
        "avb_" + "A1b-_" * 8,
        "sk-proj-abcdefghijklmnopqrst",
        "Bearer abc.def.ghi-jkl",
        "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.c2ln",
        "postgresql://someone:hunter2xyz@db/name",
        "-----BEGIN PRIVATE KEY-----\nMIIB\n-----END PRIVATE KEY-----",
    ],
)
def test_what_looks_like_a_secret_is_not_written_under_any_name(secret: str) -> None:
    assert "[redacted]" in redaction.line(f"GET /x?y={secret} done", 500)
    written = json.dumps(redaction.values({"note": f"see {secret} there", "list": [secret]}))
    assert written.count("[redacted]") == 2
    assert secret[-12:] not in written or "hunter2xyz" in secret
    assert "hunter2xyz" not in written


def test_a_secret_across_the_end_is_not_written_in_part() -> None:
    text = "x" * 980 + "avb_" + "s3cr3t" * 8
    assert "s3cr3t" not in json.dumps(redaction.values({"note": text}))
    assert "s3cr3t" not in redaction.line(text, 1_000)


def test_what_is_cut_is_marked() -> None:
    found = redaction.values(
        {"long": "x" * 5_000, "many": list(range(500)), "deep": _deep(50), "all": {f"k{n}": n for n in range(500)}}
    )
    assert found is not None
    assert found["long"] == "x" * 1_000 + "… of 5000 characters"
    assert found["many"][-1] == "… 400 more"
    assert found["all"]["…"] == "400 more"
    assert "…" in json.dumps(found["deep"], ensure_ascii=False)


def _deep(levels: int) -> dict[str, Any]:
    return {"a": _deep(levels - 1)} if levels else {}


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.uuids() | st.datetimes(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=30,
)


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text(), ANY))
def test_everything_can_be_written_down(record: dict[str, Any]) -> None:
    found = json.dumps(redaction.values(record), allow_nan=False, ensure_ascii=False)
    found.encode()
    assert "\\u0000" not in found
    assert len(found) < 120_000


@given(st.integers(1, 400), st.integers(1, 400), st.text(max_size=50))
def test_no_record_is_large(width: int, height: int, text: str) -> None:
    found = redaction.values({f"{text}{n}": [text * 100] * height for n in range(width)})
    assert len(json.dumps(found, ensure_ascii=False)) < 110_000


# Denials


async def test_denials_are_lines_too(database: Database, tenant: Tenant) -> None:
    who = Actor(ActorType.API_KEY, uuid.uuid4())
    with audit.acting(who):
        await audit.denied(database, tenant.id, Action.DELETE, "project", "p1", "DELETE /x", "permission_denied", 403)
    line = (await lines_of(database, tenant.id))[-1]
    assert (line.actor_id, line.action, line.resource_id) == (who.id, "delete", "p1")
    assert line.details == {"denied": True, "code": "permission_denied", "status": 403}


async def test_denials_of_nobody_known_are_the_platforms(database: Database) -> None:
    with audit.acting(Actor(ActorType.USER, None, ip="192.0.2.99")):
        await audit.denied(database, None, Action.LOGIN, "session", "", "no such key", "invalid_api_key", 401)
    line = (await lines_of(database, PLATFORM))[-1]
    assert (str(line.ip_address), line.details["code"]) == ("192.0.2.99", "invalid_api_key")


async def test_a_flood_of_denials_writes_few_lines(database: Database) -> None:
    tenant_id = uuid.uuid4()
    with audit.acting(Actor(ActorType.USER, None, ip="192.0.2.98")):
        for _ in range(50):
            await audit.denied(database, tenant_id, Action.LOGIN, "session", "", "no", "invalid_api_key", 401)
    assert len(await lines_of(database, tenant_id)) == 5


def test_what_went_unwritten_is_told() -> None:
    throttle = _Throttle(each=2, all_=3, remembered=2)
    assert [throttle.admit("a", 0.0) for _ in range(4)] == [0, 0, None, None]
    assert [throttle.admit("b", 1.0) for _ in range(2)] == [0, None], "three a minute of all"
    assert throttle.admit("a", 61.0) == 2
    assert throttle.admit("a", 62.0) == 0
    assert throttle.admit("b", 62.0) == 1
    assert throttle.admit("c", 130.0) == 0
    assert len(throttle._kinds) == 2


# Immutability


STATEMENTS = [
    "UPDATE audit_log SET description = 'x'",
    "UPDATE audit_log SET seq = seq + 1",
    "UPDATE audit_log SET at = at - interval '1 year'",
    "DELETE FROM audit_log",
    "TRUNCATE audit_log",
    "TRUNCATE audit_log_{month}",
    "UPDATE audit_log_{month} SET description = 'x'",
    "DELETE FROM audit_log_{month}",
    "UPDATE audit_heads SET seq = seq - 1",
    "UPDATE audit_heads SET hash = '\\x01'",
    "DELETE FROM audit_heads",
    "TRUNCATE audit_heads",
    "INSERT INTO audit_heads VALUES (gen_random_uuid(), 0, '\\x00')",
    "MERGE INTO audit_log l USING (SELECT 1) s ON l.tenant_id = '{tenant}' WHEN MATCHED THEN DELETE",
    "WITH gone AS (DELETE FROM audit_log RETURNING 1) SELECT count(*) FROM gone",
]


@settings(parent=FAST, max_examples=60)
@given(
    role=st.sampled_from([*roles.ALL, roles.ADMIN]),
    statement=st.sampled_from(STATEMENTS),
    bound=st.booleans(),
    where=st.sampled_from(["", " WHERE true", " WHERE tenant_id = '{tenant}'"]),
)
def test_p16_audit_immutability(
    role: str, statement: str, bound: bool, where: str, address: Address, written: tuple[uuid.UUID, str]
) -> None:
    """P16: whoever tries to change or remove a line is refused, and every line stays as it was."""
    tenant_id, whole = written
    if statement.startswith(("UPDATE", "DELETE FROM")):
        statement += where
    statement = statement.format(tenant=tenant_id, month=f"{datetime.now(UTC):%Y_%m}")
    with psycopg.connect(address(roles.ADMIN)) as connection:
        connection.execute(f"SET ROLE {role}")
        if bound:
            connection.execute("SELECT set_config('app.tenant_id', %s, false)", (str(tenant_id),))
        with pytest.raises(psycopg.Error) as caught:
            connection.execute(statement)
        assert caught.value.sqlstate in ("42501", "AV004", "AV001"), statement
    assert fingerprint(address, tenant_id) == whole


@pytest.fixture(scope="module")
async def written(database: Database, address: Address) -> tuple[uuid.UUID, str]:
    """A chain of three lines and what is in it."""
    tenant_id = uuid.uuid4()
    for n in range(3):
        async with database.tenant(tenant_id) as session:
            await audit.append(session, Action.CREATE, "project", n)
    return tenant_id, fingerprint(address, tenant_id)


def fingerprint(address: Address, tenant_id: uuid.UUID) -> str:
    """All that is stored of a chain."""
    with psycopg.connect(address(roles.ADMIN)) as connection:
        lines = connection.execute("SELECT l::text FROM audit_log l WHERE tenant_id = %s ORDER BY seq", (tenant_id,))
        head = connection.execute("SELECT h::text FROM audit_heads h WHERE tenant_id = %s", (tenant_id,))
        return repr((lines.fetchall(), head.fetchall()))


@pytest.mark.parametrize("role", [roles.APP, roles.SYSTEM])
@pytest.mark.parametrize(
    ("column", "value"),
    [("seq", "9"), ("at", "'2020-01-01'"), ("prev", "'x'"), ("hash", "'x'"), ("id", "gen_random_uuid()")],
)
def test_nobody_forges_the_place_of_a_line(address: Address, role: str, column: str, value: str) -> None:
    tenant_id = uuid.uuid4()
    with psycopg.connect(address(role)) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, false)", (str(tenant_id),))
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(
                f"INSERT INTO audit_log (tenant_id, action, resource_type, {column}) "
                f"VALUES ('{tenant_id}', 'create', 'x', {value})"
            )


def test_nobody_writes_on_another_tenants_chain(address: Address, written: tuple[uuid.UUID, str]) -> None:
    tenant_id, whole = written
    with psycopg.connect(address(roles.APP)) as connection:
        connection.execute("SELECT set_config('app.tenant_id', %s, false)", (str(uuid.uuid4()),))
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
            connection.execute(
                "INSERT INTO audit_log (tenant_id, action, resource_type) VALUES (%s, 'create', 'x')", (tenant_id,)
            )
    assert fingerprint(address, tenant_id) == whole


@pytest.mark.parametrize("role", [role for role in roles.ALL if role != roles.OWNER])
@pytest.mark.parametrize(
    "call", ["audit_archive(now(), 0, '')", "audit_months(1)", "audit_hash(NULL)", "audit_chain()"]
)
def test_who_may_call_what(address: Address, role: str, call: str) -> None:
    may = {
        "audit_archive(now(), 0, '')": {roles.KEEPER},
        "audit_months(1)": {roles.SYSTEM, roles.KEEPER},
        "audit_hash(NULL)": {roles.APP, roles.SYSTEM},
        "audit_chain()": set(),
    }[call]
    with psycopg.connect(address(role), autocommit=True) as connection:
        state = ""
        try:
            connection.execute(f"SELECT {call}")
        except psycopg.Error as error:
            state = error.sqlstate or ""
    assert (state != "42501") == (role in may), state


async def test_functions_with_the_owners_rights_look_nowhere_else(admin: psycopg.AsyncConnection) -> None:
    found = await admin.execute("SELECT proname, proconfig FROM pg_proc WHERE prosecdef AND proname LIKE 'audit%%'")
    functions = dict(await found.fetchall())
    assert set(functions) == {"audit_archive", "audit_chain", "audit_months"}
    assert all("search_path=pg_catalog, pg_temp" in config for config in functions.values())


async def test_a_look_alike_is_not_taken_for_one_of_ours(database: Database, address: Address) -> None:
    tenant_id = uuid.uuid4()
    with psycopg.connect(address(roles.ADMIN)) as connection:
        connection.execute("SET search_path = pg_temp, public")
        connection.execute("CREATE TEMPORARY TABLE audit_heads (tenant_id uuid PRIMARY KEY, seq bigint, hash bytea)")
        connection.execute("INSERT INTO pg_temp.audit_heads VALUES (%s, 99, 'x')", (tenant_id,))
        connection.execute(
            "INSERT INTO public.audit_log (tenant_id, action, resource_type) VALUES (%s, 'create', 'x')", (tenant_id,)
        )
    assert [line.seq for line in await lines_of(database, tenant_id)] == [1]


async def test_time_is_the_transactions_and_may_go_back(
    database: Database, chain: Chain, vandal: psycopg.AsyncConnection
) -> None:
    async with database.tenant(tenant_id := uuid.uuid4()) as session:
        begun = await session.scalar(text("SELECT now()"))
        await audit.append(session, Action.CREATE, "project")
        await audit.append(session, Action.CREATE, "project")
    assert [line.at for line in await lines_of(database, tenant_id)] == [begun, begun]
    await vandal.execute("SET session_replication_role = origin")
    for at in ("now() + interval '40 days'", "now()", "now() - interval '20 days'", "now() + interval '1 day'"):
        await vandal.execute(
            f"INSERT INTO audit_log (tenant_id, at, action, resource_type) VALUES (%s, {at}, 'create', 'x')",
            (tenant_id,),
        )
    assert await audit.verify(database, tenant_id) == audit.Verdict(6, 1, ())


# Verification


async def test_a_chain_that_nobody_touched_is_whole(database: Database, chain: Chain) -> None:
    for lines in (0, 1, 5):
        tenant_id = await chain(lines)
        assert await audit.verify(database, tenant_id) == audit.Verdict(lines, min(lines, 1), ())


EDITS = [
    "description = 'x'",
    "actor_id = gen_random_uuid()",
    "actor_email = 'x'",
    "ip_address = '192.0.2.1'",
    "user_agent = 'x'",
    "action = 'login'",
    "resource_type = 'x'",
    "resource_id = 'x'",
    "old_values = 'null'",
    "new_values = NULL",
    "metadata = '{\"n\": 77}'",
    "request_id = 'x'",
    "id = gen_random_uuid()",
    "at = at + interval '1 microsecond'",
    "hash = '\\x00'",
    "prev = '\\x77'",
]
REHASH = "UPDATE audit_log l SET hash = audit_hash(l) WHERE tenant_id = %(tenant)s AND seq = %(seq)s"


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("seq", [1, 3, 5])
async def test_an_edited_line_is_named(
    database: Database, chain: Chain, vandal: psycopg.AsyncConnection, edit: str, seq: int
) -> None:
    tenant_id, other = await chain(5), await chain(2)
    await run(
        vandal, f"UPDATE audit_log SET {edit} WHERE tenant_id = %(tenant)s AND seq = %(seq)s", tenant=tenant_id, seq=seq
    )
    (broken,) = (await audit.verify(database, tenant_id)).broken
    assert (broken.tenant_id, broken.seq) == (tenant_id, seq)
    assert broken.at == (await lines_of(database, tenant_id))[seq - 1].at
    assert (await audit.verify(database, other)).broken == ()


@pytest.mark.parametrize("edit", ["description = 'x'", "prev = '\\x77'"])
@pytest.mark.parametrize("seq", [1, 2, 4, 5])
async def test_a_line_edited_with_its_hash_is_named(
    database: Database, chain: Chain, vandal: psycopg.AsyncConnection, edit: str, seq: int
) -> None:
    tenant_id = await chain(5)
    await run(
        vandal, f"UPDATE audit_log SET {edit} WHERE tenant_id = %(tenant)s AND seq = %(seq)s", tenant=tenant_id, seq=seq
    )
    await run(vandal, REHASH, tenant=tenant_id, seq=seq)
    (broken,) = (await audit.verify(database, tenant_id)).broken
    assert (broken.seq, broken.what) == (seq, "was replaced: the next line continues another one")


@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 3), (3, 3), (2, 4), (5, 5), (4, 5), (1, 5)])
async def test_lines_that_are_gone_are_named(
    database: Database, chain: Chain, vandal: psycopg.AsyncConnection, first: int, last: int
) -> None:
    tenant_id = await chain(5)
    await run(
        vandal,
        "DELETE FROM audit_log WHERE tenant_id = %(tenant)s AND seq BETWEEN %(first)s AND %(last)s",
        tenant=tenant_id,
        first=first,
        last=last,
    )
    (broken,) = (await audit.verify(database, tenant_id)).broken
    what = "is missing" if first == last else f"and all up to {last} are missing"
    assert broken == (tenant_id, first, None, what)


@pytest.mark.parametrize("shift", ["1 hour", "-1 hour"])
@pytest.mark.parametrize("seq", [0, 1, 3, 5, 6, 9])
@pytest.mark.parametrize("rehash", [False, True])
async def test_a_line_put_in_is_named(
    database: Database, chain: Chain, vandal: psycopg.AsyncConnection, seq: int, rehash: bool, shift: str
) -> None:
    tenant_id = await chain(5)
    await run(
        vandal,
        "INSERT INTO audit_log (tenant_id, seq, at, action, resource_type, prev, hash) SELECT %(tenant)s, %(seq)s, "
        "now() + %(shift)s::interval, 'create', 'forged', coalesce((SELECT prev FROM audit_log WHERE tenant_id = "
        "%(tenant)s AND seq = %(seq)s), (SELECT hash FROM audit_heads WHERE tenant_id = %(tenant)s)), 'x'",
        tenant=tenant_id,
        seq=seq,
        shift=shift,
    )
    if rehash:
        await run(vandal, REHASH + " AND resource_type = 'forged'", tenant=tenant_id, seq=seq)
    (broken,) = (await audit.verify(database, tenant_id)).broken
    forged = next(line for line in await lines_of(database, tenant_id) if line.resource_type == "forged")
    assert (broken.seq, broken.at, broken.what) == (seq, forged.at, "was put in afterwards")


@pytest.mark.parametrize(("one", "two"), [(1, 2), (2, 4), (1, 5), (4, 5)])
async def test_lines_that_changed_places_are_named(
    database: Database, chain: Chain, vandal: psycopg.AsyncConnection, one: int, two: int
) -> None:
    tenant_id = await chain(5)
    await run(
        vandal,
        "UPDATE audit_log l SET (description, metadata, id) = (SELECT description, metadata, id "
        "FROM audit_log o WHERE o.tenant_id = l.tenant_id AND o.seq = %(one)s + %(two)s - l.seq) "
        "WHERE tenant_id = %(tenant)s AND seq IN (%(one)s, %(two)s)",
        tenant=tenant_id,
        one=one,
        two=two,
    )
    (broken,) = (await audit.verify(database, tenant_id)).broken
    assert broken.seq == one


async def test_a_chain_without_its_head(database: Database, chain: Chain, vandal: psycopg.AsyncConnection) -> None:
    tenant_id = await chain(3)
    await run(vandal, "DELETE FROM audit_heads WHERE tenant_id = %(tenant)s", tenant=tenant_id)
    (broken,) = (await audit.verify(database, tenant_id)).broken
    assert (broken.seq, broken.what) == (3, "is the last, but there is no record that it should be")


async def test_all_chains_are_looked_at(
    database: Database, chain: Chain, vandal: psycopg.AsyncConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentvoicebox.tenancy.audit.chain._BATCH", 4)
    bad = sorted([await chain(3), await chain(2)])
    whole = await chain(3)
    for tenant_id in bad:
        await run(vandal, "UPDATE audit_log SET description = 'x' WHERE tenant_id = %(t)s AND seq = 2", t=tenant_id)
    await run(vandal, "DELETE FROM audit_heads WHERE tenant_id = %(t)s", t=bad[0])
    told: list[tuple[int, int]] = []
    verdict = await audit.verify(database, tell=lambda rows, tenants: told.append((rows, tenants)))
    named = [broken for broken in verdict.broken if broken.tenant_id in (*bad, whole)]
    assert [(broken.tenant_id, broken.seq) for broken in named] == [(one, 2) for one in bad]
    assert len(told) > 2
    assert told[-1] == (verdict.rows, verdict.tenants)
    async with database.system() as session:
        assert verdict.rows == await session.scalar(text("SELECT count(*) FROM audit_log"))


TAMPERING = {
    "edit": "UPDATE audit_log SET description = 'x' WHERE tenant_id = %(tenant)s AND seq = %(seq)s",
    "rewrite": "UPDATE audit_log l SET description = 'x', hash = (SELECT audit_hash(n) FROM audit_log n "
    "WHERE n.tenant_id = l.tenant_id AND n.seq = l.seq AND n.at = l.at) WHERE tenant_id = %(tenant)s AND seq = %(seq)s",
    "delete": "DELETE FROM audit_log WHERE tenant_id = %(tenant)s AND seq = %(seq)s",
    "cut the end": "DELETE FROM audit_log WHERE tenant_id = %(tenant)s AND seq >= %(seq)s",
    "cut the front": "DELETE FROM audit_log WHERE tenant_id = %(tenant)s AND seq <= %(seq)s",
    "double": "INSERT INTO audit_log (tenant_id, seq, at, action, resource_type, prev, hash) SELECT tenant_id, seq, "
    "at + (1 + random() * 3600) * interval '1 s', action, 'forged', prev, hash FROM audit_log "
    "WHERE tenant_id = %(tenant)s AND seq = %(seq)s",
}


@settings(parent=FAST, max_examples=60)
@given(
    lines=st.integers(1, 8),
    acts=st.lists(st.tuples(st.sampled_from(sorted(TAMPERING)), st.integers(1, 8)), max_size=4),
)
def test_whatever_is_done_to_a_chain_is_noticed_and_placed(
    lines: int, acts: list[tuple[str, int]], address: Address
) -> None:
    """The first bad line that is named is one that was touched, and none is named where nothing was."""
    tenant_id = uuid.uuid4()
    with psycopg.connect(address(roles.ADMIN)) as connection:
        connection.execute(
            "INSERT INTO audit_log (tenant_id, action, resource_type, description) "
            "SELECT %s, 'create', 'x', n FROM generate_series(1, %s) n",
            (tenant_id, lines),
        )
        connection.execute("SET session_replication_role = replica")
        touched: set[int] = set()
        for act, seq in acts:
            values = {"tenant": tenant_id, "seq": seq}
            before = _state(connection, tenant_id)
            connection.execute(TAMPERING[act], values)
            after = _state(connection, tenant_id)
            touched |= {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
        row = connection.execute("SELECT seq FROM audit_verify(%s, %s)", (tenant_id, tenant_id)).fetchone()
        assert row is not None
        assert (row[0] in touched) if touched else row[0] is None, (row, touched)


def _state(connection: psycopg.Connection, tenant_id: uuid.UUID) -> dict[int, str]:
    rows = connection.execute(
        "SELECT seq, string_agg(l::text, '|' ORDER BY at) FROM audit_log l WHERE tenant_id = %s GROUP BY seq",
        (tenant_id,),
    )
    return dict(rows.fetchall())


async def test_a_chain_written_anew_is_found_by_its_anchor(
    database: Database, chain: Chain, vandal: psycopg.AsyncConnection
) -> None:
    rewritten, cut, lost, whole = [await chain(3) for _ in range(4)]
    anchors = json.loads(json.dumps(await audit.heads(database)))
    anchors = {str(one): anchors[str(one)] for one in (rewritten, cut, lost, whole)}
    assert anchors[str(whole)]["seq"] == 3
    for tenant_id in (rewritten, whole):
        async with database.tenant(tenant_id) as session:
            await audit.append(session, Action.CREATE, "project", "later")
    assert await audit.against(database, anchors) == ()

    for seq in range(2, 5):
        if seq == 2:
            await run(vandal, "UPDATE audit_log SET description = 'x' WHERE tenant_id = %(t)s AND seq = 2", t=rewritten)
        else:
            await run(
                vandal,
                "UPDATE audit_log l SET prev = p.hash FROM audit_log p WHERE l.tenant_id = %(t)s AND l.seq = %(seq)s "
                "AND p.tenant_id = l.tenant_id AND p.seq = l.seq - 1",
                t=rewritten,
                seq=seq,
            )
        await run(vandal, REHASH, tenant=rewritten, seq=seq)
    newest = "(SELECT hash FROM audit_log l WHERE l.tenant_id = h.tenant_id AND l.seq = h.seq)"
    await run(vandal, f"UPDATE audit_heads h SET hash = {newest} WHERE tenant_id = %(t)s", t=rewritten)
    await run(vandal, "DELETE FROM audit_log WHERE tenant_id = %(t)s AND seq = 3", t=cut)
    await run(vandal, "UPDATE audit_heads h SET seq = 2 WHERE tenant_id = %(t)s", t=cut)
    await run(vandal, f"UPDATE audit_heads h SET hash = {newest} WHERE tenant_id = %(t)s", t=cut)
    for table in ("audit_log", "audit_heads"):
        await run(vandal, f"DELETE FROM {table} WHERE tenant_id = %(t)s", t=lost)

    for tenant_id in (rewritten, cut, lost, whole):
        assert (await audit.verify(database, tenant_id)).broken == ()
    gone = "is missing, though it was anchored"
    assert await audit.against(database, anchors) == tuple(
        sorted(
            [
                (rewritten, 3, None, "is not the one that was anchored: the chain up to it was rewritten"),
                (cut, 3, None, gone),
                (lost, 3, None, gone),
            ]
        )
    )


@pytest.mark.parametrize(
    "anchors",
    [{"x": {"seq": 1, "hash": ""}}, {str(PLATFORM): {}}, {str(PLATFORM): 3}, {str(PLATFORM): {"seq": 1, "hash": "z"}}],
)
async def test_anchors_that_cannot_be_read(database: Database, anchors: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        await audit.against(database, anchors)


# Reading


async def test_entries_are_found_by_all_that_is_asked(database: Database) -> None:
    tenant_id, who = uuid.uuid4(), uuid.uuid4()
    begun = datetime.now(UTC) - timedelta(seconds=5)
    for n in range(5):
        with audit.acting(Actor(ActorType.USER, who if n % 2 else None)):
            async with database.tenant(tenant_id) as session:
                await audit.append(
                    session, Action.CREATE if n < 3 else Action.DELETE, f"kind{n % 3}", f"id-{n}", f"number {n} done"
                )

    async def found(**wanted: Any) -> list[str]:
        page = await audit.search(database, tenant_id, **wanted)
        assert page.total == len(page.items)
        return [one.resource_id for one in page.items]

    assert await found() == ["id-4", "id-3", "id-2", "id-1", "id-0"]
    assert await found(actor_id=who) == ["id-3", "id-1"]
    assert await found(action="delete") == ["id-4", "id-3"]
    assert await found(resource_type="kind1") == ["id-4", "id-1"]
    assert await found(resource_id="id-2") == ["id-2"]
    assert await found(since=begun) == await found()
    assert await found(until=begun) == []
    assert await found(actor_id=who, action=Action.DELETE) == ["id-3"]
    assert await found(q="NUMBER 3") == ["id-3"]
    second = await audit.search(database, tenant_id, page=2, page_size=2)
    assert ([one.resource_id for one in second.items], second.total, second.page) == (["id-2", "id-1"], 5, 2)
    async with database.tenant(tenant_id) as session:
        one = (await session.scalars(select(AuditEntry).where(AuditEntry.seq == 2))).one()
    assert await found(since=one.at, until=one.at + timedelta(microseconds=1)) == ["id-1"]
    assert (await audit.entry(database, tenant_id, one.id)).resource_id == "id-1"
    assert (await audit.entry(database, None, one.id)).resource_id == "id-1"
    for whose in (uuid.uuid4(), PLATFORM):
        with pytest.raises(NotFound):
            await audit.entry(database, whose, one.id)


@pytest.mark.parametrize(
    ("description", "resource_id", "q"),
    [
        ("PATCH /api/v2/projects/77", "", "projects"),
        ("PATCH /api/v2/projects/77", "", "/api/v2/projects/77"),
        ("made someone@example.com an admin", "", "example.com"),
        ("made someone@example.com an admin", "", "someone@example.com"),
        ("renamed", "550e8400-e29b-41d4-a716-446655440000", "550e8400-e29b-41d4-a716-446655440000"),
        ("renamed", "550e8400-e29b-41d4-a716-446655440000", "550e84"),
        ("set secret", "llm_provider/openai", "openai"),
        ("set secret", "llm_provider/openai", "llm_prov"),
        ("Größe geändert", "", "grö"),
        ("it's", "", "it's"),
    ],
)
async def test_words_are_found_within_paths_and_ids(
    database: Database, description: str, resource_id: str, q: str
) -> None:
    tenant_id = uuid.uuid4()
    async with database.tenant(tenant_id) as session:
        await audit.append(session, Action.UPDATE, "thing", resource_id, description)
        await audit.append(session, Action.UPDATE, "thing", "other", "another line")
    for whose in (tenant_id, None):
        found = await audit.search(database, whose, q=q)
        assert [one.description for one in found.items if one.tenant_id == tenant_id] == [description], whose
    assert (await audit.search(database, PLATFORM, q=q)).total == 0


@settings(parent=FAST, max_examples=40)
@given(which=st.uuids())
def test_every_id_is_found_by_its_text(which: uuid.UUID, address: Address) -> None:
    query = audit_reading._query(str(which))
    with psycopg.connect(address(roles.ADMIN)) as connection:
        row = connection.execute(
            "SELECT audit_words('', 'x', %s) @@ to_tsquery('simple', %s)", (str(which), query)
        ).fetchone()
    assert row == (True,)


@settings(parent=FAST, max_examples=60)
@given(q=st.text(max_size=60))
def test_whatever_is_searched_for_is_a_query_or_bad_input(q: str, address: Address) -> None:
    try:
        query = audit_reading._query(q)
    except BadInput:
        return
    with psycopg.connect(address(roles.ADMIN)) as connection:
        connection.execute("SET client_min_messages = error")
        assert connection.execute("SELECT to_tsquery('simple', %s)", (query,)).fetchone() is not None


@pytest.mark.parametrize(
    "wanted",
    [
        {"action": "explode"},
        {"q": "!?"},
        {"q": "x" * 201},
        {"q": " ".join("x" * 11)},
        {"since": datetime(2026, 1, 1)},
        {"page": 0},
        {"page_size": 101},
    ],
)
async def test_a_search_that_makes_no_sense(database: Database, wanted: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as caught:
        await audit.search(database, PLATFORM, **wanted)
    assert caught.value.param == next(iter(wanted))


async def test_a_tenant_reads_its_own_lines_only(database: Database, chain: Chain) -> None:
    one, two = await chain(2), await chain(3)
    assert {line.tenant_id for line in (await audit.search(database, two)).items} == {two}
    everything = await audit.search(database, None, page_size=100)
    assert {one, two} <= {line.tenant_id for line in everything.items}


async def gathered(pieces: AsyncIterator[bytes]) -> str:
    return b"".join([piece async for piece in pieces]).decode()


@pytest.mark.parametrize("lines", [0, 1, 4, 5, 11])
async def test_exports_are_whole_and_lines_themselves(
    database: Database, chain: Chain, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_reading, "_BATCH", 5)
    tenant_id = await chain(lines)
    as_json = json.loads(await gathered(audit.export(database, tenant_id, format="json")))
    rows = list(
        csv.DictReader(io.StringIO(await gathered(audit.export(database, tenant_id, format="csv")), newline=""))
    )
    assert [row["seq"] for row in as_json] == list(range(1, lines + 2))
    assert [row["seq"] for row in rows] == [str(n) for n in range(1, lines + 3)]
    assert tuple(rows[0]) == tuple(as_json[0]) == audit_reading.COLUMNS
    assert rows[-1]["description"] == as_json[-1]["description"] == "export"
    assert json.loads(rows[-1]["details"]) == {"format": "csv", "filter": {}}
    stored = await lines_of(database, tenant_id)
    assert [row["hash"] for row in rows] == [line.hash.hex() for line in stored]


async def test_an_export_is_filtered_and_says_how(database: Database, chain: Chain) -> None:
    tenant_id = await chain(4)
    found = json.loads(await gathered(audit.export(database, tenant_id, Filter(resource_id="2"), "json")))
    assert [row["seq"] for row in found] == [3]
    assert (await lines_of(database, tenant_id))[-1].details == {"format": "json", "filter": {"resource_id": "2"}}
    everything = await gathered(audit.export(database, None))
    assert str(tenant_id) in everything
    assert (await lines_of(database, PLATFORM))[-1].description == "export"


def test_an_export_that_makes_no_sense_is_refused_at_once(database: Database) -> None:
    with pytest.raises(BadInput):
        audit.export(database, PLATFORM, format="xml")
    with pytest.raises(BadInput):
        audit.export(database, PLATFORM, Filter(action="explode"))


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
async def test_no_cell_is_a_formula(database: Database, start: str) -> None:
    tenant_id, evil = uuid.uuid4(), f"{start}cmd|' /C calc'!A0, \"quoted\""
    async with database.tenant(tenant_id) as session:
        # What append would clean away has come in by another way.
        await session.execute(
            text("INSERT INTO audit_log (tenant_id, action, resource_type, description) VALUES (:t, 'login', 'x', :d)"),
            {"t": tenant_id, "d": evil},
        )
    rows = csv.DictReader(io.StringIO(await gathered(audit.export(database, tenant_id)), newline=""))
    assert [row["description"] for row in rows] == [f"'{evil}", "export"]


async def test_a_reader_who_stalls_holds_no_connection(database: Database, chain: Chain) -> None:
    tenant_id = await chain(1)
    stalled = [audit.export(database, tenant_id) for _ in range(30)]
    for pieces in stalled:
        await anext(pieces)
    async with asyncio.timeout(20), database.tenant(tenant_id) as session:
        assert await session.scalar(text("SELECT 1")) == 1
    for pieces in stalled:
        await pieces.aclose()


# Months


OLD = "2024_03"


@pytest.fixture
async def past(admin: psycopg.AsyncConnection) -> AsyncIterator[Callable[[str], Awaitable[None]]]:
    """Makes the places of months long gone, by their names."""
    made: list[str] = []

    async def make(month: str) -> None:
        begin = datetime.strptime(month, "%Y_%m").replace(tzinfo=UTC)
        end = (begin + timedelta(days=32)).replace(day=1)
        await admin.execute(
            f"CREATE TABLE audit_log_{month} PARTITION OF audit_log FOR VALUES FROM ('{begin}') TO ('{end}')"
        )
        await admin.execute(f"ALTER TABLE audit_log_{month} OWNER TO avb_owner")
        made.append(month)

    async def forget() -> None:
        await admin.execute("SET session_replication_role = replica")
        for month in made:
            await admin.execute(f"DROP TABLE IF EXISTS audit_log_{month}")
        await admin.execute("TRUNCATE audit_anchors, audit_log, audit_heads")
        await admin.execute("SET session_replication_role = origin")

    await forget()
    yield make
    await forget()


async def write_at(connection: psycopg.AsyncConnection, tenant_id: uuid.UUID, *times: str) -> None:
    for at in times:
        await connection.execute(
            "INSERT INTO audit_log (tenant_id, at, action, resource_type, description, new_values) "
            "VALUES (%s, %s, 'create', 'thing', 'Größe \"x\"', '{\"b\": 1.50, \"a\": null}')",
            (tenant_id, at),
        )


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


async def test_old_months_move_into_files(
    database: Database, admin: psycopg.AsyncConnection, past: Callable[[str], Awaitable[None]], tmp_path: Path
) -> None:
    for month in ("2024_03", "2024_04"):
        await past(month)
    one, two, three = sorted(uuid.uuid4() for _ in range(3))
    # Transactions that began before midnight are chained after those that began behind it.
    await write_at(admin, one, "2024-03-05Z", "2024-04-01 00:00Z", "2024-03-31 23:59Z", "2024-04-02Z", "now")
    await write_at(admin, two, "2024-03-09Z", "2024-03-10Z")
    await write_at(admin, three, "now")
    status = await audit.retention(database)
    assert (status.retention_days, status.archive_status, len(status.due)) == (90, "due", 2)
    assert status.oldest == datetime(2024, 3, 5, tzinfo=UTC)

    directory = tmp_path / "archive"
    march, april = await audit.archive(database, directory)
    assert sorted(os.listdir(directory)) == ["audit-2024-03.jsonl.gz", "audit-2024-04.jsonl.gz"]
    assert (march.month, march.lines, april.lines) == (datetime(2024, 3, 1, tzinfo=UTC), 4, 2)
    assert march.digest == hashlib.sha256(march.file.read_bytes()).hexdigest()
    assert march.file.stat().st_mode & 0o777 == 0o600
    head, *rows, end = read(march.file)
    assert (head["month"], end) == ("2024-03", {"end": True, "lines": 4})
    assert [(row["piece"], row["first"], row["last"]) for row in rows if "piece" in row] == [
        (str(one), 1, 1),
        (str(one), 3, 3),
        (str(two), 1, 2),
    ]
    assert (await audit.verify(database)).broken == ()
    assert [line.seq for line in await lines_of(database, one)] == [5]
    status = await audit.retention(database)
    assert (status.archive_status, status.archived_until) == ("current", datetime(2024, 5, 1, tzinfo=UTC))
    assert [line.resource_id for line in await lines_of(database, PLATFORM)] == ["2024-03", "2024-04"]
    assert await audit.archive(database, directory) == []
    async with database.tenant(two) as session:
        await audit.append(session, Action.CREATE, "thing")
    assert (await audit.verify(database, two)).broken == ()
    assert (await lines_of(database, two))[-1].seq == 3


async def test_an_archive_proves_itself(
    database: Database, admin: psycopg.AsyncConnection, past: Callable[[str], Awaitable[None]], tmp_path: Path
) -> None:
    await past(OLD)
    tenant_id = uuid.uuid4()
    await write_at(admin, tenant_id, "2024-03-05Z", "2024-03-06Z", "2024-03-07Z")
    (done,) = await audit.archive(database, tmp_path)
    with gzip.open(done.file, "rt") as file:
        lines = file.read().splitlines()[1:4]
    hash_ = "00"
    for line in lines:
        row = json.loads(line)
        said = line[line.index('"entry": ') + 9 : -1]
        assert row["prev"] == hash_
        hash_ = hashlib.sha256(bytes.fromhex(row["prev"]) + said.encode()).hexdigest()
        assert row["hash"] == hash_


@pytest.mark.parametrize("table", ["audit_anchors", "audit_log"])
async def test_what_was_archived_stays_part_of_the_chain(
    database: Database,
    vandal: psycopg.AsyncConnection,
    past: Callable[[str], Awaitable[None]],
    tmp_path: Path,
    table: str,
) -> None:
    await past(OLD)
    await vandal.execute("SET session_replication_role = origin")
    tenant_id = uuid.uuid4()
    await write_at(vandal, tenant_id, "2024-03-05Z", "2024-03-06Z", "now", "now")
    await audit.archive(database, tmp_path)
    await vandal.execute("SET session_replication_role = replica")
    await run(vandal, f"DELETE FROM {table} WHERE tenant_id = %(t)s AND seq < 4", t=tenant_id)
    (broken,) = (await audit.verify(database, tenant_id)).broken
    assert broken.seq == (1 if table == "audit_anchors" else 3)
    if table == "audit_anchors":
        return
    assert (await audit.against(database, {str(tenant_id): {"seq": 1, "hash": "00"}})) == ()
    assert len(await audit.against(database, {str(tenant_id): {"seq": 2, "hash": "00"}})) == 1


async def test_an_altered_anchor_is_noticed(
    database: Database, vandal: psycopg.AsyncConnection, past: Callable[[str], Awaitable[None]], tmp_path: Path
) -> None:
    await past(OLD)
    await vandal.execute("SET session_replication_role = origin")
    tenant_id = uuid.uuid4()
    await write_at(vandal, tenant_id, "2024-03-05Z", "2024-03-06Z", "now", "now")
    await audit.archive(database, tmp_path)
    await vandal.execute("SET session_replication_role = replica")
    await run(vandal, "UPDATE audit_anchors SET hash = 'x' WHERE tenant_id = %(t)s", t=tenant_id)
    (broken,) = (await audit.verify(database, tenant_id)).broken
    assert (broken.seq, broken.what) == (2, "ends what was archived, and the next line does not continue it")


FORGE = """
INSERT INTO audit_anchors (tenant_id, seq, first, prev, hash, month, digest)
SELECT l.tenant_id, 6, 3, f.prev, l.hash, %(month)s, %(digest)s
FROM audit_log l JOIN audit_log f ON f.tenant_id = l.tenant_id AND f.seq = 3 WHERE l.tenant_id = %(t)s AND l.seq = 6
"""


@pytest.mark.parametrize("like_a_real_one", [False, True])
async def test_lines_that_no_month_has_are_not_archived(
    database: Database,
    chain: Chain,
    admin: psycopg.AsyncConnection,
    past: Callable[[str], Awaitable[None]],
    tmp_path: Path,
    like_a_real_one: bool,
) -> None:
    """A false row among the anchors does not stand for lines that somebody removed."""
    await past(OLD)
    archived, tenant_id = uuid.uuid4(), await chain(9)
    await write_at(admin, archived, "2024-03-05Z", "2024-03-06Z", "now")
    (done,) = await audit.archive(database, tmp_path)
    assert (await audit.verify(database)).broken == ()
    await admin.execute("SET session_replication_role = replica")
    month = done.month if like_a_real_one else datetime(2024, 2, 1, tzinfo=UTC)
    await run(admin, FORGE, t=tenant_id, month=month, digest=bytes.fromhex(done.digest))
    await run(admin, "DELETE FROM audit_log WHERE tenant_id = %(t)s AND seq BETWEEN 3 AND 6", t=tenant_id)
    what = "is said to be archived, but no month was archived that holds it"
    assert (await audit.verify(database, tenant_id)).broken == ((tenant_id, 3, None, what),)
    # Which pieces of a month are the false ones nobody can tell.
    suspects = {tenant_id, archived} if like_a_real_one else {tenant_id}
    assert {one.tenant_id for one in (await audit.verify(database)).broken} == suspects


async def test_months_stay_backed_when_the_line_that_tells_of_them_is_archived(
    database: Database, admin: psycopg.AsyncConnection, past: Callable[[str], Awaitable[None]], tmp_path: Path
) -> None:
    for month in ("2024_03", "2024_08"):
        await past(month)
    tenant_id = uuid.uuid4()
    await write_at(admin, tenant_id, "2024-03-05Z", "2024-08-06Z", "now")
    # March was archived in August.
    keeper = await database.connect(roles.KEEPER)
    await keeper.execute("SELECT audit_archive('2024-03-01Z', 1, '\\x01')")
    await keeper.close()
    await admin.execute("SET session_replication_role = replica")
    await run(admin, "UPDATE audit_log SET at = '2024-08-05Z' WHERE tenant_id = %(t)s", t=PLATFORM)
    await run(admin, "UPDATE audit_log l SET hash = audit_hash(l) WHERE tenant_id = %(t)s", t=PLATFORM)
    await run(
        admin,
        "UPDATE audit_heads SET hash = (SELECT hash FROM audit_log WHERE tenant_id = %(t)s) WHERE tenant_id = %(t)s",
        t=PLATFORM,
    )
    await admin.execute("SET session_replication_role = origin")
    assert (await audit.verify(database)).broken == ()
    (august,) = await audit.archive(database, tmp_path)
    assert (august.lines, [line.resource_id for line in await lines_of(database, PLATFORM)]) == (2, ["2024-08"])
    assert (await audit.verify(database)).broken == ()


async def test_a_month_is_archived_once(
    database: Database, admin: psycopg.AsyncConnection, past: Callable[[str], Awaitable[None]], tmp_path: Path
) -> None:
    await past(OLD)
    await write_at(admin, uuid.uuid4(), "2024-03-05Z")
    (done,) = await audit.archive(database, tmp_path)
    await past(OLD)
    await write_at(admin, uuid.uuid4(), "2024-03-06Z")
    with pytest.raises(Conflict, match="2024-03 is archived already"):
        await audit.archive(database, tmp_path)
    assert hashlib.sha256(done.file.read_bytes()).hexdigest() == done.digest


async def test_how_far_back_it_goes_is_read_from_the_oldest_month(
    database: Database, admin: psycopg.AsyncConnection, past: Callable[[str], Awaitable[None]], address: Address
) -> None:
    for month in ("2024_02", "2024_03", "2024_04"):
        await past(month)
    one, two = uuid.uuid4(), uuid.uuid4()
    await write_at(admin, one, "2024-03-05Z", "2024-04-05Z")
    await write_at(admin, two, "2024-04-06Z", "now")
    assert (await audit.retention(database, tenant_id=two)).oldest == datetime(2024, 4, 6, tzinfo=UTC)
    assert (await audit.retention(database, tenant_id=uuid.uuid4())).oldest is None
    async with admin.transaction():
        await admin.execute("LOCK TABLE ONLY audit_log_2024_04 IN ACCESS EXCLUSIVE MODE")
        async with asyncio.timeout(20):
            assert (await audit.retention(database)).oldest == datetime(2024, 3, 5, tzinfo=UTC)


async def test_a_crash_between_file_and_database_is_made_good(
    database: Database,
    admin: psycopg.AsyncConnection,
    past: Callable[[str], Awaitable[None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await past(OLD)
    tenant_id = uuid.uuid4()
    await write_at(admin, tenant_id, "2024-03-05Z")

    def die(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("agentvoicebox.tenancy.audit.archives._sync", die)
        with pytest.raises(KeyboardInterrupt):
            await audit.archive(database, tmp_path)
    assert len(await lines_of(database, tenant_id)) == 1
    (done,) = await audit.archive(database, tmp_path)
    assert os.listdir(tmp_path) == [done.file.name]
    assert [row.get("hash") is not None for row in read(done.file)][1] is True
    assert (await audit.verify(database)).broken == ()


async def test_a_month_that_was_tampered_with_is_not_archived(
    database: Database, vandal: psycopg.AsyncConnection, past: Callable[[str], Awaitable[None]], tmp_path: Path
) -> None:
    await past(OLD)
    await vandal.execute("SET session_replication_role = origin")
    tenant_id = uuid.uuid4()
    await write_at(vandal, tenant_id, "2024-03-05Z", "2024-03-06Z")
    await vandal.execute("SET session_replication_role = replica")
    await run(vandal, "UPDATE audit_log SET description = 'x' WHERE tenant_id = %(t)s AND seq = 2", t=tenant_id)
    with pytest.raises(Conflict, match=f"line 2 of tenant {tenant_id}") as caught:
        await audit.archive(database, tmp_path)
    assert caught.value.code == "audit_broken"
    assert len(await lines_of(database, tenant_id)) == 2


async def test_one_archives_at_a_time(
    database: Database, admin: psycopg.AsyncConnection, past: Callable[[str], Awaitable[None]], tmp_path: Path
) -> None:
    await past(OLD)
    await admin.execute("SELECT pg_advisory_lock(%s)", (0x41564203,))
    with pytest.raises(Conflict):
        await audit.archive(database, tmp_path)
    await admin.execute("SELECT pg_advisory_unlock_all()")
    assert len(await audit.archive(database, tmp_path)) == 1


async def test_archiving_waits_for_writers_and_they_not_for_it(
    database: Database,
    admin: psycopg.AsyncConnection,
    past: Callable[[str], Awaitable[None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agentvoicebox.tenancy.audit.archives._PAUSE", 0.05)
    monkeypatch.setattr("agentvoicebox.tenancy.audit.archives._TRIES", 50)  # the writer below may be slow
    await past(OLD)
    tenant_id = uuid.uuid4()
    await write_at(admin, tenant_id, "2024-03-05Z")
    async with database.tenant(uuid.uuid4()) as session:
        await audit.append(session, Action.CREATE, "thing")
        archiving = asyncio.create_task(audit.archive(database, tmp_path))
        await asyncio.sleep(2.5)
        assert not archiving.done()
    assert len(await archiving) == 1


async def test_a_directory_that_cannot_be_written(
    database: Database, past: Callable[[str], Awaitable[None]], tmp_path: Path
) -> None:
    await past(OLD)
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable) as caught:
        await audit.archive(database, tmp_path / "file")
    assert caught.value.code == "audit_archive_unwritable"


@pytest.mark.parametrize("days", [0, 89, 1_000_000])
async def test_lines_are_kept_for_ninety_days_at_least(database: Database, tmp_path: Path, days: int) -> None:
    with pytest.raises(BadInput):
        await audit.archive(database, tmp_path, days)
    with pytest.raises(BadInput):
        await audit.retention(database, days)


async def test_the_database_gives_up_no_young_line(database: Database, chain: Chain) -> None:
    tenant_id = await chain(2)
    keeper = await database.connect(roles.KEEPER)
    try:
        assert await (await keeper.execute("SELECT count(*) FROM audit_log")).fetchone() == (0,)
        month = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        for when in (month, month - timedelta(days=1), month + timedelta(days=400)):
            with pytest.raises(psycopg.Error) as caught:
                await keeper.execute("SELECT audit_archive(%s, 0, '')", (when,))
            assert caught.value.sqlstate == "AV004"
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await keeper.execute("DELETE FROM audit_log")
    finally:
        await keeper.close()
    assert len(await lines_of(database, tenant_id)) == 2


async def test_a_file_that_lacks_lines_frees_no_month(
    database: Database, admin: psycopg.AsyncConnection, past: Callable[[str], Awaitable[None]]
) -> None:
    await past(OLD)
    tenant_id = uuid.uuid4()
    await write_at(admin, tenant_id, "2024-03-05Z", "2024-03-06Z")
    keeper = await database.connect(roles.KEEPER)
    try:
        with pytest.raises(psycopg.Error, match="the file holds 1 lines"):
            await keeper.execute("SELECT audit_archive('2024-03-01Z', 1, '')")
    finally:
        await keeper.close()
    assert len(await lines_of(database, tenant_id)) == 2


async def test_months_are_made_ahead_and_protected(database: Database, admin: psycopg.AsyncConnection) -> None:
    assert await audit.months(database) == 0
    found = await admin.execute(
        "SELECT c.relname, c.relrowsecurity, c.relforcerowsecurity, c.relacl IS NULL, pg_get_userbyid(c.relowner), "
        "(SELECT array_agg(tgname::text ORDER BY tgname) FROM pg_trigger WHERE tgrelid = c.oid) "
        "FROM pg_class c JOIN pg_inherits ON inhrelid = c.oid WHERE inhparent = 'audit_log'::regclass"
    )
    months = {name: protection for name, *protection in await found.fetchall()}
    assert len(months) == 14
    for name, protection in months.items():
        assert protection == [True, True, True, "avb_owner", ["chained", "kept", "kept_whole"]], name
    last = max(months)
    await admin.execute(f"DROP TABLE {last}")
    assert await asyncio.gather(audit.months(database), audit.months(database)) in ([0, 1], [1, 0])


async def test_every_chain_has_its_head(database: Database, chain: Chain) -> None:
    tenant_id = await chain(3)
    async with database.tenant(tenant_id) as session:
        head = (await session.scalars(select(AuditHead))).one()
    assert (head.seq, head.hash) == (3, (await lines_of(database, tenant_id))[-1].hash)
