"""Everything that can happen to a session, everything it can ask for, and everything it can tell its client.

One small frozen dataclass per thing. `Session.receive` takes an `Event` and returns a list of `Effect` (work to be
done by the shell) and `Told` (news for the client, which a codec writes in the client's protocol).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agentvoicebox.bus_bridge.calls import Call, Wish
from agentvoicebox.bus_bridge.models import NO_TOKENS, SessionSettings, Story, Tokens, TurnStatus

# --- events: what the client does ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AudioAppended:
    """The client sent audio in its own format; the shell turns it into `Heard`."""

    pcm: bytes
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class Heard:
    """One stretch of 16 kHz 16-bit mono audio, with its speech probability when voice activity is detected here."""

    pcm: bytes
    speech: float | None = None


@dataclass(frozen=True, slots=True)
class AudioCommitted:
    """The client says that the audio so far is one utterance."""

    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class AudioCleared:
    """The client takes back the audio it has not committed."""

    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class TextAdded:
    """The client wrote instead of speaking."""

    text: str
    item_id: str | None = None
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class ResultAdded:
    """The client says what a function returned that it was to call."""

    call_id: str
    output: str
    item_id: str | None = None
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class ResponseWanted:
    """The client asks for an answer to what was said or written last."""

    metadata: Mapping[str, str] | None = None
    speaks: bool | None = None
    """Overrides `SessionSettings.speaks` for this answer."""
    text: str | None = None
    """What is to be answered, when the client writes and asks in one go."""
    event_id: str | None = None
    wish: Wish | None = None
    """What more it wants; then the language model answers, without core."""


@dataclass(frozen=True, slots=True)
class ResponseCancelled:
    """The client does not want the rest of the answer."""

    response_id: str | None = None
    event_id: str | None = None


@dataclass(frozen=True, slots=True)
class SettingsWanted:
    """The client changes its settings; `changes` maps fields of `SessionSettings` to checked values."""

    changes: Mapping[str, object]
    event_id: str | None = None


# --- events: what the engines, the cell and the ledger answer --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Transcribed:
    """What the recogniser understood; empty when it heard nothing."""

    item_id: str
    attempt: int
    text: str


@dataclass(frozen=True, slots=True)
class TranscriptionFailed:
    item_id: str
    attempt: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Guessed:
    """What the recogniser makes of an utterance so far; None when it had no time for that."""

    item_id: str
    text: str | None


@dataclass(frozen=True, slots=True)
class SkillStarted:
    """Core has matched the utterance and a handler runs."""

    turn_id: str


@dataclass(frozen=True, slots=True)
class Spoke:
    """A skill or the persona said something."""

    turn_id: str
    text: str
    expects_response: bool = False
    apology: bool = False
    """Whether it says why there is no answer: nothing to be remembered."""


@dataclass(frozen=True, slots=True)
class Wrote:
    """The language model wrote this much more of an answer that is read; it goes on where the last one ended."""

    turn_id: str
    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """The language model wants a function of the client's called."""

    turn_id: str
    call: Call


@dataclass(frozen=True, slots=True)
class Progressed:
    """Something else was seen of the turn: core, or the language model, is alive and at it."""

    turn_id: str


@dataclass(frozen=True, slots=True)
class Handled:
    """Core, or the language model, has finished with the utterance."""

    turn_id: str
    tokens: Tokens = NO_TOKENS
    """What the language model has read and written for it, where that is known here."""


@dataclass(frozen=True, slots=True)
class AskFailed:
    """The cell is gone or never took the utterance."""

    turn_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Synthesized:
    """Audio of one stretch of the reply: 16-bit mono at `rate` Hz."""

    turn_id: str
    index: int
    pcm: bytes
    rate: int
    more: bool = False
    """Whether the stretch goes on."""


@dataclass(frozen=True, slots=True)
class SynthesisFailed:
    turn_id: str
    index: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Metered:
    """The usage recorded under `key` has been committed."""

    key: str


@dataclass(frozen=True, slots=True)
class MeteringFailed:
    key: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The session's `deadline` has come."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The session is over; nothing comes after this."""


Event = (
    Heard
    | AudioCommitted
    | AudioCleared
    | TextAdded
    | ResultAdded
    | ResponseWanted
    | ResponseCancelled
    | SettingsWanted
    | Transcribed
    | TranscriptionFailed
    | Guessed
    | SkillStarted
    | Spoke
    | Wrote
    | Called
    | Progressed
    | Handled
    | AskFailed
    | Synthesized
    | SynthesisFailed
    | Metered
    | MeteringFailed
    | TimePassed
    | Ended
)

# --- effects: work for the shell --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Transcribe:
    """Recognise this audio (16 kHz 16-bit mono) and answer with `Transcribed` for the same item and attempt."""

    item_id: str
    attempt: int
    pcm: bytes
    language: str


@dataclass(frozen=True, slots=True)
class CancelTranscription:
    item_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Guess:
    """Recognise this beginning of an utterance, if there is time for it, and answer with `Guessed`."""

    item_id: str
    pcm: bytes
    language: str


@dataclass(frozen=True, slots=True)
class Ask:
    """Put the utterance to core."""

    turn_id: str
    text: str
    language: str


@dataclass(frozen=True, slots=True)
class Converse:
    """Put it to the language model, without core; an empty text goes on with what the calls have returned."""

    turn_id: str
    text: str
    wish: Wish
    speaks: bool
    """Whether the answer is to be listened to; else it is read."""


@dataclass(frozen=True, slots=True)
class Return:
    """Keep what a call has returned for the model's next turn."""

    call_id: str
    output: str


@dataclass(frozen=True, slots=True)
class Synthesize:
    turn_id: str
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CancelTurn:
    """Stop all work for this turn; what still arrives of it is dropped."""

    turn_id: str


@dataclass(frozen=True, slots=True)
class PlaybackEnded:
    """The client has played what it was sent; skills that wait for that may go on."""

    turn_id: str


@dataclass(frozen=True, slots=True)
class Meter:
    """Record this usage, all or nothing, and answer with `Metered(key)`."""

    key: str
    stt_seconds: float
    tts_seconds: float


@dataclass(frozen=True, slots=True)
class Record:
    """Append to the session's history: `kind` is one of transcript, response, error, system."""

    kind: str
    content: Mapping[str, object]


Effect = (
    Transcribe
    | CancelTranscription
    | Guess
    | Ask
    | Converse
    | Return
    | Synthesize
    | CancelTurn
    | PlaybackEnded
    | Meter
    | Record
)

# --- told: news for the client ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SettingsChanged:
    settings: SessionSettings


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    """Speech began `at` seconds into the session's audio, prefix padding included."""

    item_id: str
    at: float


@dataclass(frozen=True, slots=True)
class SpeechStopped:
    item_id: str
    at: float


@dataclass(frozen=True, slots=True)
class UtteranceCommitted:
    """The user's audio became an item of the conversation."""

    item_id: str
    previous_item_id: str | None


@dataclass(frozen=True, slots=True)
class TextCommitted:
    """The user's text became an item of the conversation."""

    item_id: str
    previous_item_id: str | None
    text: str


@dataclass(frozen=True, slots=True)
class ResultCommitted:
    """What a call returned became an item of the conversation."""

    item_id: str
    previous_item_id: str | None
    call_id: str
    output: str


@dataclass(frozen=True, slots=True)
class InputCleared:
    pass


@dataclass(frozen=True, slots=True)
class Understanding:
    """What more has been understood of an utterance that is still being spoken."""

    item_id: str
    text: str


@dataclass(frozen=True, slots=True)
class Understood:
    """What the user said; `seconds` of audio were recognised."""

    item_id: str
    text: str
    seconds: float


@dataclass(frozen=True, slots=True)
class NotUnderstood:
    """Recognition itself failed (silence is `Understood` with empty text)."""

    item_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class ReplyStarted:
    turn_id: str
    item_id: str
    previous_item_id: str | None
    speaks: bool
    metadata: Mapping[str, str] | None
    apart: bool = False
    """Whether it stays out of the conversation."""


@dataclass(frozen=True, slots=True)
class ReplyText:
    turn_id: str
    text: str
    goes_on: bool = False
    """Whether it continues the text before it as it is; else it is a sentence of its own."""


@dataclass(frozen=True, slots=True)
class ReplyCalls:
    """The reply asks for a function of the client's to be called."""

    turn_id: str
    item_id: str
    call: Call


@dataclass(frozen=True, slots=True)
class ReplyAudio:
    """Audio of the reply: 16-bit mono at `rate` Hz."""

    turn_id: str
    pcm: bytes
    rate: int


@dataclass(frozen=True, slots=True)
class ReplyEnded:
    """The turn is over and what it used is in the ledger."""

    turn_id: str
    status: TurnStatus
    reason: str | None
    """For a cancelled turn: `turn_detected` or `client_cancelled`; for a failed one: the error code."""
    message: str | None
    text: str
    audio_seconds: float
    story: Story = field(default_factory=dict)
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    listens: bool = False
    """The skill asked something back and waits for the next utterance."""
    asked: str = ""
    """What the user had said or written; empty when nobody asked."""
    wish: Wish | None = None
    """Set when the language model has answered without core."""
    calls: tuple[Call, ...] = ()
    tokens: Tokens = NO_TOKENS
    """What the language model has read and written, where that is known here."""
    apology: bool = False
    """Whether something of it says why there is no answer."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something the client did cannot be done; the session goes on."""

    code: str
    message: str
    param: str | None = None
    event_id: str | None = None


Told = (
    SettingsChanged
    | SpeechStarted
    | SpeechStopped
    | UtteranceCommitted
    | TextCommitted
    | ResultCommitted
    | InputCleared
    | Understanding
    | Understood
    | NotUnderstood
    | ReplyStarted
    | ReplyText
    | ReplyCalls
    | ReplyAudio
    | ReplyEnded
    | Problem
)
