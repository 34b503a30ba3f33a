"""Wake words: the phrases that a tenant's devices listen for, how readily, and how well that goes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock
from typing import TYPE_CHECKING, Annotated, NamedTuple

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from msgspec import UNSET, Meta, UnsetType
from pydantic import Field

from agentvoicebox.admin_api import auth, recordings, schemas, speech
from agentvoicebox.admin_api.auth import Visiting
from agentvoicebox.admin_api.listings import Listing, Paged, View, listing
from agentvoicebox.admin_api.schemas import Body
from agentvoicebox.admin_api.stores import Store
from agentvoicebox.admin_api.visits import Visit
from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.plugins.device import choices
from agentvoicebox.tenancy import voices, wake_words
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.models import WakeWord as Row

if TYPE_CHECKING:
    from agentvoicebox.plugins.detector import Heard
    from agentvoicebox.plugins.phrases import Phrase

router = APIRouter(prefix="/api/v2/wake-words", tags=["wake words"])

LARGEST = 10 * 1024 * 1024
"""Bytes of a recording."""
LONGEST = 30.0
"""Seconds of one."""
MOST_TRIALS, MOST_OF_ONE = 8, 2
"""Recordings that wait on a node at once, of all tenants and of one."""
PATIENCE = 60.0
"""Seconds in which one has been heard."""
DEFAULT_DAYS = 30
"""Of analytics."""

_HEARING = ThreadPoolExecutor(1, "wake-words")
"""What hears the recordings: however many are sent, conversations have their processors."""
_trials: Counter[uuid.UUID] = Counter()
"""How many recordings of whom are heard or wait for it."""

_CHANGE = ("wake_word.edit", "tenant.configure_voice")

Text = Annotated[str, Meta(min_length=1, max_length=100)]
"""As it is spoken."""
Sensitivity = Annotated[float, Meta(ge=0, le=1)]
"""From hardly ever to at anything similar; 0.5 is the engine's own choice."""


class NewWakeWord(Body):
    """What devices are to listen for."""

    phrase: Text
    sensitivity: Sensitivity = 0.5
    enabled: bool = True


class WakeWordChange(Body):
    """What is to be different about a wake word."""

    phrase: Text | UnsetType = UNSET
    sensitivity: Sensitivity | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class WakeWord(View):
    """A wake word. While it is not enabled no device listens for it, and everything about it is kept."""

    id: uuid.UUID
    phrase: str
    sensitivity: float
    enabled: bool
    model_ref: str
    """What hears it: `micro/…`, a model made for this phrase, or `sphinx`, which goes by how it is pronounced."""
    created_at: datetime
    updated_at: datetime


class Awaited(View):
    """What devices listen for now; without an id it is the phrase of the voice configuration."""

    id: uuid.UUID | None
    phrase: str
    sensitivity: float
    problem: str = ""
    """Why nobody can hear it, where that is so: the phrase of the voice configuration may be anything."""


class WakeWords(Listing[WakeWord]):
    """The tenant's wake words, and what its devices listen for now."""

    heard: list[Awaited]


class Trial(View):
    """Whether a recording would have woken a device."""

    detected: bool
    confidence: float
    """0 to 1: of the detection, or the most that it came to."""
    at: float | None
    """Seconds from the beginning of the recording, where it was detected."""
    sensitivity: float
    audio_seconds: float
    seconds: float
    """How long it took."""


class Day(View):
    """What devices told of a day in UTC."""

    date: Annotated[date, Field(validation_alias="day")]
    detections: int
    false_positives: int
    missed: int


class Analytics(View):
    """How well devices hear: from the day `since` to the day `until`, both included.

    Every wake-up is a detection; one after which nothing was said is a false positive, too. Missed is what was said and
    not heard, as far as a device finds that out.
    """

    since: date
    until: date
    detections: int
    false_positives: int
    missed: int
    detection_rate: float | None
    """0 to 1: how much was heard of what was said; None when nothing was said."""
    average_confidence: float | None
    """0 to 1, of detections; None without any."""
    days: list[Day]


class Span(NamedTuple):
    """Days in UTC, both included."""

    since: date
    until: date

    @property
    def begin(self) -> datetime:
        """When the first day begins."""
        return datetime.combine(self.since, clock.min, UTC)

    @property
    def end(self) -> datetime:
        """When the last day has ended."""
        return datetime.combine(self.until, clock.min, UTC) + timedelta(days=1)


async def _span(
    since: Annotated[date | None, Query(alias="from", description="The first day, in UTC.")] = None,
    until: Annotated[date | None, Query(alias="to", description="The last day, by default today.")] = None,
) -> Span:
    """The days that are asked about, by default the last 30. Raises `BadInput`."""
    today = datetime.now(UTC).date()
    last = min(until or today, today)  # nothing has happened later
    if since is None:
        since = date.fromordinal(max(1, last.toordinal() - DEFAULT_DAYS + 1))
    if since > last:
        raise BadInput("from must not be after to, nor after today.", param="from")
    if (last - since).days >= wake_words.MOST_DAYS:
        raise BadInput(
            f"from and to must not be more than {wake_words.MOST_DAYS} days apart; ask for fewer.", param="from"
        )
    return Span(since, last)


Asked = Annotated[Span, Depends(_span)]


@router.post("", status_code=201, dependencies=auth.may(*_CHANGE), openapi_extra=schemas.document(NewWakeWord))
async def create_wake_word(request: Request, visit: Visiting, store: Store) -> WakeWord:
    """Let devices listen for a phrase, at once; it must be one that can be heard in the assistant's language."""
    wanted = await schemas.read(request, NewWakeWord)
    found = await _checked(visit, store, wanted.phrase)
    made = await wake_words.create(
        store,
        visit.tenant_id,
        found.phrase,
        sensitivity=wanted.sensitivity,
        enabled=wanted.enabled,
        model_ref=found.model,
    )
    return WakeWord.model_validate(made)


@router.get("", dependencies=auth.may("wake_word.view"))
async def list_wake_words(visit: Visiting, store: Store, paging: Paged) -> WakeWords:
    """The tenant's wake words, and under `heard` what its devices listen for: those that are enabled.

    Where none is, it is the `wake_word` of the voice configuration, so that no device is ever deaf.
    """
    found = await wake_words.list_(store, visit.tenant_id, paging.page, paging.size)
    return WakeWords(**listing(WakeWord.model_validate, found).model_dump(), heard=await _heard(visit, store))


@router.get("/analytics", dependencies=auth.may("wake_word.view"))
async def read_all_analytics(visit: Visiting, store: Store, span: Asked) -> Analytics:
    """How well devices hear, whichever phrase it is, those included that are no more."""
    return await _told(visit, store, None, span)


@router.get("/{wake_word_id:uuid}", dependencies=auth.may("wake_word.view"))
async def read_wake_word(visit: Visiting, store: Store, wake_word_id: uuid.UUID) -> WakeWord:
    """One wake word."""
    return WakeWord.model_validate(await wake_words.get(store, visit.tenant_id, wake_word_id))


@router.put("/{wake_word_id:uuid}", dependencies=auth.may(*_CHANGE), openapi_extra=schemas.document(NewWakeWord))
async def replace_wake_word(request: Request, visit: Visiting, store: Store, wake_word_id: uuid.UUID) -> WakeWord:
    """Set all of a wake word anew; what is left out is as for a new one."""
    wanted = await schemas.read(request, NewWakeWord)
    return await _changed(visit, store, wake_word_id, schemas.changes(wanted))


@router.patch("/{wake_word_id:uuid}", dependencies=auth.may(*_CHANGE), openapi_extra=schemas.document(WakeWordChange))
async def change_wake_word(request: Request, visit: Visiting, store: Store, wake_word_id: uuid.UUID) -> WakeWord:
    """Change some of a wake word; devices have it within two seconds."""
    wanted = await schemas.read(request, WakeWordChange)
    return await _changed(visit, store, wake_word_id, schemas.changes(wanted))


@router.delete("/{wake_word_id:uuid}", status_code=204, dependencies=auth.may("wake_word.delete"))
async def remove_wake_word(visit: Visiting, store: Store, wake_word_id: uuid.UUID) -> Response:
    """Remove a wake word; what devices told of it still counts in the analytics of all."""
    await wake_words.remove(store, visit.tenant_id, wake_word_id)
    return Response(status_code=204)


@router.post(
    "/{wake_word_id:uuid}/test",
    dependencies=auth.may(*_CHANGE, body=LARGEST),
    openapi_extra=recordings.document(LARGEST, LONGEST),
)
async def try_wake_word(
    request: Request,
    visit: Visiting,
    store: Store,
    wake_word_id: uuid.UUID,
    sensitivity: Annotated[
        float | None, Query(ge=0, le=1, allow_inf_nan=False, description="Instead of that of the wake word.")
    ] = None,
) -> Trial:
    """Whether a recording, which is the body, would wake a device; it is kept nowhere, nor counted."""
    row = await wake_words.get(store, visit.tenant_id, wake_word_id)
    recordings.check(request)
    file = await schemas.received(request)
    begun = time.monotonic()
    used = row.sensitivity if sensitivity is None else sensitivity
    word = choices.WakeWord(row.phrase, used, row.model_ref, str(row.id))
    with _turn(visit.tenant_id):
        try:
            async with asyncio.timeout(PATIENCE):
                audio_seconds, heard = await _listen(file, word)
        except TimeoutError as error:
            raise Unavailable("The recording was not heard in time: try again.", code="engine_timeout") from error
    return Trial(
        detected=heard.detected,
        confidence=heard.confidence,
        at=heard.at,
        sensitivity=used,
        audio_seconds=audio_seconds,
        seconds=time.monotonic() - begun,
    )


@router.get("/{wake_word_id:uuid}/analytics", dependencies=auth.may("wake_word.view"))
async def read_analytics(visit: Visiting, store: Store, wake_word_id: uuid.UUID, span: Asked) -> Analytics:
    """How well devices hear a wake word."""
    return await _told(visit, store, wake_word_id, span)


async def _told(visit: Visit, store: Database, wake_word_id: uuid.UUID | None, span: Span) -> Analytics:
    found = await wake_words.analytics(store, visit.tenant_id, wake_word_id, span.begin, span.end)
    return Analytics.model_validate({**asdict(found), "since": span.since, "until": span.until})


async def _changed(visit: Visit, store: Database, wake_word_id: uuid.UUID, changes: dict[str, object]) -> WakeWord:
    if (phrase := changes.get("phrase")) is not None:
        await wake_words.get(store, visit.tenant_id, wake_word_id)  # who has none learns nothing about phrases
        found = await _checked(visit, store, str(phrase))
        changes |= {"phrase": found.phrase, "model_ref": found.model}
    return WakeWord.model_validate(await wake_words.update(store, visit.tenant_id, wake_word_id, changes))


async def _checked(visit: Visit, store: Database, phrase: str) -> Phrase:
    return await speech.check_phrase(phrase, (await voices.get(store, visit.tenant_id)).language)


async def _heard(visit: Visit, store: Database) -> list[Awaited]:
    rows: list[Row] = list(await wake_words.active(store, visit.tenant_id))
    if rows:
        return [Awaited.model_validate(row) for row in rows]
    phrase = (await voices.get(store, visit.tenant_id)).wake_word
    problem = ""
    try:
        await _checked(visit, store, phrase)
    except BadInput as error:
        problem = error.message
    return [Awaited(id=None, phrase=phrase, sensitivity=choices.WakeWord(phrase).sensitivity, problem=problem)]


@contextmanager
def _turn(tenant_id: uuid.UUID) -> Iterator[None]:
    """While a recording is heard. Raises `Unavailable` (`busy`) where too many are."""
    if _trials.total() >= MOST_TRIALS or _trials[tenant_id] >= MOST_OF_ONE:
        raise Unavailable("Too many recordings wait to be heard here: try again in some seconds.", code="busy")
    _trials[tenant_id] += 1
    try:
        yield
    finally:
        _trials[tenant_id] -= 1
        if not _trials[tenant_id]:
            del _trials[tenant_id]


async def _listen(file: bytes, word: choices.WakeWord) -> tuple[float, Heard]:
    return await asyncio.get_running_loop().run_in_executor(_HEARING, _hear, file, word)


def _hear(file: bytes, word: choices.WakeWord) -> tuple[float, Heard]:
    """The length of a recording, in seconds, and what was heard in it. Raises `BadInput`, `TooLarge`."""
    from agentvoicebox.plugins import audio, detector

    pcm = audio.decode(file, longest=LONGEST)
    return len(pcm) / (2 * audio.RATE), detector.hear(pcm, word)
