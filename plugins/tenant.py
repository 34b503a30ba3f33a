"""For skill authors: whose assistant is speaking, and what has this tenant set for my skill?

    from agentvoicebox.plugins import tenant

    def handle_hello(self, message):
        whose = tenant.current(message)
        if whose is not None:
            self.speak(f"Welcome to {whose.name}.")

The same in a cell, where one skill serves many tenants at once, and on a device, which belongs to one. Who asks waits a
second at most, and mostly not at all: what is known is remembered for a few seconds. `None` means that nothing of any
tenant may be said.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urlencode

from ovos_bus_client.message import Message
from ovos_config.config import Configuration
from ovos_utils.log import LOG

from agentvoicebox.config.errors import AvbError, NotFound, Unavailable
from agentvoicebox.plugins import node
from agentvoicebox.plugins.device import kept

if TYPE_CHECKING:
    from agentvoicebox.plugins.device.link import Link
    from agentvoicebox.plugins.device.section import Section

FRESH = 1.5
"""Seconds for which what was told is not asked again."""

AGAIN = 1.0
"""Seconds for which nobody is asked again who did not answer."""

MOST = 500
"""Answers that are remembered, of all tenants, sessions and skills together."""

LONGEST_SKILL = 100
"""Characters of a skill's id."""

_Told = Mapping[str, Any]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Project:
    """The part of a tenant that a conversation belongs to."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class TenantContext:
    """The tenant on whose behalf a message was sent. Names are its own words: never render them as templates."""

    id: str
    """Empty on a device that has not met its platform yet."""
    name: str
    persona: str
    """What the tenant's assistant is called, at this moment of this conversation."""
    slug: str = ""
    """The tenant's name in addresses; empty while the platform is out of reach."""
    project: Project | None = None
    session: str = ""
    """The conversation. Nothing may be remembered for one that belongs to another."""
    locale: str = ""
    """What is spoken, as a BCP 47 tag; empty when that is not known."""
    personas: tuple[str, ...] = ()
    """Whom one could talk to instead."""
    settings: Mapping[str, Any] = field(default_factory=lambda: _NOTHING, hash=False)
    """What the tenant has set for this skill (`PUT /api/v2/skills/{skill_id}/settings`); nothing by default."""


@dataclass(frozen=True, slots=True)
class Account:
    """What a tenant has, and has used since the first of the month."""

    plan: str
    """`free`, `starter`, `professional` or `enterprise`."""
    used: Mapping[str, float]
    """By metric, as in the REST service: `sessions`, `stt_audio_seconds` and so on."""
    limits: Mapping[str, float | None]
    """By metric; what is not limited has None."""
    resets: date
    """The day on which counting begins anew."""

    def left(self, metric: str) -> float | None:
        """How much of a metric is left; None when it is not limited."""
        limit = self.limits.get(metric)
        return None if limit is None else max(0.0, limit - self.used.get(metric, 0.0))


def current(message: Message, skill: str = "") -> TenantContext | None:
    """The tenant of a message, with what it has set for `skill`, by default the skill that the message was sent to.

    None when the message belongs to nobody. While the node or platform is out of reach the settings are the last known
    ones, or none. Never raises.
    """
    place = _place()
    whose = place.whose(message)
    if whose is None:
        return None
    try:
        told = _told(place, whose, message, skill)
    except _Elsewhere:
        return None
    who = told.get("tenant") or {}
    project = told.get("project")
    return TenantContext(
        id=whose.id or str(who.get("id") or ""),
        name=str(who.get("name") or whose.name),
        persona=whose.persona or str(told.get("persona") or ""),  # which may have changed since it was told
        slug=str(who.get("slug") or ""),
        project=Project(str(project["id"]), str(project["name"])) if project else None,
        session=whose.session,
        locale=str(told.get("locale") or _language(message)),
        personas=tuple(map(str, told.get("personas") or ())),
        settings=MappingProxyType(dict(told.get("settings") or {})),
    )


def identity(message: Message) -> TenantContext | None:
    """The same without asking anybody: id, name, persona, session and locale alone. Never raises, never waits."""
    whose = _place().whose(message)
    return whose and TenantContext(
        whose.id, whose.name, whose.persona, session=whose.session, locale=_language(message)
    )


def account(message: Message) -> Account | None:
    """Plan and usage of the tenant of a message; None when it belongs to nobody, or that cannot be told now."""
    place = _place()
    whose = place.whose(message)
    if whose is None:
        return None
    try:
        told = _told(place, whose, message, "").get("account") or {}
        return Account(
            str(told["plan"]),
            MappingProxyType({str(name): float(value) for name, value in told["used"].items()}),
            MappingProxyType({str(n): None if v is None else float(v) for n, v in told["limits"].items()}),
            date.fromisoformat(told["resets"]),
        )
    except (_Elsewhere, LookupError, TypeError, ValueError, AttributeError):
        return None


def choose_persona(message: Message, name: str) -> str:
    """Let the persona of that name answer from now on, in this conversation alone; returns what it is called.

    An empty name means whoever answers by default. One that is only heard roughly is understood as well.

    Raises `NotFound` when nobody is called so, or the message belongs to nobody, and `Unavailable` when the node or
    platform is out of reach.
    """
    place = _place()
    whose = place.whose(message)
    if whose is None:
        raise NotFound("This message belongs to no tenant.", code="tenant_not_found")
    chosen = place.choose(message, name)
    _RECENT.forget(whose)
    return chosen


class _Whose(NamedTuple):
    """What a message, or this process, says by itself of its tenant."""

    id: str
    name: str
    persona: str
    session: str


class _Elsewhere(Exception):
    """What was told is about another tenant than the message says: somebody lies."""


class _Place(Protocol):
    """Where this process runs."""

    def whose(self, message: Message) -> _Whose | None:
        """The tenant, as far as it is known without asking."""

    def tell(self, message: Message, skill: str) -> _Told:
        """Ask. Raises `AvbError` or `node.Failed`."""

    def kept(self, skill: str) -> _Told:
        """What was told in an earlier life of this process."""

    def choose(self, message: Message, name: str) -> str:
        """Change who answers. Raises `NotFound`, `Unavailable`."""


class _Cell:
    """Many tenants: each message says whose it is, and the node tells of turns in flight only."""

    def __init__(self, door: node.Node | None) -> None:
        self._door = door

    def whose(self, message: Message) -> _Whose | None:
        keys = ("tenant_id", "tenant_name", "persona_name")
        found = [value if isinstance(value := message.context.get(key), str) else "" for key in keys]
        session = message.context.get("avb_session")
        tenant_id, name, persona = found
        return _Whose(tenant_id, name, persona, session if isinstance(session, str) else "") if all(found) else None

    def tell(self, message: Message, skill: str) -> _Told:
        return self._ask(message, "GET", "/about?" + urlencode({"skill": skill}))

    def kept(self, skill: str) -> _Told:
        return _NOTHING

    def choose(self, message: Message, name: str) -> str:
        try:
            return str(self._ask(message, "POST", "/persona", {"name": name})["persona"])
        except (node.Failed, LookupError) as error:
            if isinstance(error, node.Failed) and error.code in ("persona_not_found", "validation_error"):
                raise _nobody(name) from error
            raise Unavailable("The node cannot be asked who answers; try again in a moment.") from error

    def _ask(self, message: Message, method: str, path: str, body: Any = None) -> dict[str, Any]:
        turn = message.context.get("avb_turn")
        if self._door is None or not isinstance(turn, str) or not turn:
            raise node.Failed("node_unreachable")
        return self._door.tell(method, path, turn, body)


class _Device:
    """One tenant, whose key this device has; whatever a message says."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._kept = _Kept(link.section)

    def whose(self, message: Message) -> _Whose | None:
        welcome, choices = self._link.welcome, self._link.choices
        name = welcome.tenant_name if welcome is not None else choices.tenant
        if not name:
            return None
        session = message.context.get("session")
        session_id = session.get("session_id") if isinstance(session, Mapping) else None
        return _Whose(welcome.tenant_id if welcome is not None else "", name, choices.persona, session_id or "default")

    def tell(self, message: Message, skill: str) -> _Told:
        if self._link.state != "up":
            raise Unavailable("The platform is out of reach.", code="platform_away")
        told = self._link.about(skill, timeout=node.TELL)
        self._kept.put(skill, told)
        return told

    def kept(self, skill: str) -> _Told:
        return self._kept.get(skill)

    def choose(self, message: Message, name: str) -> str:
        try:
            return self._link.choose(name)
        except Unavailable:
            raise
        except AvbError as error:
            if error.code == "persona_not_found":
                raise _nobody(name) from error
            raise Unavailable("The platform cannot change who answers; try again in a moment.") from error


class _Recent:
    """What was told lately, by tenant, session and skill. Safe to use from several threads."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, str, str], tuple[float, _Told]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, whose: _Whose, skill: str) -> tuple[bool, _Told | None]:
        """Whether it is still fresh, and what was told, however long ago."""
        with self._lock:
            until, told = self._held.get((whose.id, whose.session, skill), (0.0, None))
        return time.monotonic() < until, told

    def put(self, whose: _Whose, skill: str, told: _Told, seconds: float) -> None:
        key = (whose.id, whose.session, skill)
        with self._lock:
            self._held[key] = (time.monotonic() + seconds, told)
            self._held.move_to_end(key)
            while len(self._held) > MOST:
                self._held.popitem(last=False)

    def forget(self, whose: _Whose) -> None:
        """Ask anew in this conversation."""
        with self._lock:
            for key in [key for key in self._held if key[:2] == (whose.id, whose.session)]:
                del self._held[key]


class _Kept:
    """The same on the disk of a device, so that a skill keeps its settings where the network comes late or never."""

    def __init__(self, section: Section) -> None:
        self._section = section
        self._file = section.state / "about.json"
        self._lock = threading.Lock()
        self._owner = ""
        self._told: dict[str, _Told] = {}
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            self._told = {str(skill): told for skill, told in found["told"].items() if isinstance(told, dict)}
            self._owner = str(found["owner"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass  # not yet there, or of no use

    def get(self, skill: str) -> _Told:
        with self._lock:
            return self._told.get(skill, _NOTHING) if self._owner == self._now() else _NOTHING

    def put(self, skill: str, told: _Told) -> None:
        keep = {name: value for name, value in told.items() if name not in ("account", "session")}
        with self._lock:
            owner = self._now()
            if owner != self._owner:  # what was another tenant's is nobody's here any more
                self._owner, self._told = owner, {}
            if self._told.get(skill) == keep or (skill not in self._told and len(self._told) >= MOST):
                return
            self._told[skill] = keep
            try:
                kept.replace(self._file, json.dumps({"owner": owner, "told": self._told}).encode())
            except OSError as error:  # a full card is no reason not to answer
                LOG.warning(f"what the tenant has set cannot be kept: {type(error).__name__}")

    def _now(self) -> str:
        """Whose key this device has."""
        return kept.owner(self._section.key() or "")


_RECENT = _Recent()


@lru_cache(maxsize=1)
def _device(link: Link) -> _Device:
    return _Device(link)


def _place() -> _Place:
    """Where this process runs, by its `mycroft.conf`."""
    configuration = Configuration()
    section = configuration.get("agentvoicebox")
    if section and section.get("place") != "cell":
        from agentvoicebox.plugins.device import link  # which a cell does not need

        shared = link.shared("core")
        if shared is not None:
            return _device(shared)
    try:
        return _Cell(node.configured(section))
    except (OSError, ValueError) as error:
        LOG.error(f"the key of the node cannot be read: {type(error).__name__}")
        return _Cell(None)


def _told(place: _Place, whose: _Whose, message: Message, skill: str) -> _Told:
    """What is told of a tenant; if it cannot be asked now, what was told before. Raises `_Elsewhere`."""
    skill = _skill(message, skill)
    fresh, told = _RECENT.get(whose, skill)
    if not fresh:
        try:
            told = place.tell(message, skill)
            _RECENT.put(whose, skill, told, FRESH)
        except (AvbError, node.Failed) as error:
            LOG.warning(f"what a tenant has set cannot be asked: {error.code}")
            # Old settings are better than none; old figures are not.
            told = {name: value for name, value in (told or place.kept(skill)).items() if name != "account"}
            if error.code != "turn_not_found":  # the next turn may be told
                _RECENT.put(whose, skill, told, AGAIN)
    found = (told or {}).get("tenant") or {}
    if whose.id and found and found.get("id") != whose.id:
        raise _Elsewhere
    return told or _NOTHING


def _skill(message: Message, skill: str) -> str:
    found = skill or message.context.get("skill_id")
    return found if isinstance(found, str) and len(found) <= LONGEST_SKILL else ""


def _language(message: Message) -> str:
    session = message.context.get("session")
    told = message.data.get("lang") or (session.get("lang") if isinstance(session, Mapping) else "")
    return told if isinstance(told, str) else ""


def _nobody(name: str) -> NotFound:
    return NotFound(f"There is no persona {name[:100]!r}.", code="persona_not_found")
