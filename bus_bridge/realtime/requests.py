"""The client events of the OpenAI Realtime protocol (GA) that this door understands, as strict structures.

Field names and ranges follow the published event types. Unknown fields are ignored, as clients send more than any
server uses; fields whose effect is not to be had here are refused by name, so that nobody relies on them in vain.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.calls import Wish
from agentvoicebox.bus_bridge.models import MAX_INSTRUCTIONS, SessionSettings, TurnDetection
from agentvoicebox.bus_bridge.wire import WireError, check_pcm

MAX_AUDIO = 15 * 1024 * 1024
"""Bytes of audio in one `input_audio_buffer.append`."""

MAX_TEXT = 8000
"""Characters of one written message."""

MAX_OUTPUT = 100_000
"""Characters of what a call returned."""

MAX_EVENT = 256 * 1024
"""Characters of one event other than `input_audio_buffer.append`."""

MAX_TOOLS = 200_000
"""Characters of all functions of a session or response as JSON."""

Metadata = Annotated[
    dict[
        Annotated[str, msgspec.Meta(max_length=64)],
        Annotated[str, msgspec.Meta(max_length=512)],
    ],
    msgspec.Meta(max_length=16),
]


class ClientEvent(msgspec.Struct, tag_field="type"):
    """What every client event has."""

    event_id: Annotated[str, msgspec.Meta(max_length=512)] | None = None


class PcmFormat(msgspec.Struct):
    """`audio/pcm`: 16-bit little-endian mono at 24 kHz."""

    type: str = "audio/pcm"
    rate: int | UnsetType = UNSET

    def check(self, param: str, event_id: str | None) -> None:
        """Refuse other encodings and rates."""
        if self.type != "audio/pcm" or self.rate not in (24_000, UNSET):
            raise WireError("invalid_value", "Audio is `audio/pcm` at 24000 Hz here.", param, event_id)


class Detection(msgspec.Struct):
    """`turn_detection` of an audio input; times in milliseconds."""

    type: str = "server_vad"
    threshold: Annotated[float, msgspec.Meta(ge=0, le=1)] | UnsetType = UNSET
    prefix_padding_ms: Annotated[int, msgspec.Meta(ge=0, le=2000)] | UnsetType = UNSET
    silence_duration_ms: Annotated[int, msgspec.Meta(ge=50, le=5000)] | UnsetType = UNSET
    create_response: bool | UnsetType | None = UNSET
    interrupt_response: bool | UnsetType | None = UNSET

    def over(self, before: TurnDetection | None) -> TurnDetection:
        """These choices on top of what was in force."""
        found = before or TurnDetection()
        return TurnDetection(
            # At 0 and 1 nothing or everything would be speech for ever.
            threshold=found.threshold
            if isinstance(self.threshold, UnsetType)
            else min(max(self.threshold, 0.05), 0.95),
            prefix_padding=found.prefix_padding
            if isinstance(self.prefix_padding_ms, UnsetType)
            else self.prefix_padding_ms / 1000,
            silence=found.silence
            if isinstance(self.silence_duration_ms, UnsetType)
            else self.silence_duration_ms / 1000,
            create_response=self.create_response if isinstance(self.create_response, bool) else found.create_response,
            interrupt_response=self.interrupt_response
            if isinstance(self.interrupt_response, bool)
            else found.interrupt_response,
        )


class AudioInput(msgspec.Struct):
    format: PcmFormat | UnsetType = UNSET
    transcription: dict[str, Any] | UnsetType | None = UNSET
    """With it, what is understood is told while the user still speaks; its model and prompt are the tenant's choice."""
    turn_detection: Detection | UnsetType | None = UNSET


class AudioOutput(msgspec.Struct):
    format: PcmFormat | UnsetType = UNSET
    voice: Annotated[str, msgspec.Meta(max_length=100)] | UnsetType = UNSET
    speed: Annotated[float, msgspec.Meta(ge=0.25, le=1.5)] | UnsetType = UNSET


class Audio(msgspec.Struct):
    input: AudioInput = msgspec.field(default_factory=AudioInput)
    output: AudioOutput = msgspec.field(default_factory=AudioOutput)


class Tool(msgspec.Struct):
    """A function of the client's; its `parameters` are a JSON schema, which the model's provider reads."""

    type: Literal["function"]
    name: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
    description: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    parameters: dict[str, Any] = msgspec.field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """As chat completions have it."""
        parameters = self.parameters or {"type": "object", "properties": {}}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


Tools = Annotated[list[Tool], msgspec.Meta(max_length=64)]


def tools_told(tools: list[Tool], param: str, event_id: str | None) -> tuple[dict[str, Any], ...]:
    """All of them as chat completions have them. Raises `WireError`."""
    told = tuple(tool.told() for tool in tools)
    if len(msgspec.json.encode(told)) > MAX_TOOLS:
        raise WireError("invalid_value", f"All tools together are at most {MAX_TOOLS} characters.", param, event_id)
    return told


class ToolNamed(msgspec.Struct):
    """The function that is to be called, whatever was asked."""

    type: Literal["function"]
    name: str


Choice = Literal["auto", "none", "required"] | ToolNamed


def choice_told(choice: Choice) -> Any:
    """Which tool is to be used, as chat completions have it."""
    return {"type": "function", "function": {"name": choice.name}} if isinstance(choice, ToolNamed) else choice


def choice_of(told: Any) -> Any:
    """The same, back in this protocol's shape."""
    return {"type": "function", "name": told["function"]["name"]} if isinstance(told, dict) else told


Modalities = Annotated[list[Literal["audio", "text"]], msgspec.Meta(min_length=1, max_length=1)]


class SessionRequest(msgspec.Struct):
    """The `session` of a `session.update`; absent fields stay as they are."""

    type: str
    instructions: Annotated[str, msgspec.Meta(max_length=MAX_INSTRUCTIONS)] | UnsetType = UNSET
    output_modalities: Modalities | UnsetType = UNSET
    audio: Audio = msgspec.field(default_factory=Audio)
    tools: Tools | UnsetType = UNSET
    tool_choice: Choice | UnsetType = UNSET

    def changes(self, settings: SessionSettings, event_id: str | None) -> dict[str, object]:
        """The fields of `SessionSettings` this request changes. Raises `WireError`."""
        if self.type != "realtime":
            raise WireError("invalid_value", "Only sessions of type `realtime` are served.", "session.type", event_id)
        found: dict[str, object] = {}
        if not isinstance(self.tools, UnsetType):
            found["tools"] = tools_told(self.tools, "session.tools", event_id)
        if not isinstance(self.tool_choice, UnsetType):
            found["tool_choice"] = choice_told(self.tool_choice)
        if not isinstance(self.instructions, UnsetType):
            found["instructions"] = self.instructions
        if not isinstance(self.audio.input.transcription, UnsetType):
            found["partials"] = self.audio.input.transcription is not None
        if not isinstance(self.output_modalities, UnsetType):
            found["speaks"] = self.output_modalities == ["audio"]
        source, sink = self.audio.input, self.audio.output
        if not isinstance(source.format, UnsetType):
            source.format.check("session.audio.input.format", event_id)
        if not isinstance(sink.format, UnsetType):
            sink.format.check("session.audio.output.format", event_id)
        if not isinstance(sink.voice, UnsetType):
            found["voice"] = sink.voice
        if not isinstance(sink.speed, UnsetType):
            found["speed"] = max(sink.speed, 0.5)
        detection = source.turn_detection
        if detection is None:
            found["turn_detection"] = None
        elif not isinstance(detection, UnsetType):
            if detection.type != "server_vad":
                param = "session.audio.input.turn_detection.type"
                raise WireError("invalid_value", "Turn detection is `server_vad` or null here.", param, event_id)
            found["turn_detection"] = detection.over(settings.turn_detection)
        return found


class SessionUpdate(ClientEvent, tag="session.update", kw_only=True):
    session: SessionRequest


class Append(ClientEvent, tag="input_audio_buffer.append", kw_only=True):
    audio: bytes

    def event(self) -> ev.AudioAppended:
        """The audio, checked. Raises `WireError`."""
        check_pcm(self.audio, MAX_AUDIO, self.event_id)
        return ev.AudioAppended(self.audio, self.event_id)


class Commit(ClientEvent, tag="input_audio_buffer.commit"):
    pass


class Clear(ClientEvent, tag="input_audio_buffer.clear"):
    pass


class Part(msgspec.Struct):
    type: str
    text: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)] | None = None


class Item(msgspec.Struct):
    type: str
    role: str | None = None
    id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)] | None = None
    content: list[Part] = msgspec.field(default_factory=list)
    call_id: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None
    output: Annotated[str, msgspec.Meta(max_length=MAX_OUTPUT)] | None = None
    name: str | None = None
    arguments: Annotated[str, msgspec.Meta(max_length=MAX_OUTPUT)] | None = None

    def event(self, event_id: str | None) -> ev.TextAdded | ev.ResultAdded:
        """A written user message, or what a call returned. Raises `WireError` for every other kind of item."""
        if self.type == "function_call_output":
            if self.call_id is None or self.output is None:
                raise WireError("invalid_value", "A result has a call_id and an output.", "item", event_id)
            return ev.ResultAdded(self.call_id, self.output, self.id, event_id)
        if self.type != "message" or self.role != "user":
            raise WireError(
                "unsupported_item",
                "Items are user messages with `input_text` content, and `function_call_output`, here.",
                "item",
                event_id,
            )
        return ev.TextAdded(self.text(("input_text",), event_id), self.id, event_id)

    def text(self, kinds: tuple[str, ...], event_id: str | None) -> str:
        """What is written in it. Raises `WireError` for content of other kinds."""
        texts = [part.text for part in self.content if part.type in kinds and part.text]
        if len(texts) != len(self.content) or not texts:
            raise WireError("unsupported_item", "Content is text here.", "item.content", event_id)
        text = " ".join(texts)
        if len(text) > MAX_TEXT:
            raise WireError("invalid_value", f"An item holds at most {MAX_TEXT} characters.", "item.content", event_id)
        return text

    def told(self, event_id: str | None) -> dict[str, Any]:
        """As a message of a chat that is to be answered. Raises `WireError`."""
        if self.type == "function_call_output" and self.call_id is not None:
            return {"role": "tool", "tool_call_id": self.call_id, "content": self.output or ""}
        if self.type == "function_call" and self.call_id is not None:
            function = {"name": self.name or "", "arguments": self.arguments or "{}"}
            call = {"id": self.call_id, "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        if self.type != "message" or self.role not in ("system", "user", "assistant"):
            raise WireError(
                "unsupported_item", "This kind of item cannot be answered here.", "response.input", event_id
            )
        return {"role": self.role, "content": self.text(("input_text", "output_text", "text"), event_id)}


class ItemCreate(ClientEvent, tag="conversation.item.create", kw_only=True):
    item: Item


class ResponseRequest(msgspec.Struct):
    """The `response` of a `response.create`."""

    metadata: Metadata | None = None
    output_modalities: Modalities | None = None
    instructions: Annotated[str, msgspec.Meta(max_length=MAX_INSTRUCTIONS)] | None = None
    conversation: Literal["auto", "none"] | None = None
    input: Annotated[list[Item], msgspec.Meta(max_length=64)] | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = None

    def event(self, event_id: str | None) -> ev.ResponseWanted:
        """The wish for a response. Raises `WireError` for wishes that are not served."""
        speaks = None if self.output_modalities is None else self.output_modalities == ["audio"]
        return ev.ResponseWanted(self.metadata, speaks, event_id=event_id, wish=self.wish(event_id))

    def wish(self, event_id: str | None) -> Wish | None:
        """What only the language model can grant; None when core answers as well."""
        apart = self.conversation == "none"
        if not (self.instructions or self.tools is not None or self.input is not None or apart):
            return None
        return Wish(
            instructions=self.instructions or "",
            tools=None if self.tools is None else tools_told(self.tools, "response.tools", event_id),
            tool_choice=None if self.tool_choice is None else choice_told(self.tool_choice),
            input=None if self.input is None else tuple(item.told(event_id) for item in self.input),
            apart=apart,
        )


class ResponseCreate(ClientEvent, tag="response.create", kw_only=True):
    response: ResponseRequest = msgspec.field(default_factory=ResponseRequest)


class ResponseCancel(ClientEvent, tag="response.cancel", kw_only=True):
    response_id: str | None = None


class _NotServed(ClientEvent):
    """A client event of the protocol that this door does not serve yet."""


class ItemRetrieve(_NotServed, tag="conversation.item.retrieve"):
    pass


class ItemTruncate(_NotServed, tag="conversation.item.truncate"):
    pass


class ItemDelete(_NotServed, tag="conversation.item.delete"):
    pass


class OutputClear(_NotServed, tag="output_audio_buffer.clear"):
    pass


DECODER = msgspec.json.Decoder(
    SessionUpdate
    | Append
    | Commit
    | Clear
    | ItemCreate
    | ResponseCreate
    | ResponseCancel
    | ItemRetrieve
    | ItemTruncate
    | ItemDelete
    | OutputClear
)


_APPEND_DECODER = msgspec.json.Decoder(Append)


def decode_large(frame: str | bytes) -> ev.AudioAppended:
    """An event of more than `MAX_EVENT` characters: audio, and nothing else is even read. Raises `WireError`."""
    try:
        if isinstance(frame, str) and "input_audio_buffer.append" in frame:
            return _APPEND_DECODER.decode(frame).event()
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        pass
    raise WireError(
        "event_too_large", f"Beside valid `input_audio_buffer.append`, events have at most {MAX_EVENT} characters."
    )


def decode(event: ClientEvent, settings: SessionSettings) -> ev.Event | ev.AudioAppended:
    """One client event as an event of the session. Raises `WireError`."""
    match event:
        case Append():
            return event.event()
        case SessionUpdate():
            return ev.SettingsWanted(event.session.changes(settings, event.event_id), event.event_id)
        case Commit():
            return ev.AudioCommitted(event.event_id)
        case Clear():
            return ev.AudioCleared(event.event_id)
        case ItemCreate():
            return event.item.event(event.event_id)
        case ResponseCreate():
            return event.response.event(event.event_id)
        case ResponseCancel():
            return ev.ResponseCancelled(event.response_id, event.event_id)
        case _:
            kind = type(event).__struct_config__.tag
            raise WireError(
                "unsupported_event", f"The client event {kind!r} is not served yet.", "type", event.event_id
            )
