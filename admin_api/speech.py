"""What the routes that speak, listen and answer have in common: the parts they ask, and what they are metered by."""

from __future__ import annotations

import asyncio
import struct
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from agentvoicebox.admin_api.visits import Visit
from agentvoicebox.bus_bridge.answers import Answers
from agentvoicebox.bus_bridge.engines import Engines
from agentvoicebox.bus_bridge.models import SessionSettings
from agentvoicebox.config.errors import BadInput, Forbidden, Unavailable
from agentvoicebox.plugins.chat.solvers import Solvers
from agentvoicebox.plugins.pool import Speech
from agentvoicebox.tenancy import secrets, settings, voices
from agentvoicebox.tenancy.database import Database
from agentvoicebox.tenancy.keyring import Grant
from agentvoicebox.tenancy.masterkeys import MasterKeys
from agentvoicebox.tenancy.metering import Usage
from agentvoicebox.tenancy.models import Metric, VoiceProvider

if TYPE_CHECKING:
    from agentvoicebox.plugins.phrases import Phrase

LONGEST_TEXT = 8_000
"""Characters that are spoken at once."""

SILENT_RATE = 24_000
"""Hz of what says nothing."""

WAV: dict[int | str, dict[str, Any]] = {
    200: {"description": "Audio.", "content": {"audio/wav": {"schema": {"type": "string", "format": "binary"}}}}
}
"""The OpenAPI `responses` of a route that answers with a WAV file."""

FAILED: dict[int | str, dict[str, Any]] = {
    502: {
        "description": "A provider failed; `error` says how.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
}
"""Those of a route that asks a provider."""

_ENDLESS = 0xFFFFFFFF
"""Stands in a WAV header for a length that nobody knows yet; readers go on to the end of what they are sent."""


def engines(request: Request) -> Engines:
    """The node's ears and voices. Raises `Unavailable` (`no_engines`)."""
    found: Engines | None = request.app.state.engines
    return found if found is not None else _none("speech engines")


def answers(request: Request) -> Answers:
    """Who answers here. Raises `Unavailable` (`no_engines`)."""
    found: Answers | None = request.app.state.answers
    return found if found is not None else _none("language models")


def solvers(request: Request) -> Solvers:
    """Who can be asked beside language models. Raises `Unavailable` (`no_engines`)."""
    found: Solvers | None = request.app.state.solvers
    return found if found is not None else _none("solvers")


def forget(request: Request, visit: Visit) -> None:
    """What the tenant has chosen has changed: the next question is answered by that."""
    if request.app.state.answers is not None:
        request.app.state.answers.forget(visit.tenant_id)


def master_keys(request: Request) -> MasterKeys:
    """By which secrets are sealed. Raises `Unavailable` (`no_engines`)."""
    found: MasterKeys | None = request.app.state.secrets
    return found if found is not None else _none("place for secrets")


async def begin(request: Request, visit: Visit, store: Database) -> SessionSettings:
    """What a new session of the tenant would begin with. Raises `Forbidden` (`voice_disabled`), `Unavailable`."""
    ears_and_voices = engines(request)
    decided = await settings.get(store, visit.tenant_id)
    if decided.default_voice_provider == VoiceProvider.DISABLED:
        raise Forbidden("Voice is turned off in the tenant's settings.", code="voice_disabled")
    config = await voices.get(store, visit.tenant_id)
    return ears_and_voices.begin(config, decided.default_stt_model, decided.default_tts_voice)


async def change(
    store: Database, visit: Visit, changes: Mapping[str, Any], names: Mapping[str, str]
) -> voices.VoiceConfig:
    """Change fields of the tenant's voice configuration, which a route calls otherwise: `names`, ours by the route's.

    Raises `BadInput` with the route's name, `NotFound`.
    """
    given = {names[name]: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    try:
        return await voices.patch(store, visit.tenant_id, given)
    except BadInput as error:
        told = next((name for name, field in names.items() if field == error.param), None)
        if told is None or error.param is None:
            raise
        message = error.message.replace(error.param, told, 1)
        raise BadInput(message, code=error.code, param=told) from error


async def check_phrase(phrase: str, language: str, param: str = "phrase") -> Phrase:
    """The wake phrase as it is kept. Raises `BadInput` with this param for one that no device could hear."""
    from agentvoicebox.plugins import phrases

    try:
        return await asyncio.to_thread(phrases.check, phrase, language)  # which may read a dictionary
    except BadInput as error:
        raise BadInput(error.message, code=error.code, param=param) from error


async def credentials(store: Database, visit: Visit) -> list[secrets.SecretInfo]:
    """What may be told of the tenant's keys with providers of language models, recognition and knowledge."""
    found: list[secrets.SecretInfo] = []
    for kind in ("llm", "stt", "solver"):
        # There are fewer of each than one page holds: only those that are known here can be set.
        found += (await secrets.list_(store, visit.tenant_id, kind, 1, 100)).items
    return found


def project_of(visit: Visit) -> uuid.UUID | None:
    """The project that the caller's key belongs to."""
    return visit.principal.project_id if isinstance(visit.principal, Grant) else None


async def meter(request: Request, visit: Visit, part: str, metric: Metric, seconds: float) -> None:
    """Return once the ledger holds what this part of the request used. Raises `Unavailable`.

    Also a caller that is cancelled here has put it into the ledger's queue: `record` does that before it waits.
    """
    if seconds > 0:
        used = Usage(
            f"{visit.request_id}:{part}",
            visit.tenant_id,
            metric,
            seconds,
            datetime.now(UTC),
            project_id=project_of(visit),
        )
        await request.app.state.ledger.record([used])


async def spoken(request: Request, visit: Visit, text: str, wanted: SessionSettings) -> bytes:
    """`text` as a WAV file, metered. Raises `AvbError`."""
    from agentvoicebox.plugins import audio

    said = await engines(request).speak(text, wanted, visit.tenant_id)
    await meter(request, visit, "tts", Metric.TTS_AUDIO_SECONDS, said.seconds)
    return audio.wav(said.pcm, said.rate)


async def clip(request: Request, visit: Visit, wanted: SessionSettings) -> Response:
    """A sample of how something sounds. Raises `AvbError`."""
    from agentvoicebox.plugins import kokoro

    text = kokoro.sample(wanted.language)
    return Response(await spoken(request, visit, text, wanted), media_type="audio/wav")


class Streamed(StreamingResponse):
    """Speech, sent as it is made: 16-bit mono, as a WAV file of unknown length or bare.

    When the client goes, the work ends.
    """

    def __init__(self, first: Speech | None, rest: AsyncGenerator[Speech, None], *, wav: bool) -> None:
        self._rest = rest
        rate = first.rate if first is not None else SILENT_RATE
        super().__init__(
            self._pieces(first, _wav_header(rate) if wav else b""),
            media_type="audio/wav" if wav else "audio/pcm",
            headers={"X-Sample-Rate": str(rate)},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve (ASGI)."""
        # A client that goes leaves a generator where it is: what it used would be metered whenever it is collected.
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)

    async def _pieces(self, first: Speech | None, header: bytes) -> AsyncGenerator[bytes, None]:
        yield header + (first.pcm if first is not None else b"")
        async for chunk in self._rest:
            yield chunk.pcm


async def streamed(request: Request, visit: Visit, text: str, wanted: SessionSettings, *, wav: bool) -> Response:
    """`text` as it is spoken; what was made is metered before the end is sent. Raises what its beginning raises."""
    chunks = _metered(request, visit, engines(request).stream(text, wanted, visit.tenant_id))
    return Streamed(await anext(chunks, None), chunks, wav=wav)


async def _metered(
    request: Request, visit: Visit, chunks: AsyncGenerator[Speech, None]
) -> AsyncGenerator[Speech, None]:
    used = 0.0
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                used += chunk.seconds
                yield chunk
    finally:
        await meter(request, visit, "tts", Metric.TTS_AUDIO_SECONDS, used)


def _wav_header(rate: int) -> bytes:
    """The header of a WAV file of 16-bit mono at `rate` Hz, as long as whatever follows."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", _ENDLESS, b"WAVE") + form + struct.pack("<4sI", b"data", _ENDLESS)


def _none(what: str) -> NoReturn:
    raise Unavailable(f"This node has no {what}: ask the operator, or a node that has.", code="no_engines")
