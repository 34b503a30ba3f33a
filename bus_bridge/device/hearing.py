"""What is heard in one request, and what of it is worth recognising before all of it is there. Pure."""

from __future__ import annotations

from agentvoicebox.bus_bridge.models import BYTES_PER_SECOND, TurnDetection
from agentvoicebox.bus_bridge.partials import Partials
from agentvoicebox.bus_bridge.turns import HYSTERESIS, ONSET

PAUSE = 0.15
"""Seconds of silence after speech from which what was said is recognised on suspicion that it is all.

The device waits for more than that before it says so; a pause between words is mostly shorter.
"""

_SPEECH = TurnDetection().threshold
_SILENCE = _SPEECH - HYSTERESIS


class Hearing:
    """The audio of one request as it comes, and whether somebody speaks at its end."""

    __slots__ = ("_begin", "_judged", "_pauses", "_quiet", "_speech", "_told", "_window", "audio", "partials")

    def __init__(self, window: int, *, partials: bool = False) -> None:
        """`window` is the number of samples of one decision about speech."""
        self.audio = bytearray()
        self.partials = Partials() if partials else None
        self._window = 2 * window
        self._judged = 0
        self._speech = 0.0
        """Seconds of speech without a pause, until there was enough of it not to be a click."""
        self._begin: float | None = None
        """Where speech began, in seconds."""
        self._quiet = 0.0
        self._pauses = 0
        self._told = ""

    @property
    def seconds(self) -> float:
        """Of audio so far."""
        return len(self.audio) / BYTES_PER_SECOND

    @property
    def spoken(self) -> float:
        """Seconds since somebody began to speak; 0 when nobody has."""
        return 0.0 if self._begin is None else self.seconds - self._begin

    @property
    def pause(self) -> int:
        """The number of the pause at the end, from 1: who spoke says no more. 0 when there is none.

        While it is the same, nobody has spoken since.
        """
        return self._pauses if self._begin is not None and self._quiet >= PAUSE else 0

    def fresh(self, most: float) -> bytes:
        """Whole windows that nobody has judged yet, of `most` seconds or less; `judge` wants their probabilities."""
        end = min(len(self.audio), self._judged + int(most * BYTES_PER_SECOND))
        end -= (end - self._judged) % self._window
        return bytes(self.audio[self._judged : end])

    def rest(self) -> bytes:
        """The last of the audio, which fills no window, made up to one with silence."""
        left = bytes(self.audio[self._judged :])
        return left + bytes(-len(left) % self._window)

    def judge(self, probabilities: list[float]) -> None:
        """Take how probably each of the next windows holds speech, 0 to 1."""
        seconds = self._window / BYTES_PER_SECOND
        for speech in probabilities:
            self._judged = min(self._judged + self._window, len(self.audio))
            if speech < _SILENCE:  # in doubt somebody speaks: what is recognised early must be all there is
                self._pauses += self._quiet < PAUSE <= self._quiet + seconds
                self._quiet += seconds
                self._speech = 0.0
                continue
            self._quiet = 0.0
            self._speech += seconds if speech >= _SPEECH else 0.0
            if self._begin is None and self._speech >= ONSET:
                self._begin = self._judged / BYTES_PER_SECOND - self._speech

    def guessed(self, text: str | None) -> str | None:
        """Take a guess at what was said so far (None for one that was not made); returns what is certain, if news."""
        assert self.partials is not None
        if text is None:
            self.partials.miss()
            return None
        fresh = self.partials.hear(text)
        if not fresh:
            return None
        self._told += fresh
        return self._told.strip()
