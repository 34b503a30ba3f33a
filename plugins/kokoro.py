"""Kokoro, the natural voice, as an ovos-plugin-manager TTS plugin: one loaded model speaks for all voices, in clauses.

Kokoro synthesises a text as a whole and several times slower than it is heard on few cores, so what counts is how
little stands between the text and its first sound: `stream` says a short first clause, then growing ones.
"""

from __future__ import annotations

import os
import re
import threading
import wave
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ovos_plugin_manager.templates.tts import TTS, TTSContext
from ovos_utils import classproperty

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.plugins.clauses import OPENERS, clauses
from agentvoicebox.plugins.pool.engine import cancelled, when_cancelled
from agentvoicebox.plugins.pool.runner import Voice

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

_GENDERS = {"f": "female", "m": "male"}

_SAMPLES = {
    "de": "Guten Tag, so klingt diese Stimme. Was kann ich heute für dich tun?",
    "en": "Hello, this is how I sound. What can I do for you today?",
    "es": "Hola, así suena mi voz. ¿En qué puedo ayudarte hoy?",
    "fr": "Bonjour, voici ma voix. Que puis-je faire pour vous aujourd'hui ?",
    "hi": "नमस्ते, मेरी आवाज़ ऐसी है। आज मैं आपकी क्या मदद कर सकता हूँ?",
    "it": "Ciao, questa è la mia voce. Che cosa posso fare per te oggi?",
    "ja": "こんにちは、これが私の声です。今日は何をお手伝いしましょうか？",
    "pt": "Olá, esta é a minha voz. Como posso ajudar você hoje?",
    "zh": "你好，这就是我的声音。今天我能为你做些什么？",
}

_SENTENCE_PAUSE, _CLAUSE_PAUSE = 0.25, 0.1
"""Seconds of silence between two clauses, at speed 1."""
_FADE = np.linspace(0, 1, RATE // 200, dtype=np.float32)
"""5 ms: audio that begins or ends elsewhere than at zero clicks."""
_MOST_OPENERS = 512
"""Openers kept, about 30 KB of audio each."""

_SPEAKABLE = re.compile(r"[^\W_]")
_SENTENCE_END = re.compile(r"[.!?…。！？।][\"'”’»)\]}」』）]*$")
_CLAUSE_END = re.compile(r"[,;:、，；：–—-][\"'”’»)\]}」』）]*$")
_SWITCH = re.compile(r"\((?:en|en-us|en-gb|es|fr|fr-fr|hi|it|ja|pt|pt-br|cmn)\)")
"""How espeak's phonemes name the language of a foreign word; Kokoro would try to pronounce that."""


def sample(language: str) -> str:
    """A short sentence to hear a voice by, in `language` (as in `pt-BR`); English where there is none."""
    return _SAMPLES.get(_primary(language), _SAMPLES["en"])


class KokoroTTS(TTS):  # type: ignore[misc]
    """Configuration: `model`, the directory with the files of the release; `voice` (am_onyx); `speed` (1.0); `threads`.

    `threads` is how many cores one clause is synthesised with: all, up to 4; `cores`, how many there are for it (all).
    """

    thread_safe = True
    shares_cores = True

    def __init__(self, config: dict[str, Any] | None = None, **more: Any) -> None:
        # The stock cache is shared by everyone who says the same sentence: it would speak with another's speed.
        super().__init__(config={**(config or {}), "enable_cache": False}, audio_ext="wav", **more)
        directory = Path(self.config.get("model") or "")
        if not all((directory / name).is_file() for name in (MODEL, VOICES)):
            raise Unavailable(
                f"Kokoro's model is not in {directory}: fetch it with `avb models pull kokoro`.", code="models_missing"
            )
        cores = int(self.config.get("cores") or os.cpu_count() or 1)
        threads = int(self.config.get("threads") or min(4, cores))
        try:
            self._kokoro, self._styles = _load(directory, threads)
        except Exception as error:
            raise Unavailable(
                f"Kokoro's model in {directory} is damaged: remove it, and fetch it with `avb models pull kokoro`.",
                code="model_broken",
            ) from error
        self.voices = frozenset(self._styles)
        # Two at least, so that nobody's first sound waits for the last of another's long reply; where more of them
        # share the same cores, all are heard later.
        self.parallel = max(2, cores // threads)
        self._openers: OrderedDict[tuple[str, float, str], NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    @classproperty  # type: ignore[untyped-decorator]
    def available_languages(cls) -> set[str]:
        return {language for language, _ in LANGUAGES.values()}

    def voice_list(self) -> list[Voice]:
        """All voices of the pack, by name."""
        return [Voice(name, LANGUAGES[name[0]][0], _GENDERS.get(name[1:2], "")) for name in sorted(self.voices)]

    def stream(
        self, sentence: str, lang: str | None = None, voice: str | None = None, speed: float | None = None
    ) -> Iterator[tuple[bytes, int]]:
        """Say `sentence` clause by clause: 16-bit mono audio and its rate of 24 kHz; it stops when nobody listens.

        `speed` is 0.5 to 2.0. Text without a letter or digit is one chunk of silence. Raises `BadInput`, at once, for
        an unknown voice, a speed out of range, or a voice of another language than `lang`; without a `voice` it is the
        configured one, or one of that language.
        """
        chosen, pace = self._voice(voice, lang), self._pace(speed)
        return self._spoken(sentence, chosen, pace)

    def get_tts(
        self,
        sentence: str,
        wav_file: str,
        lang: str | None = None,
        voice: str | None = None,
        speed: float | None = None,
    ) -> tuple[str, None]:
        """The same as `stream` as a whole, in `wav_file`."""
        with wave.open(wav_file, "wb") as wav:
            wav.setparams((1, 2, RATE, 0, "NONE", ""))
            for pcm, _ in self.stream(sentence, lang, voice, speed):
                wav.writeframes(pcm)
        return wav_file, None

    def warm(self, voice: str | None = None, speed: float | None = None, language: str | None = None) -> None:
        """Synthesise the openers of a voice now, rather than when they are first said. Raises as `stream` does."""
        chosen, pace = self._voice(voice, language), self._pace(speed)
        for opener in OPENERS[_primary(LANGUAGES[chosen[0]][0])]:
            if cancelled():
                return
            self._opener(opener, chosen, pace)

    def _spoken(self, sentence: str, voice: str, pace: float) -> Iterator[tuple[bytes, int]]:
        language = LANGUAGES[voice[0]][0]
        openers = OPENERS[_primary(language)]
        silent, pause = True, 0.0
        for clause in clauses(sentence, language):
            if cancelled():
                return
            audio = (self._opener if clause in openers else self._say)(clause, voice, pace)
            if not audio.size:
                continue
            # The pause stands before the next clause, so that none is left after the last.
            yield _pcm(np.concatenate([np.zeros(int(pause * RATE), np.float32), audio])), RATE
            silent, pause = False, _pause(clause) / pace
        if silent and not cancelled():
            yield bytes(RATE // 10 * 2), RATE

    def _opener(self, text: str, voice: str, pace: float) -> NDArray[np.float32]:
        """A clause that many replies begin with: nobody's wording, so its audio is kept for everybody."""
        key = (voice, pace, text)
        with self._lock:
            audio = self._openers.get(key)
            if audio is not None:
                self._openers.move_to_end(key)
                return audio
        audio = self._say(text, voice, pace)
        if audio.size:
            with self._lock:
                self._openers[key] = audio
                if len(self._openers) > _MOST_OPENERS:
                    self._openers.popitem(last=False)
        return audio

    def _say(self, clause: str, voice: str, pace: float) -> NDArray[np.float32]:
        """The audio of a clause without silence around it; empty where nothing is to be said, or nobody listens."""
        nothing = np.zeros(0, np.float32)
        if not _SPEAKABLE.search(clause):
            return nothing
        phonemes = _SWITCH.sub("", self._kokoro.tokenizer.phonemize(clause, LANGUAGES[voice[0]][1]))
        # Letters that this language has no sound for.
        if not _SPEAKABLE.search(phonemes):
            return nothing
        try:
            audio, _ = self._kokoro.create(phonemes, self._styles[voice], pace, is_phonemes=True)
        except Exception:
            if cancelled():
                return nothing
            raise
        faded = np.array(audio, np.float32)
        length = min(len(_FADE), len(faded))
        faded[:length] *= _FADE[:length]
        faded[len(faded) - length :] *= _FADE[:length][::-1]
        return faded

    def _voice(self, voice: str | None, language: str | None) -> str:
        named = voice not in (None, "", "default", "auto")
        chosen = voice if named else self.config.get("voice") or DEFAULT_VOICE
        if chosen not in self.voices:
            raise BadInput(
                f"Kokoro has no voice {chosen!r}; it has: {', '.join(sorted(self.voices))}.",
                code="unknown_voice",
                param="voice",
            )
        wanted = _primary(language or "auto")
        if wanted in ("auto", _primary(LANGUAGES[chosen[0]][0])):
            return str(chosen)
        others = [name for name in sorted(self.voices) if _primary(LANGUAGES[name[0]][0]) == wanted]
        if named or not others:
            raise BadInput(
                f"Voice {chosen} speaks {LANGUAGES[chosen[0]][0]}, not {language}: choose a voice of that language.",
                code="unsupported_language",
                param="voice",
            )
        return others[0]

    def _pace(self, speed: float | None) -> float:
        pace = float(speed or self.config.get("speed") or 1.0)
        if not 0.5 <= pace <= 2.0:
            raise BadInput("The speed of a voice is 0.5 to 2.0.", code="bad_speed", param="speed")
        return pace

    def _get_ctxt(self, kwargs: dict[str, Any] | None = None) -> TTSContext:
        context = super()._get_ctxt(kwargs)
        # Files are named after the sentence, in a directory named after the voice: the speed must be in its name.
        pace = context.synth_kwargs.get("speed") or self.config.get("speed", 1)
        context.voice = f"{self._voice(context.voice, context.lang)}-{pace}"
        return context


class _Stoppable:
    """An onnxruntime session whose work at hand ends when nobody waits for it: a clause may take seconds."""

    def __init__(self, session: Any, options: Callable[[], Any]) -> None:
        self._session, self._options = session, options

    def run(self, outputs: list[str] | None, inputs: dict[str, Any]) -> Any:
        options = self._options()
        with when_cancelled(lambda: setattr(options, "terminate", True)):
            return self._session.run(outputs, inputs, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _load(directory: Path, threads: int) -> tuple[Any, dict[str, NDArray[np.float32]]]:
    """The model, and the styles of the voices whose language is known. Raises when either is damaged."""
    # Imported where they are used: a machine that speaks with flite should not carry onnxruntime.
    import onnxruntime
    from kokoro_onnx import Kokoro
    from kokoro_onnx.session import resolve_providers

    options = onnxruntime.SessionOptions()
    # All cores for one clause at a time: on two, the first sound comes nearly twice as soon as from one.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait for work must not burn the cores that recognition and the cells of this machine need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # No two clauses are equally long: a memory plan for each length would be made, kept and never used again.
    options.enable_mem_pattern = False
    session = onnxruntime.InferenceSession(str(directory / MODEL), options, providers=resolve_providers())
    if not {"style", "speed"} <= {put.name for put in session.get_inputs()}:
        raise ValueError("not Kokoro's model")
    # kokoro-onnx would unpack a voice from the file each time it speaks, and leave the file open.
    with (directory / VOICES).open("rb") as file, np.load(file) as pack:
        styles = {name: pack[name] for name in pack.files if name[:1] in LANGUAGES}
    if not styles or any(style.ndim != 3 or style.shape[1:] != (1, 256) for style in styles.values()):
        raise ValueError("not Kokoro's voices")
    kokoro = Kokoro.from_session(_Stoppable(session, onnxruntime.RunOptions), str(directory / VOICES))
    kokoro.voices.close()
    kokoro.voices = styles
    return kokoro, styles


def _primary(language: str) -> str:
    return re.split("[-_]", language.lower(), maxsplit=1)[0]


def _pause(clause: str) -> float:
    if _SENTENCE_END.search(clause):
        return _SENTENCE_PAUSE
    return _CLAUSE_PAUSE if _CLAUSE_END.search(clause) else 0.0


def _pcm(audio: NDArray[np.float32]) -> bytes:
    return (np.clip(audio, -1, 1) * 32_767).astype("<i2").tobytes()
