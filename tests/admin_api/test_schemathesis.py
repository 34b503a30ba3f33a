"""The service against its own document: every operation, with what it takes and with what it does not.

Operations that document a 502 ask somebody else, who may not answer: of them a 500 alone is a failure of ours.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from agentvoicebox.admin_api import health
from agentvoicebox.tenancy import devices, domains, keys, pairings, personas, projects, sessions, wake_words
from agentvoicebox.tenancy.personas import Character

load_all_checks()
NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)
EXAMPLES = 6
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND")

Ids = Callable[[], dict[str, str]]


def exercise(schema: Any, url: str, headers: dict[str, str], mode: GenerationMode, ids: dict[str, str]) -> int:
    """Call every operation some times; where `ids` names its path's parts, those rows are meant. Returns the calls."""
    calls = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not (operation.query or operation.body):
            continue
        parts = {name: value for name, value in ids.items() if f"{{{name}}}" in operation.path}

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode, path_parameters=parts or None))
        def call(case: Any) -> None:
            nonlocal calls
            calls += 1
            check(case, case.call(base_url=url, headers=headers, timeout=60), mode)

        call()
    return calls


def check(case: Any, reply: Any, mode: GenerationMode) -> None:
    """Raise when the answer is not what the document says."""
    if mode is GenerationMode.NEGATIVE and reply.status_code == 413:
        return  # what is too large is refused before anybody looks what else is wrong with it
    asks_others = "502" in case.operation.definition.raw["responses"]
    assert not asks_others or reply.status_code != 500
    case.validate_response(reply, checks=CHECKS.get_by_names(NAMES[1:] if asks_others else NAMES))


@pytest.fixture
async def rows(service: Any, client: Any) -> dict[str, str]:
    """Rows of the client's tenant, to be read, changed and removed, not the key that it uses; and what has a name."""
    store = service.database
    spare = (await keys.issue(store, client.tenant, "spare", ("admin",))).id
    digest, address = secrets.token_hex(32), f"2001:db8:{secrets.token_hex(2)}::1"
    return {
        "key_id": str(spare),
        "project_id": str((await projects.create(store, client.tenant, "spare")).id),
        "session_id": str((await sessions.create(store, client.tenant)).id),
        "domain_id": str((await domains.add(store, client.tenant, f"{client.slug}.example.com")).id),
        "persona_id": str((await personas.create(store, client.tenant, Character("Anna"))).id),
        "device_id": str((await devices.arrive(store, client.tenant, spare, None, "Kitchen")).id),
        "wake_word_id": str((await wake_words.create(store, client.tenant, "okay nabu")).id),
        "pairing_id": str((await pairings.begin(store, digest, "Hall", address, key_prefix="avb_12345678")).id),
        "skill_id": "skill-account.agentvoicebox",
        "tenant_id": str(client.tenant),
        "name": "slt",
        "provider": "deepgram",  # which nobody asks here
    }


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("who", ["operator", "tenant"])
async def test_every_operation_does_what_the_document_says(
    service: Any,
    speaking: Any,
    operator: httpx.AsyncClient,
    client: Any,
    rows: dict[str, str],
    who: str,
    mode: GenerationMode,
    monkeypatch: pytest.MonkeyPatch,
):
    """No failure of ours, answers as described, wrong input refused."""
    monkeypatch.setattr(health, "PATIENCE", 60.0)  # else a machine that stands still is a node that is not ready
    headers = {"X-API-Key": client.key}
    if who == "operator":
        headers = {"Authorization": operator.headers["authorization"], "X-Tenant-ID": str(client.tenant)}
        rows.pop("tenant_id")  # or it would delete the tenant that everything else is about
    schema = schemathesis.openapi.from_dict(service.app.state.document)
    calls = await asyncio.to_thread(exercise, schema, service.url, headers, mode, rows)
    assert calls >= 60 * EXAMPLES / 2


async def test_methods_that_are_not_described_are_refused(service: Any, client: Any):
    for path, item in service.app.state.document["paths"].items():
        described = {method.upper() for method in item}
        there = re.sub(r"\{\w+\}", str(client.tenant), path)
        for method in set(METHODS) - described:
            reply = await client.http.request(method, there)
            assert (reply.status_code, reply.json()["error"]) == (405, "method_not_allowed"), (method, path)
            assert described <= set(reply.headers["allow"].split(", ")), (method, path)
