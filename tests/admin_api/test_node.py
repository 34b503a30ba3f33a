"""What every answer has in common, and that nothing raised anywhere comes out raw."""

from __future__ import annotations

import logging
import re
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentvoicebox.admin_api.node import Node
from agentvoicebox.config.errors import AvbError, Conflict, Unavailable

PROPERTY = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PATHS = ["/health", "/api/v2/tenants/me", "/api/v2/nothing", "/api/v2/sessions", "/api/v2/openapi.json", "/"]
ID = re.compile(r"[0-9a-f]{32}")


class Raises:
    """An application that fails at some point of its answer."""

    def __init__(self, error: BaseException, after: int = 0) -> None:
        self.error = error
        self.after = after

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if self.after > 0:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if self.after > 1:
            await send({"type": "http.response.body", "body": b"all"})
        raise self.error


def asking(rest: Any) -> httpx.AsyncClient:
    """A client of a node whose REST application is `rest`."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(Node(None, rest)), base_url="http://node")


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """The ids of all answers of this module."""
    return set()


@PROPERTY
@given(
    path=st.sampled_from(PATHS),
    method=st.sampled_from(["GET", "POST", "DELETE", "PATCH", "PUT", "HEAD", "OPTIONS"]),
    sent=st.one_of(st.none(), st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=200)),
)
async def test_p15_request_id(service: Any, seen: set[str], path: str, method: str, sent: str | None):
    """Every response has an X-Request-ID of its own, whatever the client sends and however it ends."""
    headers = {} if sent is None else {"X-Request-ID": sent}
    async with httpx.AsyncClient(base_url=service.url, timeout=60) as http:
        reply = await http.request(method, path, headers=headers)
    (found,) = reply.headers.get_list("x-request-id")
    assert ID.fullmatch(found)
    assert found not in seen
    assert found != sent
    seen.add(found)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("abc-123", True),
        ("a/b:c+d=e_f.g", True),
        ("a" * 100, True),
        ("a" * 101, False),
        ("", False),
        ("a b", False),
        ("<script>", False),
        ("a\tb", False),
        ("ünicode".encode(), False),
    ],
)
async def test_a_clients_id_comes_back_as_correlation_only(http: httpx.AsyncClient, sent: Any, kept: bool):
    """FLW-30, CON-48: it is neither taken for ours nor written anywhere before it is known to be harmless."""
    reply = await http.get("/health", headers=[(b"X-Request-ID", sent if isinstance(sent, bytes) else sent.encode())])
    assert ID.fullmatch(reply.headers["x-request-id"])
    assert reply.headers.get("x-correlation-id") == (sent if kept else None)


@PROPERTY
@given(
    kind=st.sampled_from([RuntimeError, ValueError, KeyError, OSError, AssertionError, ZeroDivisionError]),
    detail=st.text(min_size=12, max_size=40).filter(lambda text: text.strip()),
)
async def test_p17_exception_sanitisation(kind: type[Exception], detail: str, caplog: pytest.LogCaptureFixture):
    """A 500 is generic and has no trace of the exception; the log has all of it, under the id of the answer."""
    caplog.clear()
    secret = f"secret-{detail}"
    async with asking(Raises(kind(secret))) as http:
        reply = await http.get("/api/v2/x")
    assert reply.status_code == 500
    assert set(reply.json()) == {"error", "message"}
    assert reply.json()["error"] == "internal_error"
    for told in ("secret-", kind.__name__, "Traceback", ".py", "line "):
        assert told not in reply.text
        assert told not in str(reply.headers)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert reply.headers["x-request-id"] in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is not None
    assert record.exc_info[1].args == (secret,)


async def test_a_handler_that_fails_is_no_different(service: Any, operator: Any, monkeypatch: Any, caplog: Any):
    """FLW-38: through all of the real application, and whatever the caller is."""
    from agentvoicebox.tenancy import tenants

    async def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("the password is hunter2")

    monkeypatch.setattr(tenants, "list_", fails)
    reply = await operator.get("/api/v2/admin/tenants", headers={"X-Debug": "1", "Host": "localhost"})
    assert (reply.status_code, reply.json()["error"]) == (500, "internal_error")
    assert "hunter2" not in reply.text
    assert "hunter2" in caplog.text
    assert reply.headers["x-request-id"] in caplog.text


@pytest.mark.parametrize("error", [Conflict("Another has it."), Unavailable("Try again."), AvbError("Odd.")])
async def test_an_error_of_ours_raised_outside_any_route_keeps_its_meaning(error: AvbError):
    """FLW-68."""
    async with asking(Raises(error)) as http:
        reply = await http.get("/")
    assert (reply.status_code, reply.json()) == (error.status, {"error": error.code, "message": error.message})


async def test_half_an_answer_does_not_look_whole():
    async with asking(Raises(RuntimeError("in the middle"), after=1)) as http:
        with pytest.raises(RuntimeError):
            await http.get("/")


async def test_what_fails_after_the_answer_changes_nothing_about_it():
    async with asking(Raises(RuntimeError("too late"), after=2)) as http:
        reply = await http.get("/")
    assert (reply.status_code, reply.text) == (200, "all")


@pytest.mark.parametrize("path", ["/api/v2/tenants/me", "/api/v2/projects", "/api/v2/api-keys"])
async def test_the_older_prefix_serves_the_same(client: Any, path: str):
    """CON-01."""
    new = await client.http.get(path)
    old = await client.http.get(path.replace("v2", "v1"))
    assert (old.status_code, old.json()) == (new.status_code, new.json())
    assert old.headers["deprecation"].startswith("@")
    assert "deprecation" not in new.headers
    assert (await client.http.get(path.replace("v2", "v11"))).status_code == 404


@pytest.mark.parametrize("prefix", ["/api/v1", "/api/v2"])
async def test_a_slash_at_the_end_changes_nothing(client: Any, prefix: str):
    """CON-02: also for writes, which are never redirected."""
    made = await client.http.post(f"{prefix}/projects/", json={"name": "With a slash"})
    assert made.status_code == 201
    reply = await client.http.get(f"{prefix}/projects/{made.json()['id']}/")
    assert reply.json()["name"] == "With a slash"
    assert (await client.http.get("/health/")).json() == {"status": "ok"}
    assert (await client.http.get("/health//")).status_code == 404


async def test_unknown_methods_are_told_what_there_is(client: Any):
    for method in ("PUT", "TRACE", "OPTIONS", "PROPFIND"):
        reply = await client.http.request(method, "/api/v2/projects")
        assert (reply.status_code, reply.json()["error"]) == (405, "method_not_allowed")
        assert reply.headers["allow"] == "GET, HEAD, POST"


async def test_head_is_get_without_a_body(client: Any):
    reply = await client.http.head("/api/v2/projects")
    assert (reply.status_code, reply.content) == (200, b"")
    assert int(reply.headers["content-length"]) > 0
    assert (await client.http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    "address",
    [
        "/api/v2/pro%00jects",
        "/api/v2/projects/%00",
        "/api/v2/projects?page=%00",
        "/api/v2/projects?%00=1",
        "/api/v2/projects?page=%0a1",
        "/api/v2/projects/%ff%fe",
        "/api/v2/projects?search=%ff",
        "/api/v2/projects?search=%c3%28",
        "/api/v2/audit?q=%ed%a0%80",
    ],
)
async def test_addresses_that_are_not_text_are_refused(client: Any, address: str):
    reply = await client.http.get(address)
    assert (reply.status_code, reply.json()["error"]) == (400, "validation_error")


async def test_answers_with_secrets_are_kept_nowhere(client: Any):
    reply = await client.http.post("/api/v2/api-keys", json={"name": "a"})
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-content-type-options"] == "nosniff"
