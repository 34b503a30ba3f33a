"""Host names of tenants' own: claims, proofs, and whose a name is."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from agentvoicebox.config.errors import BadInput, Conflict, NotFound, Unavailable
from agentvoicebox.tenancy import domains, roles
from agentvoicebox.tenancy.database import Database, sqlstate
from agentvoicebox.tenancy.models import AuditEntry, Tenant, TenantDomain


class Dns:
    """Records of this test's own."""

    def __init__(self, *claims: TenantDomain) -> None:
        self.records: dict[str, list[str]] = {}
        for claim in claims:
            self.publish(claim)

    def publish(self, claim: TenantDomain) -> None:
        self.records.setdefault(f"_agentvoicebox.{claim.domain}", ["v=spf1 -all"]).append(claim.token)

    async def txt(self, name: str) -> Sequence[str]:
        return self.records.get(name, [])


@pytest.fixture
def name() -> str:
    return f"voice.{uuid.uuid4().hex[:12]}.example"


async def test_a_claim_proves_nothing(database: Database, tenant: Tenant, name: str) -> None:
    claim = await domains.add(database, tenant.id, name)
    assert (claim.domain, claim.verified_at, claim.is_primary) == (name, None, False)
    assert len(claim.token) >= 43
    assert await domains.by_host(database, name) is None


async def test_the_proof_is_a_record_in_dns(database: Database, tenant: Tenant, name: str) -> None:
    claim = await domains.add(database, tenant.id, name)
    dns = Dns()
    with pytest.raises(Conflict, match=f"_agentvoicebox.{name}") as caught:
        await domains.verify(database, tenant.id, claim.id, dns)
    assert caught.value.code == "domain_not_proven"
    dns.publish(claim)
    proven = await domains.verify(database, tenant.id, claim.id, dns)
    assert proven.verified_at is not None
    assert await domains.by_host(database, name) == tenant.id
    assert await domains.by_host(database, f"{name.upper()}.") == tenant.id
    assert await domains.by_host(database, f"other.{name}") is None
    assert (await domains.verify(database, tenant.id, claim.id, Dns())).verified_at == proven.verified_at
    async with database.tenant(tenant.id) as session:
        lines = (await session.execute(select(AuditEntry.description).order_by(AuditEntry.seq))).scalars().all()
    assert lines[1:] == [f"Claimed {name}", f"Proved {name}"]


async def test_another_claims_token_proves_nothing(
    database: Database, tenant: Tenant, other: Tenant, name: str
) -> None:
    mine, theirs = await domains.add(database, tenant.id, name), await domains.add(database, other.id, name)
    with pytest.raises(Conflict):
        await domains.verify(database, tenant.id, mine.id, Dns(theirs))


async def test_only_the_first_proven_claim_counts(database: Database, tenant: Tenant, other: Tenant, name: str) -> None:
    mine, theirs = await domains.add(database, tenant.id, name), await domains.add(database, other.id, name)
    dns = Dns(mine, theirs)
    await domains.verify(database, tenant.id, mine.id, dns)
    with pytest.raises(Conflict, match="Another tenant"):
        await domains.verify(database, other.id, theirs.id, dns)
    assert await domains.by_host(database, name) == tenant.id
    await domains.remove(database, tenant.id, mine.id)
    assert await domains.by_host(database, name) is None
    await domains.verify(database, other.id, theirs.id, dns)
    assert await domains.by_host(database, name) == other.id


async def test_of_two_proofs_at_once_one_counts(database: Database, tenant: Tenant, other: Tenant, name: str) -> None:
    claims = {each.id: await domains.add(database, each.id, name) for each in (tenant, other)}
    dns = Dns(*claims.values())
    results = await asyncio.gather(
        *(domains.verify(database, owner, claim.id, dns) for owner, claim in claims.items()), return_exceptions=True
    )
    assert sorted(type(result).__name__ for result in results) == ["Conflict", "TenantDomain"]


async def test_dns_that_does_not_answer_changes_nothing(database: Database, tenant: Tenant, name: str) -> None:
    class Silent:
        async def txt(self, name: str) -> Sequence[str]:
            raise Unavailable("DNS does not answer; try again.")

    claim = await domains.add(database, tenant.id, name)
    with pytest.raises(Unavailable):
        await domains.verify(database, tenant.id, claim.id, Silent())
    assert await domains.by_host(database, name) is None


async def test_a_name_is_claimed_once_by_a_tenant(database: Database, tenant: Tenant, name: str) -> None:
    await domains.add(database, tenant.id, name)
    with pytest.raises(Conflict) as caught:
        await domains.add(database, tenant.id, name.upper())
    assert caught.value.param == "domain"


async def test_one_proven_name_is_primary(database: Database, tenant: Tenant, name: str) -> None:
    first, second = [await domains.add(database, tenant.id, f"{label}.{name}") for label in ("a", "b")]
    with pytest.raises(Conflict) as caught:
        await domains.set_primary(database, tenant.id, first.id)
    assert caught.value.code == "domain_not_verified"
    for claim in (first, second):
        await domains.verify(database, tenant.id, claim.id, Dns(claim))
    assert (await domains.set_primary(database, tenant.id, first.id)).is_primary
    assert (await domains.set_primary(database, tenant.id, second.id)).is_primary
    listed = await domains.list_(database, tenant.id)
    assert [(each.domain, each.is_primary) for each in listed.items] == [(f"b.{name}", True), (f"a.{name}", False)]


async def test_of_many_who_choose_at_once_one_stands(database: Database, tenant: Tenant, name: str) -> None:
    claims = [await domains.add(database, tenant.id, f"{label}.{name}") for label in "abcd"]
    for claim in claims:
        await domains.verify(database, tenant.id, claim.id, Dns(claim))
    await asyncio.gather(*(domains.set_primary(database, tenant.id, claim.id) for claim in claims))
    listed = await domains.list_(database, tenant.id)
    assert [each.is_primary for each in listed.items].count(True) == 1


async def test_a_tenant_claims_twenty_at_most(database: Database, tenant: Tenant, other: Tenant, name: str) -> None:
    results = await asyncio.gather(
        *(domains.add(database, tenant.id, f"d{number}.{name}") for number in range(25)), return_exceptions=True
    )
    refused = [each for each in results if isinstance(each, Conflict)]
    assert [each.code for each in refused] == ["too_many_domains"] * 5
    listed = await domains.list_(database, tenant.id)
    assert listed.total == domains.MOST == 20
    await domains.add(database, other.id, name)
    await domains.remove(database, tenant.id, listed.items[0].id)
    assert (await domains.add(database, tenant.id, name)).domain == name


async def test_to_choose_one_touches_no_other(
    database: Database, tenant: Tenant, admin: psycopg.AsyncConnection, name: str
) -> None:
    mine, another = [await domains.add(database, tenant.id, f"{label}.{name}") for label in ("a", "b")]
    await domains.verify(database, tenant.id, mine.id, Dns(mine))
    async with admin.transaction():
        await admin.execute("SELECT FROM tenant_domains WHERE id = %s FOR UPDATE", (another.id,))
        assert (await domains.set_primary(database, tenant.id, mine.id)).is_primary


async def test_another_tenants_claim_is_not_there(database: Database, tenant: Tenant, other: Tenant, name: str) -> None:
    claim = await domains.add(database, tenant.id, name)
    for attempt in (
        domains.verify(database, other.id, claim.id, Dns(claim)),
        domains.set_primary(database, other.id, claim.id),
        domains.remove(database, other.id, claim.id),
        domains.add(database, uuid.uuid4(), name),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert (await domains.list_(database, other.id)).total == 0


async def test_no_tenant_can_prove_its_claim_itself(database: Database, tenant: Tenant, name: str) -> None:
    claim = await domains.add(database, tenant.id, name)
    for statement in (
        "UPDATE tenant_domains SET verified_at = now()",
        "UPDATE tenant_domains SET domain = 'theirs.example'",
        "INSERT INTO tenant_domains (tenant_id, id, domain, token, verified_at) "
        "SELECT tenant_id, gen_random_uuid(), 'theirs.example', token, now() FROM tenant_domains",
    ):
        with pytest.raises(DBAPIError) as caught:
            async with database.tenant(tenant.id) as session:
                await session.execute(text(statement))
        assert sqlstate(caught.value) == "42501", statement
    connection = await database.connect(roles.SYSTEM)
    with pytest.raises(psycopg.errors.CheckViolation):
        await connection.execute("UPDATE tenant_domains SET is_primary = true WHERE id = %s", (claim.id,))
    await connection.close()


@pytest.mark.parametrize(
    "domain",
    [
        "",
        "com",
        "localhost",
        "10.0.0.1",
        "127.1",
        "[::1]",
        "2001:db8::1",
        "a..b",
        "-a.example",
        "a_b.example",
        "a.example\n",
        "a b.example",
        "x" * 64 + ".example",
        "a." * 130 + "example",
        "http://a.example",
        "*.a.example",
        "a.0x7f",
        "grüße.example",
        "nul\x00.example",
        None,
        7,
    ],
)
async def test_what_is_no_name(database: Database, tenant: Tenant, domain: Any) -> None:
    with pytest.raises(BadInput) as caught:
        await domains.add(database, tenant.id, domain)
    assert caught.value.param == "domain"


async def test_names_are_written_as_dns_does(database: Database, tenant: Tenant) -> None:
    assert (await domains.add(database, tenant.id, "Grün.Example.")).domain == "xn--grn-ioa.example"
    assert (await domains.add(database, tenant.id, "xn--gre-6ka8h.example")).domain == "xn--gre-6ka8h.example"


@pytest.mark.parametrize("domain", ["voice.example.com", "acme.voice.example.com", "VOICE.example.com."])
async def test_the_platforms_own_domain_is_nobodys(database: Database, tenant: Tenant, domain: str) -> None:
    with pytest.raises(BadInput):
        await domains.add(database, tenant.id, domain, platform="voice.example.com")
    assert (await domains.add(database, tenant.id, "myvoice.example.com", platform="voice.example.com")).domain
