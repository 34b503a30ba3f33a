"""A node's open connections: closed when their credential dies, when nobody speaks for long, or on demand."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.door import Credential, Door
from agentvoicebox.config.errors import AvbError, Unavailable
from agentvoicebox.config.tasks import begin, end
from agentvoicebox.tenancy.keyring import Grant

log = logging.getLogger(__name__)

LONGEST_SESSION = 24 * 3600
"""Seconds after which a session is ended."""

EVERY = 5.0
"""Seconds between looks at who has been silent for too long."""

AGAIN = 1.0
"""Seconds before a credential is checked again that could not be; up to twice that, so that not all ask at once."""

MOVED = 1012
"""The close code for a device that is to connect again: "service restart", in the registry of RFC 6455."""

UNAUTHORISED = 4001
SUSPENDED = 4005
EXPIRED = 4008
"""Close codes of ours, beside those of RFC 6455."""

_CODES = {"tenant_suspended": SUSPENDED, "tenant_not_found": SUSPENDED, "tenant_pending": SUSPENDED}


class Connected(Protocol):
    """An open connection."""

    @property
    def age(self) -> float:
        """Seconds since the client came."""
        ...

    @property
    def idle(self) -> float:
        """Seconds since the client sent something."""
        ...

    def close(self, code: int, reason: str, problem: ev.Problem | None = None) -> None:
        """End the connection, after telling the client why."""
        ...


@dataclass(slots=True, eq=False)
class Visit:
    """One open connection and the credential behind it."""

    session_id: uuid.UUID
    """Or, of a device, a number that names the connection."""
    connection: Connected
    credential: Credential
    grant: Grant
    timer: asyncio.TimerHandle | None = None
    reason: str = ""
    """Why we ended it, for the session's record."""
    stays: bool = False
    """Whether it may be silent, and last, for as long as its credential does, as a device's; it is no session then."""

    def end(self, code: int, reason: str, message: str) -> None:
        """Close from our side, telling why."""
        self.reason = self.reason or reason
        self.connection.close(code, reason, ev.Problem(reason, message))


class Live:
    """All visits of this node."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._visits: dict[uuid.UUID, Visit] = {}
        self._staying = 0
        self._by_key: dict[uuid.UUID, set[Visit]] = {}
        self._keys: dict[uuid.UUID, set[uuid.UUID]] = {}
        """Of each tenant, those that are in use here: there may be devices of many."""
        self._checks: set[asyncio.Task[None]] = set()
        self._few = asyncio.Semaphore(2)
        """However many are to be checked, requests find connections to the database too."""
        self._watch: asyncio.Task[None] | None = None
        door.keyring.on_revoked(self._check_key)
        door.keyring.on_changed(self._check_changed)
        door.keyring.on_gap(self._check_everybody)

    def __len__(self) -> int:
        return len(self._visits) - self._staying

    def __iter__(self) -> Iterator[Visit]:
        return iter(list(self._visits.values()))

    @contextmanager
    def visiting(self, visit: Visit) -> Iterator[None]:
        """The connection is open until the block ends."""
        self._visits[visit.session_id] = visit
        self._staying += visit.stays
        tenant_id, key_id = visit.grant.tenant_id, visit.grant.key_id
        self._by_key.setdefault(key_id, set()).add(visit)
        self._keys.setdefault(tenant_id, set()).add(key_id)
        self._arm(visit)
        if self._watch is None:
            self._watch = begin(self._look_after(), "live")
        try:
            yield
        finally:
            if visit.timer is not None:
                visit.timer.cancel()
            del self._visits[visit.session_id]
            self._staying -= visit.stays
            mine = self._by_key[key_id]
            mine.discard(visit)
            if not mine:
                del self._by_key[key_id]
                self._keys[tenant_id].discard(key_id)
                if not self._keys[tenant_id]:
                    del self._keys[tenant_id]

    def terminate(self, session_id: uuid.UUID, reason: str) -> bool:
        """End a session that is open on this node, as an administrator wants it; false when it is not here."""
        visit = self._visits.get(session_id)
        if visit is None:
            return False
        visit.reason = reason
        visit.end(EXPIRED, "session_terminated", "The session was ended by an administrator.")
        return True

    async def check(self, visit: Visit) -> None:
        """Close the visit unless its credential is still good; else go by what that says now."""
        try:
            async with self._few:
                grant = await self._door.check_again(visit.credential)
        except Unavailable:
            # Nobody has said that it is not good any more. No new one comes in meanwhile, and this one is asked again.
            self._spawn_check([visit], AGAIN * (1 + visit.session_id.int % 1000 / 1000))
        except AvbError as error:
            visit.end(_CODES.get(error.code, UNAUTHORISED), error.code, error.message)
        else:
            self._renew(visit, grant)

    async def close(self) -> None:
        """Stop looking after visits."""
        watching = [] if self._watch is None else [self._watch]
        await end(*watching, *self._checks)

    # --- credentials that die or change -------------------------------------------------------------------------------

    def _check_key(self, key_id: uuid.UUID) -> None:
        if key_id in self._by_key:
            self._spawn_check(list(self._by_key[key_id]))

    def _check_changed(self, tenant_id: uuid.UUID, key_id: uuid.UUID | None) -> None:
        if key_id is not None:
            self._check_key(key_id)
            return
        for each in self._keys.get(tenant_id, ()):
            self._check_key(each)

    def _check_everybody(self) -> None:
        """Something may have changed that nobody told us."""
        for visits in list(self._by_key.values()):
            self._spawn_check(list(visits))

    def _spawn_check(self, visits: list[Visit], after: float = 0.0) -> None:
        task = begin(self._check_all(visits, after), "credentials")
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    async def _check_all(self, visits: list[Visit], after: float) -> None:
        await asyncio.sleep(after)
        for visit in visits:  # of one key: the first fills the cache for the others
            if visit.session_id in self._visits:
                await self.check(visit)

    def _renew(self, visit: Visit, grant: Grant) -> None:
        if visit.stays and grant.project_id != visit.grant.project_id:
            visit.end(MOVED, "project_changed", "The key is another project's now: connect again.")
            return
        if grant.expires_at != visit.grant.expires_at:
            visit.grant = grant
            self._arm(visit)
        visit.grant = grant

    def _arm(self, visit: Visit) -> None:
        """See to it that the visit ends with its credential, and a session after a day."""
        if visit.timer is not None:
            visit.timer.cancel()
            visit.timer = None
        left = math.inf if visit.stays else LONGEST_SESSION - visit.connection.age
        code, reason, message = EXPIRED, "session_expired", "The session hit its maximum duration of 1440 minutes."
        if visit.grant.expires_at is not None:
            good = (visit.grant.expires_at - datetime.now(UTC)).total_seconds()
            if good < left:
                left, code, reason, message = good, UNAUTHORISED, "api_key_expired", "The API key has expired."
        if left == math.inf:
            return
        visit.timer = asyncio.get_running_loop().call_later(max(left, 0), visit.end, code, reason, message)

    # --- visits in which nothing happens ------------------------------------------------------------------------------

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            try:
                self._end_idle()
            except Exception:
                log.exception("looking after open sessions failed; trying again")

    def _end_idle(self) -> None:
        for visit in self:
            if not visit.stays and visit.connection.idle > visit.grant.session_timeout:
                minutes = visit.grant.session_timeout / 60
                visit.end(EXPIRED, "session_idle", f"Nothing was said for {minutes:.0f} minutes.")
