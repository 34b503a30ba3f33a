"""The native codec: what frames mean, and that no frame can hurt."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.models import AudioFormat, SessionSettings, Stamp, TurnDetection, TurnStatus, timings_ms
from agentvoicebox.bus_bridge.native import MAX_AUDIO, EndWanted, NativeCodec, Pinged
from agentvoicebox.bus_bridge.wire import Clock, WireError

NOW = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
SETTINGS = SessionSettings()


@pytest.fixture
def codec() -> NativeCodec:
    return NativeCodec("5e551017", NOW, Clock(NOW.timestamp))


def sent(**fields: Any) -> str:
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("frame", "wanted"),
    [
        (sent(type="audio.chunk", audio="AAAA/w=="), [ev.AudioAppended(b"\0\0\0\xff")]),
        (sent(type="audio.commit", event_id="e"), [ev.AudioCommitted("e")]),
        (sent(type="audio.clear"), [ev.AudioCleared()]),
        (sent(type="response.cancel"), [ev.ResponseCancelled()]),
        (sent(type="response.create"), [ev.ResponseWanted()]),
        (
            sent(type="response.create", messages=[{"role": "user", "content": "hello"}], event_id="e"),
            [ev.ResponseWanted(text="hello", event_id="e")],
        ),
        (
            sent(type="session.update", config={"voice": "rms", "speed": 1.5, "modality": "text", "input_rate": 8000}),
            [ev.SettingsWanted({"voice": "rms", "speed": 1.5, "speaks": False, "input_format": AudioFormat(8000)})],
        ),
        (sent(type="session.update", config={"turn_detection": None}), [ev.SettingsWanted({"turn_detection": None})]),
        (
            sent(type="session.update", config={"turn_detection": {"silence_duration_ms": 700}}),
            [ev.SettingsWanted({"turn_detection": TurnDetection(silence=0.7)})],
        ),
    ],
)
def test_what_a_frame_means(codec: NativeCodec, frame: str, wanted: list[object]):
    assert codec.decode(frame, SETTINGS) == wanted


def test_ping_and_end(codec: NativeCodec):
    assert isinstance(codec.decode(sent(type="ping"), SETTINGS)[0], Pinged)
    assert isinstance(codec.decode(sent(type="session.end"), SETTINGS)[0], EndWanted)
    assert json.loads(codec.pong())["type"] == "pong"
    assert json.loads(codec.closing()[0])["type"] == "session.ended"


@pytest.mark.parametrize(
    ("frame", "code", "param"),
    [
        ("{", "invalid_json", None),
        (b"\x00\xff\x00", "invalid_json", None),
        ("[" * 50_000, "invalid_value", "type"),
        ("[]", "invalid_value", "type"),
        ('{"type": 5, "event_id": "mine"}', "invalid_value", "type"),
        ('{"event_id": "mine"}', "missing_required_parameter", "type"),
        (sent(type="nonsense", event_id="mine"), "unknown_message_type", "type"),
        (sent(type="audio.chunk", event_id="mine"), "missing_required_parameter", "audio"),
        (sent(type="audio.chunk", audio=5, event_id="mine"), "invalid_value", "audio"),
        (sent(type="audio.chunk", audio="???", event_id="mine"), "invalid_value", "audio"),
        (sent(type="audio.chunk", audio="AAAA", event_id="mine"), "invalid_audio", "audio"),
        (
            sent(type="audio.chunk", audio=base64.b64encode(bytes(MAX_AUDIO + 2)).decode(), event_id="mine"),
            "invalid_audio",
            "audio",
        ),
        (sent(type="session.update", config={"speed": 7}, event_id="mine"), "invalid_value", "config.speed"),
        (sent(type="session.update", config={"tenant": "x"}, event_id="mine"), "invalid_value", "config"),
        (sent(type="session.update", config={"language": "!"}, event_id="mine"), "invalid_value", "config.language"),
        (
            sent(type="response.create", messages=[{"role": "system", "content": "x"}], event_id="mine"),
            "invalid_value",
            "messages[0].role",
        ),
    ],
)
def test_a_bad_frame_gets_one_clear_error(codec: NativeCodec, frame: str | bytes, code: str, param: str | None):
    with pytest.raises(WireError) as caught:
        codec.decode(frame, SETTINGS)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.message
    if isinstance(frame, str) and "mine" in frame:
        assert caught.value.event_id == "mine"


@given(
    st.one_of(
        st.text(),
        st.binary(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(
                    st.sampled_from(["type", "event_id", "audio", "config", "messages", "content", "turn_detection"]),
                    inner,
                )
            ),
            max_leaves=12,
        ).map(json.dumps),
    )
)
def test_no_frame_escapes(frame: str | bytes):
    codec = NativeCodec("5e551017", NOW, Clock(NOW.timestamp))
    try:
        codec.decode(frame, SETTINGS)
    except WireError as error:
        told = json.loads(codec.problem(ev.Problem(error.code, error.message, error.param, error.event_id)))
        assert set(told["error"]) == {"code", "message", "param", "event_id"}


def test_a_client_is_told_the_turns_outcome(codec: NativeCodec):
    story = {Stamp.SPEECH_ENDED: 1.0, Stamp.COMMITTED: 1.2, Stamp.TRANSCRIBED: 1.25, Stamp.FIRST_AUDIO: 1.4}
    ended = ev.ReplyEnded("resp_1", TurnStatus.COMPLETED, None, None, "Noon.", 1.5, story, timings_ms(story))
    (frame,) = codec.encode(ended, SETTINGS)
    assert json.loads(frame) == {
        "type": "response.done",
        "timestamp": "2026-01-02T03:04:05.678+00:00",
        "data": {
            "response_id": "resp_1",
            "status": "completed",
            "text": "Noon.",
            "audio_seconds": 1.5,
            "expects_response": False,
            "timings_ms": {"vad": 200.0, "stt": 50.0, "first_audio": 400.0},
        },
    }


def test_a_failed_turn_says_why(codec: NativeCodec):
    ended = ev.ReplyEnded("resp_1", TurnStatus.FAILED, "cell_lost", "The assistant has stopped.", "", 0.0)
    data = json.loads(codec.encode(ended, SETTINGS)[0])["data"]
    assert data["error"] == {"code": "cell_lost", "message": "The assistant has stopped."}


TOLD = [
    ev.SettingsChanged(SETTINGS),
    ev.SpeechStarted("item_1", 0.5),
    ev.SpeechStopped("item_1", 1.5),
    ev.InputCleared(),
    ev.Understood("item_1", "hello", 1.0),
    ev.NotUnderstood("item_1", "engine_failed", "no"),
    ev.ReplyStarted("resp_1", "item_2", "item_1", True, None),
    ev.ReplyText("resp_1", "Hi."),
    ev.ReplyAudio("resp_1", b"\0\0", 24_000),
    ev.Problem("invalid_value", "no"),
]


@pytest.mark.parametrize("told", TOLD, ids=lambda told: type(told).__name__)
def test_all_news_has_the_envelope(codec: NativeCodec, told: ev.Told):
    (frame,) = codec.encode(told, SETTINGS)
    message = json.loads(frame)
    assert set(message) == {"type", "timestamp", "error" if isinstance(told, ev.Problem) else "data"}


@given(st.floats(0, 4e9))
def test_the_clock_agrees_with_the_standard_one(seconds: float):
    shown = datetime.fromisoformat(Clock(lambda: seconds)())
    assert abs(shown.timestamp() - seconds) < 0.0011
