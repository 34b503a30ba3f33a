"""The Realtime codec, held against the event types that the `openai` package publishes."""

from __future__ import annotations

import base64
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter

from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.calls import Call, Wish
from agentvoicebox.bus_bridge.models import SessionSettings, Tokens, TurnDetection, TurnStatus
from agentvoicebox.bus_bridge.realtime.codec import RateState, RealtimeCodec
from agentvoicebox.bus_bridge.realtime.requests import MAX_AUDIO, MAX_EVENT, MAX_TOOLS
from agentvoicebox.bus_bridge.wire import WireError

SETTINGS = SessionSettings()
WEATHER = {"type": "function", "name": "weather", "description": "Tells.", "parameters": {"type": "object"}}
TOLD = {"type": "function", "function": {name: WEATHER[name] for name in ("name", "description", "parameters")}}
SERVER_EVENT: TypeAdapter[Any] = TypeAdapter(RealtimeServerEvent)


def make_codec() -> RealtimeCodec:
    numbers = itertools.count(1)
    return RealtimeCodec("5e551017", "gpt-realtime", 1_800_000_000, lambda kind: f"{kind}_{next(numbers)}")


@pytest.fixture
def codec() -> RealtimeCodec:
    return make_codec()


def sent(**fields: Any) -> str:
    return json.dumps(fields)


def read(frames: list[str]) -> list[dict[str, Any]]:
    """The frames as JSON, each of them valid by the published types, required fields included."""
    for frame in frames:
        event = SERVER_EVENT.validate_json(frame)
        assert event.type == json.loads(frame)["type"], "it is not taken for another event"
    return [json.loads(frame) for frame in frames]


@pytest.mark.parametrize(
    ("frame", "wanted"),
    [
        (sent(type="input_audio_buffer.append", audio="AAAA/w=="), ev.AudioAppended(b"\0\0\0\xff")),
        (sent(type="input_audio_buffer.commit", event_id="e"), ev.AudioCommitted("e")),
        (sent(type="input_audio_buffer.clear"), ev.AudioCleared()),
        (
            sent(
                type="conversation.item.create",
                item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]},
            ),
            ev.TextAdded("hello"),
        ),
        (
            sent(type="response.create", response={"metadata": {"a": "b"}, "output_modalities": ["text"]}),
            ev.ResponseWanted({"a": "b"}, False),
        ),
        (sent(type="response.create"), ev.ResponseWanted()),
        (sent(type="response.cancel", response_id="resp_1"), ev.ResponseCancelled("resp_1")),
        (
            sent(
                type="session.update",
                session={
                    "type": "realtime",
                    "model": "ignored",
                    "output_modalities": ["text"],
                    "audio": {
                        "input": {"format": {"type": "audio/pcm", "rate": 24000}},
                        "output": {"voice": "rms", "speed": 1.25},
                    },
                },
            ),
            ev.SettingsWanted({"speaks": False, "voice": "rms", "speed": 1.25}),
        ),
        (
            sent(type="session.update", session={"type": "realtime", "audio": {"input": {"turn_detection": None}}}),
            ev.SettingsWanted({"turn_detection": None}),
        ),
        (
            sent(
                type="session.update",
                session={
                    "type": "realtime",
                    "audio": {"input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": 700}}},
                },
            ),
            ev.SettingsWanted({"turn_detection": TurnDetection(silence=0.7)}),
        ),
        (sent(type="session.update", session={"type": "realtime", "tracing": "auto"}), ev.SettingsWanted({})),
        (
            sent(
                type="session.update",
                session={
                    "type": "realtime",
                    "instructions": "Be brief.",
                    "tools": [WEATHER],
                    "tool_choice": {"type": "function", "name": "weather"},
                    "audio": {"input": {"transcription": {"model": "whisper-1"}}},
                },
            ),
            ev.SettingsWanted(
                {
                    "instructions": "Be brief.",
                    "tools": (TOLD,),
                    "tool_choice": {"type": "function", "function": {"name": "weather"}},
                    "partials": True,
                }
            ),
        ),
        (
            sent(
                type="conversation.item.create",
                item={"type": "function_call_output", "call_id": "call_1", "output": "rain", "id": "i"},
            ),
            ev.ResultAdded("call_1", "rain", "i"),
        ),
        (
            sent(
                type="response.create",
                response={
                    "conversation": "none",
                    "instructions": "Classify.",
                    "input": [
                        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]},
                        {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"},
                        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
                    ],
                    "tools": [],
                    "metadata": {"topic": "1"},
                },
            ),
            ev.ResponseWanted(
                {"topic": "1"},
                wish=Wish(
                    instructions="Classify.",
                    tools=(),
                    input=(
                        {"role": "user", "content": "hello"},
                        {
                            "role": "assistant",
                            "content": None,
                            "tool_calls": [
                                {
                                    "id": "call_1",
                                    "type": "function",
                                    "function": {"name": "weather", "arguments": "{}"},
                                }
                            ],
                        },
                        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
                    ),
                    apart=True,
                ),
            ),
        ),
    ],
)
def test_what_a_frame_means(codec: RealtimeCodec, frame: str, wanted: object):
    assert codec.decode(frame, SETTINGS) == [wanted]


@pytest.mark.parametrize(
    ("frame", "code", "param"),
    [
        ("{", "invalid_json", None),
        (b"\x00\xff", "invalid_json", None),
        (sent(type="nonsense", event_id="mine"), "unknown_message_type", "type"),
        (sent(type="session.update", session={}, event_id="mine"), "missing_required_parameter", "session.type"),
        (sent(type="session.update", session={"type": "transcription"}, event_id="mine"), "invalid_value", None),
        (sent(type="input_audio_buffer.append", audio="AAAA", event_id="mine"), "invalid_audio", "audio"),
        (sent(type="input_audio_buffer.append", audio=[1], event_id="mine"), "invalid_value", "audio"),
        (sent(type="conversation.item.retrieve", item_id="x", event_id="mine"), "unsupported_event", "type"),
        (
            sent(type="conversation.item.create", item={"type": "function_call_output"}, event_id="mine"),
            "invalid_value",
            "item",
        ),
        (
            sent(type="conversation.item.create", item={"type": "message", "role": "system"}, event_id="mine"),
            "unsupported_item",
            "item",
        ),
        (
            sent(type="response.create", response={"input": [{"type": "item_reference", "id": "x"}]}, event_id="mine"),
            "unsupported_item",
            "response.input",
        ),
        (
            sent(type="response.create", response={"conversation": "mine"}, event_id="mine"),
            "invalid_value",
            "response.conversation",
        ),
        (
            sent(type="session.update", session={"type": "realtime", "tools": [{"type": "mcp"}]}, event_id="mine"),
            "invalid_value",
            None,
        ),
        (
            sent(
                type="session.update",
                session={"type": "realtime", "audio": {"input": {"format": {"type": "audio/pcmu"}}}},
                event_id="mine",
            ),
            "invalid_value",
            "session.audio.input.format",
        ),
    ],
)
def test_a_bad_frame_gets_one_clear_error(codec: RealtimeCodec, frame: str | bytes, code: str, param: str | None):
    with pytest.raises(WireError) as caught:
        codec.decode(frame, SETTINGS)
    assert caught.value.code == code
    if param is not None:
        assert caught.value.param == param
    if isinstance(frame, str) and "mine" in frame:
        assert caught.value.event_id == "mine"
        problem = ev.Problem(code, caught.value.message, param, caught.value.event_id)
        assert read([codec.problem(problem)])[0]["error"]["event_id"] == "mine"


def test_an_append_over_the_limit_is_refused_and_one_at_the_limit_is_not(codec: RealtimeCodec):
    audio = base64.b64encode(bytes(MAX_AUDIO)).decode()
    assert codec.decode(sent(type="input_audio_buffer.append", audio=audio), SETTINGS)
    with pytest.raises(WireError, match="At most"):
        codec.decode(sent(type="input_audio_buffer.append", audio=audio[:-4] + "AAAAAAAA"), SETTINGS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "audio", "input", "output", "turn_detection", "format", "item", "content"]), inner
        )
    ),
    max_leaves=10,
)


@given(
    st.text()
    | st.binary()
    | st.builds(
        lambda kind, fields: json.dumps({"type": kind, **fields}),
        st.sampled_from(["session.update", "input_audio_buffer.append", "conversation.item.create", "response.create"]),
        st.dictionaries(st.sampled_from(["session", "audio", "item", "response", "event_id"]), json_values),
    )
)
def test_no_frame_escapes(frame: str | bytes):
    codec = make_codec()
    try:
        codec.decode(frame, SETTINGS)
    except WireError as error:
        read([codec.problem(ev.Problem(error.code, error.message, error.param, error.event_id))])


def test_a_spoken_turn_in_the_order_clients_rely_on(codec: RealtimeCodec):
    story: list[ev.Told] = [
        ev.SpeechStarted("item_1", 0.2),
        ev.SpeechStopped("item_1", 1.4),
        ev.UtteranceCommitted("item_1", None),
        ev.ReplyStarted("resp_1", "item_2", "item_1", True, {"k": "v"}),
        ev.Understood("item_1", "what time is it", 1.2),
        ev.ReplyText("resp_1", "It is noon."),
        ev.ReplyAudio("resp_1", b"\1\0" * 100, 24_000),
        ev.ReplyText("resp_1", "Really."),
        ev.ReplyEnded("resp_1", TurnStatus.COMPLETED, None, None, "It is noon. Really.", 2.0),
    ]
    frames = read(codec.opening(SETTINGS))
    frames += read([frame for told in story for frame in codec.encode(told, SETTINGS)])
    assert [frame["type"] for frame in frames] == [
        "session.created",
        "input_audio_buffer.speech_started",
        "input_audio_buffer.speech_stopped",
        "input_audio_buffer.committed",
        "conversation.item.added",
        "conversation.item.done",
        "response.created",
        "conversation.item.input_audio_transcription.delta",
        "conversation.item.input_audio_transcription.completed",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
        "response.output_audio_transcript.delta",
        "response.output_audio.delta",
        "response.output_audio_transcript.delta",
        "response.output_audio.done",
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "response.output_item.done",
        "conversation.item.done",
        "response.done",
    ]
    assert len({frame["event_id"] for frame in frames}) == len(frames)
    done = frames[-1]["response"]
    assert done["metadata"] == {"k": "v"}
    assert done["status"] == "completed"
    assert done["output"][0]["content"] == [{"type": "output_audio", "transcript": "It is noon. Really."}]
    assert done["usage"]["input_token_details"]["audio_tokens"] == 12
    assert done["usage"]["output_tokens"] == 40


def test_what_the_model_writes_is_joined_as_it_is(codec: RealtimeCodec):
    texts = ("Here:\n\n", "* one", "\n* t", "wo")
    codec.encode(ev.ReplyStarted("resp_1", "item_2", None, False, None), SETTINGS)
    written = [frame for text in texts for frame in codec.encode(ev.ReplyText("resp_1", text, True), SETTINGS)]
    assert "".join(frame.get("delta", "") for frame in read(written)) == "Here:\n\n* one\n* two"
    ended = ev.ReplyEnded("resp_1", TurnStatus.COMPLETED, None, None, "".join(texts), 0.0, tokens=Tokens(7, 3))
    done = read(codec.encode(ended, SETTINGS))[-1]["response"]
    assert done["output"][0]["content"][0]["text"] == "Here:\n\n* one\n* two"
    assert done["usage"]["input_token_details"]["text_tokens"] == done["usage"]["input_tokens"] == 7
    assert done["usage"]["output_token_details"]["text_tokens"] == done["usage"]["output_tokens"] == 3
    assert done["usage"]["total_tokens"] == 10


def large(**fields: Any) -> str:
    return sent(**fields, event_id="e", padding="x" * MAX_EVENT)


@pytest.mark.parametrize(
    "frame",
    [
        large(type="session.update", session={"type": "realtime"}),
        large(type="session.update", session={"type": "realtime"}, note="input_audio_buffer.append"),
        large(type="input_audio_buffer.append", audio="not base64"),
        large(type="input_audio_buffer.append"),
        '"input_audio_buffer.append"' * MAX_EVENT,
        b"x" * MAX_EVENT * 2,
    ],
)
def test_only_audio_may_be_large(codec: RealtimeCodec, frame: str | bytes):
    with pytest.raises(WireError) as caught:
        codec.decode(frame, SETTINGS)
    assert caught.value.code == "event_too_large"


def test_large_audio_is_taken(codec: RealtimeCodec):
    pcm = bytes(MAX_EVENT)
    frame = sent(type="input_audio_buffer.append", event_id="e", audio=base64.b64encode(pcm).decode())
    assert codec.decode(frame, SETTINGS) == [ev.AudioAppended(pcm, "e")]


@pytest.mark.parametrize("kind", ["session", "response"])
def test_tools_are_bounded_together(codec: RealtimeCodec, kind: str):
    tools = [WEATHER | {"parameters": {"type": "object", "enum": ["x" * (MAX_TOOLS // 2)]}}] * 2
    names = {"session": ("session.update", {"type": "realtime"}), "response": ("response.create", {})}
    name, more = names[kind]
    assert codec.decode(sent(type=name, **{kind: more | {"tools": tools[:1]}}), SETTINGS)
    with pytest.raises(WireError) as caught:
        codec.decode(sent(type=name, event_id="e", **{kind: more | {"tools": tools}}), SETTINGS)
    assert (caught.value.param, caught.value.event_id) == (f"{kind}.tools", "e")


def test_a_written_turn(codec: RealtimeCodec):
    story: list[ev.Told] = [
        ev.TextCommitted("item_1", None, "hello"),
        ev.ReplyStarted("resp_1", "item_2", "item_1", False, None),
        ev.ReplyText("resp_1", "Hi."),
        ev.ReplyEnded("resp_1", TurnStatus.COMPLETED, None, None, "Hi.", 0.0),
    ]
    frames = read([frame for told in story for frame in codec.encode(told, SETTINGS)])
    assert frames[0]["item"]["content"] == [{"type": "input_text", "text": "hello"}]
    assert "response.output_text.delta" in [frame["type"] for frame in frames]
    assert frames[-1]["response"]["output_modalities"] == ["text"]


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(
    ("status", "reason", "details"),
    [
        (TurnStatus.CANCELLED, "turn_detected", {"type": "cancelled", "reason": "turn_detected"}),
        (
            TurnStatus.FAILED,
            "cell_lost",
            {"type": "failed", "error": {"type": "server_error", "code": "cell_lost", "message": "Gone."}},
        ),
    ],
)
def test_an_unfinished_turn_is_closed_in_order(
    codec: RealtimeCodec, begun: bool, status: TurnStatus, reason: str, details: dict[str, Any]
):
    codec.encode(ev.ReplyStarted("resp_1", "item_2", None, True, None), SETTINGS)
    if begun:
        codec.encode(ev.ReplyText("resp_1", "It is"), SETTINGS)
    frames = read(codec.encode(ev.ReplyEnded("resp_1", status, reason, "Gone.", "It is", 0.0), SETTINGS))
    done = frames[-1]["response"]
    assert (done["status"], done["status_details"]) == (status.value, details)
    assert [item["status"] for item in done["output"]] == (["incomplete"] if begun else [])
    assert codec.encode(ev.ReplyText("resp_1", "late"), SETTINGS) == []


def test_a_call_in_the_order_clients_rely_on(codec: RealtimeCodec):
    call = Call("call_1", "weather", '{"city": "Oslo"}')
    read(codec.encode(ev.ReplyStarted("resp_1", "item_2", "item_1", True, None), SETTINGS))
    frames = read(codec.encode(ev.ReplyText("resp_1", "Let me see."), SETTINGS))
    frames = read(codec.encode(ev.ReplyCalls("resp_1", "item_3", call), SETTINGS))
    assert [frame["type"] for frame in frames] == [
        "response.output_item.added",
        "conversation.item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "conversation.item.done",
    ]
    assert [frame["output_index"] for frame in frames if "output_index" in frame] == [1, 1, 1, 1]
    assert frames[3]["name"] == "weather"
    ended = ev.ReplyEnded("resp_1", TurnStatus.COMPLETED, None, None, "Let me see.", 0.5, calls=(call,))
    done = read(codec.encode(ended, SETTINGS))[-1]
    assert [item["type"] for item in done["response"]["output"]] == ["message", "function_call"]
    assert done["response"]["output"][1]["arguments"] == '{"city": "Oslo"}'
    told = ev.ResultCommitted("item_4", "item_3", "call_1", "rain")
    assert read(codec.encode(told, SETTINGS))[0]["item"]["output"] == "rain"


def test_an_answer_apart_is_no_item_of_the_conversation(codec: RealtimeCodec):
    frames = codec.encode(ev.ReplyStarted("resp_1", "item_2", None, False, {"topic": "1"}, apart=True), SETTINGS)
    frames += codec.encode(ev.ReplyText("resp_1", "spam"), SETTINGS)
    frames += codec.encode(ev.ReplyCalls("resp_1", "item_3", Call("call_1", "block", "{}")), SETTINGS)
    frames += codec.encode(ev.ReplyEnded("resp_1", TurnStatus.COMPLETED, None, None, "spam", 0.0), SETTINGS)
    found = read(frames)
    assert not [frame["type"] for frame in found if frame["type"].startswith("conversation.")]
    assert found[-1]["response"]["conversation_id"] is None
    assert found[-1]["response"]["metadata"] == {"topic": "1"}


def test_the_session_shows_its_tools_as_they_were_sent(codec: RealtimeCodec):
    choice = {"type": "function", "function": {"name": "weather"}}
    settings = SessionSettings(tools=(TOLD,), tool_choice=choice, instructions="Be brief.", partials=True)
    session = read(codec.encode(ev.SettingsChanged(settings), settings))[0]["session"]
    assert session["tools"] == [WEATHER]
    assert session["tool_choice"] == {"type": "function", "name": "weather"}
    assert session["instructions"] == "Be brief."
    assert session["audio"]["input"]["transcription"]["model"] == "base"


def test_what_was_told_in_parts_is_not_told_again(codec: RealtimeCodec):
    frames = codec.encode(ev.Understanding("item_1", "what time"), SETTINGS)
    frames += codec.encode(ev.Understanding("item_1", " is"), SETTINGS)
    frames += codec.encode(ev.Understood("item_1", "what time is it", 1.0), SETTINGS)
    found = read(frames)
    assert "".join(frame["delta"] for frame in found[:-1]) == found[-1]["transcript"] == "what time is it"


def test_a_part_that_turned_out_otherwise_is_put_right_at_the_end(codec: RealtimeCodec):
    codec.encode(ev.Understanding("item_1", "what lime"), SETTINGS)
    found = read(codec.encode(ev.Understood("item_1", "what time is it", 1.0), SETTINGS))
    assert [frame["type"].rpartition(".")[2] for frame in found] == ["completed"]
    assert found[0]["transcript"] == "what time is it"


def test_defaults_are_echoed_for_clients_that_look(codec: RealtimeCodec):
    (created,) = read(codec.opening(SETTINGS))
    assert created["session"]["audio"]["input"]["turn_detection"]["interrupt_response"] is True
    (updated,) = read(codec.encode(ev.SettingsChanged(SessionSettings(turn_detection=None)), SETTINGS))
    assert updated["session"]["audio"]["input"]["turn_detection"] is None


@pytest.mark.parametrize(
    "told", [ev.InputCleared(), ev.NotUnderstood("item_1", "engine_failed", "no")], ids=lambda told: type(told).__name__
)
def test_other_news(codec: RealtimeCodec, told: ev.Told):
    assert len(read(codec.encode(told, SETTINGS))) == 1


def test_a_reply_begins_with_what_may_still_be_asked() -> None:
    left = iter((7, 6))
    rates = lambda: [RateState("requests", 120, next(left), 0.5)]  # noqa: E731
    codec = RealtimeCodec("5e551017", "gpt-realtime", 1_800_000_000, lambda kind: kind, rates)
    for remaining in (7, 6):
        frames = read(codec.encode(ev.ReplyStarted(f"resp_{remaining}", "item", None, True, None), SETTINGS))
        assert [frame["type"] for frame in frames] == ["response.created", "rate_limits.updated"]
        assert frames[1]["rate_limits"] == [
            {"name": "requests", "limit": 120, "remaining": remaining, "reset_seconds": 0.5}
        ]
