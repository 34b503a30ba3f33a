"""A session's stories: what follows from what, without sockets, engines or clocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.calls import MOST_MESSAGES, Call, Wish
from agentvoicebox.bus_bridge.models import SessionSettings, Stamp, Tokens, TurnDetection, TurnStatus, timings_ms
from agentvoicebox.bus_bridge.session import (
    CORE_SILENCE,
    ENGINE_SILENCE,
    LAST_REMINDER,
    LONGEST_BUFFER,
    MODEL_SILENCE,
    MOST_OPEN,
    READING,
    Session,
)
from agentvoicebox.bus_bridge.turns import LONGEST_PIECE, sentences

WINDOW = b"\x01\x00" * 512
TEXT_ONLY = SessionSettings(speaks=False)
MANUAL = SessionSettings(turn_detection=None)


def ids() -> Callable[[str], str]:
    numbers = itertools.count(1)
    return lambda kind: f"{kind}_{next(numbers)}"


class Told:
    """Drives a session and keeps everything that came out."""

    def __init__(self, wanted: SessionSettings | None = None) -> None:
        self.session = Session(wanted or SessionSettings(), ids())
        self.now = 100.0
        self.all: list[object] = []

    def __call__(self, event: ev.Event, after: float = 0.0) -> list[object]:
        self.now += after
        out = self.session.receive(event, self.now)
        self.all += out
        return list(out)

    def last(self, kind: type) -> object:
        return next(item for item in reversed(self.all) if isinstance(item, kind))

    def count(self, kind: type) -> int:
        return sum(isinstance(item, kind) for item in self.all)

    def speak(self, windows: int = 20) -> None:
        for _ in range(windows):
            self(ev.Heard(WINDOW, 0.9), 0.032)

    def fall_silent(self, windows: int = 7) -> None:
        for _ in range(windows):
            self(ev.Heard(WINDOW, 0.0), 0.032)

    def say(self, text: str) -> str:
        """Speak, be understood, and return the turn's id."""
        self.speak()
        self.fall_silent()
        heard = self.last(ev.Transcribe)
        self(ev.Transcribed(heard.item_id, heard.attempt, text))
        return self.last(ev.ReplyStarted).turn_id


def kinds(out: list[object]) -> list[str]:
    return [type(item).__name__ for item in out]


def test_a_spoken_turn_from_sound_to_ledger():
    told = Told()
    turn = told.say("what time is it")
    assert told.last(ev.Ask) == ev.Ask(turn, "what time is it", "en-US")
    told(ev.SkillStarted(turn), 0.01)
    out = told(ev.Spoke(turn, "It is noon."), 0.01)
    assert kinds(out) == ["ReplyText", "Synthesize"]
    told(ev.Handled(turn), 0.001)
    out = told(ev.Synthesized(turn, 0, b"\0\0" * 16_000, 16_000), 0.02)
    assert kinds(out) == ["ReplyAudio", "Meter"], "the client hears it, and is told the end only after the ledger"
    meter = told.last(ev.Meter)
    assert meter.key == turn
    assert meter.tts_seconds == 1.0
    assert meter.stt_seconds == told.last(ev.Understood).seconds > 0
    out = told(ev.Metered(turn), 0.002)
    assert kinds(out) == ["ReplyEnded", "Record"]
    ended = told.last(ev.ReplyEnded)
    assert ended.status is TurnStatus.COMPLETED
    assert list(ended.story) == [
        Stamp.SPEECH_STARTED,
        Stamp.SPEECH_ENDED,
        Stamp.COMMITTED,
        Stamp.TRANSCRIBED,
        Stamp.ASKED,
        Stamp.SKILL_STARTED,
        Stamp.SPOKE,
        Stamp.HANDLED,
        Stamp.FIRST_AUDIO,
        Stamp.DONE,
    ]
    timings = timings_ms(ended.story)
    assert timings["vad"] == pytest.approx(7 * 32, abs=1)
    assert timings["core"] == pytest.approx(20, abs=1)
    assert set(timings) == {"vad", "stt", "core", "tts", "first_audio", "total"}


def test_recognition_starts_in_the_pause_and_its_result_waits_for_the_end():
    told = Told()
    told.speak()
    told.fall_silent(2)
    first = told.last(ev.Transcribe)
    assert told(ev.Transcribed(first.item_id, first.attempt, "stop")) == []
    told.fall_silent(5)
    assert told.count(ev.Transcribe) == 1
    assert told.last(ev.Ask).text == "stop"


def test_a_pause_in_the_sentence_cancels_what_was_recognised_too_early():
    told = Told()
    told.speak()
    told.fall_silent(3)
    first = told.last(ev.Transcribe)
    told.speak(5)
    assert told.last(ev.CancelTranscription) == ev.CancelTranscription(first.item_id, first.attempt)
    assert told(ev.Transcribed(first.item_id, first.attempt, "half a")) == [], "a late result is dropped"
    told.fall_silent()
    second = told.last(ev.Transcribe)
    assert second.attempt == first.attempt + 1
    assert len(second.pcm) > len(first.pcm)
    told(ev.Transcribed(second.item_id, second.attempt, "half a sentence"))
    assert told.last(ev.Ask).text == "half a sentence"


def test_a_reply_is_heard_while_the_rest_of_it_is_still_being_made():
    told = Told()
    turn = told.say("tell me a story")
    told(ev.Spoke(turn, "Once upon a time."))
    told(ev.Handled(turn))
    out = told(ev.Synthesized(turn, 0, b"\0\0" * 8_000, 16_000, more=True), 0.02)
    assert kinds(out) == ["ReplyAudio"], "the stretch goes on, and so does the turn"
    first = told.now
    out = told(ev.Synthesized(turn, 0, b"\0\0" * 8_000, 16_000), 0.02)
    assert kinds(out) == ["ReplyAudio", "Meter"]
    assert told.last(ev.Meter).tts_seconds == 1.0
    told(ev.Metered(turn))
    assert told.last(ev.ReplyEnded).story[Stamp.FIRST_AUDIO] == first


def test_the_next_stretch_waits_for_the_end_of_the_one_before():
    told = Told()
    turn = told.say("tell me two things")
    told(ev.Spoke(turn, "One."))
    assert told(ev.Spoke(turn, "Two."))
    told(ev.Synthesized(turn, 0, b"\0\0" * 100, 16_000, more=True))
    assert told.count(ev.Synthesize) == 1
    told(ev.Synthesized(turn, 0, b"", 16_000))
    assert told.last(ev.Synthesize) == ev.Synthesize(turn, 1, "Two.")


def test_a_voice_that_stops_in_the_middle_of_a_stretch_fails_the_turn_and_what_was_heard_is_metered():
    told = Told()
    turn = told.say("tell me a story")
    told(ev.Spoke(turn, "Once upon a time."))
    told(ev.Synthesized(turn, 0, b"\0\0" * 16_000, 16_000, more=True))
    told(ev.TimePassed(), ENGINE_SILENCE)
    assert told.last(ev.Meter).tts_seconds == 1.0
    told(ev.Metered(turn))
    assert told.last(ev.ReplyEnded).reason == "tts_timeout"


def test_who_wants_it_is_told_what_is_understood_while_speaking():
    told = Told(SessionSettings(partials=True))
    told.speak(30)
    first = told.last(ev.Guess)
    assert len(first.pcm) > 0
    assert told(ev.Guessed(first.item_id, "what time")) == []
    told.speak(30)
    second = told.last(ev.Guess)
    assert len(second.pcm) > len(first.pcm)
    assert told(ev.Guessed(second.item_id, "what time is")) == [ev.Understanding(first.item_id, "what time")]
    told.fall_silent()
    heard = told.last(ev.Transcribe)
    told(ev.Transcribed(heard.item_id, heard.attempt, "what time is it"))
    assert told.last(ev.Understood).text == "what time is it"
    assert told(ev.Guessed(second.item_id, "what time is it")) == [], "the final transcript has said it all"


def test_nobody_guesses_for_a_client_that_does_not_ask():
    told = Told()
    told.speak(60)
    assert told.count(ev.Guess) == 0


def test_a_guess_for_which_there_was_no_time_is_tried_again():
    told = Told(SessionSettings(partials=True))
    told.speak(30)
    assert told(ev.Guessed(told.last(ev.Guess).item_id, None)) == []
    told.speak(30)
    assert told.count(ev.Guess) == 2


TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}


def test_with_tools_the_model_answers_without_core():
    told = Told(SessionSettings(tools=(TOOL,)))
    turn = told.say("how is the weather")
    assert told.last(ev.Converse) == ev.Converse(turn, "how is the weather", Wish(), speaks=True)
    assert told.count(ev.Ask) == 0
    told(ev.Called(turn, Call("call_1", "weather", "{}")))
    assert told.last(ev.ReplyCalls).call.name == "weather"
    told(ev.Handled(turn))
    told(ev.Metered(turn))
    ended = told.last(ev.ReplyEnded)
    assert (ended.status, ended.calls) == (TurnStatus.COMPLETED, (Call("call_1", "weather", "{}"),))
    told(ev.ResultAdded("call_1", "rain"))
    assert told.last(ev.Return) == ev.Return("call_1", "rain")
    told(ev.ResponseWanted())
    again = told.last(ev.Converse)
    assert (again.text, again.turn_id) == ("", told.last(ev.ReplyStarted).turn_id)
    told(ev.Spoke(again.turn_id, "It rains."))
    assert told.last(ev.Synthesize).text == "It rains."


def called(told: Told, *ids: str, wish: Wish | None = None) -> None:
    """A turn in which the model wants these called."""
    told(ev.TextAdded("how is the weather"))
    told(ev.ResponseWanted(wish=wish))
    turn = told.last(ev.ReplyStarted).turn_id
    for id in ids:
        told(ev.Called(turn, Call(id, "weather", "{}")))
    told(ev.Handled(turn))


def test_what_nobody_called_returns_nothing():
    told = Told(SessionSettings(tools=(TOOL,), speaks=False))
    called(told, "call_1", "call_2")
    called(told, "call_3", wish=Wish(apart=True))
    for stranger in ("call_9", "call_3"):
        assert kinds(told(ev.ResultAdded(stranger, "surprise", event_id="mine"))) == ["Problem"]
        assert (told.last(ev.Problem).code, told.last(ev.Problem).event_id) == ("unknown_call", "mine")
    told(ev.ResultAdded("call_1", "rain"))
    assert told.last(ev.Return) == ev.Return("call_1", "rain")
    assert kinds(told(ev.ResultAdded("call_1", "snow"))) == ["Problem"], "once is enough"
    called(told)
    assert told(ev.ResultAdded("call_2", "late"))[1] == ev.Return("call_2", "late"), "answers in between end no call"


def test_calls_that_never_return_are_forgotten_at_some_time():
    told = Told(SessionSettings(tools=(TOOL,), speaks=False))
    called(told, *(f"call_{number}" for number in range(1_000)))
    assert kinds(told(ev.ResultAdded("call_0", "rain"))) == ["Problem"]
    assert len(told.session._calls or ()) == MOST_MESSAGES


def test_an_answer_to_read_comes_as_it_is_written():
    told = Told(SessionSettings(tools=(TOOL,), speaks=False))
    told(ev.TextAdded("show me"))
    told(ev.ResponseWanted())
    turn = told.last(ev.ReplyStarted).turn_id
    for text in ("Here:\n\n``", "`\nx = ", "", "1\n```"):
        out = told(ev.Wrote(turn, text), MODEL_SILENCE - 1)
        assert out == ([ev.ReplyText(turn, text, goes_on=True)] if text else [])
    told(ev.Handled(turn, Tokens(7, 3)))
    ended = told.last(ev.ReplyEnded)
    assert (ended.status, ended.text) == (TurnStatus.COMPLETED, "Here:\n\n```\nx = 1\n```")
    assert ended.tokens == Tokens(7, 3)


def test_a_model_that_is_at_it_is_waited_for():
    told = Told(SessionSettings(tools=(TOOL,)))
    turn = told.say("tell me everything")
    for _ in range(5):
        told(ev.Progressed(turn), MODEL_SILENCE - 1)
        assert told.session.deadline == told.now + MODEL_SILENCE
    told(ev.Spoke(turn, "Well."))
    told(ev.Progressed(turn), 1.0)
    assert told.session.deadline == told.now - 1.0 + ENGINE_SILENCE, "an engine that hangs is not"


def test_an_apology_is_told_as_one():
    told = Told(TEXT_ONLY)
    told(ev.TextAdded("hello"))
    told(ev.ResponseWanted())
    turn = told.last(ev.ReplyStarted).turn_id
    told(ev.Spoke(turn, "One."))
    told(ev.Spoke(turn, "I have lost the rest.", apology=True))
    told(ev.Handled(turn))
    assert told.last(ev.ReplyEnded).apology


def test_an_answer_apart_without_input_leaves_the_question_open():
    told = Told(TEXT_ONLY)
    told(ev.TextAdded("hello"))
    wish = Wish(instructions="Classify it.", apart=True)
    told(ev.ResponseWanted(wish=wish))
    turn = told.last(ev.ReplyStarted).turn_id
    assert told.last(ev.Converse) == ev.Converse(turn, "hello", wish, speaks=False)
    told(ev.Handled(turn))
    told(ev.ResponseWanted())
    assert told.last(ev.Ask).text == "hello"


def test_nothing_is_answered_twice_because_of_one_result():
    told = Told(SessionSettings(tools=(TOOL,), speaks=False))
    called(told, "call_1")
    told(ev.ResultAdded("call_1", "rain"))
    told(ev.ResponseWanted())
    told(ev.Handled(told.last(ev.ReplyStarted).turn_id))
    told(ev.ResponseWanted())
    assert told.last(ev.Problem).code == "nothing_to_answer"


def test_a_model_that_falls_silent_in_the_middle_is_let_go():
    told = Told(SessionSettings(tools=(TOOL,), speaks=False))
    told(ev.TextAdded("think"))
    told(ev.ResponseWanted())
    turn = told.last(ev.ReplyStarted).turn_id
    told(ev.Spoke(turn, "Well."))
    told(ev.TimePassed(), MODEL_SILENCE)
    assert told.last(ev.CancelTurn) == ev.CancelTurn(turn)
    assert told.last(ev.ReplyEnded).reason == "no_answer"
    assert told(ev.Spoke(turn, "As I said.")) == [], "what it says later is no reminder"


def test_an_answer_with_instructions_of_its_own_is_the_models():
    told = Told(TEXT_ONLY)
    told(ev.TextAdded("hello"))
    wish = Wish(instructions="Answer in Latin.")
    told(ev.ResponseWanted(wish=wish))
    assert told.last(ev.Converse) == ev.Converse(told.last(ev.ReplyStarted).turn_id, "hello", wish, speaks=False)
    told(ev.TextAdded("what time is it"))
    told(ev.Handled(told.last(ev.ReplyStarted).turn_id))
    told(ev.ResponseWanted())
    assert told.last(ev.Ask).text == "what time is it", "the next one is anybody's again"


def test_an_answer_apart_leaves_the_conversation_alone():
    told = Told(TEXT_ONLY)
    told(ev.TextAdded("hello", item_id="item_mine"))
    wish = Wish(input=({"role": "user", "content": "classify this"},), apart=True)
    told(ev.ResponseWanted(wish=wish))
    started = told.last(ev.ReplyStarted)
    assert started.apart
    told(ev.Spoke(started.turn_id, "spam"))
    told(ev.Handled(started.turn_id))
    told(ev.ResponseWanted())
    assert told.last(ev.Ask).text == "hello", "what was said before still waits for its answer"
    assert told.last(ev.ReplyStarted).previous_item_id == "item_mine"


def test_a_slow_model_is_waited_for_longer_than_core():
    told = Told(SessionSettings(tools=(TOOL,), speaks=False))
    told(ev.TextAdded("think"))
    told(ev.ResponseWanted())
    assert told.session.deadline == told.now + MODEL_SILENCE
    told(ev.TimePassed(), MODEL_SILENCE)
    assert told.last(ev.ReplyEnded).reason == "no_answer"
    assert told.last(ev.CancelTurn)


def test_silence_is_answered_politely_and_never_asked():
    told = Told()
    told.say("  ")
    assert told.count(ev.Ask) == 0
    assert told.last(ev.Meter).stt_seconds > 0
    told(ev.Metered(told.last(ev.Meter).key))
    ended = told.last(ev.ReplyEnded)
    assert ended.status is TurnStatus.COMPLETED
    assert ended.text == ""


def test_a_text_turn_uses_nothing_that_is_metered():
    told = Told(TEXT_ONLY)
    told(ev.TextAdded("what time is it"))
    told(ev.ResponseWanted(metadata={"a": "b"}))
    turn = told.last(ev.ReplyStarted).turn_id
    assert told.last(ev.ReplyStarted).metadata == {"a": "b"}
    told(ev.Spoke(turn, "Noon."))
    told(ev.Handled(turn))
    assert told.count(ev.Meter) == 0
    assert told.last(ev.ReplyEnded).text == "Noon."


def test_several_sentences_are_spoken_in_order_one_at_a_time():
    told = Told()
    turn = told.say("tell me")
    told(ev.Spoke(turn, "One."))
    assert kinds(told(ev.Spoke(turn, "Two."))) == ["ReplyText"]
    told(ev.Handled(turn))
    out = told(ev.Synthesized(turn, 0, b"\0\0" * 100, 16_000))
    assert kinds(out) == ["ReplyAudio", "Synthesize"]
    assert told.last(ev.Synthesize).text == "Two."
    out = told(ev.Synthesized(turn, 1, b"\0\0" * 100, 16_000))
    assert kinds(out) == ["ReplyAudio", "Meter"]


def test_barge_in_cancels_the_answer_and_what_it_says_later():
    told = Told()
    turn = told.say("tell me a story")
    told(ev.Spoke(turn, "Once upon a time."))
    told(ev.Synthesized(turn, 0, b"\0\0" * 48_000, 16_000))
    told.speak(2)
    assert told.last(ev.CancelTurn).turn_id == turn
    assert told.last(ev.PlaybackEnded).turn_id == turn
    assert told.last(ev.Meter).tts_seconds == 3.0, "what was delivered is metered"
    assert told(ev.Spoke(turn, "There was a king.")) == []
    told(ev.Metered(turn))
    ended = told.last(ev.ReplyEnded)
    assert (ended.status, ended.reason) == (TurnStatus.CANCELLED, "turn_detected")
    assert told(ev.Spoke(turn, "And a queen.")) == [], "not taken for a reminder either"


def test_without_interruption_the_next_answer_waits():
    told = Told(SessionSettings(turn_detection=TurnDetection(interrupt_response=False)))
    first = told.say("one")
    told.speak()
    told.fall_silent()
    heard = told.last(ev.Transcribe)
    told(ev.Transcribed(heard.item_id, heard.attempt, "two"))
    assert told.count(ev.ReplyStarted) == 1
    told(ev.Spoke(first, "First."))
    told(ev.Handled(first))
    told(ev.Synthesized(first, 0, b"\0\0", 16_000))
    told(ev.Metered(first))
    assert told.count(ev.ReplyStarted) == 2
    assert told.last(ev.Ask).text == "two"


def test_manual_commit_recognises_meters_and_answers_only_when_asked():
    told = Told(MANUAL)
    told(ev.Heard(WINDOW * 20))
    told(ev.AudioCommitted())
    heard = told.last(ev.Transcribe)
    out = told(ev.Transcribed(heard.item_id, heard.attempt, "hello"))
    assert kinds(out) == ["Meter"]
    assert kinds(told(ev.Metered(heard.item_id))) == ["Understood", "Record"]
    assert told.count(ev.Ask) == 0
    told(ev.ResponseWanted())
    turn = told.last(ev.ReplyStarted).turn_id
    assert told.last(ev.Ask) == ev.Ask(turn, "hello", "en-US")
    told(ev.Spoke(turn, "Hi."))
    told(ev.Handled(turn))
    told(ev.Synthesized(turn, 0, b"\0\0" * 16_000, 16_000))
    assert told.last(ev.Meter) == ev.Meter(turn, 0.0, 1.0), "the recognition is not metered twice"


def test_two_commits_in_a_row_are_both_understood():
    told = Told(MANUAL)
    for _text in ("one", "two"):
        told(ev.Heard(WINDOW * 20))
        told(ev.AudioCommitted())
    first, second = (item for item in told.all if isinstance(item, ev.Transcribe))
    told(ev.Transcribed(second.item_id, 1, "two"))
    told(ev.Transcribed(first.item_id, 1, "one"))
    told(ev.Metered(first.item_id))
    told(ev.Metered(second.item_id))
    assert [item.text for item in told.all if isinstance(item, ev.Understood)] == ["one", "two"]


@pytest.mark.parametrize("audio", [b"", WINDOW])
def test_a_commit_without_speech_is_refused(audio: bytes):
    told = Told(MANUAL)
    if audio:
        told(ev.Heard(audio))
    (problem,) = told(ev.AudioCommitted("evt_1"))
    assert (problem.code, problem.event_id) == ("input_audio_buffer_commit_empty", "evt_1")


def test_the_buffer_of_a_session_is_bounded():
    told = Told(MANUAL)
    second = b"\0\0" * 16_000
    out = [item for _ in range(int(LONGEST_BUFFER) + 1) for item in told(ev.Heard(second))]
    assert kinds(out) == ["Problem"]
    assert out[0].code == "input_audio_buffer_full"


def test_a_second_response_is_refused_and_the_first_goes_on():
    told = Told(TEXT_ONLY)
    told(ev.TextAdded("one"))
    told(ev.ResponseWanted())
    (problem,) = told(ev.ResponseWanted(event_id="evt_2"))
    assert (problem.code, problem.event_id) == ("conversation_already_has_active_response", "evt_2")
    assert told.session.active


def test_a_response_to_nothing_and_a_cancel_of_nothing_are_refused():
    told = Told()
    assert told(ev.ResponseWanted())[0].code == "nothing_to_answer"
    (problem,) = told(ev.ResponseCancelled())
    assert problem.code == "response_cancel_not_active"
    assert problem.message.startswith("Cancellation failed")


def test_cancelling_stops_the_recognition_too():
    told = Told()
    told.speak()
    told.fall_silent()
    heard = told.last(ev.Transcribe)
    told(ev.ResponseCancelled())
    assert told.last(ev.CancelTranscription).item_id == heard.item_id
    assert told.last(ev.NotUnderstood).code == "cancelled"
    assert told.count(ev.Meter) == 0
    assert told.last(ev.ReplyEnded).status is TurnStatus.CANCELLED


def test_a_lost_cell_fails_the_turn_and_the_next_one_works():
    told = Told()
    turn = told.say("what time is it")
    told(ev.AskFailed(turn, "cell_lost", "The assistant has stopped."))
    told(ev.Metered(turn))
    ended = told.last(ev.ReplyEnded)
    assert (ended.status, ended.reason) == (TurnStatus.FAILED, "cell_lost")
    turn = told.say("what time is it")
    assert told.last(ev.Ask).turn_id == turn


def test_a_failed_ledger_fails_the_turn():
    told = Told()
    turn = told.say("what time is it")
    told(ev.Spoke(turn, "Noon."))
    told(ev.Handled(turn))
    told(ev.Synthesized(turn, 0, b"\0\0" * 100, 16_000))
    told(ev.MeteringFailed(turn, "store_unavailable", "The store does not answer."))
    ended = told.last(ev.ReplyEnded)
    assert (ended.status, ended.reason) == (TurnStatus.FAILED, "store_unavailable")


@pytest.mark.parametrize("uncommitted", [True, False])
def test_failed_recognition(uncommitted: bool):
    told = Told()
    told.speak()
    told.fall_silent(2 if uncommitted else 7)
    heard = told.last(ev.Transcribe)
    told(ev.TranscriptionFailed(heard.item_id, heard.attempt, "engine_failed", "The engine failed."))
    if uncommitted:
        assert told.count(ev.NotUnderstood) == 0
        told.fall_silent(5)
        assert told.count(ev.Transcribe) == 2, "the end of speech tries again"
    else:
        assert told.last(ev.ReplyEnded).reason == "engine_failed"


def test_failed_synthesis_fails_the_turn():
    told = Told()
    turn = told.say("hello")
    told(ev.Spoke(turn, "Hi."))
    told(ev.SynthesisFailed(turn, 0, "engine_failed", "The engine failed."))
    assert told.last(ev.CancelTurn).turn_id == turn


@pytest.mark.parametrize(
    ("steps", "reason", "wait"),
    [(0, "stt_timeout", ENGINE_SILENCE), (1, "no_answer", CORE_SILENCE), (2, "tts_timeout", ENGINE_SILENCE)],
)
def test_a_turn_that_hangs_ends(steps: int, reason: str, wait: float):
    told = Told()
    told.speak()
    told.fall_silent()
    turn = told.last(ev.ReplyStarted).turn_id
    if steps:
        heard = told.last(ev.Transcribe)
        told(ev.Transcribed(heard.item_id, heard.attempt, "hello"))
    if steps > 1:
        told(ev.Spoke(turn, "Hi."))
    assert told.session.deadline == told.now + wait
    told(ev.TimePassed(), wait)
    told(ev.Metered(turn))
    assert told.last(ev.ReplyEnded).reason == reason


def test_a_turn_that_spoke_and_then_fell_silent_is_complete():
    told = Told(TEXT_ONLY)
    told(ev.TextAdded("hello"))
    told(ev.ResponseWanted())
    turn = told.last(ev.ReplyStarted).turn_id
    told(ev.Spoke(turn, "Hi."))
    told(ev.Progressed(turn), 5)
    told(ev.TimePassed(), 9)
    assert told.session.active, "it was heard of in the meantime"
    told(ev.TimePassed(), 1)
    assert told.last(ev.ReplyEnded).status is TurnStatus.COMPLETED


def test_a_question_back_ends_the_turn_and_the_dialogue_goes_on_under_the_old_id():
    told = Told()
    first = told.say("set a reminder")
    told(ev.Spoke(first, "When?", expects_response=True))
    told(ev.Synthesized(first, 0, b"\0\0" * 100, 16_000))
    told(ev.Metered(first))
    assert told.last(ev.ReplyEnded).listens
    second = told.say("tomorrow")
    told(ev.Spoke(first, "All right, tomorrow."))
    assert told.last(ev.ReplyText) == ev.ReplyText(second, "All right, tomorrow.")
    told(ev.Handled(first))
    told(ev.Synthesized(second, 0, b"\0\0" * 100, 16_000))
    told(ev.Metered(second))
    assert told.last(ev.ReplyEnded).turn_id == second


def test_a_handler_may_ask_back_more_than_once():
    told = Told(TEXT_ONLY)
    turns = []
    for number in range(3):
        told(ev.TextAdded("hm"))
        told(ev.ResponseWanted())
        turns.append(told.last(ev.ReplyStarted).turn_id)
        told(ev.Spoke(turns[0], f"Question {number}?", expects_response=True))
        assert told.last(ev.ReplyEnded).turn_id == turns[-1]
    told(ev.TextAdded("done"))
    told(ev.ResponseWanted())
    told(ev.Spoke(turns[0], "All right."))
    told(ev.Handled(turns[0]))
    ended = told.last(ev.ReplyEnded)
    assert (ended.text, ended.listens) == ("All right.", False)
    assert not told.session.active


def test_a_reminder_speaks_up_by_itself_after_the_turn_that_is_running():
    told = Told()
    first = told.say("remind me")
    told(ev.Spoke(first, "I will."))
    told(ev.Handled(first))
    told(ev.Synthesized(first, 0, b"\0\0" * 100, 16_000))
    told(ev.Metered(first))
    second = told.say("what time is it")
    told(ev.Spoke(first, "Here is your reminder."))
    assert told.last(ev.ReplyStarted).turn_id == second
    told(ev.Spoke(second, "Noon."))
    told(ev.Handled(second))
    told(ev.Synthesized(second, 0, b"\0\0" * 100, 16_000))
    told(ev.Metered(second))
    assert told.last(ev.ReplyText).text == "Here is your reminder."
    reminder = told.last(ev.ReplyStarted).turn_id
    told(ev.Synthesized(reminder, 0, b"\0\0" * 100, 16_000))
    told(ev.Metered(reminder))
    assert told.last(ev.ReplyEnded).turn_id == reminder


def test_playback_has_ended_when_the_audio_has_run_out():
    told = Told()
    turn = told.say("hello")
    told(ev.Spoke(turn, "Hi."))
    told(ev.Handled(turn))
    told(ev.Synthesized(turn, 0, b"\0\0" * 32_000, 16_000))
    told(ev.Metered(turn))
    assert told.session.deadline == told.now + 2.0
    assert told(ev.TimePassed(), 1.0) == []
    assert told(ev.TimePassed(), 1.0) == [ev.PlaybackEnded(turn)]


def test_a_handler_that_waits_for_playback_of_written_text_goes_on():
    told = Told(TEXT_ONLY)
    told(ev.TextAdded("hello"))
    told(ev.ResponseWanted())
    turn = told.last(ev.ReplyStarted).turn_id
    told(ev.Spoke(turn, "Hi."))
    assert told(ev.TimePassed(), READING) == [ev.PlaybackEnded(turn)]
    told(ev.Spoke(turn, "Bye."))
    told(ev.Handled(turn))
    assert told(ev.TimePassed(), READING) == [], "one that has ended needs no word"


def test_a_handler_that_listens_late_for_the_end_of_playback_is_told_again():
    """Stock skills begin to listen for it after they have spoken, and wait 15 s if it was told before that."""
    told = Told(TEXT_ONLY)
    told(ev.TextAdded("hello"))
    told(ev.ResponseWanted())
    turn = told.last(ev.ReplyStarted).turn_id
    told(ev.Spoke(turn, "Did you mean Vienna?", expects_response=True))
    assert told(ev.TimePassed(), 0.0)[-1] == ev.PlaybackEnded(turn)
    waits = []
    while told.session.deadline is not None:
        waits.append(told.session.deadline - told.now)
        assert told(ev.TimePassed(), waits[-1])[-1] == ev.PlaybackEnded(turn)
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, LAST_REMINDER])


def test_who_has_answered_a_question_is_not_told_of_the_older_ones():
    told = Told(TEXT_ONLY)
    for text in ("Did you mean Vienna?", "Did you mean Venice?"):
        told(ev.TextAdded("yes"))
        told(ev.ResponseWanted())
        turn = told.last(ev.ReplyStarted).turn_id
        told(ev.Spoke(turn, text, expects_response=True))
        told(ev.Metered(turn))
        assert told(ev.TimePassed(), 0.0) == [ev.PlaybackEnded(turn)]
    assert told(ev.TimePassed(), 0.1) == [ev.PlaybackEnded(turn)]
    assert told(ev.TimePassed(), 0.05) == []


def test_the_end_of_a_session_ends_everything():
    told = Told()
    turn = told.say("hello")
    told(ev.Spoke(turn, "Hi."))
    out = told(ev.Ended())
    assert "CancelTurn" in kinds(out)
    assert "Meter" in kinds(out)
    assert told.last(ev.Record).content["reason"] == "session_ended"
    assert told(ev.Spoke(turn, "More.")) == []
    assert told(ev.Heard(WINDOW, 0.9)) == []


def test_recognitions_and_waiting_answers_are_bounded():
    told = Told(MANUAL)
    for _ in range(MOST_OPEN):
        told(ev.Heard(WINDOW * 20))
        told(ev.AudioCommitted())
    told(ev.Heard(WINDOW * 20))
    assert told(ev.AudioCommitted("evt_5"))[0].code == "too_many_utterances"
    told = Told(SessionSettings(turn_detection=TurnDetection(interrupt_response=False)))
    for _ in range(MOST_OPEN + 3):
        told.say("one more")
    refused = [item.code for item in told.all if isinstance(item, ev.Problem)]
    assert refused == ["too_many_turns"] * 2, "one is answered, some wait, the rest is refused"


def test_a_turn_lasts_as_long_as_its_answer_is_played():
    told = Told()
    turn = told.say("tell me a story")
    told(ev.Spoke(turn, "Once upon a time."))
    told(ev.Synthesized(turn, 0, b"\0\0" * 16_000 * 30, 16_000))
    told(ev.TimePassed(), 25)
    assert told.session.active, "the handler may wait for the end of playback"
    told(ev.TimePassed(), 5)
    told(ev.TimePassed(), CORE_SILENCE)
    told(ev.Metered(turn))
    assert not told.session.active


def test_a_ledger_that_never_answers_does_not_hold_the_session():
    told = Told()
    turn = told.say("hello")
    told(ev.Spoke(turn, "Hi."))
    told(ev.Handled(turn))
    told(ev.Synthesized(turn, 0, b"\0\0" * 100, 16_000))
    told(ev.TimePassed(), ENGINE_SILENCE)
    assert told.last(ev.ReplyEnded).reason == "store_unavailable"


def test_a_refused_wish_leaves_nothing_behind():
    told = Told(TEXT_ONLY)
    told(ev.ResponseWanted(text="one"))
    turn = told.last(ev.ReplyStarted).turn_id
    assert told(ev.ResponseWanted(text="two"))[0].code == "conversation_already_has_active_response"
    told(ev.Spoke(turn, "One."))
    told(ev.Handled(turn))
    assert told(ev.ResponseWanted())[0].code == "nothing_to_answer"


def test_speech_that_began_also_ends():
    told = Told()
    told.speak()
    told(ev.AudioCleared())
    assert told.last(ev.SpeechStopped).item_id == told.last(ev.SpeechStarted).item_id


def test_a_long_answer_is_spoken_in_stretches_and_told_whole():
    told = Told()
    turn = told.say("tell me everything")
    text = "This is a sentence of the answer. " * 20
    told(ev.Spoke(turn, text))
    first = told.last(ev.Synthesize).text
    assert len(first) <= LONGEST_PIECE
    assert text.startswith(first)
    told(ev.Handled(turn))
    count = 0
    while told.count(ev.Meter) == 0:
        told(ev.Synthesized(turn, count, b"\0\0" * 100, 16_000))
        count += 1
    told(ev.Metered(turn))
    assert count == told.count(ev.Synthesize) > 1
    assert told.last(ev.ReplyEnded).text == text.strip()


@given(st.text(alphabet="ab. !\n", max_size=2_000) | st.text(max_size=1_000))
def test_no_word_is_lost_between_stretches(text: str):
    pieces = sentences(text, "en-US")
    assert all(len(piece) <= LONGEST_PIECE or piece == text for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_changed_detection_forgets_what_was_half_heard():
    told = Told()
    told.speak()
    told(ev.SettingsWanted({"turn_detection": None}))
    assert told.last(ev.SettingsChanged).settings.turn_detection is None
    assert told(ev.AudioCommitted())[0].code == "input_audio_buffer_commit_empty"


class AnySession(RuleBasedStateMachine):
    """Whatever comes in whatever order: no exception, and the books balance."""

    def __init__(self) -> None:
        super().__init__()
        self.told = Told()
        self.turns = ["resp_unknown"]
        self.items: list[tuple[str, int]] = [("item_unknown", 1)]
        self.metering: list[str] = []

    def take(self, event: ev.Event, after: float = 0.01) -> None:
        for item in self.told(event, after):
            match item:
                case ev.ReplyStarted():
                    self.turns.append(item.turn_id)
                case ev.Transcribe():
                    self.items.append((item.item_id, item.attempt))
                case ev.Meter():
                    assert item.key not in self.metering, "nothing is metered twice"
                    assert item.stt_seconds + item.tts_seconds > 0
                    self.metering.append(item.key)

    @rule(speech=st.sampled_from([0.0, 0.4, 0.9]), windows=st.integers(1, 12))
    def hear(self, speech: float, windows: int) -> None:
        for _ in range(windows):
            self.take(ev.Heard(WINDOW, speech), 0.032)

    @rule(
        event=st.sampled_from(
            [
                ev.Heard(WINDOW * 4),
                ev.AudioCommitted(),
                ev.AudioCleared(),
                ev.TextAdded("hello"),
                ev.TextAdded("   "),
                ev.ResponseWanted(),
                ev.ResponseCancelled(),
                ev.SettingsWanted({"turn_detection": None}),
                ev.SettingsWanted({"turn_detection": TurnDetection()}),
                ev.SettingsWanted({"turn_detection": TurnDetection(interrupt_response=False)}),
                ev.SettingsWanted({"speaks": False}),
                ev.SettingsWanted({"speaks": True}),
            ]
        )
    )
    def client(self, event: ev.Event) -> None:
        self.take(event)

    @rule(data=st.data(), text=st.sampled_from(["", "hello", " a "]))
    def understand(self, data: st.DataObject, text: str) -> None:
        item_id, attempt = data.draw(st.sampled_from(self.items[-3:]))
        self.take(ev.Transcribed(item_id, attempt, text))

    @rule(data=st.data())
    def misunderstand(self, data: st.DataObject) -> None:
        item_id, attempt = data.draw(st.sampled_from(self.items[-3:]))
        self.take(ev.TranscriptionFailed(item_id, attempt, "engine_failed", "no"))

    @rule(data=st.data(), kind=st.integers(0, 7))
    def core(self, data: st.DataObject, kind: int) -> None:
        turn = data.draw(st.sampled_from(self.turns[-3:]))
        self.take(
            (
                ev.SkillStarted(turn),
                ev.Spoke(turn, "yes"),
                ev.Spoke(turn, "what?", expects_response=True),
                ev.Progressed(turn),
                ev.Handled(turn),
                ev.AskFailed(turn, "cell_lost", "gone"),
                ev.Synthesized(turn, 0, b"\0\0" * 1600, 16_000),
                ev.SynthesisFailed(turn, 0, "engine_failed", "no"),
            )[kind]
        )

    @rule(data=st.data(), good=st.booleans())
    def ledger(self, data: st.DataObject, good: bool) -> None:
        key = data.draw(st.sampled_from(self.metering or ["nobody"]))
        self.take(ev.Metered(key) if good else ev.MeteringFailed(key, "store_unavailable", "no"))

    @rule(seconds=st.sampled_from([0.1, 11.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.take(ev.TimePassed(), seconds)

    @invariant()
    def replies_balance(self) -> None:
        started = [i.turn_id for i in self.told.all if isinstance(i, ev.ReplyStarted)]
        ended = [i.turn_id for i in self.told.all if isinstance(i, ev.ReplyEnded)]
        assert len(set(started)) == len(started)
        assert ended == started[: len(ended)], "answers end in the order in which they began, each once"
        assert len(started) - len(ended) == int(self.told.session.active)

    def teardown(self) -> None:
        # Whatever has happened, a session can always be brought to rest, and then hears again.
        self.take(ev.SettingsWanted({"turn_detection": TurnDetection(), "speaks": True}))
        self.told.fall_silent(40)
        for _ in range(64):
            if not self.told.session.active:
                break
            self.take(ev.TimePassed(), 31.0)
            for key in list(self.metering):
                self.take(ev.Metered(key))
        assert not self.told.session.active
        started = self.told.count(ev.ReplyStarted)
        self.told.speak(5)
        self.told.fall_silent(40)
        assert self.told.count(ev.ReplyStarted) == started + 1


TestAnySession = AnySession.TestCase
TestAnySession.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(0, 9), max_size=30))
def test_the_sessions_memory_is_bounded_by_what_it_is_doing(turns: list[int]):
    told = Told(TEXT_ONLY)
    for _ in turns:
        told(ev.TextAdded("hello"))
        told(ev.ResponseWanted())
        turn = told.last(ev.ReplyStarted).turn_id
        told(ev.Spoke(turn, "Hi."))
        told(ev.Handled(turn))
    session = told.session
    assert not session.active
    assert session._open is None
    assert not session._waiting


def test_a_long_reply_is_not_cut_after_a_title():
    text = "word " * 40 + "and that is all. Then you will see Dr. Smith " + "at noon " * 20 + "today."
    pieces = sentences(text, "en-US")
    assert len(pieces) > 1
    assert not any(piece.endswith("Dr.") for piece in pieces)
    assert " ".join(pieces).split() == text.split()
