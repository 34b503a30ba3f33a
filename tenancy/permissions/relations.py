"""Permissions from the table of relations, answered in process."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager

from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import AvbError, BadInput, Unavailable
from agentvoicebox.config.tasks import end
from agentvoicebox.tenancy.changes import Change, Feed
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import PLATFORM, ChangeKind, Role
from agentvoicebox.tenancy.permissions import rules, store
from agentvoicebox.tenancy.permissions.evaluator import Graph, Relationship, Resource, Subject
from agentvoicebox.tenancy.permissions.rules import EVALUATOR

_PATIENCE = 5.0
"""Seconds to wait for the database (AZN-02)."""
_CAPACITY = 1_000_000
"""Relationships in memory, of all tenants together; some 400 bytes each."""

_log = logging.getLogger(__name__)


class Relations:
    """The relationships of the tenants that were asked for lately, in memory.

    They may answer only while the feed is fresh, so that a change counts everywhere within a second, and in the process
    that made it at once. Otherwise, each answer comes from the database, and where that is away, it is no.
    """

    def __init__(self, database: Database, feed: Feed, capacity: int = _CAPACITY) -> None:
        self._database = database
        self._feed = feed
        self._capacity = capacity
        self._graphs: OrderedDict[uuid.UUID, Graph] = OrderedDict()
        self._size = 0
        self._platform: Graph | None = None
        self._loads: dict[uuid.UUID, asyncio.Task[Graph]] = {}
        """Those whose result may be kept."""
        self._running: set[asyncio.Task[Graph]] = set()
        feed.subscribe(self._changed)
        feed.on_gap(self._forget_all)
        store.tell(self)

    async def check(self, tenant_id: uuid.UUID, resource: Resource, permission: str, subject: Subject) -> bool:
        """Whether the subject may, by the relationships of this tenant and of the platform.

        Whatever goes wrong is a no. Raises `BadInput` for types and permissions that the schema does not have, which is
        a mistake of ours and no decision.
        """
        try:
            graphs = self._held(tenant_id)
            if graphs is None:
                EVALUATOR.require(resource.type, permission)
                fresh = time.monotonic() < self._feed.fresh_until
                graphs = await (self._read(tenant_id) if fresh else self._about(tenant_id, subject))
            # Where a resource belongs is implied by where it is found, and another tenant is not to be found here.
            if resource.type == "tenant" and resource != graphs[0].implied.get("tenant"):
                EVALUATOR.require(resource.type, permission)
                return False
            return EVALUATOR.check(graphs, resource, permission, subject)
        except BadInput:
            raise
        except AvbError as error:
            _log.warning("permission_check_failed tenant_id=%s: denied, since %s", tenant_id, error.message)
        except Exception:
            _log.exception("permission_check_failed tenant_id=%s: denied", tenant_id)
        return False

    async def lookup_subjects(
        self, tenant_id: uuid.UUID, resource: Resource, permission: str, subject_type: str = "user"
    ) -> set[Subject]:
        """All who may; `user:*` among them where everybody may. Raises `BadInput`, `Unavailable`."""
        EVALUATOR.require(resource.type, permission)
        graphs = self._held(tenant_id) or await self._read(tenant_id)
        if resource.type == "tenant" and resource != graphs[0].implied.get("tenant"):
            return set()
        return EVALUATOR.subjects(graphs, resource, permission, subject_type)

    async def explain(self, tenant_id: uuid.UUID, resource: Resource, permission: str, subject: Subject) -> list[str]:
        """The way by which the subject may, step by step; empty when it may not. Raises as `lookup_subjects`."""
        EVALUATOR.require(resource.type, permission)
        graphs = self._held(tenant_id) or await self._read(tenant_id)
        if resource.type == "tenant" and resource != graphs[0].implied.get("tenant"):
            return []
        return EVALUATOR.explain(graphs, resource, permission, subject)

    async def write(self, tenant_id: uuid.UUID, relationships: Iterable[Relationship]) -> None:
        """Make these stand, all or none; those that do already stay. Raises `BadInput`, `Unavailable`."""
        wanted = tuple(relationships)
        async with self._of(tenant_id, ours=_by_platform(wanted)) as session:
            await store.put(session, tenant_id, wanted)

    async def delete(self, tenant_id: uuid.UUID, relationships: Iterable[Relationship]) -> None:
        """Make these not stand, all or none; those that do not are no error. Raises `Unavailable`."""
        unwanted = tuple(relationships)
        async with self._of(tenant_id) as session:
            await store.remove(session, tenant_id, unwanted)

    def forget(self, tenant_id: uuid.UUID) -> None:
        """Read this tenant's relationships again before the next answer."""
        self._loads.pop(tenant_id, None)  # what is being read now may be older
        if tenant_id == PLATFORM:
            self._platform = None
        graph = self._graphs.pop(tenant_id, None)
        if graph is not None:
            self._size -= _weight(graph)

    async def close(self) -> None:
        """Stop what is being read."""
        await end(*self._running)

    def _changed(self, change: Change) -> None:
        if change.kind == ChangeKind.RELATIONS:
            self.forget(change.tenant_id)

    def _forget_all(self) -> None:
        for tenant_id in {PLATFORM, *self._graphs, *self._loads}:
            self.forget(tenant_id)

    def _of(self, tenant_id: uuid.UUID, *, ours: bool = False) -> AbstractAsyncContextManager[AsyncSession]:
        """A transaction on relationships of a tenant; the platform's, and what is `ours` to say, take the system's."""
        return self._database.system() if ours or tenant_id == PLATFORM else self._database.tenant(tenant_id)

    def _held(self, tenant_id: uuid.UUID) -> tuple[Graph, ...] | None:
        """What may answer from memory, if all of it is there."""
        if time.monotonic() >= self._feed.fresh_until:
            return None
        graph, platform = self._graphs.get(tenant_id), self._platform
        if graph is None or platform is None:
            return None
        graph.asked = True
        return graph, platform

    async def _read(self, tenant_id: uuid.UUID) -> tuple[Graph, ...]:
        return await self._graph(tenant_id), await self._graph(PLATFORM)

    async def _about(self, tenant_id: uuid.UUID, subject: Subject) -> tuple[Graph, ...]:
        """What one answer takes, from the database, for when nothing may be kept.

        In our schema no way leads over a group or a stored parent, so what names the subject is all there is to know.
        """
        graphs = tuple(rules.graph(each) for each in (tenant_id, PLATFORM))
        try:
            async with asyncio.timeout(_PATIENCE):
                for graph, whose in zip(graphs, (tenant_id, PLATFORM), strict=True):
                    async with self._of(whose) as session:
                        EVALUATOR.add(graph, await store.about(session, whose, subject))
        except TimeoutError as error:
            raise _slow() from error
        return graphs

    async def _graph(self, tenant_id: uuid.UUID) -> Graph:
        fresh = time.monotonic() < self._feed.fresh_until
        kept = self._platform if tenant_id == PLATFORM else self._graphs.get(tenant_id)
        if fresh and kept is not None:
            return kept
        load = self._loads.get(tenant_id) if fresh else None
        if load is None:
            load = asyncio.create_task(self._load(tenant_id), name="relations")
            load.add_done_callback(self._loaded)
            self._loads[tenant_id] = load
            self._running.add(load)
        try:
            async with asyncio.timeout(_PATIENCE):
                return await asyncio.shield(load)
        except TimeoutError as error:
            raise _slow() from error

    def _loaded(self, load: asyncio.Task[Graph]) -> None:
        self._running.discard(load)
        if not load.cancelled():
            load.exception()  # whoever waited for it may be gone

    async def _load(self, tenant_id: uuid.UUID) -> Graph:
        me = asyncio.current_task()
        graph = rules.graph(tenant_id)
        try:
            async with self._of(tenant_id) as session:
                async for some in store.read(session, tenant_id):
                    EVALUATOR.add(graph, some)
            if self._loads.get(tenant_id) is me:
                self._keep(tenant_id, graph)
            return graph
        finally:
            if self._loads.get(tenant_id) is me:
                del self._loads[tenant_id]

    def _keep(self, tenant_id: uuid.UUID, graph: Graph) -> None:
        self.forget(tenant_id)
        if tenant_id == PLATFORM:
            self._platform = graph
            return
        while self._graphs and self._size + _weight(graph) > self._capacity:
            # The oldest, unless somebody has asked for it since it was last looked at: then it is as good as new.
            oldest, unused = self._graphs.popitem(last=False)
            if unused.asked:
                unused.asked = False
                self._graphs[oldest] = unused
            else:
                self._size -= _weight(unused)
        self._graphs[tenant_id] = graph
        self._size += _weight(graph)


def _weight(graph: Graph) -> int:
    """In relationships; a graph without any takes some room, too."""
    return graph.size + 4


def _by_platform(relationships: Iterable[Relationship]) -> bool:
    """Whether a sysadmin is among them, which the database lets no tenant's transaction make."""
    return any(each.relation == Role.SYSADMIN for each in relationships)


def _slow() -> Unavailable:
    return Unavailable("The store took too long to tell who may do what; try again.")
