"""The tables. What belongs to a tenant has its id first in every key, and row-level security around it."""

from __future__ import annotations

from agentvoicebox.tenancy.models.audit import Action, ActorType, AuditAnchor, AuditEntry, AuditHead
from agentvoicebox.tenancy.models.base import PLATFORM, Base, TenantOwned, Timestamped
from agentvoicebox.tenancy.models.devices import (
    Device,
    DeviceEventKind,
    DeviceEventRow,
    Outcome,
    Pairing,
    SkillSettings,
    WakeWord,
)
from agentvoicebox.tenancy.models.keys import ApiKey, ChangeKind, KeyRevocation, RateClass
from agentvoicebox.tenancy.models.people import (
    Invitation,
    InvitationStatus,
    Member,
    MemberStatus,
    Relation,
    Role,
    User,
)
from agentvoicebox.tenancy.models.personas import Persona, PersonaStatus
from agentvoicebox.tenancy.models.secrets import DataKey, Secret, SecretVersion
from agentvoicebox.tenancy.models.sessions import EventType, Session, SessionEvent, SessionMonth, SessionStatus
from agentvoicebox.tenancy.models.tenants import (
    Deployment,
    DeploymentStatus,
    Environment,
    Project,
    ProjectEnvironment,
    Tenant,
    TenantDomain,
    TenantSettings,
    TenantStatus,
    Tier,
    VoiceConfig,
    VoiceProvider,
)
from agentvoicebox.tenancy.models.usage import GAUGES, Metric, UsageEvent, UsageMark, UsageMinute, UsageWindow

__all__ = [
    "GAUGES",
    "PLATFORM",
    "Action",
    "ActorType",
    "ApiKey",
    "AuditAnchor",
    "AuditEntry",
    "AuditHead",
    "Base",
    "ChangeKind",
    "DataKey",
    "Deployment",
    "DeploymentStatus",
    "Device",
    "DeviceEventKind",
    "DeviceEventRow",
    "Environment",
    "EventType",
    "Invitation",
    "InvitationStatus",
    "KeyRevocation",
    "Member",
    "MemberStatus",
    "Metric",
    "Outcome",
    "Pairing",
    "Persona",
    "PersonaStatus",
    "Project",
    "ProjectEnvironment",
    "RateClass",
    "Relation",
    "Role",
    "Secret",
    "SecretVersion",
    "Session",
    "SessionEvent",
    "SessionMonth",
    "SessionStatus",
    "SkillSettings",
    "Tenant",
    "TenantDomain",
    "TenantOwned",
    "TenantSettings",
    "TenantStatus",
    "Tier",
    "Timestamped",
    "UsageEvent",
    "UsageMark",
    "UsageMinute",
    "UsageWindow",
    "User",
    "VoiceConfig",
    "VoiceProvider",
    "WakeWord",
]
