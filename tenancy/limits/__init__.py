"""How much may be asked for in how short a time: the rates, who is held to which, and the decisions."""

from agentvoicebox.tenancy.limits.bucket import Subject
from agentvoicebox.tenancy.limits.budget import Budget
from agentvoicebox.tenancy.limits.limiter import Decision, Exceeded, Limiter, headers
from agentvoicebox.tenancy.limits.rates import (
    ADMIN,
    API_KEY,
    CLAIMS,
    DEFAULT,
    FAILURES,
    KEYS,
    LOOKS,
    PAIRINGS,
    SESSIONS,
    SOCKET_AUDIO,
    SOCKET_MESSAGES,
    TENANTS,
    Rate,
)
from agentvoicebox.tenancy.limits.reconciler import Reconciler

__all__ = [
    "ADMIN",
    "API_KEY",
    "CLAIMS",
    "DEFAULT",
    "FAILURES",
    "KEYS",
    "LOOKS",
    "PAIRINGS",
    "SESSIONS",
    "SOCKET_AUDIO",
    "SOCKET_MESSAGES",
    "TENANTS",
    "Budget",
    "Decision",
    "Exceeded",
    "Limiter",
    "Rate",
    "Reconciler",
    "Subject",
    "headers",
]
