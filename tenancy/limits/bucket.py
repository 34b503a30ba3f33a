"""One subject's two windows. Pure: time is an argument, in seconds that never go back."""

from __future__ import annotations

from collections.abc import Hashable

from agentvoicebox.tenancy.limits.rates import MINUTE, Rate
from agentvoicebox.tenancy.state import HOUR_MINUTES

Subject = tuple[str, Hashable]
"""Who is held to a rate: its kind (key, tenant, user, operator, ip, failures) and which one."""


class Bucket:
    """What a subject has used: the minute as the time when its bucket is empty (GCRA), the hour as counts by minute.

    The hour reaches back 60 minutes and what has passed of the current one: no 60 minutes see more than its limit.
    """

    __slots__ = (
        "foreign",
        "frees",
        "fresh",
        "kept",
        "minutes",
        "rate",
        "since",
        "subject",
        "synced",
        "tat",
        "told",
        "turn",
        "used",
    )

    def __init__(self, subject: Subject, rate: Rate, now: float) -> None:
        self.subject = subject
        self.rate = rate
        self.tat = now
        """When the minute's bucket is empty."""
        self.used = 0
        """Requests of the hour: those of `minutes`, of the current minute, and of other nodes."""
        self.fresh = 0
        """Those of this node that others have not been told of."""
        self.since = 0.0
        """When the first of these was; 0 when there are none."""
        self.turn = (now // MINUTE + 1) * MINUTE
        """When the current minute ends."""
        self.frees = self.turn + HOUR_MINUTES * MINUTE
        """When the oldest counted minute falls out of the hour."""
        self.minutes: list[tuple[int, int]] = []
        """This node's requests by minute, of the minutes before the current one."""
        self.kept = 0
        """Their sum."""
        self.foreign = 0
        """Requests of other nodes within the hour, as of `synced`."""
        self.synced = now
        self.told = 0.0
        """Until when nobody need be told that the limit was met."""

    def advance(self, now: float) -> None:
        """The minute has turned: book it, and forget what is more than an hour old."""
        mine = self.used - self.foreign - self.kept
        if mine:
            self.minutes.append((round(self.turn / MINUTE) - 1, mine))
            self.kept += mine
        minute = int(now // MINUTE)
        while self.minutes and self.minutes[0][0] < minute - HOUR_MINUTES:
            self.kept -= self.minutes.pop(0)[1]
        if now - self.synced > (HOUR_MINUTES + 1) * MINUTE:
            self.foreign = 0
        self.used = self.kept + self.foreign
        self.turn = (minute + 1) * MINUTE
        oldest = self.minutes[0][0] if self.minutes else minute
        self.frees = (oldest + HOUR_MINUTES + 1) * MINUTE

    def frees_room_for(self, cost: int, now: float) -> float:
        """Seconds until the hour has room for `cost`; to the next minute when that depends on other nodes' requests."""
        excess = self.used + cost - self.rate.per_hour
        for minute, count in self.minutes:
            if excess <= 0:
                break
            excess -= count
            if excess <= 0:
                return (minute + HOUR_MINUTES + 1) * MINUTE - now
        if excess > 0:
            return self.turn - now if self.foreign else self.turn + HOUR_MINUTES * MINUTE - now
        return 0.0

    def is_full_again(self, now: float, spare: int = 0) -> bool:
        """Whether forgetting the subject would give it no more than `spare` requests."""
        if now >= self.turn:
            self.advance(now)
        return self.tat <= now and self.used <= spare

    def learn(self, level: float, used: int, now: float) -> None:
        """What all nodes have counted, without what is fresh here. It empties no bucket, nor forgets our own."""
        mine = self.used - self.foreign
        self.foreign = max(0, used - (mine - self.fresh))
        self.used = mine + self.foreign
        self.tat = max(self.tat, now + level + self.fresh * self.rate.interval)
        self.synced = now
