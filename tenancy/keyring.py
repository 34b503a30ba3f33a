"""One node's view of all keys: checked from a cache that is never a second behind, their uses counted without a write
for each."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from sqlalchemy import extract, func, select, text

from agentvoicebox.config.errors import AvbError, Forbidden, NotFound, Refused, Unavailable
from agentvoicebox.tenancy import keys
from agentvoicebox.tenancy.changes import Change, Feed
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keys import Scope
from agentvoicebox.tenancy.models import (
    ApiKey,
    ChangeKind,
    RateClass,
    Tenant,
    TenantSettings,
    TenantStatus,
    Tier,
    VoiceProvider,
)
from agentvoicebox.tenancy.settings import admits

Network = IPv4Network | IPv6Network

_CACHED = 10_000
_OLDEST = 60.0
"""Seconds after which a cached key is read again, whatever the feed says."""
_SHUT = 1.0
"""Seconds for which it is remembered that a key's tenant is not active, unless that changes ..."""
_OFTEN = 5
"""... once the key has been asked for so many times."""
_AT_ONCE = 3
"""Look-ups under way, of the five connections that the system has; after a restart all devices' keys are asked for."""
_QUEUE = 10.0
"""Seconds for which one waits for its turn."""
_JOIN = 0.3
"""Seconds for which a look-up under way answers others who ask for the same key."""

_FLUSH = 5.0
_PATIENCE = 5.0
_MOST_USED = 100_000
"""Keys whose uses are kept while the store is away; those of further ones are not counted."""

_NOBODY = ip_network("::/128")
"""Stands for a range that cannot be read: no client has this address."""

# What the columns default to; most tenants decide nothing.
_DEFAULTS = TenantSettings(
    default_voice_provider=VoiceProvider.LOCAL,
    default_stt_model="base",
    default_tts_voice="am_onyx",
    allowed_ip_ranges=[],
    session_timeout_minutes=60,
)

# Rows are locked in one order first, so that two nodes never wait for each other.
_COUNT = text("""
WITH used AS (
    SELECT * FROM unnest(
        CAST(:tenants AS uuid[]), CAST(:ids AS uuid[]), CAST(:counts AS bigint[]), CAST(:ats AS timestamptz[]),
        CAST(:ips AS inet[])
    ) AS used (tenant_id, id, uses, at, ip)
), locked AS (
    SELECT k.tenant_id, k.id FROM api_keys k JOIN used USING (tenant_id, id)
    ORDER BY k.tenant_id, k.id FOR NO KEY UPDATE OF k
)
UPDATE api_keys AS k SET
    usage_count = k.usage_count + used.uses,
    last_used_at = greatest(k.last_used_at, used.at),
    last_used_ip = CASE WHEN k.last_used_at > used.at THEN k.last_used_ip ELSE used.ip END
FROM used JOIN locked USING (tenant_id, id)
WHERE k.tenant_id = used.tenant_id AND k.id = used.id
""")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Grant:
    """Who holds a good key, what for, and what the tenant has decided about it."""

    tenant_id: uuid.UUID
    tenant_slug: str
    tenant_name: str
    tier: Tier
    key_id: uuid.UUID
    project_id: uuid.UUID | None
    scopes: frozenset[str]
    rate_class: RateClass
    expires_at: datetime | None
    networks: tuple[Network, ...]
    """Where its user must be; empty for anywhere."""
    session_timeout: float
    """Seconds."""
    voice_provider: VoiceProvider
    default_stt_model: str
    default_tts_voice: str

    def require(self, scope: Scope | str) -> None:
        """Raise `Forbidden` unless the key has this scope."""
        if scope not in self.scopes:
            raise Forbidden(f"This key lacks the scope {str(scope)!r}; use one that has it.", code="insufficient_scope")

    def admit(self, ip: str | None) -> None:
        """Raise `Forbidden` unless the tenant's keys may be used from this address; None is an unknown one."""
        if not admits(self.networks, ip):
            raise Forbidden(
                "This key may not be used from your address; an administrator of the tenant can allow it in its "
                "settings.",
                code="ip_not_allowed",
            )


@dataclass(slots=True)
class _Held:
    """A key in the cache; times are of the ring's clock."""

    grant: Grant
    ends: float
    """When the key expires."""
    until: float
    """When this is no answer any more."""


@dataclass(slots=True)
class _Reading:
    """A look-up under way, or one that waits for its turn and will find what is true then."""

    task: asyncio.Task[_Held]
    begun: float | None = None
    changes: int = 0
    """How many the feed had told when it began."""


@dataclass(slots=True)
class _Shut:
    """A key whose tenant is not active, and how often that has been read lately."""

    error: Forbidden | NotFound
    until: float
    times: int = 1


@dataclass(slots=True)
class _Use:
    """What has not been written yet of a key's uses."""

    tenant_id: uuid.UUID
    count: int
    at: float
    ip: str | None


class Keyring:
    """Checks keys.

    It answers from memory only while `feed` is fresh, that is under a second behind, else from the database, and not at
    all when that is away.
    """

    def __init__(self, database: Database, feed: Feed, clock: Callable[[], float] = time.monotonic) -> None:
        self.used_total: dict[RateClass, int] = dict.fromkeys(RateClass, 0)
        """Uses since the start, for `avb_api_key_usage_total`; by class only, since keys and tenants have no bound."""
        self._database = database
        self._feed = feed
        self._clock = clock
        self._held: OrderedDict[bytes, _Held] = OrderedDict()
        self._shut: dict[bytes, _Shut] = {}
        self._tenants: dict[uuid.UUID, dict[uuid.UUID, bytes]] = {}
        """The digests held, by tenant and key."""
        self._reading: dict[bytes, _Reading] = {}
        self._few = asyncio.Semaphore(_AT_ONCE)
        self._changes = 0
        self._revoked: list[Callable[[uuid.UUID], None]] = []
        self._changed: list[Callable[[uuid.UUID, uuid.UUID | None], None]] = []
        self._uses: dict[uuid.UUID, _Use] = {}
        self._closing = asyncio.Event()
        self._counting: asyncio.Task[None] | None = None
        self._feed.subscribe(self._take)
        self._feed.on_gap(self._forget)

    async def start(self) -> None:
        """Begin to write down uses."""
        self._counting = asyncio.create_task(self._count(), name="key uses")

    async def close(self) -> None:
        """Write down the uses so far."""
        self._closing.set()
        if self._counting is not None:
            await self._counting
            self._counting = None
        await self._flush_if_possible()

    def on_revoked(self, callback: Callable[[uuid.UUID], None]) -> None:
        """Call `callback` with the id of every key that is revoked, or whose tenant stops being active, from now on."""
        self._revoked.append(callback)

    def on_changed(self, callback: Callable[[uuid.UUID, uuid.UUID | None], None]) -> None:
        """Call `callback` with tenant and key when what the key grants, or how long, has changed; the key is None when
        all of the tenant have. What `verify` says from then on is the new state."""
        self._changed.append(callback)

    def on_gap(self, callback: Callable[[], None]) -> None:
        """Call `callback` when changes may have been missed, as in a fail-over of the database."""
        self._feed.on_gap(callback)

    # --- whose key is this --------------------------------------------------------------------------------------------

    def known(self, secret: str) -> Grant | None:
        """Whose key this is, if that can be said from memory."""
        held = self._held.get(hashlib.sha256(secret.encode(errors="replace")).digest())
        now = self._clock()
        return None if held is None or now >= held.until or now >= self._feed.fresh_until else held.grant

    async def verify(self, secret: str) -> Grant:
        """Whose key this is. Raises `Refused`, `Forbidden`, `NotFound` for a deleted tenant, `Unavailable`."""
        digest = hashlib.sha256(secret.encode(errors="replace")).digest()
        held = self._held.get(digest)
        now = self._clock()
        if held is None or now >= held.until or now >= self._feed.fresh_until:
            return await self._verify_slowly(secret, digest, held, now)
        self._held.move_to_end(digest)
        return held.grant

    async def _verify_slowly(self, secret: str, digest: bytes, held: _Held | None, now: float) -> Grant:
        shut = self._shut.get(digest)
        if shut is not None and shut.times >= _OFTEN and now < min(shut.until, self._feed.fresh_until):
            raise type(shut.error)(shut.error.message, code=shut.error.code)
        if held is None or now < held.ends or now >= self._feed.fresh_until:
            if len(secret) != keys.LENGTH or not secret.startswith(keys.PREFIX):
                raise _unknown()
            held = await self._read_once(digest, now)
            now = self._clock()
        # By our own time since the database compared its clock with the expiry: neither clock, set back, revives a key.
        if now >= held.ends:
            raise Refused("This key has expired; issue a new one.", code="api_key_expired")
        return held.grant

    async def _read_once(self, digest: bytes, now: float) -> _Held:
        """Ask the database, or wait with those who have just asked it for the same key."""
        reading = self._reading.get(digest)
        begun = None if reading is None else reading.begun
        late = begun is not None and now - begun > _JOIN
        if reading is None or late or (begun is not None and reading.changes != self._changes):
            reading = _Reading(asyncio.create_task(self._read_in_turn(digest), name="key look-up"))
            self._reading[digest] = reading
            reading.task.add_done_callback(functools.partial(self._done_reading, digest))
        try:
            return await asyncio.shield(reading.task)
        except AvbError as error:
            # Each waiter raises its own: an exception collects the traceback of everyone who raises it.
            raise type(error)(error.message, code=error.code, param=error.param) from error

    def _done_reading(self, digest: bytes, task: asyncio.Task[_Held]) -> None:
        if (reading := self._reading.get(digest)) is not None and reading.task is task:
            del self._reading[digest]
        if not task.cancelled():
            task.exception()  # whoever waited may be gone

    async def _read_in_turn(self, digest: bytes) -> _Held:
        try:
            async with asyncio.timeout(_QUEUE):
                await self._few.acquire()
        except TimeoutError as error:
            raise Unavailable("Too many keys are asked for at once; try again in a few seconds.") from error
        try:
            return await self._read(digest, self._reading[digest])
        finally:
            self._few.release()

    async def _read(self, digest: bytes, reading: _Reading) -> _Held:
        changes, asked_at = self._changes, self._clock()
        reading.begun, reading.changes = asked_at, changes
        async with self._database.system() as session:
            found = (
                await session.execute(
                    select(
                        ApiKey,
                        Tenant,
                        TenantSettings,
                        extract("epoch", ApiKey.expires_at - func.clock_timestamp()),
                    )
                    .join(Tenant, Tenant.id == ApiKey.tenant_id)
                    .outerjoin(TenantSettings, TenantSettings.tenant_id == ApiKey.tenant_id)
                    .where(ApiKey.key_hash == digest.hex())
                )
            ).one_or_none()
        if found is None:
            raise _unknown()
        key, tenant, settings, left = found
        if key.revoked_at is not None:
            raise Refused("This key has been revoked; issue a new one.", code="api_key_revoked")
        grant = _grant(key, tenant, settings or _DEFAULTS)
        ends = float("inf") if left is None else asked_at + float(left)
        before = self._held.get(digest)
        if before is not None and before.grant.expires_at == grant.expires_at:
            ends = min(ends, before.ends)
        if asked_at < ends:
            try:
                _check_active(tenant.status)
            except (Forbidden, NotFound) as error:
                if changes == self._changes:
                    self._shut_out(digest, asked_at, error)
                raise
        held = _Held(grant, ends, min(ends, asked_at + _OLDEST))
        if changes == self._changes:  # else we may have read what was before
            self._keep(digest, held)
        return held

    def _shut_out(self, digest: bytes, now: float, error: Forbidden | NotFound) -> None:
        """Remember for a moment that the key's tenant is not active: its devices go on asking."""
        before = self._shut.get(digest)
        if before is not None and now < before.until:
            before.times += 1
            return
        if len(self._shut) >= _CACHED:
            self._shut.clear()
        self._shut[digest] = _Shut(error, now + _SHUT)

    def _keep(self, digest: bytes, held: _Held) -> None:
        self._held[digest] = held
        self._held.move_to_end(digest)
        self._tenants.setdefault(held.grant.tenant_id, {})[held.grant.key_id] = digest
        if len(self._held) > _CACHED:
            oldest = next(iter(self._held.values())).grant
            self._evict(oldest.tenant_id, oldest.key_id)

    # --- what has changed ---------------------------------------------------------------------------------------------

    def _take(self, change: Change) -> None:
        if change.kind in (ChangeKind.RELATIONS, ChangeKind.VOICE):
            return  # nothing that a key carries with it
        self._changes += 1
        self._shut.clear()
        if change.key_id is not None:
            self._evict(change.tenant_id, change.key_id)
        else:
            for digest in self._tenants.pop(change.tenant_id, {}).values():
                del self._held[digest]
        if change.kind != ChangeKind.REVOKED:
            for changed in self._changed:
                _tell(changed, change.tenant_id, change.key_id)
        elif change.key_id is not None:
            for revoked in self._revoked:
                _tell(revoked, change.key_id)

    def _evict(self, tenant_id: uuid.UUID, key_id: uuid.UUID) -> None:
        held = self._tenants.get(tenant_id, {})
        digest = held.pop(key_id, None)
        if digest is not None:
            del self._held[digest]
            if not held:
                del self._tenants[tenant_id]

    def _forget(self) -> None:
        self._changes += 1
        self._shut.clear()
        self._held.clear()
        self._tenants.clear()

    # --- how much keys are used ---------------------------------------------------------------------------------------

    def used(self, grant: Grant, ip: str | None = None) -> None:
        """Note one use of the key, from that address if it is known; it is in the database some seconds later.

        The count is for people to see whether a key is in use, not to be billed: a crash loses those seconds.
        """
        self.used_total[grant.rate_class] += 1
        use = self._uses.get(grant.key_id)
        if use is not None:
            use.count += 1
            use.at = time.time()
            use.ip = ip
        elif len(self._uses) < _MOST_USED:
            self._uses[grant.key_id] = _Use(grant.tenant_id, 1, time.time(), ip)

    async def flush(self) -> None:
        """Write down the uses so far, in one statement. Raises `Unavailable`, and then keeps them for the next time."""
        uses, self._uses = self._uses, {}
        if not uses:
            return
        try:
            async with self._database.system() as session:
                await session.execute(
                    _COUNT,
                    {
                        "tenants": [use.tenant_id for use in uses.values()],
                        "ids": list(uses),
                        "counts": [use.count for use in uses.values()],
                        "ats": [datetime.fromtimestamp(use.at, UTC) for use in uses.values()],
                        "ips": [_address(use.ip) for use in uses.values()],
                    },
                )
        except BaseException:
            self._put_back(uses)
            raise

    def _put_back(self, uses: dict[uuid.UUID, _Use]) -> None:
        for key_id, later in self._uses.items():
            if (use := uses.get(key_id)) is not None:
                use.count, use.at, use.ip = use.count + later.count, later.at, later.ip
            elif len(uses) < _MOST_USED:
                uses[key_id] = later
        self._uses = uses

    async def _count(self) -> None:
        while not self._closing.is_set():
            try:
                async with asyncio.timeout(_FLUSH):
                    await self._closing.wait()
            except TimeoutError:
                await self._flush_if_possible()

    async def _flush_if_possible(self) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                await self.flush()
        except (AvbError, TimeoutError) as error:
            _log.warning("The uses of %d keys cannot be written down now: %s", len(self._uses), error)
        except Exception:
            _log.exception("The uses of keys cannot be written down.")


def _grant(key: ApiKey, tenant: Tenant, settings: TenantSettings) -> Grant:
    return Grant(
        tenant_id=tenant.id,
        tenant_slug=tenant.slug,
        tenant_name=tenant.name,
        tier=tenant.tier,
        key_id=key.id,
        project_id=key.project_id,
        scopes=frozenset(key.scopes),
        rate_class=key.rate_limit_tier,
        expires_at=key.expires_at,
        networks=tuple(_network(given) for given in settings.allowed_ip_ranges),
        session_timeout=settings.session_timeout_minutes * 60.0,
        voice_provider=settings.default_voice_provider,
        default_stt_model=settings.default_stt_model,
        default_tts_voice=settings.default_tts_voice,
    )


def _network(given: str) -> Network:
    try:
        return ip_network(given, strict=False)
    except ValueError:
        return _NOBODY


def _address(ip: str | None) -> str | None:
    """As the database holds it; what is no address is none, since the count matters more."""
    try:
        return str(ip_address((ip or "").partition("%")[0]))
    except ValueError:
        return None


def _tell(callback: Callable[..., None], *what: object) -> None:
    try:
        callback(*what)
    except Exception:
        _log.exception("Could not act on a change of a key.")


def _unknown() -> Refused:
    return Refused("This API key is not known; check it, or issue a new one.", code="invalid_api_key")


def _check_active(status: TenantStatus) -> None:
    if status == TenantStatus.ACTIVE:
        return
    if status == TenantStatus.DELETED:
        raise NotFound("There is no such tenant.", code="tenant_not_found")
    if status == TenantStatus.SUSPENDED:
        raise Forbidden("This tenant is suspended; its administrator can ask why.", code="tenant_suspended")
    raise Forbidden("This tenant is not active yet; finish its onboarding.", code="tenant_pending")
