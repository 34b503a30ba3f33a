"""The nouns of a voice session; they depend on nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

LISTENING_RATE = 16_000
"""Hz at which the node listens: voice activity detection and recognition both work on 16-bit mono at this rate."""

BYTES_PER_SECOND = 2 * LISTENING_RATE

MAX_INSTRUCTIONS = 16_000
"""Characters that a client may tell the language model to heed."""


@dataclass(frozen=True, slots=True)
class TurnDetection:
    """When speech counts as a turn (OpenAI Realtime `server_vad`)."""

    threshold: float = 0.5
    """Speech probability, 0 to 1, from which a window counts as speech."""
    prefix_padding: float = 0.3
    """Seconds of audio kept from before the speech began."""
    silence: float = 0.2
    """Seconds of silence after which the turn has ended."""
    create_response: bool = True
    interrupt_response: bool = True


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """16-bit little-endian mono PCM on the wire."""

    rate: int = 24_000
    """Hz."""


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """What a client may choose for its session; the tenant's voice configuration is where it starts."""

    language: str = "en-US"
    voice: str = "auto"
    """Name of a voice of the speech engine; `auto` or an unknown one means the engine's own choice."""
    speed: float = 1.0
    stt: tuple[str, ...] = ("auto",)
    """Recognisers, asked in this order: ovos-plugin-manager names, `deepgram`, `openai`, or `auto`, the node's choice.

    Of the engines and what they are told, a client chooses nothing: that is the tenant's.
    """
    stt_model: str = "base"
    """The Whisper model, where Whisper listens."""
    stt_language: str = ""
    """What is spoken, when that is not `language`; `auto` to detect it."""
    stt_vad: bool = True
    """Whether silence within an utterance is cut out before it is recognised."""
    tts: tuple[str, ...] = ("auto",)
    partials: bool = False
    """Whether the client is told what has been understood while the user still speaks."""
    instructions: str = ""
    """What the client wants the language model to heed, beside what its persona is."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Functions of the client's that the model may have called, as OpenAI's chat format has them.

    With any, the model answers without core: skills know nothing of them.
    """
    tool_choice: Any = "auto"
    speaks: bool = True
    """Whether replies are spoken; otherwise they are text only."""
    turn_detection: TurnDetection | None = field(default_factory=TurnDetection)
    """None leaves it to the client to commit the audio and ask for a response."""
    input_format: AudioFormat = field(default_factory=AudioFormat)
    output_format: AudioFormat = field(default_factory=AudioFormat)


class Tokens(NamedTuple):
    """What a language model has read and written."""

    input: int = 0
    output: int = 0


NO_TOKENS = Tokens()


class TurnStatus(StrEnum):
    """How a turn ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Stamp(StrEnum):
    """The stages of a turn, in the order in which they normally happen."""

    SPEECH_STARTED = "speech_started"
    SPEECH_ENDED = "speech_ended"
    """The last window with speech in it had arrived."""
    COMMITTED = "committed"
    TRANSCRIBED = "transcribed"
    ASKED = "asked"
    SKILL_STARTED = "skill_started"
    SPOKE = "spoke"
    FIRST_AUDIO = "first_audio"
    HANDLED = "handled"
    DONE = "done"


Story = dict[Stamp, float]
"""When each stage of a turn was first reached, in seconds of the session's clock."""


def timings_ms(story: Story) -> dict[str, float]:
    """How long each stage took, in milliseconds, counted from the end of speech (or from asking, for a text turn).

    Keys, present once their stage was reached: `vad` (end of speech to commit), `stt`, `core`, `tts`, `first_audio`
    and `total`.
    """
    begin = story.get(Stamp.SPEECH_ENDED, story.get(Stamp.COMMITTED, story.get(Stamp.ASKED)))
    spans = {
        "vad": (Stamp.SPEECH_ENDED, Stamp.COMMITTED),
        "stt": (Stamp.COMMITTED, Stamp.TRANSCRIBED),
        "core": (Stamp.ASKED, Stamp.SPOKE),
        "tts": (Stamp.SPOKE, Stamp.FIRST_AUDIO),
    }
    found = {n: story[b] - story[a] for n, (a, b) in spans.items() if a in story and b in story}
    if begin is not None:
        for name, end in (("first_audio", Stamp.FIRST_AUDIO), ("total", Stamp.DONE)):
            if end in story:
                found[name] = story[end] - begin
    # Recognition may finish while the silence is still being waited out: then it cost nothing, not less than nothing.
    return {name: round(max(seconds, 0.0) * 1000, 2) for name, seconds in found.items()}
