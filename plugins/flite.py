"""flite, the small offline voice of every Debian, as an ovos-plugin-manager TTS plugin."""

from __future__ import annotations

import re
import shutil
import subprocess
import wave
from typing import Any

from ovos_plugin_manager.templates.tts import TTS, TTSContext
from ovos_utils import classproperty

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins.pool import when_cancelled

VOICES = ("slt", "rms", "awb", "kal16", "kal")

MAX_TEXT = 8_000
"""Characters of one call; more is cut, as a command line has an end."""

_SPEAKABLE = re.compile(r"\w")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


class FliteTTS(TTS):  # type: ignore[misc]
    """Five English voices that start speaking at once. Configuration: `voice` (slt) and `speed` (1.0)."""

    thread_safe = True
    voices = frozenset(VOICES)

    def __init__(self, config: dict[str, Any] | None = None, **more: Any) -> None:
        # The stock cache is keyed without the speed and lies in shared memory: synthesising again is cheaper.
        super().__init__(config={**(config or {}), "enable_cache": False}, audio_ext="wav", **more)
        self._flite = shutil.which("flite")
        if self._flite is None:
            raise Unavailable("flite is not installed: apt-get install flite", code="engine_missing")

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
        voice = voice if voice in VOICES else self.config.get("voice", "slt")
        voice = voice if voice in VOICES else "slt"
        speed = min(max(float(speed or self.config.get("speed") or 1.0), 0.5), 2.0)
        text = _CONTROL.sub(" ", sentence).strip()[:MAX_TEXT]
        if not _SPEAKABLE.search(text):
            _write_silence(wav_file)
            return wav_file, None
        command = [str(self._flite), "-voice", voice, "--setf", f"duration_stretch={1 / speed:.3f}"]
        # Text goes in through a pipe: on the command line others could read it, and flite would take it for a file.
        process = subprocess.Popen(
            [*command, "-o", wav_file], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        with process, when_cancelled(process.kill):
            process.communicate(text.encode())
        if process.returncode:
            raise Unavailable("flite failed to speak.", code="engine_failed")
        return wav_file, None

    def _get_ctxt(self, kwargs: dict[str, Any] | None = None) -> TTSContext:
        kwargs = dict(kwargs or {})
        if kwargs.get("voice") in (None, "default"):
            kwargs["voice"] = self.config.get("voice", "slt")
        context = super()._get_ctxt(kwargs)
        # Files are named after the sentence, in a directory named after the voice: the speed must be in its name.
        context.voice = f"{context.voice}-{kwargs.get('speed') or self.config.get('speed') or 1.0}"
        return context


def _write_silence(wav_file: str) -> None:
    with wave.open(wav_file, "wb") as wav:
        wav.setparams((1, 2, 16_000, 0, "NONE", ""))
        wav.writeframes(bytes(3_200))
