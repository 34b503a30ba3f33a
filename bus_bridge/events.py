"""Everything that can happen to a session, everything it can ask for, and everything it can tell its client.

One small frozen dataclass per thing. `Session.receive` takes an `Event` and returns a list of `Effect` (work to be
done by the shell) and `Told` (news for the client, which a codec writes in the client's protocol).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agentvoicebox.bus_bridge.models import SessionSettings, Story, TurnStatus

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
class ResponseWanted:
    """The client asks for an answer to what was said or written last."""

    metadata: Mapping[str, str] | None = None
    speaks: bool | None = None
    """Overrides `SessionSettings.speaks` for this answer."""
    text: str | None = None
    """What is to be answered, when the client writes and asks in one go."""
    event_id: str | None = None


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
class SkillStarted:
    """Core has matched the utterance and a handler runs."""

    turn_id: str


@dataclass(frozen=True, slots=True)
class Spoke:
    """A skill or the persona said something."""

    turn_id: str
    text: str
    expects_response: bool = False


@dataclass(frozen=True, slots=True)
class Progressed:
    """Some other message of the turn was seen: core is alive and at it."""

    turn_id: str


@dataclass(frozen=True, slots=True)
class Handled:
    """Core has finished with the utterance."""

    turn_id: str


@dataclass(frozen=True, slots=True)
class AskFailed:
    """The cell is gone or never took the utterance."""

    turn_id: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Synthesized:
    """The audio of one stretch of the reply: 16-bit mono at `rate` Hz."""

    turn_id: str
    index: int
    pcm: bytes
    rate: int


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
    | ResponseWanted
    | ResponseCancelled
    | SettingsWanted
    | Transcribed
    | TranscriptionFailed
    | SkillStarted
    | Spoke
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
class Ask:
    """Put the utterance to core."""

    turn_id: str
    text: str
    language: str


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


Effect = Transcribe | CancelTranscription | Ask | Synthesize | CancelTurn | PlaybackEnded | Meter | Record

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
class InputCleared:
    pass


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


@dataclass(frozen=True, slots=True)
class ReplyText:
    turn_id: str
    text: str


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
    | InputCleared
    | Understood
    | NotUnderstood
    | ReplyStarted
    | ReplyText
    | ReplyAudio
    | ReplyEnded
    | Problem
)
