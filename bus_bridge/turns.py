"""When a turn begins and ends, and what one turn is made of. Pure: time and audio are arguments."""

from __future__ import annotations

import textwrap
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from agentvoicebox.bus_bridge.calls import Call, Wish
from agentvoicebox.bus_bridge.models import (
    BYTES_PER_SECOND,
    NO_TOKENS,
    Stamp,
    Story,
    Tokens,
    TurnDetection,
    TurnStatus,
)
from agentvoicebox.bus_bridge.partials import Partials
from agentvoicebox.plugins.clauses import Sentences

ONSET = 0.06
"""Seconds of speech before a turn begins, so that a click does not."""

PAUSE = 0.06
"""Seconds of silence after which recognition starts on suspicion, while the rest of the silence is waited out."""

LONGEST_UTTERANCE = 60.0
"""Seconds after which a turn ends even when the user goes on speaking; bounds what a session holds in memory."""

HYSTERESIS = 0.15
"""How far below the threshold the speech probability must fall before a window counts as silence."""


LONGEST_PIECE = 300
"""Characters that are synthesised in one go: the first words of a long answer need not wait for the last."""


def sentences(text: str, language: str) -> list[str]:
    """A text in stretches of at most `LONGEST_PIECE` characters, cut between sentences where that is possible."""
    if len(text) <= LONGEST_PIECE:
        return [text]
    pieces = [""]
    found = Sentences(language)
    for sentence in (*found.feed(text), *found.end()):
        for part in textwrap.wrap(sentence, LONGEST_PIECE) or [""]:
            if len(pieces[-1]) + len(part) < LONGEST_PIECE:
                pieces[-1] = f"{pieces[-1]} {part}".strip()
            else:
                pieces.append(part)
    return [piece for piece in pieces if piece]


class Change(Enum):
    """What one more window of audio meant."""

    BEGAN = auto()
    PAUSED = auto()
    RESUMED = auto()
    ENDED = auto()


class Listener:
    """Finds utterances in a stream of windows with speech probabilities.

    Feed every window to `hear`. From `Change.BEGAN` on, `audio` holds the utterance with its prefix padding, until
    `take` hands it over.
    """

    __slots__ = ("_before", "_before_bytes", "_detection", "_onset", "_silence", "audio", "position", "speaking")

    def __init__(self, detection: TurnDetection) -> None:
        self._detection = detection
        self._before: deque[bytes] = deque()
        self._before_bytes = 0
        self._onset = 0.0
        self._silence = 0.0
        self.audio = bytearray()
        self.position = 0.0
        """Seconds of audio heard in all."""
        self.speaking = False

    @property
    def quiet(self) -> bool:
        """Whether the last window heard was silence."""
        return self._silence > 0

    @property
    def began_at(self) -> float:
        """Where the utterance begins, in seconds of the session's audio."""
        return max(0.0, self.position - len(self.audio) / BYTES_PER_SECOND)

    def hear(self, pcm: bytes, speech: float) -> Change | None:
        """Take one window of 16 kHz 16-bit mono audio and its speech probability."""
        seconds = len(pcm) / BYTES_PER_SECOND
        self.position += seconds
        if not self.speaking:
            return self._wait_for_speech(pcm, seconds, speech)
        self.audio += pcm
        return self._wait_for_silence(seconds, speech)

    def take(self) -> bytes:
        """Hand over the utterance and wait for the next one."""
        audio = bytes(self.audio)
        self.audio.clear()
        self.speaking = False
        self._onset = self._silence = 0.0
        return audio

    def _wait_for_speech(self, pcm: bytes, seconds: float, speech: float) -> Change | None:
        self._before.append(pcm)
        self._before_bytes += len(pcm)
        self._onset = self._onset + seconds if speech >= self._detection.threshold else 0.0
        if self._onset >= ONSET:
            self.speaking = True
            self.audio += b"".join(self._before)
            self._before.clear()
            self._before_bytes = 0
            return Change.BEGAN
        keep = int((self._detection.prefix_padding + self._onset) * BYTES_PER_SECOND)
        while self._before and self._before_bytes - len(self._before[0]) >= keep:
            self._before_bytes -= len(self._before.popleft())
        return None

    def _wait_for_silence(self, seconds: float, speech: float) -> Change | None:
        if speech >= self._detection.threshold:
            paused, self._silence = self._silence >= PAUSE, 0.0
            if paused:
                return Change.RESUMED
        elif self._silence > 0 or speech < self._detection.threshold - HYSTERESIS:
            before = self._silence
            self._silence += seconds
            if self._silence >= self._detection.silence - 1e-6:
                return Change.ENDED
            if before < PAUSE <= self._silence:
                return Change.PAUSED
        if len(self.audio) >= LONGEST_UTTERANCE * BYTES_PER_SECOND:
            return Change.ENDED
        return None


@dataclass(slots=True)
class Utterance:
    """Something the user said or wrote: one item of the conversation."""

    item_id: str
    text: str | None = None
    """None until it has been understood."""
    seconds: float = 0.0
    """Audio that was recognised; 0 for text."""
    attempt: int = 0
    """Counts the tries to recognise it, since a pause may turn out not to be the end."""
    recognising: bool = False
    committed: bool = False
    metered: bool = False
    told: bool = False
    """Whether the client has been told what was understood."""
    partials: Partials | None = None
    """Where its client wants to be told of it while it is being spoken."""
    story: Story = field(default_factory=dict)


class Stage(Enum):
    """Where a turn stands."""

    WAITING = auto()
    """Another turn has to end first."""
    UNDERSTANDING = auto()
    ASKING = auto()
    ANSWERING = auto()
    SETTLING = auto()
    """All is said; the ledger has not confirmed yet."""


@dataclass(slots=True)
class Turn:
    """One answer, and the utterance it answers (none when a timer or reminder speaks up by itself)."""

    id: str
    item_id: str
    utterance: Utterance | None
    speaks: bool
    metadata: Mapping[str, str] | None = None
    stage: Stage = Stage.WAITING
    said: list[str] = field(default_factory=list)
    """What was said, in order, the spaces between sentences included."""
    pieces: list[str] = field(default_factory=list)
    """The same, in stretches that are spoken one by one."""
    synthesized: int = 0
    """How many of the pieces have become audio."""
    synthesizing: bool = False
    handled: bool = False
    listens: bool = False
    wish: Wish | None = None
    """Set when the language model answers without core."""
    calls: list[Call] = field(default_factory=list)
    tokens: Tokens = NO_TOKENS
    apology: bool = False
    """Whether something of what was said is why there is no answer."""
    asker: str = ""
    """The turn whose handler asked something back: it goes on under that turn's id, however many questions follow."""
    audio_seconds: float = 0.0
    deadline: float = float("inf")
    ending: tuple[TurnStatus, str | None, str | None] = (TurnStatus.COMPLETED, None, None)
    """Status, reason and message to report once the turn has settled."""
    story: Story = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The whole reply so far."""
        return "".join(self.said)

    @property
    def complete(self) -> bool:
        """Whether core has finished and everything it said has been delivered."""
        return self.handled and not self.synthesizing and (not self.speaks or self.synthesized == len(self.pieces))

    def stamp(self, stamp: Stamp, now: float) -> None:
        """Note when a stage was first reached."""
        self.story.setdefault(stamp, now)
