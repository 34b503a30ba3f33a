"""What devices have said lately, and to whom: one conversation for each, whichever of its sockets asks. Pure."""

from __future__ import annotations

import uuid
from collections import OrderedDict

from agentvoicebox.bus_bridge.talk import Talk

MOST = 10_000
"""Conversations that are remembered; beyond that the one that rests longest is forgotten."""

IDLE = 1800.0
"""Seconds after the last question from which a conversation is over."""

_Key = tuple[uuid.UUID, uuid.UUID]
"""Tenant and device."""


class Talks:
    """The conversations of a node's devices. Times are seconds of one steady clock."""

    def __init__(self) -> None:
        self._talks: OrderedDict[_Key, tuple[Talk, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._talks)

    def of(self, tenant_id: uuid.UUID, device_id: uuid.UUID, project_id: uuid.UUID | None, now: float) -> Talk:
        """The device's conversation, which goes on now."""
        self.forget(now)
        key = tenant_id, device_id
        found = self._talks.pop(key, None)
        talk = found[0] if found is not None else Talk(project_id=project_id)
        talk.project_id = project_id
        self._talks[key] = talk, now
        if len(self._talks) > MOST:
            self._drop()
        return talk

    def keep(self, tenant_id: uuid.UUID, device_id: uuid.UUID, talk: Talk, now: float) -> None:
        """Something is asked in it. What was said long ago is not what is talked of."""
        self.forget(now)
        self._talks.pop((tenant_id, device_id), None)
        self._talks[tenant_id, device_id] = talk, now
        if len(self._talks) > MOST:
            self._drop()

    def forget(self, now: float) -> None:
        """End those that have rested for too long. A device that is connected still talks to whom it has chosen."""
        while self._talks and now - next(iter(self._talks.values()))[1] > IDLE:
            self._drop()

    def _drop(self) -> None:
        _, (talk, _) = self._talks.popitem(last=False)
        talk.forget()
