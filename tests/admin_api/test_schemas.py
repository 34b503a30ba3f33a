"""Bodies: what is wrong with them is said by field, and nothing is written (P9, FLW-45)."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentvoicebox.admin_api import schemas
from agentvoicebox.admin_api.settings import SettingsChange
from agentvoicebox.config.errors import BadInput

PROPERTY = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SETTINGS = "/api/v2/tenants/me/settings"
WRONG: dict[str, st.SearchStrategy[Any]] = {
    "logo_url": st.sampled_from(
        [None, 1, "http://a.example.com", "javascript:alert(1)", "https://10.0.0.1/x", "x" * 3000]
    ),
    "primary_color": st.sampled_from([None, "red", "#12345", "#1234567", "#gggggg", 7, "#6366f1\n"]),
    "default_voice_provider": st.sampled_from([None, "", "google", "LOCAL", 1, ["local"]]),
    "default_stt_model": st.sampled_from([None, "", "a" * 51, "a b", "a\x00b", 1.5]),
    "email_notifications_enabled": st.sampled_from([None, "true", 1, 0, [], {}]),
    "webhook_url": st.sampled_from([None, "ftp://a.example.com", "https://user:pw@a.example.com", "https://localhost"]),
    "allowed_ip_ranges": st.sampled_from(
        [None, "10.0.0.0/8", ["10.0.0.0/33"], ["x"], [None], [1], ["10.0.0.0/8"] * 101]
    ),
    "require_mfa": st.sampled_from([None, "no", 2]),
    "session_timeout_minutes": st.sampled_from([None, 4, 1441, 5.5, "60", True, 10**30]),
    "unknown": st.just(1),
    "tenant_id": st.uuids().map(str),
}


@PROPERTY
@given(data=st.data(), method=st.sampled_from(["PATCH", "PUT"]))
async def test_p9_schema_validation(
    service: Any, operator: httpx.AsyncClient, wronged: Any, data: st.DataObject, method: str
):
    """An invalid body gets 400 and the error of its field; nothing of it is written."""
    field = data.draw(st.sampled_from(sorted(WRONG)))
    body = {"require_mfa": True} | {field: data.draw(WRONG[field])}
    headers = {**operator.headers, "X-Tenant-ID": str(wronged.tenant)}
    async with httpx.AsyncClient(base_url=service.url, headers=headers, timeout=60) as http:
        reply = await http.request(method, SETTINGS, json=body)
        assert reply.status_code == 400, body
        error = reply.json()
        assert error["error"] == "validation_error"
        assert error["message"]
        assert [name.split("[")[0].split(".")[0] for name in error["details"]] == [field]
        assert (await http.get(SETTINGS)).json()["require_mfa"] is False


@pytest.fixture
async def wronged(client: Any) -> Any:
    """The tenant that wrong settings are meant for."""
    return client


@pytest.mark.parametrize(
    ("sent", "details"),
    [
        (b"{", ["body"]),
        (b"[]", ["body"]),
        (b"null", ["body"]),
        (b'"x"', ["body"]),
        (b"\xff\xfe", ["body"]),
        (b'{"name": "\xff"}', ["body"]),
        (b'{"name": "a\\ud800b"}', ["body"]),
        (b'{"name": "a\\u0000b"}', ["name"]),
        (b'{"name": "a\\nb"}', ["name"]),
        (b'{"name": " "}', ["name"]),
        (b"{}", ["name"]),
        (b'{"name": null}', ["name"]),
        (b'{"name": ["x"]}', ["name"]),
        (b'{"name": "x", "environment": "prod"}', ["environment"]),
        (b'{"name": "x", "config": []}', ["config"]),
        (b'{"name": "x", "owner": "me"}', ["owner"]),
        (b'{"name": "x"} {}', ["body"]),
        (b"[" * 60_000, ["body"]),
        (b'{"name": "x", "config": ' + b'{"a":' * 9_000 + b"1" + b"}" * 9_000 + b"}", ["body"]),
        (b'{"name": "x", "config": {"a": NaN}}', ["body"]),
        (b'{"name": "x", "config": {"a": 1e999}}', ["config"]),
    ],
)
async def test_a_body_without_sense_names_its_field(client: Any, sent: bytes, details: list[str]):
    before = (await client.http.get("/api/v2/projects")).json()["total"]
    reply = await client.http.post("/api/v2/projects", content=sent)
    assert (reply.status_code, list(reply.json()["details"])) == (400, details)
    assert (await client.http.get("/api/v2/projects")).json()["total"] == before


async def test_a_nul_in_a_document_is_refused(client: Any):
    reply = await client.http.post("/api/v2/projects", content=b'{"name": "x", "config": {"a": "b\\u0000"}}')
    assert (reply.status_code, reply.json()["error"]) == (400, "validation_error")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "multipart/form-data", "x"]
)
async def test_a_body_that_is_not_json_is_not_guessed_at(client: Any, kind: str):
    reply = await client.http.post("/api/v2/projects", content=b'{"name": "x"}', headers={"Content-Type": kind})
    assert (reply.status_code, reply.json()["error"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json"]
)
async def test_json_has_several_names(client: Any, kind: str):
    reply = await client.http.post("/api/v2/projects", content=b'{"name": "x"}', headers={"Content-Type": kind})
    assert reply.status_code == 201


@pytest.mark.parametrize("path", [SETTINGS, "/api/v2/projects", "/api/v2/api-keys"])
async def test_a_large_document_is_refused(client: Any, path: str):
    """Ten megabytes of settings: by their length before they are read, and in pieces as soon as it is too much."""
    method = "PATCH" if path == SETTINGS else "POST"
    large = b'{"x": "' + b"a" * 10_000_000 + b'"}'
    reply = await client.http.request(method, path, content=large)
    assert (reply.status_code, reply.json()["error"]) == (413, "payload_too_large")

    async def pieces():
        for _ in range(1000):
            yield b"a" * 10_000

    reply = await client.http.request(method, path, content=pieces())
    assert (reply.status_code, reply.json()["error"]) == (413, "payload_too_large")


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_a_hundred_megabytes_are_refused_at_their_first_line(service: Any, client: Any, method: str):
    """Before a byte of them has come, by any route: what they say of themselves is enough."""
    host, _, port = service.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    path = "/api/v2/projects" if method != "DELETE" else f"/api/v2/projects/{client.key_id}"
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"X-API-Key: {client.key}", "Content-Length: 100000000"]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    async with asyncio.timeout(30):
        assert (await reader.readline()).startswith(b"HTTP/1.1 413")
    writer.close()


async def test_who_waits_to_be_told_is_not_told_to_go_on(service: Any, client: Any):
    host, _, port = service.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = ["POST /api/v2/projects HTTP/1.1", "Host: n", f"X-API-Key: {client.key}", "Expect: 100-continue"]
    writer.write("\r\n".join([*lines, "Content-Length: 100000000", "", ""]).encode())
    async with asyncio.timeout(30):
        assert (await reader.readline()).startswith(b"HTTP/1.1 413")
    writer.close()


async def test_a_client_that_leaves_in_the_middle_of_a_body_leaves_nothing_behind(service: Any, client: Any):
    host, _, port = service.url.removeprefix("http://").partition(":")
    before = (await client.http.get("/api/v2/projects")).json()["total"]
    for _ in range(5):
        _, writer = await asyncio.open_connection(host, int(port))
        lines = ["POST /api/v2/projects HTTP/1.1", "Host: n", f"X-API-Key: {client.key}", "Content-Length: 100"]
        writer.write("\r\n".join([*lines, "", '{"name": "x"}']).encode())
        await writer.drain()
        writer.transport.abort()
    assert (await client.http.get("/api/v2/projects")).json()["total"] == before
    assert (await client.http.get("/health")).status_code == 200


def test_whatever_is_sent_is_read_or_refused_by_name():
    """Damaged documents of every kind."""
    random_ = random.Random(7)
    whole = json.dumps({"primary_color": "#aabbcc", "allowed_ip_ranges": ["10.0.0.0/8"], "require_mfa": True}).encode()
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(random_.randint(1, 4)):
            damaged[random_.randrange(len(damaged))] = random_.randrange(256)
        read: Any
        try:
            read = schemas.decode(bytes(damaged), SettingsChange)
        except BadInput as error:
            read = error
        assert isinstance(read, SettingsChange) or (read.param and read.message)
