"""Whisper made fast, as an ovos-plugin-manager STT plugin: the encoder pays for the audio there is, not for 30 s.

Stock faster-whisper encodes 30 s for every utterance. Here the window is cropped to the utterance and a margin, equal
windows of several sessions are decoded together, and each worker has one thread: several such workers serve more than
one that has all threads. A model trained on 30 s may loop or guess on less, so every answer is checked the way
faster-whisper checks its own; what fails is heard again the stock way, with 30 s and rising temperatures.

`no_repeat_ngram_size` is left alone on purpose: it would turn "five five five five five" into something else, and hide
from the check the very loops that it looks for.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from ovos_plugin_manager.templates.stt import STT
from ovos_utils import classproperty

from agentvoicebox.config.errors import AvbError, BadInput, Unavailable
from agentvoicebox.plugins.pool import cancelled
from agentvoicebox.plugins.pool.line import Crowded

if TYPE_CHECKING:
    from agentvoicebox.plugins.pool.runner import Heard

log = logging.getLogger(__name__)

Samples = NDArray[np.float32]
"""Mono at 16 kHz, -1 to 1."""

Found = tuple[str, float | None, str]
"""Text, confidence of 0 to 1 (None when nothing was heard), language ("" when nobody told and nothing was heard)."""

RATE = 16_000

WINDOWS = (4, 6, 8, 10, 13, 17, 22)
"""Seconds that are encoded instead of 30, at most. Utterances of one window are heard together, so there are few, each
at most half as long again as the last: little of what is encoded is empty. An utterance of 5 s has the window of 8."""

_STEP = 16
"""Frames of 10 ms by which what is encoded of a window grows with its longest utterance."""

WHOLE = 30
"""Seconds the model was trained on; what fits no shorter window has this one."""

MARGIN = 2.56
"""Seconds of silence after the utterance, 128 of the encoder's frames: with less, models in use were seen to loop."""

_TOGETHER = {"cpu": 2, "cuda": 4}
"""Utterances decoded at once. On a CPU two share most of what can be shared (the walk through the vocabulary's weights
for each token); four cost a tenth less together, and make the first of them wait for twice as long."""

_MOST_SECONDS = 32
"""Seconds of windows decoded at once: with more, attention leaves the cache and each takes longer than alone."""

_PIECE = 28.0
"""Seconds of the pieces, cut at silences, in which a longer utterance is heard."""

_UNPACKED = {"int8": 0.5, "float32": 2.0}
"""Bytes of weights in memory for each byte of a file, which has 16-bit ones."""

_WORKING = 100 << 20
"""Bytes for all that is not weights, generously."""

_SHORTEST = 0.1
"""Seconds below which nothing is a word."""

_QUIETEST = 16 / 32_768
"""A peak below this is no voice: four bits of sixteen."""

_LOOPING = 2.4
"""What compresses by more repeats itself. This and the next two are the limits faster-whisper sets itself."""

_DOUBTFUL = -1.0
"""Mean logarithm of the tokens' probabilities below which the model guesses."""

_NOT_SPEECH = 0.6
"""Probability that nobody speaks, above which a guess stands for nothing."""

_CODES = (
    "af am ar as az ba be bg bn bo br bs ca cs cy da de el en es et eu fa fi fo fr gl gu ha haw he hi hr ht hu hy id "
    "is it ja jw ka kk km kn ko la lb ln lo lt lv mg mi mk ml mn mr ms mt my ne nl nn no oc pa pl ps pt ro ru sa sd si "
    "sk sl sn so sq sr su sv sw ta te tg th tk tl tr tt uk ur uz vi yi yo yue zh"
)
LANGUAGES = frozenset(_CODES.split())
"""As Whisper calls them; a model may know fewer."""

_ALSO_CALLED = {"cmn": "zh", "fil": "tl", "in": "id", "iw": "he", "ji": "yi", "jv": "jw", "mo": "ro", "nb": "no"}


class WhisperSTT(STT):  # type: ignore[misc]
    """Configuration: `model`, a directory as `avb models pull` leaves it; `vad` (true), whether silence is cut out
    before anything is encoded; `parallel`, workers of one thread each (the cores, at most 8); `cores`, how many there
    are for it (all); `device` (`auto`, or `cpu` also where there is CUDA); `compute_type` (int8, on CUDA float16)."""

    thread_safe = True
    shares_cores = True

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        """Raises `Unavailable`: `models_missing`, `model_broken`, or `engine_missing` without faster-whisper."""
        super().__init__(config)
        cores = int(self.config.get("cores") or os.cpu_count() or 1)
        self.parallel = max(1, int(self.config.get("parallel") or min(8, cores)))
        self._vad = bool(self.config.get("vad", True))
        self._ear = _load(
            Path(self.config.get("model") or ""),
            self.parallel,
            str(self.config.get("device") or "auto"),
            str(self.config.get("compute_type") or "auto"),
        )
        self.batch = self._ear.together
        self.memory = self._ear.memory

    @classproperty  # type: ignore[untyped-decorator]
    def available_languages(cls) -> set[str]:
        return set(LANGUAGES)

    def execute(self, audio: Any, language: str | None = None) -> str:
        """What was said; empty when nothing was. Raises `BadInput` for a language that the model does not know."""
        return self.transcribe(audio, language)[0][0]

    def transcribe(self, audio: Any, lang: str | None = None) -> list[tuple[str, float]]:
        """What was said and how sure that is, 0 to 1. `lang` may be `auto`. Raises `BadInput`, as `execute` does."""
        answer = self._answers([(audio.get_raw_data(convert_rate=RATE, convert_width=2), lang or self.lang, False)])[0]
        if isinstance(answer, AvbError):
            raise answer
        return [(answer[0], answer[1] or 0.0)]

    def transcribe_batch(self, jobs: Sequence[Heard]) -> list[Found | AvbError]:
        """What each of the jobs says, in their order; one that cannot be heard harms no other.

        A tentative job has no second try: where its answer cannot be trusted it is empty, and where none is cheap, for
        more than 30 s of speech, it is `Unavailable` with code `busy`.
        """
        return self._answers([(job.pcm16k, job.language, job.tentative) for job in jobs])

    def _answers(self, jobs: Sequence[tuple[bytes, str, bool]]) -> list[Found | AvbError]:
        answers: dict[int, Found | AvbError] = {}
        short: dict[int, _Utterance] = {}
        for place, (pcm, language, tentative) in enumerate(jobs):
            try:
                utterance = _Utterance(self._audible(pcm), self._ear.language(language), tentative)
                if not utterance.samples.size:
                    answers[place] = ("", None, utterance.language or "")
                elif utterance.seconds <= WHOLE:
                    short[place] = utterance
                else:
                    answers[place] = self._long(utterance)
            except AvbError as error:
                answers[place] = error
        for places in _together(short, self.batch):
            guesses = self._ear.hear([short[place] for place in places])
            for place, guess in zip(places, guesses, strict=True):
                answers[place] = self._checked(short[place], guess).found
        return [answers[place] for place in range(len(jobs))]

    def _audible(self, pcm: bytes) -> Samples:
        """The audio, without its silence where that is wanted; nothing of what cannot be a voice."""
        samples = _samples(pcm)
        if samples.size < _SHORTEST * RATE or np.abs(samples).max() < _QUIETEST:
            return samples[:0]
        return _spoken(samples) if self._vad else samples

    def _long(self, utterance: _Utterance) -> Found:
        """What is said in more than 30 s, piece by piece; the language is found once."""
        if utterance.tentative:
            # Said of the guess alone: the engine is well, and no pool may leave it alone for this.
            raise Crowded(f"Speech of more than {WHOLE} s is transcribed when it has ended.", code="busy")
        guesses: list[_Guess] = []
        language = utterance.language
        for samples in _pieces(utterance.samples):
            if cancelled():
                break
            piece = replace(utterance, samples=samples, language=language)
            guess = self._checked(piece, self._ear.hear([piece])[0])
            if guess.text:
                guesses.append(guess)
                language = guess.language
        sure = [math.exp(guess.logprob) for guess in guesses]
        text = "".join(guess.text for guess in guesses).strip()
        return text, sum(sure) / len(sure) if sure else None, language or ""

    def _checked(self, utterance: _Utterance, guess: _Guess) -> _Guess:
        """The guess where it can be trusted; else what the stock way makes of the utterance."""
        if guess.doubtful and not guess.silence:
            if utterance.tentative or cancelled():
                return replace(guess, text="")
            guess = self._ear.hear_again(replace(utterance, language=guess.language))
        return replace(guess, text="") if guess.silence else guess


@dataclass(frozen=True, slots=True)
class _Utterance:
    samples: Samples
    language: str | None
    """One of Whisper's; None to find it."""
    tentative: bool = False

    @property
    def seconds(self) -> float:
        return self.samples.size / RATE

    @property
    def window(self) -> int:
        return next((window for window in WINDOWS if window >= self.seconds + MARGIN), WHOLE)

    @property
    def frames(self) -> int:
        """What has to be encoded of it, its margin included, in steps of 10 ms; never less than the shortest window."""
        needed = math.ceil((self.seconds + MARGIN) * 100 / _STEP) * _STEP
        return min(100 * self.window, max(100 * WINDOWS[0], needed))

    @property
    def most_tokens(self) -> int:
        """More than anybody says in that time in most languages; where it is not enough, 30 s have the last word."""
        return min(224, 16 + int(10 * self.seconds))


@dataclass(frozen=True, slots=True)
class _Guess:
    text: str
    language: str
    logprob: float
    """Mean over the tokens."""
    not_speech: float
    """Probability."""
    endless: bool
    """Whether it had to be cut."""

    @property
    def found(self) -> Found:
        text = self.text.strip()
        return text, min(1.0, math.exp(self.logprob)) if text else None, self.language

    @property
    def silence(self) -> bool:
        return self.not_speech > _NOT_SPEECH and self.logprob < _DOUBTFUL

    @property
    def doubtful(self) -> bool:
        return self.endless or self.logprob < _DOUBTFUL or self.looping

    @property
    def looping(self) -> bool:
        from faster_whisper.transcribe import get_compression_ratio

        return bool(get_compression_ratio(self.text.strip()) > _LOOPING)


class _Ear:
    """A loaded model; works in several threads at once."""

    def __init__(self, whisper: Any, stored: int) -> None:
        self._whisper = whisper
        self.memory = int(stored * _UNPACKED.get(whisper.model.compute_type.partition("_")[0], 1)) + _WORKING
        """Bytes that it holds, about; `stored` is what its files take."""
        self.together = _TOGETHER[whisper.model.device]
        self._multilingual = bool(whisper.model.is_multilingual)
        token = whisper.hf_tokenizer.token_to_id
        known = {code for code in LANGUAGES if token(f"<|{code}|>") is not None}
        self.languages = sorted(known) if self._multilingual else ["en"]

    def language(self, tag: str) -> str | None:
        """What Whisper calls a language; None for `auto` where there is something to find. Raises `BadInput`."""
        if tag in ("auto", ""):
            return None if self._multilingual else "en"
        code = tag.replace("_", "-").split("-")[0].lower()
        code = _ALSO_CALLED.get(code, code)
        if code not in self.languages:
            raise BadInput(
                f"This speech model does not know the language {tag[:40]!r}; it knows: {', '.join(self.languages)}.",
                code="unsupported_language",
                param="language",
            )
        return code

    def hear(self, utterances: Sequence[_Utterance]) -> list[_Guess]:
        """What is said in utterances of one window, from one pass of encoder and decoder."""
        from faster_whisper.transcribe import get_ctranslate2_storage

        model = self._whisper.model
        frames = WHOLE * 100 if utterances[0].window == WHOLE else max(utterance.frames for utterance in utterances)
        features = np.stack([self._features(utterance, frames) for utterance in utterances])
        encoded = model.encode(get_ctranslate2_storage(features))
        languages = [utterance.language for utterance in utterances]
        if None in languages:
            ranked = model.detect_language(encoded)
            languages = [known or found[0][0][2:-2] for known, found in zip(languages, ranked, strict=True)]
        prompts = [self._prompt(str(language)) for language in languages]
        most = max(utterance.most_tokens for utterance in utterances)
        results = model.generate(
            encoded,
            prompts,
            beam_size=1,
            max_length=_length(most, len(prompts[0])),
            return_scores=True,
            return_no_speech_prob=True,
        )
        return [self._guess(str(code), result, most) for code, result in zip(languages, results, strict=True)]

    def hear_again(self, utterance: _Utterance) -> _Guess:
        """What the stock way hears: 30 s, beams, and rising temperatures until an answer passes its own checks."""
        most = min(224, 2 * utterance.most_tokens)
        prompt = len(self._prompt(utterance.language or "en"))
        segments, info = self._whisper.transcribe(
            utterance.samples,
            language=utterance.language,
            condition_on_previous_text=False,
            without_timestamps=True,
            temperature=_Temperatures(),
            max_new_tokens=_length(most, prompt) - prompt,
        )
        heard = list(segments)
        tokens = sum(len(segment.tokens) for segment in heard)
        guess = _Guess(
            "".join(segment.text for segment in heard),
            str(info.language),
            sum(segment.avg_logprob * len(segment.tokens) for segment in heard) / max(1, tokens),
            max((segment.no_speech_prob for segment in heard), default=1.0),
            any(len(segment.tokens) >= most for segment in heard),
        )
        # People repeat themselves, but they come to an end; a loop that 30 s did not end either says nothing.
        return replace(guess, text="") if guess.endless and guess.looping else guess

    def _features(self, utterance: _Utterance, frames: int) -> Samples:
        """The log-mel spectrum of an utterance, (bands, frames), with the silence that fills it up.

        The silence is what the spectrum of zeros would be, cut off 80 dB below the loudest as the rest is.
        """
        heard = self._whisper.feature_extractor(utterance.samples)
        features = np.full((heard.shape[0], frames), max(heard.max() - 2.0, -1.5), np.float32)
        features[:, : heard.shape[1]] = heard[:, :frames]
        return features

    def _tokenizer(self, language: str) -> Any:
        from faster_whisper.tokenizer import Tokenizer

        return Tokenizer(self._whisper.hf_tokenizer, self._multilingual, "transcribe", language)

    def _prompt(self, language: str) -> list[int]:
        tokenizer = self._tokenizer(language)
        return [*tokenizer.sot_sequence, tokenizer.no_timestamps]

    def _guess(self, language: str, result: Any, most: int) -> _Guess:
        tokens = result.sequences_ids[0]
        # The mean that faster-whisper compares with its limit counts the end of the text as a token.
        logprob = result.scores[0] * len(tokens) / (len(tokens) + 1)
        text = self._tokenizer(language).decode(tokens)
        return _Guess(text, language, logprob, result.no_speech_prob, len(tokens) >= most)


class _Temperatures(list[float]):
    """Those of faster-whisper, as long as somebody waits: six tries at half a minute of nonsense take their time."""

    def __init__(self) -> None:
        super().__init__((0.0, 0.2, 0.4, 0.6, 0.8, 1.0))

    def __iter__(self) -> Iterator[float]:
        for tried, temperature in enumerate(super().__iter__()):
            if tried and cancelled():
                return
            yield temperature


def _length(tokens: int, prompt: int) -> int:
    """What CTranslate2 must be told for so many new tokens: it takes half of it, or what the prompt leaves."""
    return max(2 * tokens, tokens + prompt)


def _together(utterances: dict[int, _Utterance], most: int) -> Iterator[list[int]]:
    """The places of utterances that are decoded at once: of one window, at most `most`, and not too much of it."""
    windows: dict[int, list[int]] = {}
    for place, utterance in utterances.items():
        windows.setdefault(utterance.window, []).append(place)
    for window, places in windows.items():
        count = max(1, min(most, _MOST_SECONDS // window))
        yield from (places[first : first + count] for first in range(0, len(places), count))


def _spoken(samples: Samples) -> Samples:
    """The audio without pauses of more than a second."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    found = get_speech_timestamps(samples, VadOptions(min_silence_duration_ms=1_000))
    return np.concatenate([samples[:0], *(samples[part["start"] : part["end"]] for part in found)])


def _pieces(samples: Samples) -> Iterator[Samples]:
    # Imported where it is used: it brings PyAV, which only comes with faster-whisper.
    from agentvoicebox.plugins import audio

    pcm = (samples * 32_768).astype("<i2").tobytes()
    for piece in audio.split(pcm, _PIECE):
        yield _samples(piece)


def _samples(pcm: bytes) -> Samples:
    return np.frombuffer(pcm, "<i2", len(pcm) // 2).astype(np.float32) * np.float32(1 / 32_768)


def _load(directory: Path, workers: int, device: str, compute_type: str) -> _Ear:
    name = directory.name if directory.name.startswith("faster-whisper-") else "faster-whisper-base"
    # Without its tokenizer faster-whisper would fetch one from the network.
    if missing := [file for file in ("config.json", "model.bin", "tokenizer.json") if not (directory / file).is_file()]:
        raise Unavailable(
            f"The speech model in {directory} lacks {', '.join(missing)}: fetch it with `avb models pull {name}`.",
            code="models_missing",
        )
    try:
        from ctranslate2 import get_cuda_device_count  # type: ignore[import-untyped]
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise Unavailable(
            "faster-whisper is not installed: pip install 'agentvoicebox[speech]'.", code="engine_missing"
        ) from error

    def loaded(place: str, fastest: str) -> _Ear:
        kind = fastest if compute_type == "auto" else compute_type
        whisper = WhisperModel(str(directory), device=place, compute_type=kind, cpu_threads=1, num_workers=workers)
        ear = _Ear(whisper, (directory / "model.bin").stat().st_size)
        # What does not fit together shows only when it works; better now than in somebody's turn.
        ear.hear([_Utterance(np.zeros(RATE, np.float32), None if len(ear.languages) > 1 else "en")])
        return ear

    if device != "cpu" and get_cuda_device_count() > 0:
        try:
            return loaded("cuda", "float16")
        except Exception as error:
            log.warning("CUDA cannot be used for speech, the CPU is: %s", type(error).__name__)
    try:
        return loaded("cpu", "int8")
    except Exception as error:
        raise Unavailable(
            f"The speech model in {directory} is broken ({type(error).__name__}): remove that directory and fetch it "
            f"again with `avb models pull {name}`.",
            code="model_broken",
        ) from error
