"""A voice session: events in, effects and news out. It never awaits, owns no clock and knows no protocol."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from typing import Any

from agentvoicebox.bus_bridge import events as ev
from agentvoicebox.bus_bridge.calls import MOST_MESSAGES, Wish
from agentvoicebox.bus_bridge.models import (
    BYTES_PER_SECOND,
    SessionSettings,
    Stamp,
    TurnStatus,
    timings_ms,
)
from agentvoicebox.bus_bridge.partials import Partials
from agentvoicebox.bus_bridge.turns import Change, Listener, Stage, Turn, Utterance, sentences

CORE_SILENCE = 10.0
"""Seconds without any message of a turn after which it ends."""

MODEL_SILENCE = 60.0
"""Seconds a language model may take to begin, its retries and those who stand in for it included."""

ENGINE_SILENCE = 30.0
"""Seconds an engine may take for one piece of work."""

SHORTEST_COMMIT = 0.1
"""Seconds of audio below which a commit is refused."""

LONGEST_BUFFER = 300.0
"""Seconds of uncommitted audio a session holds when the client detects its turns itself."""

READING = 0.1
"""Seconds after which written text counts as played."""

LAST_REMINDER = 3.2
"""Seconds between the last two times that this is told to whoever may not have listened yet."""

MOST_OPEN = 4
"""Utterances of a session that may be recognised or wait for an answer at the same time."""

REMEMBERED_TURNS = 16
"""How many cancelled turns are remembered, so that what they say later is not taken for a reminder."""

Out = ev.Effect | ev.Told


class Session:
    """The state of one session. `receive` is the only way in.

    `new_id(kind)` must return a fresh identifier; kinds are `item` and `resp`.
    """

    __slots__ = (
        "_buffer",
        "_calls",
        "_cancelled",
        "_dialogue",
        "_ended",
        "_last_item",
        "_listener",
        "_new_id",
        "_open",
        "_out",
        "_playing_turn",
        "_playing_until",
        "_remind_after",
        "_returned",
        "_speaking",
        "_turn",
        "_unanswered",
        "_waiting",
        "settings",
    )

    def __init__(self, settings: SessionSettings, new_id: Callable[[str], str]) -> None:
        self.settings = settings
        self._new_id = new_id
        self._buffer: bytearray | None = None
        self._listener: Listener | None = None
        self._speaking: Utterance | None = None
        self._unanswered: Utterance | None = None
        # Utterances with recognition or metering under way. None instead of empty: most sessions are idle.
        self._open: dict[str, Utterance] | None = None
        self._turn: Turn | None = None
        self._waiting: deque[Turn] | None = None
        self._cancelled: deque[str] | None = None
        self._dialogue: str | None = None
        self._last_item: str | None = None
        self._playing_until: float | None = None
        self._playing_turn = ""
        self._remind_after = 0.0
        """Seconds after which the end of playback is told once more; 0 where it need not be."""
        self._calls: dict[str, None] | None = None
        """Calls of the conversation that have returned nothing yet, oldest first."""
        self._returned = False
        """Whether calls have returned something that the model has not been told."""
        self._ended = False
        self._out: list[Out] = []

    @property
    def deadline(self) -> float | None:
        """When `TimePassed` must be received, unless something else happens first; None when nothing is pending."""
        times = [self._playing_until] if self._playing_until is not None else []
        if self._turn is not None and self._turn.deadline != float("inf"):
            times.append(self._turn.deadline)
        return min(times) if times else None

    @property
    def active(self) -> bool:
        """Whether a turn is being answered."""
        return self._turn is not None

    def receive(self, event: ev.Event, now: float) -> list[Out]:
        """Take what happened at `now` (seconds, any steady clock); return what follows from it, in order."""
        if self._ended:
            return []
        _HANDLERS[type(event)](self, event, now)
        out, self._out = self._out, []
        return out

    # --- what the client does -----------------------------------------------------------------------------------------

    def _heard(self, event: ev.Heard, now: float) -> None:
        detection = self.settings.turn_detection
        if detection is None or event.speech is None:
            self._buffer = self._buffer if self._buffer is not None else bytearray()
            if len(self._buffer) + len(event.pcm) > LONGEST_BUFFER * BYTES_PER_SECOND:
                self._refuse("input_audio_buffer_full", f"Commit or clear the audio within {LONGEST_BUFFER:.0f} s.")
                return
            self._buffer += event.pcm
            return
        listener = self._listener
        if listener is None:
            listener = self._listener = Listener(detection)
        change = listener.hear(event.pcm, event.speech)
        if change is Change.BEGAN:
            self._begin_utterance(listener, now)
        utterance = self._speaking
        if utterance is None:
            return
        if not listener.quiet:
            utterance.story[Stamp.SPEECH_ENDED] = now
        if change is Change.PAUSED:
            self._recognise(utterance, bytes(listener.audio))
        elif change is Change.RESUMED:
            self._stop_recognising(utterance)
        elif change is Change.ENDED:
            self._end_utterance(listener, utterance, now)
        elif self._is_worth_a_guess(utterance, len(listener.audio)):
            self._out.append(ev.Guess(utterance.item_id, bytes(listener.audio), self.settings.language))

    def _begin_utterance(self, listener: Listener, now: float) -> None:
        utterance = self._speaking = Utterance(self._new_id("item"))
        utterance.story[Stamp.SPEECH_STARTED] = now
        if self.settings.partials:
            utterance.partials = Partials()
        self._out.append(ev.SpeechStarted(utterance.item_id, listener.began_at))
        detection = self.settings.turn_detection
        if detection is not None and detection.interrupt_response:
            self._drop_waiting()
            if self._turn is not None and self._turn.stage is not Stage.SETTLING:
                self._cancel(self._turn, "turn_detected", now)
            self._stop_playback()

    def _is_worth_a_guess(self, utterance: Utterance, size: int) -> bool:
        partials = utterance.partials
        return partials is not None and not utterance.recognising and partials.due(size / BYTES_PER_SECOND)

    def _end_utterance(self, listener: Listener, utterance: Utterance, now: float) -> None:
        self._out.append(ev.SpeechStopped(utterance.item_id, listener.position))
        audio = listener.take()
        self._speaking = None
        if not utterance.recognising and utterance.text is None:
            self._recognise(utterance, audio)
        detection = self.settings.turn_detection
        self._commit(utterance, now, answer=detection is None or detection.create_response)

    def _audio_committed(self, event: ev.AudioCommitted, now: float) -> None:
        if self._listener is not None and self._speaking is not None:
            self._end_utterance(self._listener, self._speaking, now)
            return
        audio = bytes(self._buffer or b"")
        if len(audio) < SHORTEST_COMMIT * BYTES_PER_SECOND:
            self._refuse(
                "input_audio_buffer_commit_empty",
                f"There is no speech to commit: append at least {SHORTEST_COMMIT * 1000:.0f} ms of audio first.",
                event.event_id,
            )
            return
        if len(self._open or ()) >= MOST_OPEN:
            message = f"{MOST_OPEN} utterances are being recognised; commit the next one when one of them is done."
            self._refuse("too_many_utterances", message, event.event_id)
            return
        self._buffer = None
        utterance = Utterance(self._new_id("item"))
        self._recognise(utterance, audio)
        self._commit(utterance, now, answer=False)

    def _audio_cleared(self, event: ev.AudioCleared, now: float) -> None:
        self._forget_input()
        self._out.append(ev.InputCleared())

    def _text_added(self, event: ev.TextAdded, now: float) -> None:
        utterance = Utterance(event.item_id or self._new_id("item"), text=event.text.strip(), committed=True)
        self._out.append(ev.TextCommitted(utterance.item_id, self._last_item, event.text))
        self._out.append(ev.Record("transcript", {"item_id": utterance.item_id, "text": event.text, "typed": True}))
        self._last_item = utterance.item_id
        self._unanswered = utterance

    def _response_wanted(self, event: ev.ResponseWanted, now: float) -> None:
        if self._turn is not None:
            self._refuse(
                "conversation_already_has_active_response",
                f"Response {self._turn.id} is still in progress; wait for it or cancel it.",
                event.event_id,
            )
            return
        if event.text is not None:
            self._text_added(ev.TextAdded(event.text, event_id=event.event_id), now)
        wish = event.wish
        utterance = self._unanswered
        if wish is not None and wish.input is not None:
            utterance = None  # what was said last still waits for its answer
        elif wish is None or not wish.apart:
            self._unanswered = None
        if utterance is None and wish is None and self._returned:
            wish = Wish()
        if utterance is None and wish is None:
            self._refuse("nothing_to_answer", "Say or write something first.", event.event_id)
            return
        turn = self._new_turn(utterance, event.speaks, event.metadata)
        turn.wish = wish
        self._enqueue(turn, now)

    def _result_added(self, event: ev.ResultAdded, now: float) -> None:
        if event.call_id not in (self._calls or ()):
            message = (
                f"No call {event.call_id[:64]!r} of this conversation waits for a result. Of a response with an "
                '`input` of its own, or with `conversation: "none"`, results go into the `input` of the next one.'
            )
            self._refuse("unknown_call", message, event.event_id)
            return
        assert self._calls is not None
        del self._calls[event.call_id]
        self._calls = self._calls or None
        item_id = event.item_id or self._new_id("item")
        self._out.append(ev.ResultCommitted(item_id, self._last_item, event.call_id, event.output))
        self._out.append(ev.Return(event.call_id, event.output))
        self._out.append(ev.Record("tool_result", {"call_id": event.call_id, "output": event.output}))
        self._last_item = item_id
        self._returned = True

    def _response_cancelled(self, event: ev.ResponseCancelled, now: float) -> None:
        turn = self._turn
        if turn is None or turn.stage is Stage.SETTLING or event.response_id not in (None, turn.id):
            self._refuse("response_cancel_not_active", "Cancellation failed: no active response found.", event.event_id)
            return
        self._cancel(turn, "client_cancelled", now)
        self._stop_playback()

    def _settings_wanted(self, event: ev.SettingsWanted, now: float) -> None:
        changes: dict[str, Any] = dict(event.changes)
        before, self.settings = self.settings, dataclasses.replace(self.settings, **changes)
        if before.turn_detection != self.settings.turn_detection:
            self._forget_input()
        self._out.append(ev.SettingsChanged(self.settings))

    # --- understanding ------------------------------------------------------------------------------------------------

    def _recognise(self, utterance: Utterance, audio: bytes) -> None:
        utterance.attempt += 1
        utterance.recognising = True
        utterance.seconds = len(audio) / BYTES_PER_SECOND
        self._open = self._open if self._open is not None else {}
        self._open[utterance.item_id] = utterance
        self._out.append(ev.Transcribe(utterance.item_id, utterance.attempt, audio, self.settings.language))

    def _stop_recognising(self, utterance: Utterance) -> None:
        if utterance.recognising:
            self._out.append(ev.CancelTranscription(utterance.item_id, utterance.attempt))
        utterance.recognising = False
        utterance.text = None
        self._close(utterance)

    def _commit(self, utterance: Utterance, now: float, *, answer: bool) -> None:
        utterance.committed = True
        utterance.story[Stamp.COMMITTED] = now
        self._out.append(ev.UtteranceCommitted(utterance.item_id, self._last_item))
        self._last_item = utterance.item_id
        if answer:
            self._enqueue(self._new_turn(utterance), now)
        else:
            self._unanswered = utterance
        if utterance.text is not None:
            self._understood(utterance, now)

    def _transcribed(self, event: ev.Transcribed, now: float) -> None:
        utterance = self._find(event.item_id, event.attempt)
        if utterance is None:
            return
        utterance.recognising = False
        utterance.text = event.text.strip()
        if utterance.committed:
            self._understood(utterance, now)

    def _guessed(self, event: ev.Guessed, now: float) -> None:
        utterance = self._speaking
        if utterance is None or utterance.item_id != event.item_id or utterance.partials is None:
            return  # the final transcript says it all
        if event.text is None:
            utterance.partials.miss()
        elif fresh := utterance.partials.hear(event.text):
            self._out.append(ev.Understanding(utterance.item_id, fresh))

    def _understood(self, utterance: Utterance, now: float) -> None:
        utterance.story.setdefault(Stamp.TRANSCRIBED, now)
        turn = self._turn_answering(utterance)
        if turn is None:
            self._meter_alone(utterance)
            return
        self._tell_understood(utterance)
        if turn.stage is Stage.UNDERSTANDING:
            self._ask(turn, now)

    def _meter_alone(self, utterance: Utterance) -> None:
        """Nobody has asked for an answer: the recognition stands for itself, and is told once it is metered."""
        if not utterance.metered:
            utterance.metered = True
            self._out.append(ev.Meter(utterance.item_id, utterance.seconds, 0.0))

    def _tell_understood(self, utterance: Utterance) -> None:
        self._close(utterance)
        if utterance.told:
            return
        utterance.told = True
        text = utterance.text or ""
        self._out.append(ev.Understood(utterance.item_id, text, utterance.seconds))
        self._out.append(ev.Record("transcript", {"item_id": utterance.item_id, "text": text}))

    def _transcription_failed(self, event: ev.TranscriptionFailed, now: float) -> None:
        utterance = self._find(event.item_id, event.attempt)
        if utterance is None:
            return
        utterance.recognising = False
        if not utterance.committed:
            return  # it was on suspicion only; the end of speech tries again
        self._not_understood(utterance, event.code, event.message, now)

    def _not_understood(self, utterance: Utterance, code: str, message: str, now: float) -> None:
        self._close(utterance)
        self._out.append(ev.NotUnderstood(utterance.item_id, code, message))
        if self._unanswered is utterance:
            self._unanswered = None
        turn = self._turn_answering(utterance)
        if turn is None:
            return
        if turn is self._turn:
            self._fail(turn, code, message, now)
        elif self._waiting is not None:
            self._waiting.remove(turn)

    # --- asking and answering -----------------------------------------------------------------------------------------

    def _new_turn(self, utterance: Utterance | None, speaks: bool | None = None, metadata: Any = None) -> Turn:
        return Turn(
            id=self._new_id("resp"),
            item_id=self._new_id("item"),
            utterance=utterance,
            speaks=self.settings.speaks if speaks is None else speaks,
            metadata=metadata,
        )

    def _enqueue(self, turn: Turn, now: float) -> None:
        if self._turn is None:
            self._start(turn, now)
            return
        if self._waiting is None:
            self._waiting = deque()
        if len(self._waiting) < MOST_OPEN:
            self._waiting.append(turn)
        else:
            message = f"{MOST_OPEN} answers are waiting already; this one will not be given."
            self._refuse("too_many_turns", message)

    def _start(self, turn: Turn, now: float) -> None:
        self._turn = turn
        apart = turn.wish is not None and turn.wish.apart
        self._out.append(ev.ReplyStarted(turn.id, turn.item_id, self._last_item, turn.speaks, turn.metadata, apart))
        if not apart:
            self._last_item = turn.item_id
        utterance = turn.utterance
        if utterance is None and turn.wish is not None:
            self._converse(turn, "", turn.wish, now)
            return
        if utterance is None:
            said, turn.said = turn.said, []
            turn.stage = Stage.ANSWERING
            turn.handled = True
            for text in said:
                self._say(turn, text, now)
            self._settle_if_complete(turn, now)
            return
        turn.stage = Stage.UNDERSTANDING
        turn.deadline = now + ENGINE_SILENCE
        if utterance.text is not None and Stamp.TRANSCRIBED in utterance.story:
            self._ask(turn, now)
        elif utterance.text is not None and Stamp.COMMITTED not in utterance.story:
            self._ask(turn, now)  # it was written, there is nothing to recognise

    def _ask(self, turn: Turn, now: float) -> None:
        assert turn.utterance is not None
        if not turn.utterance.text:
            turn.handled = True
            self._settle_if_complete(turn, now)
            return
        if turn.wish is not None or self.settings.tools:
            self._converse(turn, turn.utterance.text, turn.wish or Wish(), now)
            return
        turn.stage = Stage.ASKING
        turn.stamp(Stamp.ASKED, now)
        turn.deadline = now + CORE_SILENCE
        self._out.append(ev.Ask(turn.id, turn.utterance.text, self.settings.language))

    def _converse(self, turn: Turn, text: str, wish: Wish, now: float) -> None:
        turn.wish = wish
        turn.stage = Stage.ASKING
        turn.stamp(Stamp.ASKED, now)
        turn.deadline = now + MODEL_SILENCE
        self._returned = False
        self._out.append(ev.Converse(turn.id, text, wish, turn.speaks))

    def _called(self, event: ev.Called, now: float) -> None:
        if turn := self._current(event.turn_id):
            turn.calls.append(event.call)
            if turn.wish is not None and turn.wish.joins:
                self._calls = self._calls if self._calls is not None else {}
                self._calls[event.call.id] = None
                if len(self._calls) > MOST_MESSAGES:
                    del self._calls[next(iter(self._calls))]
            call = {"call_id": event.call.id, "name": event.call.name, "arguments": event.call.arguments}
            self._last_item = item_id = self._new_id("item")
            self._out.append(ev.ReplyCalls(turn.id, item_id, event.call))
            self._out.append(ev.Record("tool_call", call))

    def _skill_started(self, event: ev.SkillStarted, now: float) -> None:
        if turn := self._current(event.turn_id):
            turn.stamp(Stamp.SKILL_STARTED, now)
            turn.deadline = now + CORE_SILENCE

    def _progressed(self, event: ev.Progressed, now: float) -> None:
        turn = self._current(event.turn_id)
        if turn is not None and not turn.synthesizing:  # an engine has a limit of its own
            turn.deadline = max(turn.deadline, now + _patience(turn))

    def _spoke(self, event: ev.Spoke, now: float) -> None:
        text = event.text.strip()
        if not text or event.turn_id in (self._cancelled or ()):
            return
        turn = self._current(event.turn_id)
        if turn is None:
            turn = self._new_turn(None)  # a timer or reminder: nobody asked just now
            turn.said.append(text)
            self._enqueue(turn, now)
            return
        turn.stage = Stage.ANSWERING
        turn.stamp(Stamp.SPOKE, now)
        turn.deadline = now + _patience(turn)
        turn.apology = turn.apology or event.apology
        if event.expects_response:
            turn.listens = turn.handled = True
            turn.asker = event.turn_id
        self._say(turn, text, now)
        self._settle_if_complete(turn, now)

    def _say(self, turn: Turn, text: str, now: float) -> None:
        turn.stamp(Stamp.SPOKE, now)
        turn.said.append(f" {text}" if turn.said else text)
        turn.pieces += sentences(text, self.settings.language)
        self._out.append(ev.ReplyText(turn.id, text))
        if turn.speaks:
            self._synthesize_next(turn, now)
        else:
            # Nothing is played. A handler that waits for the end of playback is told; one that has ended needs no word.
            self._playing_until = now if turn.listens else now + READING
            self._playing_turn = turn.id
            self._remind_after = READING

    def _wrote(self, event: ev.Wrote, now: float) -> None:
        if event.text and (turn := self._current(event.turn_id)):
            turn.stage = Stage.ANSWERING
            turn.stamp(Stamp.SPOKE, now)
            turn.deadline = now + _patience(turn)
            turn.said.append(event.text)
            self._out.append(ev.ReplyText(turn.id, event.text, goes_on=True))

    def _synthesize_next(self, turn: Turn, now: float) -> None:
        # One at a time: the order is kept, and another session's first words come before this one's last.
        if turn.synthesizing or turn.synthesized == len(turn.pieces):
            return
        turn.synthesizing = True
        turn.deadline = now + ENGINE_SILENCE
        self._out.append(ev.Synthesize(turn.id, turn.synthesized, turn.pieces[turn.synthesized]))

    def _synthesized(self, event: ev.Synthesized, now: float) -> None:
        turn = self._current(event.turn_id)
        if turn is None or not turn.synthesizing or event.index != turn.synthesized:
            return
        if event.pcm:
            seconds = len(event.pcm) / 2 / event.rate
            turn.stamp(Stamp.FIRST_AUDIO, now)
            turn.audio_seconds += seconds
            playing = self._playing_until if not self._remind_after else None
            self._playing_until = max(playing or now, now) + seconds
            self._playing_turn, self._remind_after = turn.id, 0.0
            self._out.append(ev.ReplyAudio(turn.id, event.pcm, event.rate))
        if event.more:
            turn.deadline = now + ENGINE_SILENCE
            return
        turn.synthesizing = False
        turn.synthesized += 1
        # A handler may wait until all this has been played before it goes on.
        turn.deadline = max(self._playing_until or now, now) + _patience(turn)
        self._synthesize_next(turn, now)
        self._settle_if_complete(turn, now)

    def _synthesis_failed(self, event: ev.SynthesisFailed, now: float) -> None:
        turn = self._current(event.turn_id)
        if turn is not None and turn.synthesizing and event.index == turn.synthesized:
            turn.synthesizing = False
            self._fail(turn, event.code, event.message, now)

    def _handled(self, event: ev.Handled, now: float) -> None:
        if turn := self._current(event.turn_id):
            turn.stamp(Stamp.HANDLED, now)
            turn.handled = True
            turn.tokens = event.tokens
            if not turn.speaks and self._playing_turn == turn.id:
                self._playing_until, self._remind_after = None, 0.0
            self._settle_if_complete(turn, now)

    def _ask_failed(self, event: ev.AskFailed, now: float) -> None:
        if turn := self._current(event.turn_id):
            self._fail(turn, event.code, event.message, now)

    # --- ending -------------------------------------------------------------------------------------------------------

    def _settle_if_complete(self, turn: Turn, now: float) -> None:
        if turn.complete and turn.stage is not Stage.SETTLING:
            self._settle(turn, TurnStatus.COMPLETED, None, None, now)

    def _cancel(self, turn: Turn, reason: str, now: float) -> None:
        self._abandon(turn)
        self._settle(turn, TurnStatus.CANCELLED, reason, None, now)

    def _fail(self, turn: Turn, code: str, message: str, now: float) -> None:
        self._abandon(turn)
        self._settle(turn, TurnStatus.FAILED, code, message, now)

    def _abandon(self, turn: Turn) -> None:
        if self._cancelled is None:
            self._cancelled = deque(maxlen=REMEMBERED_TURNS)
        self._cancelled.append(turn.id)
        utterance = turn.utterance
        if utterance is not None and utterance.recognising:
            self._stop_recognising(utterance)
            if self._unanswered is utterance:
                self._unanswered = None
            self._out.append(
                ev.NotUnderstood(utterance.item_id, "cancelled", "The turn ended before it was recognised.")
            )
        self._out.append(ev.CancelTurn(turn.id))

    def _settle(self, turn: Turn, status: TurnStatus, reason: str | None, message: str | None, now: float) -> None:
        turn.stage = Stage.SETTLING
        turn.deadline = now + ENGINE_SILENCE  # the ledger has a shorter limit of its own
        turn.ending = (status, reason, message)
        utterance = turn.utterance
        heard = 0.0
        if utterance is not None and utterance.text is not None and not utterance.metered:
            heard, utterance.metered = utterance.seconds, True
        if heard or turn.audio_seconds:
            self._out.append(ev.Meter(turn.id, heard, turn.audio_seconds))
        else:
            self._end(turn, now)

    def _metered(self, event: ev.Metered, now: float) -> None:
        turn = self._turn
        if turn is not None and event.key == turn.id and turn.stage is Stage.SETTLING:
            self._end(turn, now)
            return
        if (utterance := (self._open or {}).get(event.key)) and utterance.metered:
            self._tell_understood(utterance)

    def _metering_failed(self, event: ev.MeteringFailed, now: float) -> None:
        turn = self._turn
        if turn is not None and event.key == turn.id and turn.stage is Stage.SETTLING:
            turn.ending = (TurnStatus.FAILED, event.code, event.message)
            self._end(turn, now)
            return
        if (utterance := (self._open or {}).get(event.key)) and utterance.metered:
            self._not_understood(utterance, event.code, event.message, now)

    def _end(self, turn: Turn, now: float) -> None:
        turn.stamp(Stamp.DONE, now)
        status, reason, message = turn.ending
        if turn.utterance is not None:
            turn.story = {**turn.utterance.story, **turn.story}
        self._turn = None
        if turn.listens:
            self._dialogue = turn.asker
        elif turn.handled:
            self._dialogue = None
        timings = timings_ms(turn.story)
        ended = ev.ReplyEnded(
            turn_id=turn.id,
            status=status,
            reason=reason,
            message=message,
            text=turn.text,
            audio_seconds=turn.audio_seconds,
            asked=(turn.utterance.text or "") if turn.utterance is not None else "",
            story=turn.story,
            timings_ms=timings,
            listens=turn.listens,
            wish=turn.wish,
            calls=tuple(turn.calls),
            tokens=turn.tokens,
            apology=turn.apology,
        )
        content = {
            "turn_id": turn.id,
            "item_id": turn.item_id,
            "status": status,
            "reason": reason,
            "text": ended.text,
            "audio_seconds": round(turn.audio_seconds, 3),
            "timings_ms": timings,
        }
        self._out += (ended, ev.Record("response", content))
        if self._waiting:
            self._start(self._waiting.popleft(), now)

    def _time_passed(self, event: ev.TimePassed, now: float) -> None:
        if self._playing_until is not None and now >= self._playing_until:
            again = self._remind_after
            self._stop_playback()
            if 0 < again <= LAST_REMINDER:
                # Stock handlers begin to listen for it after they have spoken: on a busy machine what was told at once
                # is missed, and they wait 15 s.
                self._playing_until, self._remind_after = now + again, again * 2
        turn = self._turn
        if turn is None or now < turn.deadline:
            return
        if turn.stage is Stage.SETTLING:
            turn.ending = (TurnStatus.FAILED, "store_unavailable", "What was used could not be recorded.")
            self._end(turn, now)
        elif turn.stage is Stage.UNDERSTANDING:
            self._fail(turn, "stt_timeout", f"Speech was not recognised within {ENGINE_SILENCE:.0f} s.", now)
        elif turn.synthesizing:
            self._fail(turn, "tts_timeout", f"Speech was not synthesised within {ENGINE_SILENCE:.0f} s.", now)
        elif turn.said and turn.wish is None:
            turn.handled = True
            self._settle_if_complete(turn, now)
        else:
            self._fail(turn, "no_answer", f"The assistant did not answer within {_patience(turn):.0f} s.", now)

    def _end_session(self, event: ev.Ended, now: float) -> None:
        self._forget_input()
        for utterance in list((self._open or {}).values()):
            if utterance.recognising:
                self._stop_recognising(utterance)
        self._drop_waiting()
        if self._turn is not None and self._turn.stage is not Stage.SETTLING:
            self._cancel(self._turn, "session_ended", now)
        if self._turn is not None:
            self._end(self._turn, now)
        self._stop_playback()
        self._ended = True

    # --- small helpers ------------------------------------------------------------------------------------------------

    def _refuse(self, code: str, message: str, event_id: str | None = None) -> None:
        self._out.append(ev.Problem(code, message, None, event_id))

    def _current(self, turn_id: str) -> Turn | None:
        """The turn that a message of `turn_id` belongs to, if it is still being answered."""
        turn = self._turn
        if turn is None or turn.stage is Stage.SETTLING:
            return None
        # A handler that asked something back goes on under its own turn's id once it has the user's reply.
        return turn if turn_id in (turn.id, self._dialogue) else None

    def _turn_answering(self, utterance: Utterance) -> Turn | None:
        turns = [*([self._turn] if self._turn is not None else []), *(self._waiting or ())]
        return next((t for t in turns if t.utterance is utterance and t.stage is not Stage.SETTLING), None)

    def _find(self, item_id: str, attempt: int) -> Utterance | None:
        """The utterance this recognition result is for, unless it has been given up since."""
        utterance = (self._open or {}).get(item_id)
        return utterance if utterance and utterance.recognising and utterance.attempt == attempt else None

    def _close(self, utterance: Utterance) -> None:
        if self._open is not None:
            self._open.pop(utterance.item_id, None)
            self._open = self._open or None

    def _drop_waiting(self) -> None:
        waiting, self._waiting = self._waiting, None
        for turn in waiting or ():
            # What was said stays said; only its answer is no longer wanted.
            if turn.utterance is not None and turn.utterance.told and turn.utterance.seconds:
                self._meter_alone(turn.utterance)

    def _stop_playback(self) -> None:
        if self._playing_until is not None:
            self._playing_until, self._remind_after = None, 0.0
            self._out.append(ev.PlaybackEnded(self._playing_turn))

    def _forget_input(self) -> None:
        self._buffer = None
        if self._speaking is not None:
            self._stop_recognising(self._speaking)
            at = self._listener.position if self._listener is not None else 0.0
            self._out.append(ev.SpeechStopped(self._speaking.item_id, at))
            self._speaking = None
        self._listener = None


def _patience(turn: Turn) -> float:
    """Seconds for which nothing may come of a turn that is being answered."""
    return CORE_SILENCE if turn.wish is None else MODEL_SILENCE


_HANDLERS: dict[type, Callable[[Session, Any, float], None]] = {
    ev.Heard: Session._heard,
    ev.AudioCommitted: Session._audio_committed,
    ev.AudioCleared: Session._audio_cleared,
    ev.TextAdded: Session._text_added,
    ev.ResultAdded: Session._result_added,
    ev.ResponseWanted: Session._response_wanted,
    ev.ResponseCancelled: Session._response_cancelled,
    ev.SettingsWanted: Session._settings_wanted,
    ev.Transcribed: Session._transcribed,
    ev.TranscriptionFailed: Session._transcription_failed,
    ev.Guessed: Session._guessed,
    ev.SkillStarted: Session._skill_started,
    ev.Progressed: Session._progressed,
    ev.Spoke: Session._spoke,
    ev.Wrote: Session._wrote,
    ev.Called: Session._called,
    ev.Handled: Session._handled,
    ev.AskFailed: Session._ask_failed,
    ev.Synthesized: Session._synthesized,
    ev.SynthesisFailed: Session._synthesis_failed,
    ev.Metered: Session._metered,
    ev.MeteringFailed: Session._metering_failed,
    ev.TimePassed: Session._time_passed,
    ev.Ended: Session._end_session,
}
