"""The keys that tenants have entrusted to us for providers, remembered for a moment."""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict

from agentvoicebox.config.errors import NotFound
from agentvoicebox.tenancy import secrets
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.masterkeys import MasterKeys

FRESH = 2.0
"""Seconds after which a key is read again: one that was changed or taken back counts no longer."""

_MOST = 10_000


class Credentials:
    """Reads secrets of tenants; what was read just now is not read again."""

    def __init__(self, database: Database, keys: MasterKeys) -> None:
        self._database = database
        self._keys = keys
        self._held: OrderedDict[tuple[uuid.UUID, str, str], tuple[float, str | None]] = OrderedDict()

    async def get(self, tenant_id: uuid.UUID, kind: str, name: str) -> str | None:
        """The tenant's own key, or None. Raises `Unavailable` when the store or the master keys are away."""
        about = (tenant_id, kind, name)
        now = time.monotonic()
        held = self._held.get(about)
        if held is not None and now < held[0]:
            return held[1]
        found: str | None
        try:
            found = (await secrets.get(self._database, self._keys, tenant_id, kind, name)).decode()
        except NotFound:
            found = None
        self._held[about] = (now + FRESH, found)
        self._held.move_to_end(about)
        if len(self._held) > _MOST:
            self._held.popitem(last=False)
        return found
