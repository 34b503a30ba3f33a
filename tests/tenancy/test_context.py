"""Which tenant a request is about."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import psycopg
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from psycopg import sql
from sqlalchemy import text

from agentvoicebox.config.errors import AvbError, BadInput, Forbidden, NotFound
from agentvoicebox.tenancy import context, domains, roles, tenants
from agentvoicebox.tenancy.context import OWN, Caller, Known, Named, Place, named, resolve
from agentvoicebox.tenancy.database import Address, Database, NoTenant
from agentvoicebox.tenancy.models import Tenant, TenantStatus

BASE = "voice.example.com"
ACME = Known(uuid.UUID(int=1), "acme", TenantStatus.ACTIVE)
OTHER = Known(uuid.UUID(int=2), "other", TenantStatus.ACTIVE)
OPERATOR = Caller(None, operator=True)

slugs = st.from_regex(r"[a-z0-9][a-z0-9-]{1,20}[a-z0-9]", fullmatch=True).filter(lambda s: s not in tenants.RESERVED)
known_tenants = st.builds(Known, st.uuids(), slugs, st.just(TenantStatus.ACTIVE))


def request_of(tenant: Known, place: Place) -> tuple[Named, ...]:
    """A request that names `tenant` in one place."""
    if place == Place.HEADER:
        return named(header=str(tenant.id))
    if place == Place.SUBDOMAIN:
        return named(host=f"{tenant.slug}.{BASE}:65020", base=BASE)
    if place == Place.DOMAIN:
        return named(host=f"{tenant.slug}.example", base=BASE)
    return named(path=f"/api/v2/tenants/{tenant.id}/settings")


def found_as(tenant: Known | None, *places: Named) -> dict[Named, Known | None]:
    return dict.fromkeys(places, tenant)


@given(known_tenants, known_tenants, st.sampled_from(Place))
def test_p2_tenant_context_extraction(tenant: Known, other: Known, place: Place) -> None:
    """The right tenant comes out of the credential, the header, the subdomain, a proven domain, or the path."""
    places = request_of(tenant, place)
    assert [each.place for each in places] == [place]
    assert resolve(OPERATOR, places, found_as(tenant, *places)) == tenant.id
    assert resolve(Caller(tenant), places, found_as(tenant, *places)) == tenant.id
    assert resolve(Caller(tenant), (), {}) == tenant.id
    if other.id != tenant.id:
        with pytest.raises(Forbidden):
            resolve(Caller(other), places, found_as(tenant, *places))


@given(known_tenants, st.sampled_from(TenantStatus), st.sampled_from([None, *Place]), st.booleans())
def test_p3_tenant_access_control(tenant: Known, status: TenantStatus, place: Place | None, operator: bool) -> None:
    """No tenant is 400, a suspended or pending one 403, a deleted or unknown one 404, whoever asks."""
    tenant = tenant._replace(status=status)
    places = request_of(tenant, place) if place else ()
    expected = {
        TenantStatus.ACTIVE: None,
        TenantStatus.SUSPENDED: (403, "tenant_suspended"),
        TenantStatus.PENDING: (403, "tenant_pending"),
        TenantStatus.DELETED: (404, "tenant_not_found"),
    }[status]
    assert outcome(Caller(tenant), places, tenant) == (expected or tenant.id)
    if place:
        assert outcome(OPERATOR, places, tenant) == (expected or tenant.id)
    assert outcome(Caller(None, operator=operator), (), tenant) == (400, "tenant_required")
    if place not in (None, Place.DOMAIN):
        assert outcome(OPERATOR, places, None) == (404, "tenant_not_found")


def outcome(caller: Caller, places: tuple[Named, ...], known: Known | None) -> Any:
    try:
        return resolve(caller, places, found_as(known, *places))
    except AvbError as error:
        return error.status, error.code


@pytest.mark.parametrize("place", Place)
def test_flw_02_a_selector_never_widens_what_a_credential_allows(place: Place) -> None:
    """Naming a tenant that is not there is refused as one that is somebody else's."""
    places = request_of(OTHER, place)
    with pytest.raises(Forbidden) as caught:
        resolve(Caller(ACME), places, found_as(OTHER, *places))
    assert caught.value.code == "permission_denied"
    if place != Place.DOMAIN:
        with pytest.raises(Forbidden) as unknown:
            resolve(Caller(ACME), places, found_as(None, *places))
        assert unknown.value.message == caught.value.message


def test_flw_02_one_wrong_place_among_right_ones_is_enough() -> None:
    right, wrong = request_of(ACME, Place.HEADER), request_of(OTHER, Place.PATH)
    known = {**found_as(ACME, *right), **found_as(OTHER, *wrong)}
    with pytest.raises(Forbidden):
        resolve(Caller(ACME), (*right, *wrong), known)
    with pytest.raises(BadInput) as caught:
        resolve(OPERATOR, (*right, *wrong), known)
    assert caught.value.code == "tenant_ambiguous"


def test_flw_02_a_credential_of_no_tenant_chooses_none() -> None:
    places = request_of(ACME, Place.HEADER)
    with pytest.raises(NoTenant):
        resolve(Caller(None), places, found_as(ACME, *places))


@pytest.mark.parametrize(
    ("host", "slug"),
    [
        ("acme.voice.example.com", "acme"),
        ("ACME.Voice.Example.COM:443", "acme"),
        ("acme.voice.example.com.", "acme"),
        ("www.voice.example.com", None),
        ("api.voice.example.com", None),
        ("admin.voice.example.com:8080", None),
        ("voice.example.com", None),
        ("a.b.voice.example.com", None),
        ("acmevoice.example.com", False),
        ("acme.voice.example.com.evil.example", False),
        ("127.0.0.1:65020", None),
        ("127.0.0.1", None),
        ("[::1]:65020", None),
        ("2001:db8::1", None),
        ("0x7f.1", None),
        ("localhost:65020", None),
        ("", None),
        ("acme..voice.example.com", None),
        ("a\x00b.voice.example.com", None),
        ("-acme.voice.example.com", None),
    ],
)
def test_flw_47_only_hosts_under_our_domain_name_a_slug(host: str, slug: str | bool | None) -> None:
    found = named(host=host, base=BASE)
    if slug is False:  # may be a name of somebody's own, if they have proven it
        assert [each.place for each in found] == [Place.DOMAIN]
    else:
        assert found == (() if slug is None else (Named(Place.SUBDOMAIN, slug),))


def test_flw_47_a_foreign_host_names_nobody() -> None:
    places = named(host="acme.elsewhere.example", base=BASE)
    assert resolve(Caller(ACME), places, found_as(None, *places)) == ACME.id
    with pytest.raises(NoTenant):
        resolve(OPERATOR, places, found_as(None, *places))


@given(st.text(max_size=80), st.text(max_size=80))
@example("[", "/api/v2/tenants//")
@example(":" * 9, "/api/v2/tenants/../admin")
def test_nonsense_names_nobody_and_breaks_nothing(host: str, path: str) -> None:
    try:
        places = named(host=host, path=path, base=BASE)
    except NotFound:
        return
    assert all(each.place in (Place.SUBDOMAIN, Place.DOMAIN, Place.PATH) for each in places)


@pytest.mark.parametrize("header", ["", "acme", "7", str(uuid.uuid4())[:-1], "\x00", "{" + str(uuid.uuid4()) + "}"])
def test_flw_74_an_id_is_read_before_anybody_looks_for_it(header: str) -> None:
    with pytest.raises(BadInput) as caught:
        named(header=header)
    assert caught.value.param == context.HEADER
    if header:
        with pytest.raises(NotFound):
            named(path=f"/api/v2/tenants/{header}/settings")


def test_paths_that_name_no_tenant() -> None:
    for path in ("/api/v2/tenants", "/api/v2/tenants/", f"/api/v2/tenants/{OWN}/usage", "/api/v2/sessions/x", "/"):
        assert named(path=path) == (), path


async def test_flw_05_without_a_tenant_there_is_an_error_and_never_all_rows(database: Database, tenant: Tenant) -> None:
    for nobody in (None, uuid.UUID(int=0), str(tenant.id)):
        with pytest.raises(NoTenant):
            async with database.tenant(nobody):  # type: ignore[arg-type]
                pass
    connection = await database.connect(roles.APP)
    for name in ("tenants", "projects", "sessions", "tenant_overview"):
        with pytest.raises(psycopg.Error) as caught:
            await connection.execute(sql.SQL("SELECT * FROM {}").format(sql.Identifier(name)))
        assert caught.value.sqlstate == "AV001", name
    await connection.close()


async def test_flw_06_a_tenant_is_bound_to_a_transaction_and_ends_with_it(
    address: Address, tenant: Tenant, other: Tenant
) -> None:
    """Neither thread nor task nor connection remembers it, whatever happens within."""
    database, bound = Database(address), text("SELECT current_setting('app.tenant_id', true)")

    async def ask(whose: Tenant, fails: bool) -> str | None:
        try:
            async with database.tenant(whose.id) as session:
                found: str | None = await session.scalar(bound)
                await asyncio.sleep(0)
                if fails:
                    raise RuntimeError
                return found
        except RuntimeError:
            return None

    answers = await asyncio.gather(*(ask((tenant, other)[n % 2], n % 3 == 0) for n in range(60)))
    for number, answer in enumerate(answers):
        assert answer == (None if number % 3 == 0 else str((tenant, other)[number % 2].id))
    async with database._app.connect() as connection:
        assert (await connection.execute(bound)).scalar() in (None, "")
    await database.close()


class TestLookUp:
    """What the store is asked for."""

    async def known(self, database: Database, caller: Caller, **request: Any) -> uuid.UUID:
        places = named(base=BASE, **request)
        return resolve(caller, places, await context.look_up(database, caller, places))

    def caller(self, tenant: Tenant) -> Caller:
        return Caller(Known(tenant.id, tenant.slug, tenant.status))

    async def test_the_operator_finds_a_tenant_by_every_name(
        self, database: Database, tenant: Tenant, admin: Any
    ) -> None:
        host = f"voice.{tenant.slug}.example"
        claim = await domains.add(database, tenant.id, host)
        await admin.execute("UPDATE tenant_domains SET verified_at = now() WHERE id = %s", (claim.id,))
        for request in (
            {"header": str(tenant.id)},
            {"host": f"{tenant.slug}.{BASE}"},
            {"host": f"{host}:443"},
            {"path": f"/api/v2/tenants/{tenant.id}"},
        ):
            assert await self.known(database, OPERATOR, **request) == tenant.id

    async def test_the_operator_is_told_of_one_that_is_not_there(self, database: Database, tenant: Tenant) -> None:
        for request in ({"header": str(uuid.uuid4())}, {"host": f"nobody.{BASE}"}):
            with pytest.raises(NotFound):
                await self.known(database, OPERATOR, **request)
        await tenants.suspend(database, tenant.id, "unpaid")
        with pytest.raises(Forbidden):
            await self.known(database, OPERATOR, header=str(tenant.id))

    async def test_a_key_reaches_its_own_tenant_only(
        self, database: Database, tenant: Tenant, other: Tenant, admin: Any
    ) -> None:
        caller = self.caller(tenant)
        assert await self.known(database, caller, host=f"{tenant.slug}.{BASE}", header=str(tenant.id)) == tenant.id
        assert await self.known(database, caller, host="unproven.example") == tenant.id
        host = f"voice.{other.slug}.example"
        claim = await domains.add(database, other.id, host)
        await admin.execute("UPDATE tenant_domains SET verified_at = now() WHERE id = %s", (claim.id,))
        for request in (
            {"header": str(other.id)},
            {"header": str(uuid.uuid4())},
            {"host": f"{other.slug}.{BASE}"},
            {"host": f"nobody.{BASE}"},
            {"host": host},
            {"path": f"/api/v2/tenants/{other.id}"},
        ):
            with pytest.raises(Forbidden):
                await self.known(database, caller, **request)

    async def test_for_a_key_no_other_tenant_is_looked_up(self, tenant: Tenant) -> None:
        no_store: Database = None  # type: ignore[assignment]
        caller, places = self.caller(tenant), named(header=str(uuid.uuid4()), host=f"nobody.{BASE}", base=BASE)
        assert await context.look_up(no_store, caller, places) == dict.fromkeys(places, None)
