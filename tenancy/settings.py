"""What a tenant's administrators have decided for all of it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, Conflict, NotFound
from agentvoicebox.tenancy import audit, models
from agentvoicebox.tenancy.checks import chosen, number, public_url, shaped, yes_or_no
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import Action, VoiceProvider
from agentvoicebox.tenancy.voices import WHISPER_MODELS

MOST_NETWORKS = 100
"""Each request of the tenant is compared with all of them."""

_COLOUR = re.compile(r"#[0-9A-Fa-f]{6}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]*")

_STT_MODELS = ("auto", *WHISPER_MODELS)

Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Settings:
    """One tenant's settings; a value that makes no sense raises `BadInput` naming its field."""

    logo_url: str = ""
    """An https address; empty for none."""
    primary_color: str = "#6366f1"
    default_voice_provider: str = VoiceProvider.LOCAL
    default_stt_model: str = "base"
    """A Whisper model, tiny to large-v3; `auto` and the default leave it to the operator."""
    default_tts_voice: str = "am_onyx"
    default_llm_provider: str = "groq"
    default_llm_model: str = "llama-3.1-8b-instant"
    email_notifications_enabled: bool = True
    webhook_url: str = ""
    """An https address that is told of what happens; empty for none."""
    allowed_ip_ranges: tuple[str, ...] = ()
    """Networks from which alone the tenant can be reached; none means from everywhere."""
    require_mfa: bool = False
    session_timeout_minutes: int = 60
    """5 to 1440, after which a session in which nobody speaks is closed."""

    def __post_init__(self) -> None:
        for param in ("logo_url", "webhook_url"):
            if getattr(self, param) != "":
                public_url(getattr(self, param), param)
        shaped(self.primary_color, "primary_color", _COLOUR, "a colour such as #6366f1")
        provider = chosen(self.default_voice_provider, "default_voice_provider", VoiceProvider)
        object.__setattr__(self, "default_voice_provider", provider)
        for param, longest in (
            ("default_tts_voice", 50),
            ("default_llm_provider", 50),
            ("default_llm_model", 100),
        ):
            like = f"a name of letters, digits and . _ : / + -, at most {longest} characters"
            if len(shaped(getattr(self, param), param, _NAME, like)) > longest:
                raise BadInput(f"{param} must be {like}.", param=param)
        if self.default_stt_model not in _STT_MODELS:
            raise BadInput(f"default_stt_model must be {', '.join(_STT_MODELS)}.", param="default_stt_model")
        yes_or_no(self.email_notifications_enabled, "email_notifications_enabled")
        yes_or_no(self.require_mfa, "require_mfa")
        number(self.session_timeout_minutes, "session_timeout_minutes", 5, 1440)
        found = networks(self.allowed_ip_ranges)
        object.__setattr__(self, "allowed_ip_ranges", tuple(dict.fromkeys(map(str, found))))


def networks(ranges: object) -> tuple[Network, ...]:
    """The networks of `allowed_ip_ranges`; the bits of a host within its network do not matter. Raises `BadInput`."""
    param = "allowed_ip_ranges"
    if isinstance(ranges, str | bytes | Mapping) or not isinstance(ranges, Iterable):
        raise BadInput(f"{param} must be a list of networks such as 192.0.2.0/24.", param=param)
    given = list(ranges)
    if len(given) > MOST_NETWORKS:
        raise BadInput(f"{param} must be at most {MOST_NETWORKS} networks.", param=param)
    found: list[Network] = []
    for text in given:
        try:
            if not isinstance(text, str):
                raise ValueError
            found.append(ip_network(text, strict=False))
        except ValueError as error:
            raise BadInput(f"{param} must be networks such as 192.0.2.0/24 or 2001:db8::/32.", param=param) from error
    return tuple(found)


def admits(allowed: Iterable[Network], address: str | None) -> bool:
    """Whether a caller of this address may come in; if there are networks, one without an address may not."""
    allowed = tuple(allowed)
    if not allowed:
        return True
    try:
        caller: IPv4Address | IPv6Address = ip_address((address or "").partition("%")[0])
    except ValueError:
        return False
    if isinstance(caller, IPv6Address) and caller.ipv4_mapped is not None:
        caller = caller.ipv4_mapped  # how a socket for both kinds shows the older one
    return any(caller in network for network in allowed)


async def get(database: Database, tenant_id: uuid.UUID) -> Settings:
    """The tenant's settings; what it has never set is as by default. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        row = await session.get(models.TenantSettings, tenant_id)
        if row is None:
            await _must_exist(session, tenant_id)
    return _read(row) if row is not None else Settings()


async def put(database: Database, tenant_id: uuid.UUID, wanted: Settings, *, caller_ip: str | None = None) -> Settings:
    """Replace all settings; keys carry them within a second. Raises as `patch`."""
    return await _write(database, tenant_id, asdict(wanted), caller_ip)


async def patch(
    database: Database, tenant_id: uuid.UUID, changes: Mapping[str, Any], *, caller_ip: str | None = None
) -> Settings:
    """Replace these settings and leave the others.

    Raises `BadInput` for an unknown name, a null or a value without sense, `Conflict` where the caller at `caller_ip`
    would lock itself out, `NotFound`.
    """
    for name, value in changes.items():
        if name not in Settings.__dataclass_fields__:
            raise BadInput(f"There is no setting {str(name)[:50]!r}.", param=str(name)[:50])
        if value is None:
            raise BadInput(f"{name} cannot be null; leave it out to keep it.", param=name)
    return await _write(database, tenant_id, changes, caller_ip)


async def _write(
    database: Database, tenant_id: uuid.UUID, changes: Mapping[str, Any], caller_ip: str | None
) -> Settings:
    async with database.tenant(tenant_id) as session:
        await _must_exist(session, tenant_id)
        await session.execute(insert(models.TenantSettings).values(tenant_id=tenant_id).on_conflict_do_nothing())
        # Locked, so that of two changes at once neither is written over.
        row = (await session.execute(select(models.TenantSettings).with_for_update())).scalar_one()
        before = _read(row)
        wanted = replace(before, **changes)
        if caller_ip is not None and not admits(networks(wanted.allowed_ip_ranges), caller_ip):
            raise Conflict(
                "These ranges would lock you out: include your own address, or make the change from within them.",
                code="would_lock_out",
                param="allowed_ip_ranges",
            )
        old, new = asdict(before), asdict(wanted)
        if changed := [name for name in new if old[name] != new[name]]:
            stored = {**new, "allowed_ip_ranges": list(wanted.allowed_ip_ranges), "updated_at": func.now()}
            mine = models.TenantSettings.tenant_id == tenant_id
            await session.execute(update(models.TenantSettings).where(mine).values(stored))
            await audit.append(
                session,
                Action.SETTINGS_CHANGE,
                "tenant_settings",
                tenant_id,
                f"Changed {', '.join(changed)}",
                old={name: old[name] for name in changed},
                new={name: new[name] for name in changed},
            )
    return wanted


def _read(row: models.TenantSettings) -> Settings:
    stored = {field.name: getattr(row, field.name) for field in fields(Settings)}
    if stored["default_stt_model"] not in _STT_MODELS:  # earlier releases took any name
        stored["default_stt_model"] = "auto"
    return Settings(**{**stored, "allowed_ip_ranges": tuple(row.allowed_ip_ranges)})


async def _must_exist(session: AsyncSession, tenant_id: uuid.UUID) -> None:
    if await session.get(models.Tenant, tenant_id) is None:
        raise NotFound("There is no such tenant.", code="tenant_not_found")
