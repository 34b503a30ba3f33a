"""flite, the small offline voice of every Debian, as an ovos-plugin-manager TTS plugin."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import wave
import weakref
from collections.abc import Generator
from contextlib import closing
from typing import Any

from ovos_plugin_manager.templates.tts import TTS, TTSContext
from ovos_utils import classproperty

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins.flite.child import VOICES
from agentvoicebox.plugins.flite.children import Children, available
from agentvoicebox.plugins.pool import when_cancelled

MAX_TEXT = 8_000
"""Characters of one call; more is cut, as a command line has an end."""

_CHILD = 16 << 20
"""Bytes that a process with all voices holds, half of them its own."""

_SILENCE = bytes(3_200)
_SILENT_RATE = 16_000

_SPEAKABLE = re.compile(r"\w")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
# flite works out a whole sentence before it says any of it, in a time that grows with the square of its length: a
# minute for 8,000 digits. So no word is longer than these, and there is an end somewhere in each passage.
_LONG_WORD = re.compile(r"\S{60}(?=\S)")
_PASSAGE = re.compile(r".{300,600}?[.?!]\s|.{600}\S*\s")


class FliteTTS(TTS):  # type: ignore[misc]
    """Five English voices that start speaking at once.

    Configuration: `voice` (slt), `speed` (1.0), and `parallel`, how many sentences `stream` speaks at once (a process
    each, two at most unless told otherwise).
    """

    thread_safe = True
    voices = frozenset(VOICES)

    def __init__(self, config: dict[str, Any] | None = None, **more: Any) -> None:
        # The stock cache is keyed without the speed and lies in shared memory: synthesising again is cheaper.
        config = {**(config or {}), "enable_cache": False}
        self.parallel = max(1, int(config.get("parallel") or min(2, os.cpu_count() or 1)))
        self.memory = self.parallel * _CHILD
        self._children = Children(self.parallel)
        # Not everybody who makes one calls `shutdown` in the end.
        self._end = weakref.finalize(self, self._children.close)
        super().__init__(config=config, audio_ext="wav", **more)
        self._flite = shutil.which("flite")
        if self._flite is None:
            raise Unavailable("flite is not installed: apt-get install flite", code="engine_missing")
        self._in_parts = available()

    @classproperty  # type: ignore[untyped-decorator]
    def available_languages(cls) -> set[str]:
        return {"en-US"}

    def get_tts(
        self,
        sentence: str,
        wav_file: str,
        lang: str | None = None,
        voice: str | None = None,
        speed: float | None = None,
    ) -> tuple[str, None]:
        """Write 16-bit mono audio of `sentence` to `wav_file`; 8 kHz for kal, 16 kHz for the others.

        `speed` is 0.5 to 2.0. Unknown voices become the configured one; text without a letter or digit is silence.
        """
        text = _speakable(sentence)
        if not text:
            _write_silence(wav_file)
            return wav_file, None
        stretch = f"duration_stretch={self._stretch(speed):.3f}"
        command = [str(self._flite), "-voice", self._voice(voice), "--setf", stretch, "-o", wav_file]
        # Text goes in through a pipe: on the command line others could read it, and flite would take it for a file.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with process, when_cancelled(process.kill):
            process.communicate(text)
        if process.returncode:
            raise Unavailable("flite failed to speak.", code="engine_failed")
        return wav_file, None

    def stream(
        self, sentence: str, lang: str | None = None, voice: str | None = None, speed: float | None = None
    ) -> Generator[tuple[bytes, int]]:
        """The audio of `get_tts` in parts, as they are made: 16-bit mono, and its rate in Hz.

        In one part where flite is installed without its libraries. Raises `Unavailable` (`engine_failed`).
        """
        if not self._in_parts:
            yield self._whole(sentence, voice, speed)
            return
        text, silent = _speakable(sentence), True
        if text:
            with closing(self._children.speak(text, self._voice(voice), self._stretch(speed))) as parts:
                for part in parts:
                    yield part
                    silent = False
        if silent:
            yield _SILENCE, _SILENT_RATE

    def shutdown(self) -> None:
        """End the processes that speak."""
        super().shutdown()
        self._end()

    def _whole(self, sentence: str, voice: str | None, speed: float | None) -> tuple[bytes, int]:
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            self.get_tts(sentence, file.name, voice=voice, speed=speed)
            with wave.open(file.name) as wav:
                return wav.readframes(wav.getnframes()), wav.getframerate()

    def _voice(self, wanted: str | None) -> str:
        for voice in (wanted, self.config.get("voice")):
            if voice in VOICES:
                return str(voice)
        return "slt"

    def _stretch(self, speed: float | None) -> float:
        """How much longer than usual it takes to speak."""
        return 1 / min(max(float(speed or self.config.get("speed") or 1.0), 0.5), 2.0)

    def _get_ctxt(self, kwargs: dict[str, Any] | None = None) -> TTSContext:
        kwargs = dict(kwargs or {})
        if kwargs.get("voice") in (None, "default"):
            kwargs["voice"] = self.config.get("voice", "slt")
        context = super()._get_ctxt(kwargs)
        # Files are named after the sentence, in a directory named after the voice: the speed must be in its name.
        context.voice = f"{context.voice}-{kwargs.get('speed') or self.config.get('speed') or 1.0}"
        return context


def _speakable(sentence: str) -> bytes:
    """What flite is given of a sentence; nothing when there is nothing to say in it."""
    text = _CONTROL.sub(" ", sentence).strip()[:MAX_TEXT]
    if not _SPEAKABLE.search(text):
        return b""
    # An empty line ends a sentence.
    return _PASSAGE.sub("\\g<0>\n\n", _LONG_WORD.sub(r"\g<0> ", text)).encode(errors="replace")


def _write_silence(wav_file: str) -> None:
    with wave.open(wav_file, "wb") as wav:
        wav.setparams((1, 2, _SILENT_RATE, 0, "NONE", ""))
        wav.writeframes(_SILENCE)
