"""Pairing: one code, one device, one tenant, ten minutes; and nothing to be learned by trying."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import select

from agentvoicebox.config.errors import AvbError, BadInput, Conflict, Forbidden, NotFound, RateLimited
from agentvoicebox.tenancy import devices, keys, pairings, projects, tenants
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keyring import Keyring
from agentvoicebox.tenancy.models import AuditEntry, Device, Tenant
from agentvoicebox.tenancy.pairings import Pairing, Standing, State

Blocked = Callable[[int], Awaitable[None]]


class Box:
    """A device on its shelf, with a key of its own making."""

    def __init__(self) -> None:
        self.key = keys.PREFIX + secrets.token_urlsafe(32)
        self.digest = hashlib.sha256(self.key.encode()).hexdigest()

    async def begin(self, database: Database, ip: str = "192.0.2.1", name: str = "kitchen") -> Pairing:
        return await pairings.begin(database, self.digest, name, ip, key_prefix=self.key[: keys.SHOWN])


@pytest.fixture(autouse=True)
async def nobody_waits(admin: psycopg.AsyncConnection) -> AsyncIterator[None]:
    yield
    await admin.execute("DELETE FROM pairings")


@pytest.fixture
def box() -> Box:
    return Box()


async def expire(admin: psycopg.AsyncConnection, pairing: Pairing) -> None:
    await admin.execute("UPDATE pairings SET expires_at = now() WHERE id = %s", (pairing.id,))


async def codes(admin: psycopg.AsyncConnection) -> set[str]:
    return {code for (code,) in await (await admin.execute("SELECT code FROM pairings")).fetchall()}


def wrong(code: str) -> str:
    return f"{(int(code) + 1) % 10**8:08}"


class TestPairing:
    """As it should go."""

    async def test_a_device_becomes_the_tenants_and_its_own_key_works(
        self, database: Database, tenant: Tenant, other: Tenant, box: Box, feed: Feed
    ) -> None:
        waiting = await box.begin(database)
        assert len(waiting.code) == 8
        assert waiting.code.isdecimal()
        assert await pairings.look(database, waiting.id) == Standing(State.WAITING, "")
        device = await pairings.claim(database, tenant.id, waiting.code)
        assert await pairings.look(database, waiting.id) == Standing(State.PAIRED, "A tenant")
        assert (device.tenant_id, device.name, device.last_seen_at) == (tenant.id, "kitchen", None)
        grant = await Keyring(database, feed).verify(box.key)
        assert (grant.tenant_id, grant.key_id, grant.scopes) == (tenant.id, device.api_key_id, {"realtime"})
        assert grant.project_id == device.project_id
        arrived = await devices.arrive(database, tenant.id, grant.key_id, grant.project_id, "raspberrypi", "1.0")
        assert (arrived.id, arrived.name) == (device.id, "kitchen")
        assert (await devices.list_(database, other.id)).total == 0

    async def test_what_who_claims_it_may_choose(self, database: Database, tenant: Tenant, box: Box) -> None:
        project = await projects.create(database, tenant.id, "upstairs")
        somebody = uuid.uuid4()
        waiting = await box.begin(database)
        device = await pairings.claim(
            database,
            tenant.id,
            f" {waiting.code[:4]} {waiting.code[4:6]}-{waiting.code[6:]} ",
            name="Bath",
            project_id=project.id,
            created_by=somebody,
            granter=("realtime", "admin"),
        )
        key = await keys.get(database, tenant.id, device.api_key_id)
        assert (device.name, device.project_id) == ("Bath", project.id)
        assert (key.name, key.project_id, key.created_by) == ("Bath", project.id, somebody)
        assert (key.key_prefix, key.key_hash, key.scopes) == (box.key[:12], box.digest, ["realtime"])

    async def test_the_audit_log_tells_of_it_and_not_the_code(
        self, database: Database, tenant: Tenant, box: Box
    ) -> None:
        waiting = await box.begin(database)
        device = await pairings.claim(database, tenant.id, waiting.code)
        async with database.tenant(tenant.id) as session:
            found = (await session.execute(select(AuditEntry).order_by(AuditEntry.seq))).scalars().all()
        key, made = found[-2:]
        assert (key.resource_type, key.resource_id) == ("api_key", str(device.api_key_id))
        assert (made.resource_type, made.resource_id, made.action) == ("device", str(device.id), "create")
        told = str([line.new_values for line in found])
        assert waiting.code not in told
        assert box.digest not in told

    async def test_afterwards_nothing_is_known_of_where_it_stands(
        self, database: Database, tenant: Tenant, box: Box, admin: psycopg.AsyncConnection
    ) -> None:
        await pairings.claim(database, tenant.id, (await box.begin(database)).code)
        cursor = await admin.execute("SELECT name, network, expires_at > now() FROM pairings")
        assert await cursor.fetchall() == [("", "", True)]

    async def test_a_device_that_asks_again_has_one_code(
        self, database: Database, tenant: Tenant, box: Box, admin: psycopg.AsyncConnection
    ) -> None:
        first, second = await box.begin(database), await box.begin(database)
        assert await codes(admin) == {second.code}
        assert (await pairings.look(database, first.id)).state == State.EXPIRED
        assert (await pairings.claim(database, tenant.id, second.code)).name == "kitchen"

    async def test_one_that_was_removed_comes_back_with_a_new_key_only(
        self, database: Database, tenant: Tenant, box: Box
    ) -> None:
        device = await pairings.claim(database, tenant.id, (await box.begin(database)).code)
        for _ in range(2):
            with pytest.raises(Conflict) as caught:
                await box.begin(database)
            assert caught.value.code == "key_in_use"
            if (await devices.list_(database, tenant.id)).total:
                await devices.remove(database, tenant.id, device.id)
        again = await pairings.claim(database, tenant.id, (await Box().begin(database)).code)
        assert again.id != device.id


class TestRefusals:
    """Whoever tries codes learns nothing, and who comes late gets nothing."""

    async def test_unknown_expired_and_used_codes_are_answered_alike(
        self, database: Database, tenant: Tenant, other: Tenant, admin: psycopg.AsyncConnection
    ) -> None:
        used, late = await Box().begin(database), await Box().begin(database)
        await pairings.claim(database, other.id, used.code)
        await expire(admin, late)
        unknown = next(code for code in map(str, range(10_000_000, 10_000_009)) if code not in {used.code, late.code})
        answers = set()
        for owner in (tenant, other):
            for code in (used.code, late.code, unknown):
                with pytest.raises(NotFound) as caught:
                    await pairings.claim(database, owner.id, code)
                answers.add((caught.value.code, caught.value.param, caught.value.message))
        assert len(answers) == 1
        assert answers.pop()[:2] == ("pairing_not_found", "code")
        assert (await devices.list_(database, tenant.id)).total == 0
        assert (await keys.list_(database, tenant.id)).total == 0

    async def test_wrong_codes_do_not_spoil_the_right_one(self, database: Database, tenant: Tenant, box: Box) -> None:
        waiting = await box.begin(database)
        for _ in range(10):
            with pytest.raises(NotFound):
                await pairings.claim(database, tenant.id, wrong(waiting.code))
        assert await pairings.claim(database, tenant.id, waiting.code)

    async def test_two_admins_and_one_device(
        self,
        database: Database,
        tenant: Tenant,
        other: Tenant,
        box: Box,
        admin: psycopg.AsyncConnection,
        blocked: Blocked,
    ) -> None:
        """Both see it waiting; one has it, and of the other there is no key."""
        waiting = await box.begin(database)
        async with admin.transaction():
            await admin.execute("SELECT 1 FROM pairings FOR UPDATE")
            owners = (tenant, other, tenant, other)
            claims = [asyncio.create_task(pairings.claim(database, owner.id, waiting.code)) for owner in owners]
            await blocked(4)  # for the row, or for who of their own tenant waits for it
        found = await asyncio.gather(*claims, return_exceptions=True)
        assert sorted(type(each).__name__ for each in found) == ["Device", "NotFound", "NotFound", "NotFound"]
        (winner,) = [each for each in found if isinstance(each, Device)]
        totals = {owner.id: (await keys.list_(database, owner.id)).total for owner in (tenant, other)}
        assert totals == {tenant.id: 0, other.id: 0} | {winner.tenant_id: 1}
        assert (await devices.list_(database, winner.tenant_id)).total == 1

    async def test_a_claim_that_fails_leaves_the_device_waiting(
        self, database: Database, tenant: Tenant, other: Tenant, box: Box, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waiting = await box.begin(database)
        for failing, code in (
            ({"project_id": uuid.uuid4()}, "not_found"),
            ({"granter": ("usage",)}, "insufficient_scope"),
        ):
            with pytest.raises(AvbError) as caught:
                await pairings.claim(database, tenant.id, waiting.code, **failing)  # type: ignore[arg-type]
            assert caught.value.code == code
        theirs = await projects.create(database, other.id, "theirs")
        with pytest.raises(NotFound):
            await pairings.claim(database, tenant.id, waiting.code, project_id=theirs.id)
        with monkeypatch.context() as patch:
            patch.setattr(devices, "MOST", 0)
            with pytest.raises(Conflict) as conflict:
                await pairings.claim(database, tenant.id, waiting.code)
        assert conflict.value.code == "too_many_devices"
        assert (await pairings.look(database, waiting.id)).state == State.WAITING
        assert (await keys.list_(database, tenant.id)).total == 0
        assert await pairings.claim(database, tenant.id, waiting.code)

    async def test_the_tenants_limit_of_keys_is_the_limit(self, database: Database, box: Box) -> None:
        small = await tenants.create(database, f"t-{uuid.uuid4().hex[:12]}", "Small", "free")
        for number in range(small.max_api_keys):
            await keys.issue(database, small.id, f"key {number}")
        waiting = await box.begin(database)
        with pytest.raises(Forbidden) as caught:
            await pairings.claim(database, small.id, waiting.code)
        assert (caught.value.code, caught.value.param) == ("tenant_limit_exceeded", "api keys")
        assert (await pairings.look(database, waiting.id)).state == State.WAITING
        assert (await devices.list_(database, small.id)).total == 0

    async def test_of_a_tenant_that_there_is_not(self, database: Database, tenant: Tenant, box: Box) -> None:
        waiting = await box.begin(database)
        await tenants.delete(database, tenant.id)
        for owner in (tenant.id, uuid.uuid4()):
            with pytest.raises(NotFound) as caught:
                await pairings.claim(database, owner, waiting.code)
            assert caught.value.code == "tenant_not_found"

    async def test_a_key_that_came_to_be_somebodys_meanwhile(
        self, database: Database, tenant: Tenant, other: Tenant, box: Box, admin: psycopg.AsyncConnection
    ) -> None:
        waiting = await box.begin(database)
        key = await keys.issue(database, other.id, "a key")
        await admin.execute("UPDATE api_keys SET key_hash = %s WHERE id = %s", (box.digest, key.id))
        with pytest.raises(Conflict) as caught:
            await pairings.claim(database, tenant.id, waiting.code)
        assert caught.value.code == "key_in_use"
        assert (await keys.list_(database, tenant.id)).total == 0

    async def test_what_nobody_knows_has_expired(
        self, database: Database, tenant: Tenant, box: Box, admin: psycopg.AsyncConnection
    ) -> None:
        assert await pairings.look(database, uuid.uuid4()) == Standing(State.EXPIRED, "")
        waiting = await box.begin(database)
        await expire(admin, waiting)
        assert await pairings.look(database, waiting.id) == Standing(State.EXPIRED, "")
        paired = await box.begin(database)
        await pairings.claim(database, tenant.id, paired.code)
        await expire(admin, paired)
        assert await pairings.look(database, paired.id) == Standing(State.EXPIRED, "")

    @pytest.mark.parametrize("code", ["", "1234567", "123456789", "12345a78", "१२३४५६७८", "1234\n5678", 12345678, None])
    async def test_no_code(self, database: Database, tenant: Tenant, code: Any) -> None:
        with pytest.raises(BadInput) as caught:
            await pairings.claim(database, tenant.id, code)
        assert caught.value.param == "code"

    @pytest.mark.parametrize(
        ("given", "param"),
        [
            ({"key_digest": "0" * 63}, "key_digest"),
            ({"key_digest": "G" * 64}, "key_digest"),
            ({"key_digest": "A" * 64}, "key_digest"),
            ({"key_digest": b"0" * 64}, "key_digest"),
            ({"key_prefix": "avb_1234567"}, "key_prefix"),
            ({"key_prefix": "avb_123456789"}, "key_prefix"),
            ({"key_prefix": "sk__12345678"}, "key_prefix"),
            ({"key_prefix": "avb_1234 678"}, "key_prefix"),
            ({"name": ""}, "name"),
            ({"name": "x" * 101}, "name"),
            ({"name": "a\0b"}, "name"),
        ],
    )
    async def test_what_makes_no_sense(self, database: Database, given: dict[str, Any], param: str) -> None:
        right: dict[str, Any] = {"key_digest": "0" * 64, "name": "kitchen", "key_prefix": "avb_12345678"}
        with pytest.raises(BadInput) as caught:
            await pairings.begin(database, ip="192.0.2.1", **{**right, **given})
        assert caught.value.param == param

    async def test_a_name_that_makes_no_sense(self, database: Database, tenant: Tenant) -> None:
        with pytest.raises(BadInput) as caught:
            await pairings.claim(database, tenant.id, "12345678", name="x" * 101)
        assert caught.value.param == "name"


class TestBounds:
    """How many may wait."""

    async def test_five_of_an_address(self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection) -> None:
        waiting = [await Box().begin(database, "2001:db8::1") for _ in range(5)]
        with pytest.raises(RateLimited) as caught:
            await Box().begin(database, "2001:db8::ffff")  # one customer's
        assert caught.value.code == "too_many_pairings"
        assert 0 < caught.value.retry_after <= 600
        assert await Box().begin(database, "2001:db8:0:1::1")
        await pairings.claim(database, tenant.id, waiting[0].code)
        await Box().begin(database, "2001:db8::2")
        await expire(admin, waiting[1])
        await Box().begin(database, "2001:db8::2")
        with pytest.raises(RateLimited):
            await Box().begin(database, "2001:db8::2")

    async def test_who_waits_already_may_ask_again(self, database: Database, box: Box) -> None:
        await box.begin(database)
        for _ in range(4):
            await Box().begin(database)
        assert await box.begin(database)

    async def test_five_of_an_address_also_at_once(self, database: Database) -> None:
        found = await asyncio.gather(*(Box().begin(database) for _ in range(9)), return_exceptions=True)
        assert sorted(type(each).__name__ for each in found) == ["Pairing"] * 5 + ["RateLimited"] * 4

    async def test_so_many_in_all(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pairings, "MOST", 3)
        for number in range(3):
            await Box().begin(database, f"192.0.2.{number}")
        with pytest.raises(RateLimited) as caught:
            await Box().begin(database, "192.0.2.99")
        assert caught.value.code == "too_many_pairings"

    async def test_no_two_wait_with_one_code(
        self, database: Database, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn = iter([7, 7, 7, 8, 7])
        monkeypatch.setattr(secrets, "randbelow", lambda _: next(drawn))
        one, two = await Box().begin(database), await Box().begin(database)
        assert (one.code, two.code) == ("00000007", "00000008")
        await pairings.claim(database, tenant.id, one.code)
        assert (await Box().begin(database)).code == "00000007"

    async def test_what_has_expired_goes(
        self, database: Database, tenant: Tenant, admin: psycopg.AsyncConnection
    ) -> None:
        late, later, paired, waiting = [await Box().begin(database) for _ in range(4)]
        await pairings.claim(database, tenant.id, paired.code)
        for each in (late, paired):
            await expire(admin, each)
        assert await pairings.prune(database) == 2
        await expire(admin, later)
        new = await Box().begin(database)
        assert await codes(admin) == {waiting.code, new.code}
