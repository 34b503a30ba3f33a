"""Wake words: the phrases that wake a tenant's devices, and how well they do.

Whether somebody can pronounce a phrase and which model hears it is not for here: see `plugins.phrases`.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import delete as erase
from sqlalchemy import func, select
from sqlalchemy import update as change
from sqlalchemy.ext.asyncio import AsyncSession

from agentvoicebox.config.errors import BadInput, Conflict, NotFound
from agentvoicebox.tenancy import audit, pages, tenants
from agentvoicebox.tenancy.checks import moment, real, shaped, words, yes_or_no
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import Action, DeviceEventKind, DeviceEventRow, Outcome, WakeWord
from agentvoicebox.tenancy.pages import Page

MOST = 10
"""Wake words of one tenant: every device listens for all of them at once."""
MOST_DAYS = 366
"""Days of one analysis; events are kept for 90."""

_MODEL = re.compile(r"([A-Za-z0-9][A-Za-z0-9._/-]{0,99})?")


@dataclass(frozen=True, slots=True)
class Wording:
    """What a wake word is like; a value that makes no sense raises `BadInput` naming its field."""

    phrase: str
    """Kept in lower case, with single spaces."""
    sensitivity: float = 0.5
    """0 (hardly ever) to 1 (at anything similar)."""
    enabled: bool = True
    """A disabled one keeps the rest."""
    model_ref: str = ""
    """Which engine and model hear it, as `micro/okay_nabu`; empty for whatever finds itself for the phrase."""

    def __post_init__(self) -> None:
        if isinstance(self.phrase, str):
            object.__setattr__(self, "phrase", " ".join(self.phrase.lower().split()))
        words(self.phrase, "phrase", 2, 64)
        object.__setattr__(self, "sensitivity", real(self.sensitivity, "sensitivity", 0, 1))
        yes_or_no(self.enabled, "enabled")
        shaped(self.model_ref, "model_ref", _MODEL, "the name of a model such as micro/okay_nabu, or empty")


@dataclass(frozen=True, slots=True)
class Day:
    """What happened on one day, in UTC."""

    day: date
    detections: int = 0
    false_positives: int = 0
    missed: int = 0


@dataclass(frozen=True, slots=True)
class Analytics:
    """How well one wake word, or all of them, did.

    Every wake-up is a detection; one after which nobody said anything is a false positive, too.
    """

    detections: int
    false_positives: int
    missed: int
    detection_rate: float | None
    """Of what was said, how much was heard: detections that were not false / (those + missed). None when nothing was
    said."""
    average_confidence: float | None
    """0 to 1, of the detections that tell theirs."""
    days: list[Day] = field(default_factory=list)
    """Every day that begins or ends between the two instants, in order, also those on which nothing happened."""


async def create(
    database: Database,
    tenant_id: uuid.UUID,
    phrase: str,
    *,
    sensitivity: float = 0.5,
    enabled: bool = True,
    model_ref: str = "",
) -> WakeWord:
    """Let the tenant's devices hear one more phrase.

    Raises `BadInput`, `NotFound` for an unknown tenant, `Conflict` for a phrase that is there already
    (`wake_word_exists`) and when the tenant has 10 (`too_many_wake_words`).
    """
    wording = Wording(phrase, sensitivity, enabled, model_ref)
    wake_word = WakeWord(id=uuid.uuid4(), **asdict(wording))
    async with database.tenant(tenant_id) as session:
        await tenants.lock(session, tenant_id)
        taken = await _phrases(session)
        if len(taken) >= MOST:
            raise Conflict(f"A tenant has at most {MOST} wake words; remove one first.", code="too_many_wake_words")
        _check_free(wording.phrase, taken)
        session.add(wake_word)
        await session.flush()
        await session.refresh(wake_word)
        told = f"Made the wake word {wording.phrase}"
        await audit.append(session, Action.CREATE, "wake_word", wake_word.id, told, new=asdict(wording))
    return wake_word


async def get(database: Database, tenant_id: uuid.UUID, wake_word_id: uuid.UUID) -> WakeWord:
    """One wake word. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        return _known(await session.get(WakeWord, (tenant_id, wake_word_id)))


async def list_(database: Database, tenant_id: uuid.UUID, page: int = 1, page_size: int = 20) -> Page[WakeWord]:
    """The tenant's wake words, also disabled ones, by phrase. Raises `BadInput`."""
    async with database.tenant(tenant_id) as session:
        return await pages.turn_to(session, select(WakeWord).order_by(WakeWord.phrase), page, page_size)


async def active(database: Database, tenant_id: uuid.UUID) -> Sequence[WakeWord]:
    """What the tenant's devices listen for, the oldest first; empty when that is the phrase of its voice."""
    query = select(WakeWord).where(WakeWord.enabled).order_by(WakeWord.created_at, WakeWord.id)
    async with database.tenant(tenant_id) as session:
        return (await session.execute(query)).scalars().all()


async def update(
    database: Database, tenant_id: uuid.UUID, wake_word_id: uuid.UUID, changes: Mapping[str, Any]
) -> WakeWord:
    """Change these fields of `Wording`; the others stay, and devices follow within a moment.

    Raises `BadInput`, `NotFound`, and `Conflict` for a phrase that is there already (`wake_word_exists`).
    """
    for name in changes:
        if name not in Wording.__dataclass_fields__:
            raise BadInput(f"A wake word has no field {str(name)[:50]!r}.", param=str(name)[:50])
    async with database.tenant(tenant_id) as session:
        wake_word = await _locked(session, tenant_id, wake_word_id)
        before = Wording(**{each.name: getattr(wake_word, each.name) for each in fields(Wording)})
        after = replace(before, **changes)
        taken = await _phrases(session)
        taken.pop(wake_word_id)
        _check_free(after.phrase, taken)
        old, new = asdict(before), asdict(after)
        if changed := [name for name in new if old[name] != new[name]]:
            await session.execute(change(WakeWord).where(WakeWord.id == wake_word_id).values(new))
            await session.refresh(wake_word)
            await audit.append(
                session,
                Action.UPDATE,
                "wake_word",
                wake_word_id,
                f"Changed {', '.join(changed)}",
                old={name: old[name] for name in changed},
                new={name: new[name] for name in changed},
            )
    return wake_word


async def remove(database: Database, tenant_id: uuid.UUID, wake_word_id: uuid.UUID) -> None:
    """Let devices hear it no more; what it did counts among all wake words' still. Raises `NotFound`."""
    async with database.tenant(tenant_id) as session:
        wake_word = await _locked(session, tenant_id, wake_word_id)
        await session.execute(erase(WakeWord).where(WakeWord.id == wake_word_id))
        told = f"Removed the wake word {wake_word.phrase}"
        await audit.append(session, Action.DELETE, "wake_word", wake_word_id, told, old={"phrase": wake_word.phrase})


async def analytics(
    database: Database, tenant_id: uuid.UUID, wake_word_id: uuid.UUID | None, begin: datetime, end: datetime
) -> Analytics:
    """How well a wake word, or with None all that there are and were, did from `begin` until just before `end`.

    Events of removed devices count. Raises `BadInput`, also for more than 366 days, and `NotFound`.
    """
    begin, end = _utc(begin, "begin"), _utc(end, "end")
    if not begin < end:
        raise BadInput("end must lie after begin.", param="end")
    if end - begin > timedelta(days=MOST_DAYS):
        raise BadInput(f"begin and end must be at most {MOST_DAYS} days apart.", param="begin")
    day = func.date(func.timezone("UTC", DeviceEventRow.at))
    query = (
        select(
            day,
            DeviceEventRow.outcome,
            func.count(),
            func.count(DeviceEventRow.confidence),
            func.coalesce(func.sum(DeviceEventRow.confidence), 0.0),
        )
        .where(DeviceEventRow.kind == DeviceEventKind.WAKE, DeviceEventRow.at >= begin, DeviceEventRow.at < end)
        .group_by(day, DeviceEventRow.outcome)
    )
    if wake_word_id is not None:
        query = query.where(DeviceEventRow.wake_word_id == wake_word_id)
    async with database.tenant(tenant_id) as session:
        if wake_word_id is not None:
            _known(await session.get(WakeWord, (tenant_id, wake_word_id)))
        found = [(row[0], Outcome(row[1]), row[2], row[3], row[4]) for row in await session.execute(query)]
    counts = {(day, outcome): count for day, outcome, count, _, _ in found}
    days = [_day(each, counts) for each in _dates(begin, end)]
    detections, false_positives = sum(day.detections for day in days), sum(day.false_positives for day in days)
    missed = sum(day.missed for day in days)
    heard = detections - false_positives
    confident = [(known, total) for _, outcome, _, known, total in found if outcome != Outcome.MISSED]
    known = sum(each for each, _ in confident)
    return Analytics(
        detections,
        false_positives,
        missed,
        heard / (heard + missed) if heard + missed else None,
        sum(total for _, total in confident) / known if known else None,
        days,
    )


def _utc(given: datetime, param: str) -> datetime:
    try:
        return moment(given, param).astimezone(UTC)
    except OverflowError as error:  # the first or the last hours that there are
        raise BadInput(f"{param} must be a time with its zone.", param=param) from error


def _dates(begin: datetime, end: datetime) -> list[date]:
    last = (end - timedelta(microseconds=1)).date()
    return [begin.date() + timedelta(days=number) for number in range((last - begin.date()).days + 1)]


def _day(day: date, counts: Mapping[tuple[date, Outcome], int]) -> Day:
    detected, false, missed = (counts.get((day, outcome), 0) for outcome in Outcome)
    return Day(day, detected + false, false, missed)


async def _phrases(session: AsyncSession) -> dict[uuid.UUID, str]:
    return {id_: phrase for id_, phrase in await session.execute(select(WakeWord.id, WakeWord.phrase))}


def _check_free(phrase: str, taken: Mapping[uuid.UUID, str]) -> None:
    if phrase in taken.values():
        raise Conflict(f"There is a wake word {phrase!r} already.", code="wake_word_exists", param="phrase")


async def _locked(session: AsyncSession, tenant_id: uuid.UUID, wake_word_id: uuid.UUID) -> WakeWord:
    """The wake word, while nobody else changes any of the tenant's."""
    await tenants.lock(session, tenant_id)
    query = select(WakeWord).where(WakeWord.id == wake_word_id).with_for_update()
    return _known((await session.execute(query)).scalar_one_or_none())


def _known(wake_word: WakeWord | None) -> WakeWord:
    if wake_word is None:
        raise NotFound("There is no such wake word.", param="wake_word_id")
    return wake_word
