"""The OpenAI Realtime protocol (GA event names), as a pure codec: frames in, session events out, and back.

Order and required fields of the server events follow the published event types; clients rely on both.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge import wire
from agentvoicebox.bus_bridge.models import SessionSettings, Tokens, TurnStatus
from agentvoicebox.bus_bridge.realtime import requests

_PCM = {"type": "audio/pcm", "rate": 24_000}

# The protocol's own estimate of what a stretch of audio is worth in tokens.
_INPUT_TOKENS_PER_SECOND = 10
_OUTPUT_TOKENS_PER_SECOND = 20


class _Reply:
    """What has been written of one response."""

    __slots__ = ("apart", "begun", "calls", "index", "item_id", "metadata", "previous", "speaks", "text")

    def __init__(self, told: ev.ReplyStarted) -> None:
        self.apart = told.apart
        self.calls: list[dict[str, Any]] = []
        """Items of functions that are to be called."""
        self.index = 0
        """Place of the message among the items."""
        self.item_id = told.item_id
        self.previous = told.previous_item_id
        self.metadata = dict(told.metadata) if told.metadata else None
        self.speaks = told.speaks
        self.text = ""
        self.begun = False


class RateState(NamedTuple):
    """One limit that the client is under, as the protocol tells it."""

    name: str
    limit: int
    remaining: int
    reset_seconds: float


class RealtimeCodec:
    """One connection's codec. `new_id(kind)` gives fresh identifiers; `expires_at` is in seconds of the epoch.

    `rates` says which limits the client is under now, none where nothing is limited.
    """

    __slots__ = ("_expires_at", "_heard", "_model", "_new_id", "_partial", "_rates", "_replies", "_session_id")

    def __init__(
        self,
        session_id: str,
        model: str,
        expires_at: int,
        new_id: Callable[[str], str],
        rates: Callable[[], Sequence[RateState]] = tuple,
    ) -> None:
        self._session_id = session_id
        self._model = model
        self._expires_at = expires_at
        self._new_id = new_id
        self._rates = rates
        self._replies: dict[str, _Reply] = {}
        self._heard = 0.0
        self._partial: tuple[str, str] | None = None
        """The item that is being spoken, and what has been told of it."""

    def opening(self, settings: SessionSettings) -> list[str]:
        """The first frames of a connection."""
        return [self._frame("session.created", session=self._session(settings))]

    def closing(self) -> list[str]:
        """The protocol has no farewell; the socket just closes."""
        return []

    def decode(self, frame: str | bytes, settings: SessionSettings) -> list[ev.Event | ev.AudioAppended]:
        """What the client wants. Raises `WireError`, and nothing else."""
        if len(frame) > requests.MAX_EVENT:
            return [requests.decode_large(frame)]
        return [requests.decode(wire.decode(frame, requests.DECODER), settings)]

    def problem(self, told: ev.Problem) -> str:
        """An error event, with the client's event id so that it can be told which of its events failed."""
        error = {
            "type": "invalid_request_error",
            "code": told.code,
            "message": told.message,
            "param": told.param,
            "event_id": told.event_id,
        }
        return self._frame("error", error=error)

    def encode(self, told: ev.Told, settings: SessionSettings) -> list[str]:
        """The server events that tell the client."""
        match told:
            case ev.ReplyAudio():
                return self._audio(told)
            case ev.ReplyText():
                return self._text(told)
            case ev.ReplyCalls():
                return self._calls(told)
            case ev.ReplyStarted():
                return self._reply_started(told, settings)
            case ev.ReplyEnded():
                return self._reply_ended(told, settings)
            case ev.SpeechStarted():
                at = round(told.at * 1000)
                return [self._frame("input_audio_buffer.speech_started", item_id=told.item_id, audio_start_ms=at)]
            case ev.SpeechStopped():
                at = round(told.at * 1000)
                return [self._frame("input_audio_buffer.speech_stopped", item_id=told.item_id, audio_end_ms=at)]
            case ev.UtteranceCommitted():
                where = {"item_id": told.item_id, "previous_item_id": told.previous_item_id}
                content = [{"type": "input_audio", "transcript": None}]
                return [
                    self._frame("input_audio_buffer.committed", **where),
                    *self._item_added(_user_item(told.item_id, content), told.previous_item_id, done=True),
                ]
            case ev.TextCommitted():
                content = [{"type": "input_text", "text": told.text}]
                return self._item_added(_user_item(told.item_id, content), told.previous_item_id, done=True)
            case ev.ResultCommitted():
                item = {"id": told.item_id, "type": "function_call_output", "object": "realtime.item"}
                item |= {"status": "completed", "call_id": told.call_id, "output": told.output}
                return self._item_added(item, told.previous_item_id, done=True)
            case ev.Understanding():
                return self._understanding(told)
            case ev.Understood():
                return self._understood(told)
            case ev.NotUnderstood():
                error = {"type": "server_error", "code": told.code, "message": told.message}
                kind = "conversation.item.input_audio_transcription.failed"
                return [self._frame(kind, item_id=told.item_id, content_index=0, error=error)]
            case ev.SettingsChanged():
                return [self._frame("session.updated", session=self._session(told.settings))]
            case ev.InputCleared():
                return [self._frame("input_audio_buffer.cleared")]
            case ev.Problem():
                return [self.problem(told)]

    # --- the user's items ---------------------------------------------------------------------------------------------

    def _understanding(self, told: ev.Understanding) -> list[str]:
        if self._partial is None or self._partial[0] != told.item_id:
            self._partial = (told.item_id, "")
        self._partial = (told.item_id, self._partial[1] + told.text)
        kind = "conversation.item.input_audio_transcription.delta"
        return [self._frame(kind, item_id=told.item_id, content_index=0, delta=told.text)]

    def _understood(self, told: ev.Understood) -> list[str]:
        self._heard += told.seconds
        partial, self._partial = self._partial, None
        text = told.text
        if partial is not None and partial[0] == told.item_id:
            # What was told in parts is not told again; where it turned out otherwise, `completed` has the right one.
            text = text.removeprefix(partial[1]) if text.startswith(partial[1]) else ""
        kind = "conversation.item.input_audio_transcription."
        where = {"item_id": told.item_id, "content_index": 0}
        usage = {"type": "duration", "seconds": round(told.seconds, 3)}
        frames = [self._frame(kind + "delta", **where, delta=text)] if text else []
        return [*frames, self._frame(kind + "completed", **where, transcript=told.text, usage=usage)]

    def _item_added(self, item: dict[str, Any], previous: str | None, *, done: bool) -> list[str]:
        kinds = ("added", "done") if done else ("added",)
        return [self._frame(f"conversation.item.{kind}", previous_item_id=previous, item=item) for kind in kinds]

    # --- responses ----------------------------------------------------------------------------------------------------

    def _reply_started(self, told: ev.ReplyStarted, settings: SessionSettings) -> list[str]:
        reply = self._replies[told.turn_id] = _Reply(told)
        response = self._response(told.turn_id, reply, settings, "in_progress", None, [], None)
        created = self._frame("response.created", response=response)
        rates = [rate._asdict() for rate in self._rates()]
        return [created, self._frame("rate_limits.updated", rate_limits=rates)] if rates else [created]

    def _begin(self, turn_id: str, reply: _Reply) -> list[str]:
        if reply.begun:
            return []
        reply.begun = True
        reply.index = len(reply.calls)
        item = _assistant_item(reply.item_id, "in_progress", [])
        part = {"type": "audio", "transcript": ""} if reply.speaks else {"type": "text", "text": ""}
        return [
            self._frame("response.output_item.added", response_id=turn_id, output_index=reply.index, item=item),
            *([] if reply.apart else self._item_added(item, reply.previous, done=False)),
            self._frame("response.content_part.added", **_place(turn_id, reply), part=part),
        ]

    def _text(self, told: ev.ReplyText) -> list[str]:
        reply = self._replies.get(told.turn_id)
        if reply is None:
            return []
        delta = told.text if told.goes_on or not reply.text else f" {told.text}"
        reply.text += delta
        kind = "response.output_audio_transcript.delta" if reply.speaks else "response.output_text.delta"
        return [
            *self._begin(told.turn_id, reply),
            self._frame(kind, **_place(told.turn_id, reply), delta=delta),
        ]

    def _calls(self, told: ev.ReplyCalls) -> list[str]:
        reply = self._replies.get(told.turn_id)
        if reply is None:
            return []
        call = told.call
        item = {"id": told.item_id, "type": "function_call", "object": "realtime.item", "status": "completed"}
        item |= {"call_id": call.id, "name": call.name, "arguments": call.arguments}
        begun = item | {"status": "in_progress", "arguments": ""}
        index = len(reply.calls) + reply.begun
        reply.calls.append(item)
        place = {"response_id": told.turn_id, "item_id": told.item_id, "output_index": index, "call_id": call.id}
        added, done = ([], []) if reply.apart else ([begun], [item])
        kind = "response.function_call_arguments."
        return [
            self._frame("response.output_item.added", response_id=told.turn_id, output_index=index, item=begun),
            *(self._frame("conversation.item.added", previous_item_id=None, item=each) for each in added),
            self._frame(kind + "delta", **place, delta=call.arguments),
            self._frame(kind + "done", **place, name=call.name, arguments=call.arguments),
            self._frame("response.output_item.done", response_id=told.turn_id, output_index=index, item=item),
            *(self._frame("conversation.item.done", previous_item_id=None, item=each) for each in done),
        ]

    def _audio(self, told: ev.ReplyAudio) -> list[str]:
        reply = self._replies.get(told.turn_id)
        if reply is None:
            return []
        delta = base64.b64encode(told.pcm).decode()
        return [
            *self._begin(told.turn_id, reply),
            self._frame("response.output_audio.delta", **_place(told.turn_id, reply), delta=delta),
        ]

    def _reply_ended(self, told: ev.ReplyEnded, settings: SessionSettings) -> list[str]:
        reply = self._replies.pop(told.turn_id, None)
        if reply is None:
            return []
        frames: list[str] = []
        output = list(reply.calls)
        if reply.begun:
            frames, item = self._close_item(told, reply)
            output.insert(reply.index, item)
        usage = _usage(self._heard, told.audio_seconds, told.tokens)
        self._heard = 0.0
        response = self._response(told.turn_id, reply, settings, told.status, _details(told), output, usage)
        return [*frames, self._frame("response.done", response=response)]

    def _close_item(self, told: ev.ReplyEnded, reply: _Reply) -> tuple[list[str], dict[str, Any]]:
        place = _place(told.turn_id, reply)
        if reply.speaks:
            part = {"type": "audio", "transcript": reply.text}
            content = {"type": "output_audio", "transcript": reply.text}
            closing = [
                self._frame("response.output_audio.done", **place),
                self._frame("response.output_audio_transcript.done", **place, transcript=reply.text),
            ]
        else:
            part = {"type": "text", "text": reply.text}
            content = {"type": "output_text", "text": reply.text}
            closing = [self._frame("response.output_text.done", **place, text=reply.text)]
        status = "completed" if told.status is TurnStatus.COMPLETED else "incomplete"
        item = _assistant_item(reply.item_id, status, [content])
        frames = [
            *closing,
            self._frame("response.content_part.done", **place, part=part),
            self._frame("response.output_item.done", response_id=told.turn_id, output_index=reply.index, item=item),
        ]
        if not reply.apart:
            frames.append(self._frame("conversation.item.done", previous_item_id=reply.previous, item=item))
        return frames, item

    def _response(
        self,
        turn_id: str,
        reply: _Reply,
        settings: SessionSettings,
        status: str,
        details: dict[str, Any] | None,
        output: list[dict[str, Any]],
        usage: dict[str, Any] | None,
    ) -> dict[str, Any]:
        return {
            "object": "realtime.response",
            "id": turn_id,
            "status": status,
            "status_details": details,
            "output": output,
            "conversation_id": None if reply.apart else f"conv_{self._session_id}",
            "output_modalities": ["audio" if reply.speaks else "text"],
            "max_output_tokens": "inf",
            "audio": {"output": {"format": _PCM, "voice": settings.voice}},
            "usage": usage,
            "metadata": reply.metadata,
        }

    # --- frames -------------------------------------------------------------------------------------------------------

    def _session(self, settings: SessionSettings) -> dict[str, Any]:
        detection = settings.turn_detection
        vad = None
        if detection is not None:
            vad = {
                "type": "server_vad",
                "threshold": detection.threshold,
                "prefix_padding_ms": round(detection.prefix_padding * 1000),
                "silence_duration_ms": round(detection.silence * 1000),
                "idle_timeout_ms": None,
                "create_response": detection.create_response,
                "interrupt_response": detection.interrupt_response,
            }
        listening = {"format": _PCM, "noise_reduction": None, "transcription": None, "turn_detection": vad}
        if settings.partials:
            listening["transcription"] = {"model": settings.stt_model, "language": settings.language.split("-")[0]}
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": f"sess_{self._session_id}",
            "model": self._model,
            "expires_at": self._expires_at,
            "output_modalities": ["audio" if settings.speaks else "text"],
            "instructions": settings.instructions,
            "tools": [{"type": "function", **tool["function"]} for tool in settings.tools],
            "tool_choice": requests.choice_of(settings.tool_choice),
            "max_output_tokens": "inf",
            "tracing": None,
            "truncation": "auto",
            "prompt": None,
            "include": None,
            "audio": {
                "input": listening,
                "output": {"format": _PCM, "voice": settings.voice, "speed": settings.speed},
            },
        }

    def _frame(self, kind: str, **fields: Any) -> str:
        return wire.encode({"type": kind, "event_id": self._new_id("event"), **fields})


def _place(turn_id: str, reply: _Reply) -> dict[str, Any]:
    return {"response_id": turn_id, "item_id": reply.item_id, "output_index": reply.index, "content_index": 0}


def _user_item(item_id: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    fields = {"type": "message", "object": "realtime.item", "status": "completed", "role": "user"}
    return {"id": item_id, **fields, "content": content}


def _assistant_item(item_id: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    fields = {"type": "message", "object": "realtime.item", "status": status, "role": "assistant"}
    return {"id": item_id, **fields, "content": content}


def _details(told: ev.ReplyEnded) -> dict[str, Any] | None:
    if told.status is TurnStatus.CANCELLED:
        return {"type": "cancelled", "reason": told.reason}
    if told.status is TurnStatus.FAILED:
        error = {"type": "server_error", "code": told.reason, "message": told.message}
        return {"type": "failed", "error": error}
    return None


def _usage(heard: float, spoken: float, text: Tokens) -> dict[str, Any]:
    """Token counts in the protocol's shape: audio by its length, text as the language model's provider counts it.

    Text is 0 where core has answered: what the persona uses there is in the ledger and in the session's record.
    """
    source, sink = round(heard * _INPUT_TOKENS_PER_SECOND), round(spoken * _OUTPUT_TOKENS_PER_SECOND)
    read = {"text_tokens": text.input, "audio_tokens": source, "image_tokens": 0, "cached_tokens": 0}
    return {
        "total_tokens": source + sink + text.input + text.output,
        "input_tokens": source + text.input,
        "output_tokens": sink + text.output,
        "input_token_details": read,
        "output_token_details": {"text_tokens": text.output, "audio_tokens": sink},
    }
