"""Keys from issue to revocation: made, listed, changed, replaced and ended, each with its line in the audit log."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text

from agentvoicebox.config.errors import AvbError, BadInput, Conflict, Forbidden, NotFound, Refused, Unavailable
from agentvoicebox.tenancy import audit, keys, projects, tenants
from agentvoicebox.tenancy.audit import Actor
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keyring import Keyring
from agentvoicebox.tenancy.keys import Issued, KeyStatus, Scope
from agentvoicebox.tenancy.models import ActorType, ApiKey, AuditEntry, Project, RateClass, Tenant

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
DAY = timedelta(days=1)
Blocked = Callable[[int], Awaitable[None]]
NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=100)


@pytest.fixture
async def ring(database: Database) -> AsyncIterator[Keyring]:
    """Without a feed that runs: every answer comes from the database."""
    ring = Keyring(database, Feed(database))
    yield ring
    await ring.close()


@pytest.fixture
async def issued(database: Database, tenant: Tenant) -> Issued:
    return await keys.issue(database, tenant.id, "a key")


async def system(database: Database, statement: str, **values: object) -> None:
    async with database.system() as session:
        await session.execute(text(statement), values)


async def expire(database: Database, key_id: uuid.UUID) -> None:
    await system(database, "UPDATE api_keys SET expires_at = now() - interval '1 s' WHERE id = :id", id=key_id)


async def status_of(database: Database, tenant: Tenant, key_id: uuid.UUID) -> KeyStatus:
    return keys.status(await keys.get(database, tenant.id, key_id), datetime.now(UTC))


async def count(database: Database, tenant: Tenant) -> int:
    return (await keys.list_(database, tenant.id)).total


async def new_project(database: Database, tenant: Tenant) -> uuid.UUID:
    async with database.tenant(tenant.id) as session:
        project = Project(name="Another")
        session.add(project)
    return project.id


async def lines(database: Database, tenant: Tenant, key_id: uuid.UUID) -> list[AuditEntry]:
    async with database.tenant(tenant.id) as session:
        found = select(AuditEntry).where(AuditEntry.resource_id == str(key_id)).order_by(AuditEntry.seq)
        return list((await session.execute(found)).scalars())


# --- issue ------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=NAMES,
    scopes=st.lists(st.sampled_from(list(Scope)), min_size=1),
    rate_class=st.sampled_from(list(RateClass)),
    lifetime=st.none() | st.timedeltas(timedelta(minutes=1), timedelta(days=3650)),
)
async def test_p7_key_lifecycle_round_trip(
    database: Database,
    tenant: Tenant,
    ring: Keyring,
    name: str,
    scopes: list[Scope],
    rate_class: RateClass,
    lifetime: timedelta | None,
) -> None:
    """`avb_` and 32 random bytes, of which only the digest is stored; seen once; good until it is revoked."""
    expires_at = None if lifetime is None else datetime.now(UTC) + lifetime
    issued = await keys.issue(database, tenant.id, name, scopes, expires_at, rate_class=rate_class)
    assert re.fullmatch(r"avb_[A-Za-z0-9_-]{43}", issued.key)
    assert len(base64.urlsafe_b64decode(issued.key[4:] + "=")) == 32

    digest = hashlib.sha256(issued.key.encode()).hexdigest()
    async with database.tenant(tenant.id) as session:
        everything = text(
            "SELECT (SELECT coalesce(string_agg(to_jsonb(k)::text, ''), '') FROM api_keys k)"
            " || (SELECT coalesce(string_agg(to_jsonb(a)::text, ''), '') FROM audit_log a)"
        )
        stored = (await session.execute(everything)).scalar_one()
    assert digest in stored
    assert issued.key[12:] not in stored

    row = await keys.get(database, tenant.id, issued.id)
    assert (row.name, row.key_prefix, row.key_hash) == (name, issued.key[:12], digest)
    assert (row.rate_limit_tier, row.expires_at) == (rate_class, expires_at)
    assert (row.usage_count, row.last_used_at, row.revoked_at) == (0, None, None)
    assert issued.key not in repr(vars(row)) + repr(issued)

    grant = await ring.verify(issued.key)
    assert (grant.tenant_id, grant.key_id, grant.scopes) == (tenant.id, issued.id, set(scopes))
    new = await keys.rotate(database, tenant.id, issued.id, grace=0)
    assert new.key != issued.key
    assert (await ring.verify(new.key)).scopes == set(scopes)
    await keys.revoke(database, tenant.id, new.id)
    for secret in (issued.key, new.key):
        with pytest.raises(Refused) as caught:
            await ring.verify(secret)
        assert caught.value.code == "api_key_revoked"


async def test_no_two_keys_are_alike(database: Database, tenant: Tenant) -> None:
    made = [await keys.issue(database, tenant.id, "same name") for _ in range(20)]
    assert len({one.key for one in made}) == len({one.id for one in made}) == 20


async def test_the_prefix_fits_its_column(database: Database, tenant: Tenant, issued: Issued) -> None:
    assert len(issued.prefix) == 12
    assert (await keys.get(database, tenant.id, issued.id)).key_prefix == issued.key[:12] == issued.prefix


@pytest.mark.parametrize("scopes", [(), ("root",), ("realtime", ""), "realtime", ("realtime", None), ({},)])
async def test_scopes_that_are_none(
    database: Database, tenant: Tenant, issued: Issued, scopes: tuple[str, ...]
) -> None:
    for make in (
        keys.issue(database, tenant.id, "bad", scopes),
        keys.update(database, tenant.id, issued.id, scopes=scopes),
    ):
        with pytest.raises(BadInput) as caught:
            await make
        assert caught.value.param == "scopes"
    assert await count(database, tenant) == 1
    assert (await keys.get(database, tenant.id, issued.id)).scopes == ["realtime"]


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("name", name) for name in ("", " ", "x" * 101, "a\nb", "a\x00", None, 7)),
        *(("description", given) for given in ("x" * 1001, "a\x00", 7)),
        *(("rate_class", given) for given in ("", "infinite", "STANDARD", None)),
        *(
            ("expires_at", at)
            for at in (datetime.now(UTC) - timedelta(seconds=1), datetime(2999, 1, 1), datetime.min.replace(tzinfo=UTC))
        ),
    ],
)
async def test_values_that_make_no_sense(database: Database, tenant: Tenant, param: str, value: object) -> None:
    with pytest.raises(BadInput) as caught:
        await keys.issue(database, tenant.id, **{"name": "a key", param: value})  # type: ignore[arg-type]
    assert caught.value.param == param
    assert await count(database, tenant) == 0


async def test_a_key_is_of_an_existing_tenant_and_its_project(
    database: Database, tenant: Tenant, other: Tenant, issued: Issued
) -> None:
    theirs = await new_project(database, other)
    for attempt, code in (
        (keys.issue(database, uuid.uuid4(), "nobody's"), "tenant_not_found"),
        (keys.issue(database, tenant.id, "stray", project_id=theirs), "not_found"),
        (keys.update(database, tenant.id, issued.id, project_id=theirs), "not_found"),
    ):
        with pytest.raises(NotFound) as caught:
            await attempt
        assert caught.value.code == code


async def test_a_deleted_tenant_gets_no_key(database: Database, tenant: Tenant, issued: Issued) -> None:
    await system(database, "UPDATE tenants SET status = 'deleted' WHERE id = :id", id=tenant.id)
    for attempt in (keys.issue(database, tenant.id, "late"), keys.rotate(database, tenant.id, issued.id)):
        with pytest.raises(NotFound) as caught:
            await attempt
        assert caught.value.code == "tenant_not_found"


async def test_nobody_gives_a_scope_they_do_not_have(database: Database, tenant: Tenant) -> None:
    mine = {"realtime", "sessions"}
    issued = await keys.issue(database, tenant.id, "less", ("sessions",), granter=mine)
    powerful = await keys.issue(database, tenant.id, "more", ("admin", "realtime"))
    for attempt in (
        keys.issue(database, tenant.id, "more", ("realtime", "admin"), granter=mine),
        keys.issue(database, tenant.id, "more", ("realtime",), granter=()),
        keys.update(database, tenant.id, issued.id, scopes=("sessions", "admin"), granter=mine),
        keys.rotate(database, tenant.id, powerful.id, granter=mine),
    ):
        with pytest.raises(Forbidden) as caught:
            await attempt
        assert caught.value.code == "insufficient_scope"
    assert await count(database, tenant) == 2
    assert await status_of(database, tenant, powerful.id) == KeyStatus.ACTIVE
    widened = await keys.update(database, tenant.id, issued.id, scopes=("sessions", "realtime"), granter=mine)
    assert widened.scopes == ["sessions", "realtime"]
    narrowed = await keys.update(database, tenant.id, powerful.id, scopes=("admin",), granter=mine)
    assert narrowed.scopes == ["admin"]  # taking away gives nothing


async def test_many_creators_do_not_pass_the_limit(database: Database) -> None:
    tenant = await tenants.create(database, f"t-{uuid.uuid4().hex[:12]}", "Starter", "starter")
    ended = await keys.issue(database, tenant.id, "ended")
    await keys.revoke(database, tenant.id, ended.id)  # counts no more

    async def creator(number: int) -> str:
        try:
            await keys.issue(database, tenant.id, f"key {number}")
        except Forbidden as error:
            return error.code
        return "issued"

    outcomes = await asyncio.gather(*(creator(number) for number in range(60)))
    assert outcomes.count("issued") == tenant.max_api_keys == 20
    assert outcomes.count("tenant_limit_exceeded") == 40
    assert (await keys.list_(database, tenant.id, status="active")).total == 20


# --- list and change --------------------------------------------------------------------------------------------------


@given(
    revoked=st.booleans(),
    expires=st.none() | st.timedeltas(-DAY, DAY),
    replaced=st.booleans(),
)
def test_what_has_become_of_a_key(revoked: bool, expires: timedelta | None, replaced: bool) -> None:
    key = ApiKey(
        revoked_at=NOW if revoked else None,
        expires_at=None if expires is None else NOW + expires,
        replaced_by=uuid.uuid4() if replaced else None,
    )
    good = not revoked and (expires is None or expires > timedelta(0))
    status = keys.status(key, NOW)
    assert (status in (KeyStatus.ACTIVE, KeyStatus.ROTATING)) == good
    assert (status == KeyStatus.REVOKED) == revoked
    if good:
        assert (status == KeyStatus.ROTATING) == replaced


async def test_keys_are_listed_by_what_has_become_of_them(database: Database, tenant: Tenant, other: Tenant) -> None:
    await keys.issue(database, other.id, "theirs")
    project = await new_project(database, tenant)
    active = await keys.issue(database, tenant.id, "active", project_id=project)
    short = await keys.issue(database, tenant.id, "short", expires_at=datetime.now(UTC) + DAY)
    expired = await keys.issue(database, tenant.id, "expired")
    await expire(database, expired.id)
    revoked = await keys.issue(database, tenant.id, "revoked")
    await expire(database, revoked.id)
    await keys.revoke(database, tenant.id, revoked.id)
    rotating = await keys.issue(database, tenant.id, "rotating")
    new = await keys.rotate(database, tenant.id, rotating.id)
    expected = {
        None: [new, rotating, revoked, expired, short, active],
        "active": [new, short, active],
        "rotating": [rotating],
        "expired": [expired],
        "revoked": [revoked],
    }
    for status, found in expected.items():
        page = await keys.list_(database, tenant.id, status=status)
        assert ([key.id for key in page.items], page.total) == ([one.id for one in found], len(found)), status
        if status is not None:
            assert {keys.status(key, datetime.now(UTC)) for key in page.items} == {status}
    assert [key.id for key in (await keys.list_(database, tenant.id, project_id=project)).items] == [active.id]
    second = await keys.list_(database, tenant.id, page=2, page_size=4)
    assert ([key.id for key in second.items], second.total) == ([short.id, active.id], 6)
    for wrong in ({"status": "lost"}, {"page": 0}, {"page_size": 101}):
        with pytest.raises(BadInput) as caught:
            await keys.list_(database, tenant.id, **wrong)  # type: ignore[arg-type]
        assert caught.value.param in wrong


async def test_what_can_be_changed(database: Database, tenant: Tenant, issued: Issued) -> None:
    project = await new_project(database, tenant)
    changed = await keys.update(
        database,
        tenant.id,
        issued.id,
        name="new name",
        description="in the hall",
        project_id=project,
        scopes=("usage", "realtime"),
        rate_class="elevated",
    )
    again = await keys.get(database, tenant.id, issued.id)
    for key in (changed, again):
        assert (key.name, key.description, key.project_id) == ("new name", "in the hall", project)
        assert (key.scopes, key.rate_limit_tier) == (["usage", "realtime"], RateClass.ELEVATED)
        assert key.updated_at > key.created_at
    same = await keys.update(database, tenant.id, issued.id, name="new name")
    assert same.updated_at == again.updated_at
    assert len(await lines(database, tenant, issued.id)) == 2  # issued, changed


@pytest.mark.parametrize(
    "change", [{"name": ""}, {"name": "a\x00"}, {"description": "x" * 1001}, {"rate_class": "infinite"}]
)
async def test_a_change_that_makes_no_sense_changes_nothing(
    database: Database, tenant: Tenant, issued: Issued, change: dict[str, str]
) -> None:
    before = await keys.get(database, tenant.id, issued.id)
    with pytest.raises(BadInput) as caught:
        await keys.update(database, tenant.id, issued.id, **{"name": "good", **change})  # type: ignore[arg-type]
    assert caught.value.param in change
    after = await keys.get(database, tenant.id, issued.id)
    assert (after.name, after.updated_at) == (before.name, before.updated_at)


async def test_a_revoked_key_stays_as_it_is(database: Database, tenant: Tenant, issued: Issued) -> None:
    await keys.revoke(database, tenant.id, issued.id)
    for attempt in (
        keys.update(database, tenant.id, issued.id, name="again"),
        keys.rotate(database, tenant.id, issued.id),
    ):
        with pytest.raises(Conflict, match="issue a new one"):
            await attempt


async def test_a_key_of_another_tenant_does_not_exist(
    database: Database, tenant: Tenant, other: Tenant, issued: Issued
) -> None:
    for owner, key_id in ((tenant.id, uuid.uuid4()), (other.id, issued.id)):
        for attempt in (
            keys.get(database, owner, key_id),
            keys.update(database, owner, key_id, name="mine"),
            keys.rotate(database, owner, key_id),
            keys.revoke(database, owner, key_id),
        ):
            with pytest.raises(NotFound, match="no such key"):
                await attempt
    assert await status_of(database, tenant, issued.id) == KeyStatus.ACTIVE


# --- rotate and revoke ------------------------------------------------------------------------------------------------


async def test_a_replaced_key_works_for_a_day(database: Database, tenant: Tenant, ring: Keyring) -> None:
    maker, project = uuid.uuid4(), await new_project(database, tenant)
    old = await keys.issue(
        database,
        tenant.id,
        "hall",
        ("usage", "realtime"),
        project_id=project,
        description="in the hall",
        rate_class="unlimited",
    )
    new = await keys.rotate(database, tenant.id, old.id, created_by=maker)
    replaced, key = [await keys.get(database, tenant.id, one.id) for one in (old, new)]
    assert (key.name, key.description, key.project_id) == ("hall", "in the hall", project)
    assert (key.scopes, key.rate_limit_tier) == (["usage", "realtime"], RateClass.UNLIMITED)
    assert (key.rotated_from, key.created_by, key.expires_at) == (old.id, maker, None)
    assert (replaced.replaced_by, replaced.revoked_at) == (new.id, None)
    assert replaced.expires_at is not None
    assert abs(replaced.expires_at - key.created_at - DAY) < timedelta(minutes=1)
    assert await status_of(database, tenant, old.id) == KeyStatus.ROTATING
    for secret, key_id in ((old.key, old.id), (new.key, new.id)):
        assert (await ring.verify(secret)).key_id == key_id


async def test_a_leaked_key_is_replaced_without_grace(database: Database, tenant: Tenant, ring: Keyring) -> None:
    maker, old = uuid.uuid4(), await keys.issue(database, tenant.id, "leaked")
    new = await keys.rotate(database, tenant.id, old.id, grace=0, created_by=maker)
    with pytest.raises(Refused) as caught:
        await ring.verify(old.key)
    assert caught.value.code == "api_key_revoked"
    assert (await ring.verify(new.key)).key_id == new.id
    assert (await keys.get(database, tenant.id, old.id)).revoked_by == maker


async def test_a_replaced_key_can_be_revoked_before_its_grace_ends(
    database: Database, tenant: Tenant, issued: Issued, ring: Keyring
) -> None:
    new = await keys.rotate(database, tenant.id, issued.id)
    await keys.revoke(database, tenant.id, issued.id)
    assert await status_of(database, tenant, issued.id) == KeyStatus.REVOKED
    assert (await ring.verify(new.key)).key_id == new.id


@settings(max_examples=20, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lifetime=st.timedeltas(timedelta(minutes=1), timedelta(days=400)),
    grace=st.floats(1, keys.LONGEST_GRACE),
)
@example(lifetime=timedelta(hours=1), grace=keys.GRACE)
async def test_no_grace_lengthens_a_life(database: Database, tenant: Tenant, lifetime: timedelta, grace: float) -> None:
    """The old key ends when it would have, or earlier; the new one lives as long from now as the old one was to."""
    old = await keys.issue(database, tenant.id, "short", expires_at=datetime.now(UTC) + lifetime)
    new = await keys.rotate(database, tenant.id, old.id, grace)
    replaced, key = [await keys.get(database, tenant.id, one.id) for one in (old, new)]
    assert old.expires_at is not None
    assert replaced.expires_at is not None
    assert key.expires_at is not None
    assert replaced.expires_at <= old.expires_at
    assert replaced.expires_at <= key.created_at + timedelta(seconds=grace) + timedelta(seconds=5)
    assert abs((key.expires_at - key.created_at) - (old.expires_at - replaced.created_at)) < timedelta(seconds=5)
    for one in (old, new):
        await keys.revoke(database, tenant.id, one.id)


@pytest.mark.parametrize("grace", [-1, -0.001, 7 * 24 * 3600 + 1, math.nan, math.inf, True, "60", None])
async def test_a_grace_that_makes_no_sense(database: Database, tenant: Tenant, issued: Issued, grace: float) -> None:
    with pytest.raises(BadInput) as caught:
        await keys.rotate(database, tenant.id, issued.id, grace)
    assert caught.value.param == "grace"
    assert await status_of(database, tenant, issued.id) == KeyStatus.ACTIVE


async def test_what_cannot_be_replaced(database: Database, tenant: Tenant, issued: Issued) -> None:
    new = await keys.rotate(database, tenant.id, issued.id)
    with pytest.raises(Conflict, match=str(new.id)):
        await keys.rotate(database, tenant.id, issued.id)
    await expire(database, issued.id)
    with pytest.raises(Conflict, match="expired"):
        await keys.rotate(database, tenant.id, issued.id)
    assert await count(database, tenant) == 2


async def test_of_many_rotations_at_once_one_wins(database: Database, tenant: Tenant, issued: Issued) -> None:
    results = await asyncio.gather(
        *(keys.rotate(database, tenant.id, issued.id, grace) for grace in (0, 60, 3600, 86400) * 3),
        return_exceptions=True,
    )
    assert len([one for one in results if isinstance(one, Issued)]) == 1
    assert {type(one) for one in results} == {Issued, Conflict}
    assert await count(database, tenant) == 2


@pytest.mark.parametrize("revoke", [False, True])
@pytest.mark.parametrize("change", ["rotate", "update"])
async def test_a_change_and_the_end_of_the_project_come_one_after_the_other(
    database: Database, tenant: Tenant, admin: psycopg.AsyncConnection, blocked: Blocked, change: str, revoke: bool
) -> None:
    project_id = await new_project(database, tenant)
    key = await keys.issue(database, tenant.id, "a key", project_id=project_id)
    async with admin.transaction():
        await admin.execute("SELECT FROM api_keys WHERE id = %s FOR UPDATE", (key.id,))
        changing = asyncio.create_task(
            _done(keys.rotate(database, tenant.id, key.id))
            if change == "rotate"
            else _done(keys.update(database, tenant.id, key.id, name="another", project_id=project_id))
        )
        await blocked(1)
        deleting = asyncio.create_task(projects.delete(database, tenant.id, project_id, revoke_keys=revoke))
        await blocked(2)
    await asyncio.gather(changing, deleting)
    left = (await keys.list_(database, tenant.id)).items
    assert [each.project_id for each in left] == [None] * (2 if change == "rotate" else 1)
    assert {each.revoked_at is not None for each in left} == {revoke}


async def _done(change: Awaitable[object]) -> None:
    await change


async def test_rotation_fills_no_limit_and_passes_none(database: Database) -> None:
    """A new key takes the place of the old one; but who rotates again and again does not get any number of keys."""
    tenant = await tenants.create(database, f"t-{uuid.uuid4().hex[:12]}", "Free", "free")
    live = [await keys.issue(database, tenant.id, f"key {number}") for number in range(5)]
    newest = live[-1]
    for _ in range(5):
        newest = await keys.rotate(database, tenant.id, newest.id)
    for attempt in (keys.rotate(database, tenant.id, newest.id), keys.issue(database, tenant.id, "one more")):
        with pytest.raises(Forbidden) as caught:
            await attempt
        assert caught.value.code == "tenant_limit_exceeded"
    assert await status_of(database, tenant, newest.id) == KeyStatus.ACTIVE
    await keys.rotate(database, tenant.id, newest.id, grace=0)  # a leak can always be stopped
    assert (await keys.list_(database, tenant.id, status="active")).total == 5


async def test_revoking_again_changes_nothing(database: Database, tenant: Tenant, issued: Issued) -> None:
    first, second = uuid.uuid4(), uuid.uuid4()
    await keys.revoke(database, tenant.id, issued.id, first)
    before = await keys.get(database, tenant.id, issued.id)
    await keys.revoke(database, tenant.id, issued.id, second)
    after = await keys.get(database, tenant.id, issued.id)
    assert (after.revoked_at, after.revoked_by) == (before.revoked_at, first)
    assert len(await lines(database, tenant, issued.id)) == 2  # issued, revoked


# --- the audit log ----------------------------------------------------------------------------------------------------


async def test_every_change_leaves_its_line(database: Database, tenant: Tenant) -> None:
    person = uuid.uuid4()
    with audit.acting(Actor(ActorType.USER, person, ip="192.0.2.7")):
        issued = await keys.issue(database, tenant.id, "hall")
        await keys.update(database, tenant.id, issued.id, name="lobby")
        new = await keys.rotate(database, tenant.id, issued.id)
        await keys.revoke(database, tenant.id, new.id)
    old_lines, new_lines = [await lines(database, tenant, one.id) for one in (issued, new)]
    assert [(line.action, line.description) for line in old_lines] == [
        ("create", "issued"),
        ("update", "changed"),
        ("update", "rotated"),
    ]
    assert [(line.action, line.description) for line in new_lines] == [("create", "issued"), ("delete", "revoked")]
    for line in (*old_lines, *new_lines):
        assert (line.actor_id, str(line.ip_address), line.resource_type) == (person, "192.0.2.7", "api_key")
    assert (old_lines[1].old_values, old_lines[1].new_values) == ({"name": "hall"}, {"name": "lobby"})
    assert old_lines[2].details == {"replaced_by": str(new.id)}
    assert old_lines[0].new_values is not None
    assert old_lines[0].new_values["prefix"] == issued.prefix


async def test_what_is_refused_leaves_none(
    database: Database, tenant: Tenant, issued: Issued, new_tenant: Callable[[], Awaitable[Tenant]]
) -> None:
    before = len(await lines(database, tenant, issued.id))
    for attempt in (
        keys.update(database, tenant.id, issued.id, scopes=("admin",), granter=("realtime",)),
        keys.rotate(database, tenant.id, issued.id, granter=()),
        keys.rotate(database, tenant.id, issued.id, grace=-1),
        keys.revoke(database, (await new_tenant()).id, issued.id),
    ):
        with pytest.raises(AvbError):
            await attempt
    assert len(await lines(database, tenant, issued.id)) == before


async def test_a_change_stands_only_with_its_line(
    database: Database, tenant: Tenant, issued: Issued, admin: psycopg.AsyncConnection
) -> None:
    await admin.execute("REVOKE INSERT ON audit_log FROM avb_app")
    try:
        for attempt in (
            keys.issue(database, tenant.id, "unseen"),
            keys.update(database, tenant.id, issued.id, name="unseen"),
            keys.rotate(database, tenant.id, issued.id),
            keys.revoke(database, tenant.id, issued.id),
        ):
            with pytest.raises(Exception, match="permission denied"):
                await attempt
    finally:
        await admin.execute("GRANT INSERT ON audit_log TO avb_app")
    key = await keys.get(database, tenant.id, issued.id)
    assert (key.name, key.revoked_at, key.replaced_by) == ("a key", None, None)
    assert await count(database, tenant) == 1


# --- the operator's key -----------------------------------------------------------------------------------------------


def test_the_operator_key_is_made_once(tmp_path: Path) -> None:
    key, made = keys.operator_key(tmp_path / "data")
    assert made
    assert key.startswith("avb_operator_")
    assert keys.operator_key(tmp_path / "data") == (key, False)
    file = tmp_path / "data" / "operator.key"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["operator.key"]
    assert keys.same_key(key, key)
    assert not keys.same_key(key[:-1] + "\ud800", key)


def test_a_damaged_operator_key_is_not_accepted(tmp_path: Path) -> None:
    for content in (b"", b"avb_operator_short", b"\xff\xfe"):
        (tmp_path / "operator.key").write_bytes(content)
        with pytest.raises(Unavailable, match="remove it"):
            keys.operator_key(tmp_path)


def test_no_room_for_an_operator_key(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(Unavailable):
        keys.operator_key(tmp_path / "data")
