"""Voice sessions: a client creates one, and then connects to its socket."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from agentvoicebox.admin_api import auth, schemas
from agentvoicebox.bus_bridge.native import SessionConfig
from agentvoicebox.tenancy import sessions
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keys import Grant

router = APIRouter(prefix="/api/v2/sessions", tags=["sessions"])


class CreatedSession(BaseModel):
    """Where to go on."""

    session_id: str
    ws_url: str


@router.post("", status_code=201, openapi_extra=schemas.document(SessionConfig))
async def create_session(
    request: Request, grant: Annotated[Grant, Depends(auth.key("realtime", "sessions"))]
) -> CreatedSession:
    """Create a session of the key's tenant. The body chooses voice, model, modality, audio rates and turn detection."""
    config = await schemas.read(request, SessionConfig)
    database: Database = request.app.state.database
    made = await sessions.create(
        database,
        grant.tenant_id,
        project_id=grant.project_id,
        api_key_id=grant.key_id,
        config=msgspec.to_builtins(config),
        client_ip=request.client.host if request.client else None,
        user_agent=request.headers.get("user-agent", ""),
    )
    address = request.url_for("create_session").replace(scheme="wss" if request.url.scheme == "https" else "ws")
    return CreatedSession(session_id=str(made.id), ws_url=str(address.replace(path=f"/ws/v2/sessions/{made.id}")))
