"""A permission check with 200 000 relationships in memory.

They are stored in PostgreSQL, one tenant's, and read by `Relations` as a node does it. Measured is the CPU of this
process for one awaited `Relations.check` of a project's permission, every hop of it: project, tenant, platform. Half of
the checks are allowed (an administrator of the tenant), half are denied (nobody at all, the longest way); the projects
are taken at random, so that the processor's caches help as little as they would in a node. `against` is the recursive
query that answers the same question in PostgreSQL, whose time (not CPU: it is another process) is in the detail.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
import uuid

from parts.reports import report, store, tell

from agentvoicebox.tenancy import roles, tenants
from agentvoicebox.tenancy.changes import Feed
from agentvoicebox.tenancy.models import PLATFORM
from agentvoicebox.tenancy.permissions import Relations, Resource, Subject

RELATIONSHIPS = 200_000
ADMINS = 500
CHECKS = 20_000
ROUNDS = 7

_FILL = """
INSERT INTO relations
SELECT %(tenant)s::uuid, 'project', md5('p' || n / 3)::uuid,
       (ARRAY['owner', 'developer', 'viewer'])[n %% 3 + 1], 'user', md5('u' || n %% 5000)::uuid
FROM generate_series(0, %(projects)s - 1) AS n
UNION ALL
SELECT %(tenant)s::uuid, 'tenant', %(tenant)s, 'admin', 'user', md5('a' || n)::uuid
FROM generate_series(0, %(admins)s - 1) AS n
"""
_SAME = """
WITH RECURSIVE reach (type, id, relations) AS (
    VALUES ('project', %(project)s::text, ARRAY['owner'])
    UNION ALL
    SELECT next.type, next.id, next.relations FROM reach, LATERAL (VALUES
        ('tenant', %(tenant)s::text, ARRAY['sysadmin', 'admin'], 'project'),
        ('platform', 'avb', ARRAY['sysadmin'], 'tenant')) AS next (type, id, relations, before)
        WHERE next.before = reach.type
)
SELECT EXISTS (
    SELECT FROM reach JOIN relations r ON r.resource_type = reach.type AND r.resource_id = reach.id
        AND r.relation = ANY (reach.relations) AND r.tenant_id IN (%(tenant)s::uuid, %(platform)s::uuid)
    WHERE r.subject_type = 'user' AND r.subject_id = %(subject)s)
"""


async def measure() -> None:
    """Print what one check costs."""
    async with store() as (_, database):
        tenant = (await tenants.create(database, "bench", "Bench", "enterprise")).id
        tell(f"permissions: storing {RELATIONSHIPS} relationships")
        connection = await database.connect(roles.ADMIN)
        await connection.execute(_FILL, {"tenant": str(tenant), "projects": RELATIONSHIPS - ADMINS, "admins": ADMINS})
        cursor = await connection.execute("SELECT DISTINCT resource_id FROM relations WHERE resource_type = 'project'")
        projects = [Resource("project", id) for (id,) in await cursor.fetchall()]
        cursor = await connection.execute("SELECT subject_id FROM relations WHERE resource_type = 'tenant'")
        admins = [Subject("user", id) for (id,) in await cursor.fetchall()]
        feed = Feed(database)
        await feed.start()
        relations = Relations(database, feed)
        try:
            chance = random.Random(7)  # the same choice in every run
            asked = [
                (chance.choice(projects), chance.choice(admins) if n % 2 else Subject("user", str(uuid.uuid4())))
                for n in range(CHECKS)
            ]
            begin = time.process_time()
            while not await relations.check(tenant, projects[0], "delete", admins[0]):
                tell("permissions: reading them takes long")
            reading = time.process_time() - begin
            tell("permissions: checking")
            found = []
            for _ in range(ROUNDS):
                start = time.process_time()
                granted = 0
                for n, (project, subject) in enumerate(asked):
                    granted += await relations.check(tenant, project, "delete", subject)
                    if n % 500 == 0:
                        await asyncio.sleep(0.001)  # the feed has its turn, as it has in a node
                found.append((time.process_time() - start) / CHECKS * 1e6)
                assert granted == CHECKS // 2
            queries = []
            for project, subject in asked[:300]:
                which = {"tenant": str(tenant), "project": project.id, "subject": subject.id, "platform": PLATFORM}
                start = time.perf_counter()
                await connection.execute(_SAME, which)
                queries.append((time.perf_counter() - start) * 1e6)
        finally:
            await relations.close()
            await feed.close()
            await connection.close()
    report(
        "tenancy.permission_check",
        statistics.median(found),
        "µs",
        5.0,
        "a recursive query",
        relationships=RELATIONSHIPS,
        slowest_round=round(max(found), 3),
        query_us=round(statistics.median(queries), 1),
        reading_cpu_s=round(reading, 2),
    )
