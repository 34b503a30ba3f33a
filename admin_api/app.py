"""The REST application: its routes, and the one place where errors become HTTP."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from agentvoicebox.admin_api import health, sessions
from agentvoicebox.config.errors import AvbError
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keys import Keyring

log = logging.getLogger(__name__)

ROUTERS = (health.router, sessions.router)
"""Every resource of the service."""

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large", 415: "unsupported_media_type"}


def create(database: Database, keyring: Keyring) -> FastAPI:
    """The application over a store."""
    app = FastAPI(title="AgentVoiceBox", version="2", docs_url=None, redoc_url=None, openapi_url="/api/v2/openapi.json")
    app.state.database = database
    app.state.keyring = keyring
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(AvbError, _known)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _unexpected)
    return app


def _answer(status: int, code: str, message: str, details: dict[str, Any] | None = None) -> JSONResponse:
    body: dict[str, Any] = {"error": code, "message": message}
    if details:
        body["details"] = details
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(body, status, headers)


async def _known(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AvbError)
    return _answer(error.status, error.code, error.message, {error.param: error.message} if error.param else None)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _answer(error.status_code, _CODES.get(error.status_code, "http_error"), str(error.detail))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    details = {".".join(str(part) for part in item["loc"]): item["msg"] for item in error.errors()}
    return _answer(400, "validation_error", "The request is not valid.", details)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("unexpected_exception %s %s", request.method, request.url.path, exc_info=error)
    return _answer(500, "internal_error", "Something went wrong on our side.")
