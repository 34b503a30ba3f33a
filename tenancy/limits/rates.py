"""The numbers: what each kind of caller may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agentvoicebox.tenancy.models import RateClass, Tier

MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Two windows, both enforced: a bucket that holds a minute's requests and drains, and a count of the hour."""

    per_minute: int
    per_hour: int
    interval: float = field(init=False, repr=False)
    """Seconds in which one request drains away."""
    window: float = field(init=False, repr=False)
    """Seconds that the bucket holds: a minute, and a tenth of a request or less, for the rounding of floats."""

    def __post_init__(self) -> None:
        if self.per_minute < 1 or self.per_hour < 1:
            raise ValueError("a rate lets at least one request through")
        object.__setattr__(self, "interval", MINUTE / self.per_minute)
        object.__setattr__(self, "window", MINUTE + min(1e-4, self.interval / 10))


DEFAULT = Rate(60, 1_000)
"""Whoever shows no credential, by address."""
API_KEY = Rate(120, 5_000)
"""A key of the class `standard`; a signed-in user."""
ADMIN = Rate(300, 10_000)
"""A key of the class `elevated`; an operator of the platform."""
FAILURES = Rate(10, 100)
"""Credentials that were refused, by address."""
PAIRINGS = Rate(5, 30)
"""Devices that ask for a code, by address."""
LOOKS = Rate(30, 600)
"""Devices that ask whether their code was entered, by address."""
CLAIMS = Rate(5, 30)
"""Codes of devices that are entered, right or wrong, by tenant: one of 8 digits is not found by trying."""
CROWD = Rate(600, 36_000)
"""All addresses together that came when the table of addresses was full."""

KEYS: Mapping[RateClass, Rate | None] = {
    RateClass.STANDARD: API_KEY,
    RateClass.ELEVATED: ADMIN,
    RateClass.UNLIMITED: None,  # its tenant's rate still holds
}
TENANTS: Mapping[Tier, Rate] = {
    Tier.FREE: Rate(300, 10_000),
    Tier.STARTER: Rate(1_200, 60_000),
    Tier.PRO: Rate(6_000, 300_000),
    Tier.ENTERPRISE: Rate(60_000, 3_000_000),
}
"""All keys and users of a tenant together. An hour is fifty minutes' worth, and a third of the minutes' for `free`."""

SESSIONS: Mapping[Tier, int] = {Tier.FREE: 2, Tier.STARTER: 10, Tier.PRO: 50, Tier.ENTERPRISE: 500}
"""Live sessions of a tenant at once."""

SOCKET_MESSAGES = (100.0, 300.0)
"""Messages a second, and at once, on one socket: twice what a client sends that streams in pieces of 20 ms."""
SOCKET_AUDIO = (480_000.0, 2_880_000.0)
"""Bytes of audio a second, and at once: ten times real time at 24 kHz, and the first minute as fast as it comes."""
