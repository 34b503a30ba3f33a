"""Who did what: one line per change, in the transaction of the change, chained per tenant and kept for good.

lines       writing: the actor, a line beside each change, and denials
redaction   what may stand in a line
reading     searching, one entry, exports
chain       whether everything is still there, unchanged
retention   months: making them, archiving old ones
"""

from __future__ import annotations

from agentvoicebox.tenancy.audit.archives import Archived, Retention, archive, months, retention
from agentvoicebox.tenancy.audit.chain import Broken, Verdict, against, heads, verify
from agentvoicebox.tenancy.audit.lines import Actor, acting, actor, append, denied
from agentvoicebox.tenancy.audit.reading import entry, export, search
from agentvoicebox.tenancy.models import PLATFORM, Action, ActorType

__all__ = [
    "PLATFORM",
    "Action",
    "Actor",
    "ActorType",
    "Archived",
    "Broken",
    "Retention",
    "Verdict",
    "acting",
    "actor",
    "against",
    "append",
    "archive",
    "denied",
    "entry",
    "export",
    "heads",
    "months",
    "retention",
    "search",
    "verify",
]
