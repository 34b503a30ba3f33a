"""What was used and who did what, over HTTP (API-100, API-111, API-112, API-175, API-176)."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

USAGE = "/api/v2/usage"
AUDIT = "/api/v2/audit"


async def test_usage_is_told_in_sum_by_day_and_as_a_table(client: Any):
    for _ in range(4):
        await client.http.get("/api/v2/projects")
    # A request is counted before it is answered, and may or may not find itself in what it reads.
    told = (await client.http.get(f"{USAGE}?period=7d")).json()
    assert told["period"] == "7d"
    assert told["amounts"]["requests"] in (4, 5)
    daily = (await client.http.get(f"{USAGE}/daily?period=7d")).json()["items"]
    assert len(daily) == 7
    assert sum(day["amounts"]["requests"] for day in daily) in (5, 6)
    table = await client.http.get(f"{USAGE}/export?period=7d")
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert sum(int(row["requests"]) for row in rows) in (6, 7)
    assert table.headers["content-type"].startswith("text/csv")


async def test_usage_is_for_those_who_may(new_client: Any):
    assert (await (await new_client("usage")).http.get(USAGE)).status_code == 200
    assert (await (await new_client("realtime")).http.get(USAGE)).status_code == 403


@pytest.mark.parametrize("query", ["period=1y", "period=", "project_id=x"])
async def test_usage_is_asked_for_properly(client: Any, query: str):
    for path in ("", "/daily", "/export"):
        assert (await client.http.get(f"{USAGE}{path}?{query}")).status_code == 400


async def test_the_log_tells_who_did_what(client: Any):
    made = await client.http.post("/api/v2/projects", json={"name": "Zebra crossing"})
    listed = (await client.http.get(AUDIT, params={"q": "zebra"})).json()
    (line,) = listed["items"]
    assert (line["action"], line["resource_type"], line["resource_id"]) == ("create", "project", made.json()["id"])
    assert (line["actor_type"], line["actor_id"]) == ("api_key", str(client.key_id))
    assert (line["ip_address"], line["request_id"]) == ("127.0.0.1", made.headers["x-request-id"])
    whole = (await client.http.get(f"{AUDIT}/{line['id']}")).json()
    assert whole["new_values"]["name"] == "Zebra crossing"
    assert (await client.http.get(f"{AUDIT}/logs", params={"q": "zebra"})).json() == listed  # CON-43


async def test_the_log_is_filtered(client: Any):
    await client.http.post("/api/v2/projects", json={"name": "App"})
    await client.http.patch("/api/v2/tenants/me/settings", json={"require_mfa": True})
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()

    async def kinds(**query: Any) -> set[str]:
        reply = await client.http.get(AUDIT, params=query)
        assert reply.status_code == 200, reply.text
        return {each["resource_type"] for each in reply.json()["items"]}

    assert await kinds(action="settings_change") == {"tenant_settings"}
    assert await kinds(resource_type="project") == {"project"}
    assert await kinds(actor=str(client.key_id)) == {"project", "tenant_settings"}
    assert await kinds(**{"from": tomorrow}) == set()
    assert {"project", "tenant_settings", "tenant", "api_key"} <= await kinds(to=tomorrow, tenant=str(client.tenant))


@pytest.mark.parametrize(
    "query",
    ["action=hack", "from=2026-01-01T00:00:00", "to=x", "actor=x", "q=", "q=%21", "resource_type=" + "x" * 51],
)
async def test_the_log_is_asked_for_properly(client: Any, query: str):
    for path in ("", "/export"):
        reply = await client.http.get(f"{AUDIT}{path}?{query}")
        assert (reply.status_code, reply.json()["error"]) == (400, "validation_error")


async def test_a_tenant_names_no_other_in_the_log(client: Any, new_client: Any):
    other = await new_client("admin")
    reply = await client.http.get(AUDIT, params={"tenant": str(other.tenant)})
    assert (reply.status_code, reply.json()["error"]) == (403, "permission_denied")


async def test_the_operator_reads_all_logs_or_one(operator: httpx.AsyncClient, client: Any, new_client: Any):
    """AUD-14."""
    other = await new_client("admin")
    everybody = (await operator.get(AUDIT, params={"page_size": 100})).json()["items"]
    assert {str(client.tenant), str(other.tenant)} <= {each["tenant_id"] for each in everybody}
    for asked in ({"params": {"tenant": str(other.tenant)}}, {"headers": {"X-Tenant-ID": str(other.tenant)}}):
        found = (await operator.get(AUDIT, **asked)).json()["items"]
        assert {each["tenant_id"] for each in found} == {str(other.tenant)}


async def test_the_log_is_exported_and_says_so(client: Any):
    await client.http.post("/api/v2/projects", json={"name": "=cmd()"})
    table = await client.http.get(f"{AUDIT}/export")
    rows = list(csv.DictReader(io.StringIO(table.text)))
    assert any("=cmd()" in row["new_values"] for row in rows)
    listed = await client.http.get(f"{AUDIT}/export?format=json")
    assert listed.headers["content-type"].startswith("application/json")
    assert {row["id"] for row in rows} < {each["id"] for each in listed.json()}
    assert {each["tenant_id"] for each in listed.json()} == {str(client.tenant)}
    found = (await client.http.get(AUDIT, params={"resource_type": "audit_log"})).json()
    assert found["total"] == 2
    assert (await client.http.get(f"{AUDIT}/export?format=xml")).status_code == 400


async def test_retention_is_told(client: Any):
    told = (await client.http.get(f"{AUDIT}/retention")).json()
    assert told == {"retention_days": 90, "archive_status": "current"}
