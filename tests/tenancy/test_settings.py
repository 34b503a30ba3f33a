"""What tenants' administrators decide, and what is refused."""

from __future__ import annotations

import asyncio
import uuid
from ipaddress import ip_network
from typing import Any

import pytest
from sqlalchemy import select

from agentvoicebox.config.errors import BadInput, Conflict, NotFound
from agentvoicebox.tenancy import keys, settings
from agentvoicebox.tenancy.changes import Change, Feed
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keyring import Keyring
from agentvoicebox.tenancy.models import AuditEntry, ChangeKind, Tenant
from agentvoicebox.tenancy.settings import Settings


async def test_a_new_tenant_has_the_defaults(database: Database, tenant: Tenant) -> None:
    assert await settings.get(database, tenant.id) == Settings()
    assert (Settings().default_voice_provider, Settings().session_timeout_minutes) == ("local", 60)


async def test_a_tenant_that_never_set_any_has_them_too(database: Database, tenant: Tenant, admin: Any) -> None:
    await admin.execute("DELETE FROM tenant_settings WHERE tenant_id = %s", (tenant.id,))
    assert await settings.get(database, tenant.id) == Settings()
    assert (await settings.patch(database, tenant.id, {"require_mfa": True})).require_mfa
    assert await settings.get(database, tenant.id) == Settings(require_mfa=True)


async def test_what_is_put_is_got_whole(database: Database, tenant: Tenant, other: Tenant) -> None:
    wanted = Settings(
        logo_url="https://cdn.example.com/logo.svg",
        primary_color="#00ffAA",
        default_voice_provider="agentvoicebox",
        default_stt_model="large-v3",
        default_tts_voice="af_bella",
        default_llm_provider="openai",
        default_llm_model="meta-llama/Llama-3.1-8B",
        email_notifications_enabled=False,
        webhook_url="https://hooks.example.com:8443/avb?tenant=1",
        allowed_ip_ranges=("192.0.2.0/24", "2001:db8::/32"),
        require_mfa=True,
        session_timeout_minutes=1440,
    )
    assert await settings.put(database, tenant.id, wanted) == wanted
    assert await settings.get(database, tenant.id) == wanted
    assert await settings.get(database, other.id) == Settings()


async def test_a_model_of_an_earlier_release_that_there_is_not_leaves_the_choice_to_the_operator(
    database: Database, tenant: Tenant, admin: Any
) -> None:
    await settings.put(database, tenant.id, Settings(default_stt_model="tiny"))
    await admin.execute("UPDATE tenant_settings SET default_stt_model = 'whisper-1' WHERE tenant_id = %s", (tenant.id,))
    assert (await settings.get(database, tenant.id)).default_stt_model == "auto"
    changed = await settings.patch(database, tenant.id, {"require_mfa": True})
    assert (changed.require_mfa, changed.default_stt_model) == (True, "auto")
    assert await settings.get(database, tenant.id) == changed


async def test_a_patch_leaves_the_rest(database: Database, tenant: Tenant) -> None:
    await settings.put(database, tenant.id, Settings(primary_color="#112233", require_mfa=True))
    changed = await settings.patch(database, tenant.id, {"session_timeout_minutes": 5})
    assert changed == Settings(primary_color="#112233", require_mfa=True, session_timeout_minutes=5)


async def test_of_many_patches_at_once_none_is_lost(database: Database, tenant: Tenant) -> None:
    changes: list[dict[str, Any]] = [
        {"primary_color": "#abcdef"},
        {"require_mfa": True},
        {"session_timeout_minutes": 77},
        {"default_stt_model": "tiny"},
        {"webhook_url": "https://hooks.example.com/"},
    ]
    await asyncio.gather(*(settings.patch(database, tenant.id, change) for change in changes))
    found = await settings.get(database, tenant.id)
    assert {name: getattr(found, name) for change in changes for name in change} == {
        name: value for change in changes for name, value in change.items()
    }


async def test_flw_45_a_null_is_refused_and_nothing_written(database: Database, tenant: Tenant) -> None:
    for name in Settings.__dataclass_fields__:
        with pytest.raises(BadInput, match="null") as caught:
            await settings.patch(database, tenant.id, {"primary_color": "#000000", name: None})
        assert caught.value.param == name
    assert await settings.get(database, tenant.id) == Settings()


async def test_a_setting_that_nobody_knows(database: Database, tenant: Tenant) -> None:
    with pytest.raises(BadInput) as caught:
        await settings.patch(database, tenant.id, {"suspension_reason": "none"})
    assert caught.value.param == "suspension_reason"


async def test_an_unknown_tenant(database: Database) -> None:
    for attempt in (settings.get(database, uuid.uuid4()), settings.put(database, uuid.uuid4(), Settings())):
        with pytest.raises(NotFound):
            await attempt


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("primary_color", "red"),
        ("primary_color", "#6366f"),
        ("primary_color", "#6366f1\n"),
        ("default_voice_provider", "gcloud"),
        ("default_voice_provider", 7),
        ("default_stt_model", ""),
        ("default_stt_model", "whisper-1"),
        ("default_stt_model", ["base"]),
        ("default_tts_voice", "a b"),
        ("default_llm_model", "x" * 101),
        ("default_llm_provider", "../etc"),
        ("email_notifications_enabled", "true"),
        ("require_mfa", 1),
        ("session_timeout_minutes", 4),
        ("session_timeout_minutes", 1441),
        ("session_timeout_minutes", 60.5),
        ("session_timeout_minutes", True),
        ("allowed_ip_ranges", "192.0.2.0/24"),
        ("allowed_ip_ranges", ["192.0.2.0/33"]),
        ("allowed_ip_ranges", ["everywhere"]),
        ("allowed_ip_ranges", [3221225985]),
        ("allowed_ip_ranges", [None]),
        ("allowed_ip_ranges", 5),
        ("allowed_ip_ranges", [f"192.0.2.{i}/32" for i in range(101)]),
    ],
)
def test_flw_45_what_makes_no_sense_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(BadInput) as caught:
        Settings(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize("field", ["webhook_url", "logo_url"])
@pytest.mark.parametrize(
    "address",
    [
        "http://hooks.example.com/",
        "javascript:alert(1)",
        "file:///etc/passwd",
        "https:///nowhere",
        "https://user@example.com/",
        "https://user:password@example.com/",
        "https://:@example.com/",
        "https://127.0.0.1/",
        "https://127.1/",
        "https://2130706433/",
        "https://0x7f.0.0.1/",
        "https://0x7f000001/",
        "https://10.1.2.3/",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[fd00::1]/",
        "https://localhost/",
        "https://LOCALHOST./",
        "https://a.localhost/",
        "https://redis.internal/",
        "https://printer.local/",
        "https://intranet/",
        "https://example.com\\@127.0.0.1/",
        "https://exam ple.com/",
        "https://example.com/\nHost: x",
        "https://example.com\t/",
        "https://example.com:99999/",
        "https://example.com:x/",
        "https://-bad-.example.com/",
        "https://[::1",
        "https://" + "a" * 2000 + ".example.com/",
        None,
        7,
    ],
)
def test_flw_29_addresses_that_nobody_may_be_sent_to(field: str, address: Any) -> None:
    with pytest.raises(BadInput) as caught:
        Settings(**{field: address})
    assert caught.value.param == field


@pytest.mark.parametrize(
    "address", ["https://example.com", "https://hooks.example.co.uk:8443/a/b?c=d#e", "https://x.example.com./"]
)
def test_addresses_that_are_fine(address: str) -> None:
    assert Settings(webhook_url=address, logo_url=address).webhook_url == address


def test_networks_are_written_in_one_way() -> None:
    given = ("192.0.2.77/24", "192.0.2.0/255.255.255.0", "2001:DB8::1/32", "198.51.100.7")
    assert Settings(allowed_ip_ranges=given).allowed_ip_ranges == ("192.0.2.0/24", "2001:db8::/32", "198.51.100.7/32")


@pytest.mark.parametrize(
    ("address", "admitted"),
    [
        ("192.0.2.1", True),
        ("192.0.3.1", False),
        ("::ffff:192.0.2.1", True),
        ("::ffff:192.0.3.1", False),
        ("2001:db8::5", True),
        ("2001:db9::5", False),
        ("2001:db8::5%eth0", True),
        ("not an address", False),
        ("", False),
        (None, False),
    ],
)
def test_who_may_come_in(address: str | None, admitted: bool) -> None:
    allowed = [ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")]
    assert settings.admits(allowed, address) is admitted
    assert settings.admits([], address) is True


async def test_nobody_locks_the_door_from_outside(database: Database, tenant: Tenant) -> None:
    inside = {"allowed_ip_ranges": ["192.0.2.0/24"]}
    with pytest.raises(Conflict, match="lock you out") as caught:
        await settings.patch(database, tenant.id, inside, caller_ip="198.51.100.1")
    assert caught.value.code == "would_lock_out"
    with pytest.raises(Conflict):
        await settings.put(database, tenant.id, Settings(allowed_ip_ranges=("192.0.2.0/24",)), caller_ip="::1")
    assert (await settings.get(database, tenant.id)).allowed_ip_ranges == ()
    await settings.patch(database, tenant.id, inside, caller_ip="192.0.2.9")
    assert (await settings.get(database, tenant.id)).allowed_ip_ranges == ("192.0.2.0/24",)


async def test_flw_26_settings_bite_where_keys_are_checked(database: Database, tenant: Tenant) -> None:
    """A key carries them to every door, and is read again when they change."""
    feed = Feed(database)
    keyring = Keyring(database, feed)
    await feed.start()
    key = await keys.issue(database, tenant.id, "a key")
    before = await keyring.verify(key.key)
    assert (before.networks, before.session_timeout, before.voice_provider) == ((), 3600, "local")
    changes = {
        "allowed_ip_ranges": ["192.0.2.0/24"],
        "session_timeout_minutes": 5,
        "default_voice_provider": "disabled",
    }
    await settings.patch(database, tenant.id, changes)
    async with asyncio.timeout(10):
        while not (grant := await keyring.verify(key.key)).networks:
            await asyncio.sleep(0.01)
    assert (grant.networks, grant.session_timeout) == ((ip_network("192.0.2.0/24"),), 300)
    assert grant.voice_provider == "disabled"
    assert not settings.admits(grant.networks, "198.51.100.1")
    await feed.close()


async def test_a_change_is_told_to_the_nodes_and_to_the_audit_log(database: Database, tenant: Tenant) -> None:
    feed, told = Feed(database), asyncio.Queue[Change]()
    feed.subscribe(told.put_nowait)
    await feed.start()
    await settings.patch(database, tenant.id, {"allowed_ip_ranges": ["192.0.2.0/24"], "require_mfa": False})
    async with asyncio.timeout(10):
        while (change := await told.get()).tenant_id != tenant.id or change.kind != ChangeKind.TENANT:
            pass
    await feed.close()
    async with database.tenant(tenant.id) as session:
        line = (await session.execute(select(AuditEntry).order_by(AuditEntry.seq.desc()).limit(1))).scalar_one()
    assert (line.action, line.resource_type) == ("settings_change", "tenant_settings")
    assert (line.old_values, line.new_values) == (
        {"allowed_ip_ranges": []},
        {"allowed_ip_ranges": ["192.0.2.0/24"]},
    )
