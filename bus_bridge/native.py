"""The native session socket, `/ws/v2/sessions/{id}`: JSON text frames with 16-bit mono PCM as base64. A pure codec.

Client events are objects with a `type` and an optional `event_id`:

    ping                                       → pong
    audio.chunk {audio}                        16-bit mono at the session's input rate, at most 1 MiB an event
    audio.commit, audio.clear                  for sessions without turn detection
    response.create {messages: [{role, content}]}
    response.cancel
    session.update {config}
    session.end

The server answers with `{type, data, timestamp}`, and with `{type: "error", error: {code, message, param, event_id},
timestamp}` where something could not be done.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec

from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge import wire
from agentvoicebox.bus_bridge.models import MAX_INSTRUCTIONS, AudioFormat, SessionSettings, TurnDetection

MAX_AUDIO = 1024 * 1024
"""Bytes of audio in one event."""

MAX_TEXT = 8000
"""Characters of one written message."""

Rate = Literal[8000, 16000, 22050, 24000, 44100, 48000]


class DetectionConfig(msgspec.Struct, forbid_unknown_fields=True):
    """Turn detection as a client configures it; times in milliseconds."""

    threshold: Annotated[float, msgspec.Meta(ge=0.05, le=0.95)] | msgspec.UnsetType = msgspec.UNSET
    prefix_padding_ms: Annotated[int, msgspec.Meta(ge=0, le=2000)] | msgspec.UnsetType = msgspec.UNSET
    silence_duration_ms: Annotated[int, msgspec.Meta(ge=50, le=5000)] | msgspec.UnsetType = msgspec.UNSET
    create_response: bool | msgspec.UnsetType = msgspec.UNSET
    interrupt_response: bool | msgspec.UnsetType = msgspec.UNSET

    def over(self, detection: TurnDetection | None) -> TurnDetection:
        """These choices on top of what was in force."""
        found = detection or TurnDetection()

        def pick(value: Any, otherwise: Any, scale: float | None = None) -> Any:
            if value is msgspec.UNSET:
                return otherwise
            return value if scale is None else value / scale

        return TurnDetection(
            threshold=pick(self.threshold, found.threshold),
            prefix_padding=pick(self.prefix_padding_ms, found.prefix_padding, 1000),
            silence=pick(self.silence_duration_ms, found.silence, 1000),
            create_response=pick(self.create_response, found.create_response),
            interrupt_response=pick(self.interrupt_response, found.interrupt_response),
        )


class SessionConfig(msgspec.Struct, forbid_unknown_fields=True):
    """What a client may configure, when it creates the session and later; everything is optional."""

    voice: Annotated[str, msgspec.Meta(max_length=100)] | msgspec.UnsetType = msgspec.UNSET
    speed: Annotated[float, msgspec.Meta(ge=0.5, le=2.0)] | msgspec.UnsetType = msgspec.UNSET
    language: Annotated[str, msgspec.Meta(pattern="^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    model: Annotated[str, msgspec.Meta(max_length=100)] | msgspec.UnsetType = msgspec.UNSET
    """Accepted for clients that name one; the tenant's configuration decides."""
    persona_id: Annotated[str, msgspec.Meta(max_length=100)] | msgspec.UnsetType = msgspec.UNSET
    """Who is to answer: an id or a name, when the session is created; later it is changed by asking for it."""
    instructions: Annotated[str, msgspec.Meta(max_length=MAX_INSTRUCTIONS)] | msgspec.UnsetType = msgspec.UNSET
    partials: bool | msgspec.UnsetType = msgspec.UNSET
    modality: Literal["audio", "text"] | msgspec.UnsetType = msgspec.UNSET
    input_rate: Rate | msgspec.UnsetType = msgspec.UNSET
    output_rate: Rate | msgspec.UnsetType = msgspec.UNSET
    turn_detection: DetectionConfig | msgspec.UnsetType | None = msgspec.UNSET

    def changes(self, settings: SessionSettings) -> dict[str, object]:
        """The fields of `SessionSettings` this configuration changes."""
        found: dict[str, object] = {}
        for name in ("voice", "speed", "language", "instructions", "partials"):
            if (value := getattr(self, name)) is not msgspec.UNSET:
                found[name] = value
        if self.modality is not msgspec.UNSET:
            found["speaks"] = self.modality == "audio"
        if self.input_rate is not msgspec.UNSET:
            found["input_format"] = AudioFormat(self.input_rate)
        if self.output_rate is not msgspec.UNSET:
            found["output_format"] = AudioFormat(self.output_rate)
        detection = self.turn_detection
        if detection is None:
            found["turn_detection"] = None
        elif not isinstance(detection, msgspec.UnsetType):
            found["turn_detection"] = detection.over(settings.turn_detection)
        return found


class _Client(msgspec.Struct, tag_field="type"):
    event_id: Annotated[str, msgspec.Meta(max_length=512)] | None = None


class _Ping(_Client, tag="ping"):
    pass


class _AudioChunk(_Client, tag="audio.chunk", kw_only=True):
    audio: bytes


class _AudioCommit(_Client, tag="audio.commit"):
    pass


class _AudioClear(_Client, tag="audio.clear"):
    pass


class _Message(msgspec.Struct):
    content: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TEXT)]
    role: Literal["user"] = "user"


class _ResponseCreate(_Client, tag="response.create", kw_only=True):
    messages: list[_Message] = msgspec.field(default_factory=list)


class _ResponseCancel(_Client, tag="response.cancel"):
    pass


class _SessionUpdate(_Client, tag="session.update", kw_only=True):
    config: SessionConfig


class _SessionEnd(_Client, tag="session.end"):
    pass


_DECODER = msgspec.json.Decoder(
    _Ping | _AudioChunk | _AudioCommit | _AudioClear | _ResponseCreate | _ResponseCancel | _SessionUpdate | _SessionEnd
)


class Pinged:
    """The client wants a `pong`."""


class EndWanted:
    """The client closes its session for good."""


Input = ev.Event | ev.AudioAppended | Pinged | EndWanted


class NativeCodec:
    """One connection's codec. `clock` gives the time for timestamps, as ISO 8601."""

    __slots__ = ("_clock", "_created", "_session_id")

    def __init__(self, session_id: str, created: datetime, clock: Callable[[], str]) -> None:
        self._session_id = session_id
        self._created = created
        self._clock = clock

    def opening(self, settings: SessionSettings) -> list[str]:
        """The first frames of a connection."""
        state = {
            "session_id": self._session_id,
            "status": "active",
            "created_at": self._created.isoformat(),
            "config": _config(settings),
        }
        return [self._frame("connection.established", {}), self._frame("session.state", state)]

    def closing(self) -> list[str]:
        """The last frames of a session that has ended in order."""
        return [self._frame("session.ended", {"session_id": self._session_id})]

    def pong(self) -> str:
        """The answer to a ping."""
        return self._frame("pong", {})

    def decode(self, frame: str | bytes, settings: SessionSettings) -> list[Input]:
        """What the client wants. Raises `WireError`, and nothing else."""
        event = wire.decode(frame, _DECODER)
        match event:
            case _AudioChunk(audio=audio):
                wire.check_pcm(audio, MAX_AUDIO, event.event_id)
                return [ev.AudioAppended(audio, event.event_id)]
            case _Ping():
                return [Pinged()]
            case _AudioCommit():
                return [ev.AudioCommitted(event.event_id)]
            case _AudioClear():
                return [ev.AudioCleared(event.event_id)]
            case _ResponseCreate(messages=messages):
                text = " ".join(message.content for message in messages) if messages else None
                if text is not None and len(text) > MAX_TEXT:
                    raise wire.WireError(
                        "invalid_value", f"At most {MAX_TEXT} characters are answered.", "messages", event.event_id
                    )
                return [ev.ResponseWanted(text=text, event_id=event.event_id)]
            case _ResponseCancel():
                return [ev.ResponseCancelled(event_id=event.event_id)]
            case _SessionUpdate(config=config):
                return [ev.SettingsWanted(config.changes(settings), event.event_id)]
            case _:
                return [EndWanted()]

    def encode(self, told: ev.Told, settings: SessionSettings) -> list[str]:
        """The frames that tell the client; some news has no frame here."""
        match told:
            case ev.ReplyAudio():
                audio = base64.b64encode(told.pcm).decode()
                return [self._frame("audio.delta", {"response_id": told.turn_id, "audio": audio, "rate": told.rate})]
            case ev.ReplyText():
                return [self._frame("response.delta", {"response_id": told.turn_id, "text": told.text})]
            case ev.ReplyStarted():
                return [self._frame("response.started", {"response_id": told.turn_id})]
            case ev.ReplyEnded():
                return [self._frame("response.done", _outcome(told))]
            case ev.Understanding():
                return [self._frame("transcription.delta", {"item_id": told.item_id, "text": told.text})]
            case ev.Understood():
                data = {"item_id": told.item_id, "text": told.text, "audio_seconds": round(told.seconds, 3)}
                return [self._frame("transcription.final", data)]
            case ev.NotUnderstood():
                error = {"code": told.code, "message": told.message}
                return [self._frame("transcription.failed", {"item_id": told.item_id, "error": error})]
            case ev.SpeechStarted():
                return [self._frame("speech.started", {"item_id": told.item_id, "at_ms": round(told.at * 1000)})]
            case ev.SpeechStopped():
                return [self._frame("speech.stopped", {"item_id": told.item_id, "at_ms": round(told.at * 1000)})]
            case ev.SettingsChanged():
                return [self._frame("session.updated", {"config": _config(told.settings)})]
            case ev.InputCleared():
                return [self._frame("audio.cleared", {})]
            case ev.Problem():
                return [self.problem(told)]
            case _:
                return []

    def problem(self, told: ev.Problem) -> str:
        """An error event."""
        error = {"code": told.code, "message": told.message, "param": told.param, "event_id": told.event_id}
        return wire.encode({"type": "error", "error": error, "timestamp": self._clock()})

    def _frame(self, kind: str, data: dict[str, Any]) -> str:
        return wire.encode({"type": kind, "data": data, "timestamp": self._clock()})


def _outcome(told: ev.ReplyEnded) -> dict[str, Any]:
    found: dict[str, Any] = {
        "response_id": told.turn_id,
        "status": told.status,
        "text": told.text,
        "audio_seconds": round(told.audio_seconds, 3),
        "timings_ms": told.timings_ms,
        "expects_response": told.listens,
    }
    if told.status == "failed":
        found["error"] = {"code": told.reason, "message": told.message}
    elif told.reason:
        found["reason"] = told.reason
    return found


def _config(settings: SessionSettings) -> dict[str, Any]:
    detection = settings.turn_detection
    return {
        "voice": settings.voice,
        "speed": settings.speed,
        "language": settings.language,
        "instructions": settings.instructions,
        "partials": settings.partials,
        "modality": "audio" if settings.speaks else "text",
        "input_rate": settings.input_format.rate,
        "output_rate": settings.output_format.rate,
        "turn_detection": None
        if detection is None
        else {
            "threshold": detection.threshold,
            "prefix_padding_ms": round(detection.prefix_padding * 1000),
            "silence_duration_ms": round(detection.silence * 1000),
            "create_response": detection.create_response,
            "interrupt_response": detection.interrupt_response,
        },
    }
