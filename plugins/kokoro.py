"""Kokoro, the natural voice, as an ovos-plugin-manager TTS plugin: one loaded model speaks for all voices."""

from __future__ import annotations

import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import quebra_frases
from numpy.typing import NDArray
from ovos_plugin_manager.templates.tts import TTS, TTSContext
from ovos_utils import classproperty

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.plugins.pool import cancelled

MODEL, VOICES = "kokoro-v1.0.onnx", "voices-v1.0.bin"
"""File names of the upstream release, as `avb models pull kokoro` leaves them."""

RATE = 24_000

DEFAULT_VOICE = "am_onyx"

LANGUAGES = {
    "a": ("en-US", "en-us"),
    "b": ("en-GB", "en-gb"),
    "e": ("es-ES", "es"),
    "f": ("fr-FR", "fr-fr"),
    "h": ("hi-IN", "hi"),
    "i": ("it-IT", "it"),
    "j": ("ja-JP", "ja"),
    "p": ("pt-BR", "pt-br"),
    "z": ("zh-CN", "cmn"),
}
"""The first letter of a voice tells its language: as OVOS writes it, and as espeak's phonemes are called."""

_SPEAKABLE = re.compile(r"[^\W_]")


class KokoroTTS(TTS):  # type: ignore[misc]
    """Configuration: `model`, the directory with the files of the release; `voice` (am_onyx); `speed` (1.0)."""

    thread_safe = True

    def __init__(self, config: dict[str, Any] | None = None, **more: Any) -> None:
        # The stock cache is shared by everyone who says the same sentence: it would speak with another's speed.
        super().__init__(config={**(config or {}), "enable_cache": False}, audio_ext="wav", **more)
        directory = Path(self.config.get("model") or "")
        if not all((directory / name).is_file() for name in (MODEL, VOICES)):
            raise Unavailable(
                f"Kokoro's model is not in {directory}: fetch it with `avb models pull kokoro`.", code="models_missing"
            )
        # Imported where it is used: a machine that speaks with flite should not carry onnxruntime.
        from kokoro_onnx import Kokoro

        self._kokoro = Kokoro(str(directory / MODEL), str(directory / VOICES))
        self.voices = frozenset(self._kokoro.get_voices())

    @classproperty  # type: ignore[untyped-decorator]
    def available_languages(cls) -> set[str]:
        return {language for language, _ in LANGUAGES.values()}

    def get_tts(
        self,
        sentence: str,
        wav_file: str,
        lang: str | None = None,
        voice: str | None = None,
        speed: float | None = None,
    ) -> tuple[str, None]:
        """Write 16-bit mono audio of `sentence` at 24 kHz to `wav_file`; `speed` is 0.5 to 2.0.

        Text without a letter or digit is silence. Raises `BadInput` for an unknown voice, a speed out of range, or a
        voice of another language than `lang`.
        """
        voice = self._voice(voice)
        speed = float(speed or self.config.get("speed") or 1.0)
        if not 0.5 <= speed <= 2.0:
            raise BadInput("The speed of a voice is 0.5 to 2.0.", code="bad_speed", param="speed")
        language, phonemes = LANGUAGES[voice[0]]
        if lang and lang.split("-")[0].lower() != language.split("-")[0]:
            raise BadInput(
                f"Voice {voice} speaks {language}, not {lang}: choose a voice of that language.",
                code="unsupported_language",
                param="voice",
            )
        # Sentence by sentence, so that the work can stop between two when nobody listens any more.
        parts = [
            self._kokoro.create(part, voice, speed, phonemes)[0]
            for part in quebra_frases.sentence_tokenize(sentence)
            if _SPEAKABLE.search(part) and not cancelled()
        ]
        _write(wav_file, np.concatenate(parts) if parts else np.zeros(RATE // 10, np.float32))
        return wav_file, None

    def _voice(self, voice: str | None) -> str:
        if voice in (None, "default"):
            voice = self.config.get("voice") or DEFAULT_VOICE
        if voice not in self.voices or voice[0] not in LANGUAGES:
            raise BadInput(
                f"Kokoro has no voice {voice!r}; it has: {', '.join(sorted(self.voices))}.",
                code="unknown_voice",
                param="voice",
            )
        return voice

    def _get_ctxt(self, kwargs: dict[str, Any] | None = None) -> TTSContext:
        context = super()._get_ctxt(kwargs)
        # Files are named after the sentence, in a directory named after the voice: the speed must be in its name.
        context.voice = (
            f"{self._voice(context.voice)}-{context.synth_kwargs.get('speed') or self.config.get('speed', 1)}"
        )
        return context


def _write(wav_file: str, audio: NDArray[np.float32]) -> None:
    with wave.open(wav_file, "wb") as wav:
        wav.setparams((1, 2, RATE, 0, "NONE", ""))
        wav.writeframes((np.clip(audio, -1, 1) * 32_767).astype("<i2").tobytes())
