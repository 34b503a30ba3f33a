"""The decisions. All are made here and at once; a `Reconciler` tells nodes of one another's."""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

from agentvoicebox.config.errors import RateLimited
from agentvoicebox.tenancy.limits.bucket import Bucket, Subject
from agentvoicebox.tenancy.limits.rates import CROWD, DEFAULT, FAILURES, KEYS, MINUTE, TENANTS, Rate
from agentvoicebox.tenancy.models import RateClass, Tier
from agentvoicebox.tenancy.state import DEBT, Standing, Use

STRANGERS = 100_000
"""Addresses that are remembered at most, some 40 MB of them."""

_STRANGE = ("ip", "failures", "pairings", "looks")
"""Kinds of subjects that are addresses."""
_EVERYBODY = "*"
_SWEEP_AT = 1024
_SWEEP_PAUSE = 1.0
_LATE = 1.0
"""Seconds after which what was used has partly drained before it could be told."""

_log = logging.getLogger(__name__)


class Holder(Protocol):
    """Who shows a good key: a `Grant`."""

    @property
    def tenant_id(self) -> uuid.UUID: ...
    @property
    def key_id(self) -> uuid.UUID: ...
    @property
    def tier(self) -> Tier: ...
    @property
    def rate_class(self) -> RateClass: ...


class Decision:
    """Whether a subject may go on, and how it stands afterwards; the numbers are those of its tighter window."""

    __slots__ = ("_epoch", "_frees", "_now", "_tat", "_used", "allowed", "rate", "retry_after")

    def __init__(
        self,
        allowed: bool,
        rate: Rate,
        now: float,
        epoch: float,
        tat: float,
        used: int,
        frees: float,
        retry_after: float,
    ) -> None:
        self.allowed = allowed
        self.rate = rate
        self.retry_after = retry_after
        """Seconds until the same would be allowed; 0 when it is."""
        self._now = now
        self._epoch = epoch
        self._tat = tat
        self._used = used
        self._frees = frees

    @property
    def limit(self) -> int:
        """Requests that the window lets through."""
        return self.rate.per_hour if self.is_hourly else self.rate.per_minute

    @property
    def remaining(self) -> int:
        """Requests that would be allowed right now."""
        return max(0, min(self._minutely, self._hourly))

    @property
    def reset(self) -> int:
        """When there will be more (hour) or all of them again (minute), in seconds since 1970."""
        return math.ceil((self._frees if self.is_hourly else max(self._tat, self._now)) + self._epoch)

    @property
    def _minutely(self) -> int:
        return math.floor((self.rate.window - max(0.0, self._tat - self._now)) / self.rate.interval)

    @property
    def _hourly(self) -> int:
        return self.rate.per_hour - self._used

    @property
    def is_hourly(self) -> bool:
        """Whether the tighter window is the hour's."""
        return self._hourly <= self._minutely


class Exceeded(RateLimited):
    """A rate was met. `decision` says which, for the headers of the answer."""

    def __init__(self, decision: Decision) -> None:
        wait = math.ceil(decision.retry_after)
        window = "an hour" if decision.is_hourly else "a minute"
        super().__init__(
            f"Too many requests: {decision.limit} {window} are allowed; try again in {wait} s.",
            retry_after=wait,
        )
        self.decision = decision


def headers(decision: Decision) -> list[tuple[str, str]]:
    """What a response says about the rate that its request was held to."""
    found = [
        ("X-RateLimit-Limit", str(decision.limit)),
        ("X-RateLimit-Remaining", str(decision.remaining)),
        ("X-RateLimit-Reset", str(decision.reset)),
    ]
    if not decision.allowed:
        found.append(("Retry-After", str(math.ceil(decision.retry_after))))
    return found


class Limiter:
    """Holds subjects to their rates. `clock` decides and should be monotonic; `wall` is only shown.

    Of nodes that share a state each decides alone, and tells the others every T (a tenth of a second, and the round
    trip). N nodes together admit to a subject, in any time t, at most

        burst + rate · t + (N - 1) · a

    where `a` is what one node admits within T: no more than it is sent in that time, nor than the burst. What was
    admitted too much is a debt, up to one window, that all of them wait for, so that the rate holds in the long run.
    While the state is away each node holds every subject to the whole rate by itself: N times the rate, never more.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        strangers: int = STRANGERS,
        failures: Rate = FAILURES,
    ) -> None:
        self.failures = failures
        """Credentials that an address may show in vain."""
        self._clock = clock
        self._wall = wall
        self._lag = 0.0
        self._now = clock()
        self._epoch = wall() - self._now
        self._buckets: dict[Subject, Bucket] = {}
        self._touched: list[Bucket] = []
        self._strangers = 0
        self._most_strangers = strangers
        self._sweep_at = _SWEEP_AT
        self._next_sweep = 0.0
        self.degraded = False
        """Whether other nodes' decisions are unknown at present."""

    def __len__(self) -> int:
        """How many subjects are remembered."""
        return len(self._buckets)

    # --- decisions ----------------------------------------------------------------------------------------------------

    def decide(self, subject: Subject, rate: Rate, cost: int = 1) -> Decision:
        """Count `cost` requests if both windows have room for them. Nothing is counted when they have not."""
        now = self._clock() + self._lag
        if now < self._now:  # it goes on from where it was, so that no bucket opens, and none waits for its return
            self._lag += self._now - now
            now = self._now
        self._now = now
        bucket = self._buckets.get(subject)
        if bucket is None:
            bucket = self._open(subject, rate, now)
            if bucket.subject is not subject:
                rate = CROWD
        if now >= bucket.turn:
            self._turn(bucket, now)
        tat = bucket.tat
        if tat < now:
            tat = now
        new = tat + cost * rate.interval
        used = bucket.used + cost
        if new - now > rate.window or used > rate.per_hour:
            return self._refuse(bucket, rate, cost, now)
        if not bucket.since:
            self._touch(bucket, rate, now)
        bucket.tat = new
        bucket.used = used
        bucket.fresh += cost
        return Decision(True, rate, now, self._epoch, new, used, bucket.frees, 0.0)

    def admit(self, subject: Subject, rate: Rate, ip: str = "") -> Decision:
        """Count one request. Raises `Exceeded`. The address, if known, stands hashed in the log."""
        decision = self.decide(subject, rate)
        if not decision.allowed:
            self._tell(subject, decision, ip)
            raise Exceeded(decision)
        return decision

    def admit_request(self, holder: Holder, ip: str = "") -> Decision:
        """Count one request of a key and its tenant, or of neither; the tighter of both. Raises `Exceeded`."""
        rate = KEYS[holder.rate_class]
        tenant = ("tenant", holder.tenant_id), TENANTS[holder.tier]
        if rate is None:
            return self.admit(*tenant, ip)
        subject = ("key", holder.key_id)
        own = self.admit(subject, rate, ip)
        try:
            all_ = self.admit(*tenant, ip)
        except Exceeded:
            self._take_back(subject)
            raise
        return own if own.remaining <= all_.remaining else all_

    def admit_anonymous(self, ip: str) -> Decision:
        """Count one request without a credential. Raises `Exceeded`."""
        return self.admit_address("ip", ip, DEFAULT)

    def admit_address(self, kind: str, ip: str, rate: Rate) -> Decision:
        """Count one request of an address among those of a kind. Raises `Exceeded`."""
        return self.admit((kind, network(ip)), rate)

    def check_failures(self, ip: str) -> None:
        """Ask this before looking at a credential. Raises `Exceeded` for an address that showed too many bad ones."""
        bucket = self._buckets.get(("failures", network(ip)))
        if bucket is None and self._strangers >= self._most_strangers:
            bucket = self._buckets.get(("failures", _EVERYBODY))
        if bucket is None:
            return
        now = self._later()
        if now >= bucket.turn:
            self._turn(bucket, now)
        rate = bucket.rate
        if max(bucket.tat, now) + rate.interval - now > rate.window or bucket.used + 1 > rate.per_hour:
            decision = self._refuse(bucket, rate, 1, now)
            self._tell(bucket.subject, decision)
            raise Exceeded(decision)

    def failed(self, ip: str) -> None:
        """Count a refused credential, also beyond the limit: many may have been looked at before one was refused."""
        subject = ("failures", network(ip))
        if not self.decide(subject, self.failures).allowed:
            bucket = self._buckets.get(subject) or self._buckets[("failures", _EVERYBODY)]
            bucket.tat = min(bucket.tat + bucket.rate.interval, self._now + DEBT)
            bucket.used += 1
            bucket.fresh += 1

    # --- what happens seldom ------------------------------------------------------------------------------------------

    def _later(self) -> float:
        now = self._clock() + self._lag
        if now < self._now:  # as in `decide`, which has no time for a call
            self._lag += self._now - now
            now = self._now
        self._now = now
        return now

    def _open(self, subject: Subject, rate: Rate, now: float) -> Bucket:
        self._epoch = self._wall() - now
        if len(self._buckets) >= self._sweep_at:
            self._sweep(now, 0)
            self._sweep_at = max(_SWEEP_AT, 2 * len(self._buckets))
        if subject[0] in _STRANGE:
            if self._strangers >= self._most_strangers and now >= self._next_sweep:
                self._next_sweep = now + _SWEEP_PAUSE
                self._sweep(now, 100)
            if self._strangers >= self._most_strangers:
                subject, rate = (subject[0], _EVERYBODY), CROWD
                if (crowd := self._buckets.get(subject)) is not None:
                    return crowd
            else:
                self._strangers += 1
        bucket = self._buckets[subject] = Bucket(subject, rate, now)
        return bucket

    def _sweep(self, now: float, share: int) -> None:
        """Forget who is full again; with a `share`, also strangers that used no more than that part of the hour."""
        kept = {}
        strangers = 0
        for subject, bucket in self._buckets.items():
            strange = subject[0] in _STRANGE and subject[1] != _EVERYBODY
            spare = bucket.rate.per_hour // share if strange and share else 0
            if not bucket.is_full_again(now, spare):
                kept[subject] = bucket
                strangers += strange
        self._buckets = kept
        self._strangers = strangers
        self._touched = [bucket for bucket in self._touched if kept.get(bucket.subject) is bucket]

    def _turn(self, bucket: Bucket, now: float) -> None:
        bucket.advance(now)
        self._epoch = self._wall() - now

    def _touch(self, bucket: Bucket, rate: Rate, now: float) -> None:
        bucket.rate = rate
        bucket.since = now or 1e-9
        self._touched.append(bucket)

    def _refuse(self, bucket: Bucket, rate: Rate, cost: int, now: float) -> Decision:
        if cost > rate.per_minute or cost > rate.per_hour:
            raise ValueError(f"{cost} at once never fit into {rate}")
        if not bucket.since:
            self._touch(bucket, rate, now)  # other nodes may know better
        wait = max(bucket.tat, now) + cost * rate.interval - rate.window - now
        if bucket.used + cost > rate.per_hour:
            wait = max(wait, bucket.frees_room_for(cost, now))
        return Decision(False, rate, now, self._epoch, bucket.tat, bucket.used, bucket.frees, wait)

    def _take_back(self, subject: Subject) -> None:
        bucket = self._buckets[subject]
        bucket.tat -= bucket.rate.interval
        bucket.used -= 1
        bucket.fresh -= 1

    def _tell(self, subject: Subject, decision: Decision, ip: str = "") -> None:
        bucket = self._buckets.get(subject) or self._buckets[subject[0], _EVERYBODY]
        if self._now >= bucket.told:  # once a minute for each, however often it asks
            bucket.told = self._now + MINUTE
            _log.warning(
                "rate_limit_exceeded subject=%s:%s limit=%d from=%s",
                subject[0],
                _hashed(subject[1]),
                decision.limit,
                _hashed(network(ip)) if ip else "-",
            )

    # --- what nodes tell one another ----------------------------------------------------------------------------------

    def collect(self) -> list[Told]:
        """What has been used since the last time, by subject; also subjects that were refused."""
        touched, self._touched = self._touched, []
        now = self._later()
        found = []
        for bucket in touched:
            found.append(Told(bucket, list(_uses(bucket, now)), bucket.fresh, bucket.since))
            bucket.fresh = 0
            bucket.since = 0.0
        return found

    def learn(self, standings: Iterable[tuple[Told, Standing]]) -> None:
        """What all nodes have counted of the subjects that were collected."""
        now = self._later()
        for told, standing in standings:
            if now >= told.bucket.turn:
                told.bucket.advance(now)
            told.bucket.learn(standing.level, standing.used, now)

    def give_back(self, collected: Iterable[Told]) -> None:
        """Nobody could be told: it is still fresh."""
        for bucket, _, fresh, since in collected:
            bucket.fresh += fresh
            if not bucket.since and self._buckets.get(bucket.subject) is bucket:
                self._touched.append(bucket)
            bucket.since = since


class Told(NamedTuple):
    """What other nodes are told of one subject."""

    bucket: Bucket
    uses: list[Use]
    fresh: int
    since: float


@lru_cache(maxsize=16_384)
def network(ip: str) -> str:
    """What counts as one address: an IPv4 address, or the 64 leading bits of an IPv6 one, which one customer has."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(address) >> 64 << 64))


def _hashed(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()[:16]


def _uses(bucket: Bucket, now: float) -> Iterator[Use]:
    """What is fresh, as others are to book it: at once, or, when it comes late, as if it had come in time."""
    key = f"{bucket.subject[0]}:{bucket.subject[1]}"
    weight = bucket.fresh * bucket.rate.interval
    if not bucket.fresh or now - bucket.since <= _LATE:
        yield Use(key, weight, bucket.fresh)
        return
    if now >= bucket.turn:
        bucket.advance(now)
    own = bucket.used - bucket.foreign
    left = min(bucket.fresh, own)
    current = min(left, own - bucket.kept)
    left -= current
    for minute, count in reversed(bucket.minutes):
        if left > 0:
            yield Use(key, 0.0, min(left, count), int(now // MINUTE) - minute)
            left -= count
    yield Use(key, min(weight, max(0.0, bucket.tat - now)), current)
