"""A program of the system that plays audio while it is still being made."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

from ovos_config import Configuration

RATE = "{rate}"
"""What stands for the sample rate, in Hz, in a configured command."""

STUCK = 10.0
"""Seconds for which a player may take no audio, or go on after the end of it, before it is given up."""

# Each plays 16-bit mono audio from its standard input, and begins before it has much of it: of themselves pacat and
# aplay wait until their buffers are full, which are half a second and two, and ffplay, even of a WAV file, for 64 KB.
# pw-cat has no command for this that is the same on PipeWire 0.3 and 1; where it is, one of these is.
_PLAYERS = (
    f"pacat --playback --raw --format=s16le --rate={RATE} --channels=1 --latency-msec=100",
    f"aplay -q -t raw -f S16_LE -r {RATE} -c 1 --start-delay=50000",
    "ffplay -nodisp -autoexit -loglevel error -probesize 32 -analyzeduration 0 -f s16le"
    f" -sample_rate {RATE} -ch_layout mono -i pipe:0",
)


class PlayerBroke(Exception):
    """The player has ended before the audio has, or takes none of it."""


def find(configured: str | Sequence[str] | None = None) -> list[str]:
    """The command that plays 16-bit mono audio from its standard input, `{rate}` for its rate; empty without one.

    `configured` is the device's own: one string, or the words of it.
    """
    if configured:
        words = shlex.split(configured) if isinstance(configured, str) else [str(word) for word in configured]
        return words if words and shutil.which(words[0]) else []
    for command in _PLAYERS:
        words = command.split()
        if shutil.which(words[0]):
            return words
    return []


class Player:
    """One run of the command, for audio of one rate. It may be stopped from any thread."""

    def __init__(self, command: Sequence[str], rate: int) -> None:
        words = [word.replace(RATE, str(rate)) for word in command]
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment()
            )
        except OSError as error:
            raise PlayerBroke("it cannot be started") from error
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)
        self._room = select.poll()
        self._room.register(self._pipe, select.POLLOUT)
        self.rate, self._ends = rate, time.monotonic()

    def write(self, pcm: bytes) -> None:
        """Play this next; returns when the player has taken it. Raises `PlayerBroke`."""
        self._ends = max(self._ends, time.monotonic()) + len(pcm) / 2 / self.rate
        self._write(pcm)

    def finish(self) -> None:
        """Return when all has been played. Raises `PlayerBroke`."""
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            code = self._process.wait(max(0.0, self._ends - time.monotonic()) + STUCK)
        except subprocess.TimeoutExpired:
            self.stop()
            return  # it has had all the time that the audio takes
        if code:
            raise PlayerBroke(f"it ended with {code}")

    def stop(self) -> None:
        """Be silent at once."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)

    def close(self) -> None:
        """Leave nothing of it behind."""
        if self._process.poll() is None:
            self.stop()
        with suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._pipe, left) :]
            except BlockingIOError:
                # More than a pipe holds is waiting: the player plays it, a second in a second.
                if not self._room.poll(STUCK * 1000):
                    raise PlayerBroke("it takes no audio") from None
            except OSError as error:
                raise PlayerBroke("it has ended") from error


def _environment() -> dict[str, str]:
    """Tell the sound server that this is speech, where the device has it lower the music for that."""
    told = dict(os.environ)
    if (Configuration().get("tts") or {}).get("pulse_duck"):
        told["PULSE_PROP"] = "media.role=phone"
    return told
