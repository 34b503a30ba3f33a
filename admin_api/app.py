"""The REST application: its resources, its parts, and how errors in a route become HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from sqlalchemy import text
from starlette.exceptions import HTTPException

from agentvoicebox.admin_api import (
    admin_tenants,
    audit,
    auth,
    devices,
    documents,
    domains,
    errors,
    health,
    keys,
    llm,
    openapi,
    personas,
    projects,
    sessions,
    settings,
    skills,
    stt,
    tenants,
    usage,
    visits,
    voice,
    wake_words,
)
from agentvoicebox.admin_api.door import Door
from agentvoicebox.bus_bridge.answers import Answers
from agentvoicebox.bus_bridge.engines import Engines
from agentvoicebox.config.errors import AvbError
from agentvoicebox.plugins.chat.solvers import Solvers
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.domains import Resolver
from agentvoicebox.tenancy.keyring import Keyring
from agentvoicebox.tenancy.limits import Exceeded, Limiter
from agentvoicebox.tenancy.masterkeys import MasterKeys
from agentvoicebox.tenancy.metering import Ledger

ROUTERS = (
    health.router,
    documents.router,
    # Paths with /me come before those that name a tenant by its id.
    domains.router,
    settings.router,
    tenants.router,
    admin_tenants.router,
    keys.router,
    projects.router,
    personas.router,
    sessions.router,
    voice.router,
    stt.router,
    llm.router,
    wake_words.router,
    skills.router,
    devices.router,
    usage.router,
    audit.router,
)
"""Every resource of the service, one file each. A new one is a module with a `router`, whose routes say who may use
them (`auth`), and a line here."""

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large", 415: "unsupported_media_type"}
_MESSAGES = {404: "There is nothing at this address.", 405: "This address does not know that method; see Allow."}


def create(
    database: Database,
    keyring: Keyring,
    limiter: Limiter,
    ledger: Ledger,
    *,
    operator: str = "",
    base: str = "",
    checks: Mapping[str, health.Check] | None = None,
    resolver: Resolver | None = None,
    engines: Engines | None = None,
    answers: Answers | None = None,
    secrets: MasterKeys | None = None,
    solvers: Solvers | None = None,
) -> FastAPI:
    """The application over its parts, to be served by a `Node`.

    `operator` is the operator's key, empty for none. `base` is the domain whose subdomains are slugs of tenants.
    `checks` are what the node needs beside the store, for `/health/ready`. Routes that speak, listen or answer refuse
    with `no_engines` where what they need is not given. Raises `AssertionError` when a route does not say who may
    use it.
    """
    app = FastAPI(
        title="AgentVoiceBox API",
        version="2.0.0",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )

    async def ask_store() -> None:
        async with database.system() as session:
            await session.execute(text("SELECT 1"))

    app.state.database = database
    app.state.keyring = keyring
    app.state.base = base
    app.state.hosts = {}
    app.state.readiness = health.Readiness({"db": ask_store, **(checks or {})})
    app.state.resolver = resolver or domains.NoResolver()
    app.state.limiter = limiter
    app.state.strangers = asyncio.Semaphore(devices.STRANGERS)
    app.state.gateway = None
    app.state.ledger = ledger
    app.state.engines = engines
    app.state.answers = answers
    app.state.secrets = secrets
    app.state.solvers = solvers
    for router in ROUTERS:
        # As they are: `include_router` would match every request against every router first, and then once more.
        app.router.routes.extend(router.routes)
    for route in openapi.routes(app):
        auth.admission(route)
    app.add_exception_handler(AvbError, _known)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_middleware(Door, keyring=keyring, limiter=limiter, ledger=ledger, operator=operator, database=database)
    app.state.document = openapi.document(app)
    return app


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, AvbError)
    visit = visits.of(request.scope)
    visit.refusal = error.code
    if isinstance(error, Exceeded):
        visit.held(error.decision)
    return _response(errors.known(error))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "http_error")
    visits.of(request.scope).refusal = code
    answer = errors.answer(error.status_code, code, _MESSAGES.get(error.status_code, str(error.detail)))
    if error.status_code == 405:
        allowed = openapi.allowed(request.app, request.scope)
        answer.headers.append((b"allow", ", ".join(allowed).encode()))
    return _response(answer)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    details: dict[str, Any] = {}
    for item in error.errors():
        details[".".join(str(part) for part in item["loc"][1:]) or str(item["loc"][0])] = item["msg"]
    visits.of(request.scope).refusal = "validation_error"
    return _response(errors.answer(400, "validation_error", "The request is not valid.", details))


def _response(answer: errors.Answer) -> Response:
    response = Response(answer.body, answer.status)
    response.raw_headers = answer.headers
    return response
