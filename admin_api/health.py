"""Whether the node is alive, for load balancers; it tells nobody anything else."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from agentvoicebox.admin_api import auth

router = APIRouter(tags=["health"], dependencies=[Depends(auth.public)])


@router.get("/health")
async def health() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}
