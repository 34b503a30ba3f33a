"""The document that describes the service, and a page that shows it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse

from agentvoicebox.admin_api import auth, openapi

router = APIRouter(prefix="/api/v2", tags=["documents"], include_in_schema=False)

_POLICY = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}


@router.get("/openapi.json", dependencies=auth.public())
async def read_document(request: Request) -> JSONResponse:
    """The OpenAPI document."""
    return JSONResponse(request.app.state.document)


@router.get("/docs", dependencies=auth.public())
async def read_page(request: Request) -> HTMLResponse:
    """The document as a page."""
    return HTMLResponse(openapi.page(request.app.state.document), headers=_POLICY)
