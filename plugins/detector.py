"""What hears wake words: one detector for all of a device's phrases, fed with the audio as it comes.

Phrases with a model of their own are heard by pymicro-wakeword, all from the same features; the others by one keyphrase
search of pocketsphinx, which works only while somebody speaks. Time is counted in audio, so there is no clock in here.
Audio is 16-bit mono at 16 kHz, as the microphones of ovos-dinkum-listener give it.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pocketsphinx
import webrtcvad
from numpy.typing import NDArray
from pymicro_features import MicroFrontend
from pymicro_wakeword import MicroWakeWord

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins import phrases
from agentvoicebox.plugins.device.choices import WakeWord

RATE = 16_000
"""Hz."""
REFRACTORY = 1.0
"""Seconds after a detection in which there is no other: one utterance wakes once."""
REPEATED = 5.0
"""Seconds within which somebody who was not heard says it again."""
SETTLED = 20.0
"""Seconds of digital silence after which more of it changes nothing: after 6 features and models have settled."""

_FRAME = RATE // 100 * 2
"""Bytes of the 10 ms that make a row of features."""
_STEP = 3
"""Rows that a model takes at a time."""
_BANDS = 40
"""Features of a row."""
_PIECE = 4_096
"""Bytes of a recording heard at a time, as a listener hears its microphone."""
_NEVER = 0.99
"""The cutoff of a sensitivity of 0."""
_NEAR = 0.5
"""What part of its cutoff a word comes up to that nearly fires."""
_SWELL = 0.5
"""Seconds under half the cutoff after which a phrase is over."""

_PER_SOUND = 2.5
"""What a phoneme adds to the exponent of a phrase. Tried with ten phrases: with less, few voices are heard; with more,
phrases are found in other sentences."""
_BASE, _SHIFT, _OFFSET = 1.0001, 1024, 1500
"""How pocketsphinx writes a likelihood down (kws_search.c): the logarithm's base, what it is divided by, and by how
much it is lowered."""
_LOOK = RATE // 50 * 2
"""Bytes of the 20 ms that are looked at for a voice."""
_LENIENT = 1
"""Of webrtcvad's 0 to 3, which takes less and less for a voice."""
_SURE, _OVER, _LONGEST = 3, 30, 400
"""Looks with a voice before a search begins; without one before it ends; and of the longest search."""
_RUN_UP, _OVERLAP = 25, 60
"""Looks before the voice that a search begins with; and those that it has in common with the one before it."""


@dataclass(frozen=True, slots=True)
class Detection:
    """Somebody said a wake word."""

    word: WakeWord
    confidence: float
    """0 to 1: of a model the mean probability as it fired; of pocketsphinx 0.5 where it just fires."""
    at: float
    """Seconds of audio since the detector began."""
    missed: tuple[float, ...] = ()
    """How sure the detector was when the same word was said just before, and it did not fire."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What came of a whole recording."""

    detected: bool
    confidence: float
    """The highest that there was in it, whether it sufficed or not."""
    at: float | None
    """Seconds from its beginning; None when nothing was detected."""


class Watch:
    """The probabilities of one word: when it fires, and when it nearly did."""

    def __init__(self, cutoff: float) -> None:
        self.cutoff = cutoff
        self._half = cutoff * _NEAR
        self._armed = True
        self._peak, self._above = 0.0, 0.0
        self._near: deque[tuple[float, float]] = deque(maxlen=8)

    def step(self, probability: float, at: float) -> bool:
        """Whether it fires now. It fires once, until the probability has come down again."""
        if probability <= self._half:
            self._armed = True
            if self._peak and at - self._above > _SWELL:
                self._near.append((self._peak, self._above))
                self._peak = 0.0
            return False
        if not self._armed:
            return False
        if probability > self.cutoff:
            self._armed = False
            self._peak = 0.0
            return True
        self._peak, self._above = max(self._peak, probability), at
        return False

    def missed(self, at: float) -> tuple[float, ...]:
        """The peaks of what nearly fired in the last seconds; each is told once."""
        told = tuple(peak for peak, when in self._near if at - when <= REPEATED)
        self._near.clear()
        return told


class Detector:
    """Hears some words. One thread at a time may feed it. Raises `BadInput` for a word that cannot be heard.

    Near misses are known of words with a model only: a keyphrase search finds a phrase or says nothing.
    """

    _rest: bytes
    _silent: int
    _skipped: int

    def __init__(self, words: Sequence[WakeWord]) -> None:
        self.words = tuple(words)
        models = [(word, word.model or phrases.check(word.phrase).model) for word in words]
        self._ears = [_Ear(word, model) for word, model in models if model != phrases.SPHINX]
        spelt = [word for word, model in models if model == phrases.SPHINX]
        self._search = _Search(spelt) if spelt else None
        self._zeros = b""
        self._begin()
        self._heard = 0
        self._deaf_until = 0.0

    def feed(self, pcm: bytes) -> Detection | None:
        """Hear some more audio, of any length; tells when a word was said in it."""
        if len(self._zeros) != len(pcm):
            self._zeros = bytes(len(pcm))
        if pcm != self._zeros:
            self._silent = 0
        elif self._silent >= SETTLED * RATE * 2:
            # The microphone is muted. Features, models and what they remember stay as they are; only the place in the
            # row of three frames that makes a step of the models moves on.
            self._skipped += len(pcm)
            return None
        else:
            self._silent += len(pcm)
        if self._skipped:
            due = self._skipped % (_STEP * _FRAME)
            self._heard += self._skipped - due
            self._skipped = 0
            pcm = bytes(due) + pcm
        found = self._listen(pcm)
        if self._search is not None and (hit := self._search.feed(pcm)) is not None:
            word, confidence = hit
            found = found or self._fire(word, confidence, ())
        return found

    def reset(self) -> None:
        """What comes next does not follow on what was heard."""
        for ear in self._ears:
            ear.reset()
        if self._search is not None:
            self._search.reset()
        self._heard += self._skipped
        self._begin()

    def strongest(self, word: WakeWord) -> float:
        """The highest confidence in a word since the last reset."""
        for ear in self._ears:
            if ear.word == word:
                return ear.strongest
        return self._search.strongest.get(phrases.normalise(word.phrase), 0.0) if self._search is not None else 0.0

    def _begin(self) -> None:
        self._frontend = MicroFrontend()
        self._rest = b""
        self._rows: list[float] = []
        self._silent, self._skipped = 0, 0

    def _listen(self, pcm: bytes) -> Detection | None:
        """Let the models hear."""
        if not self._ears:
            self._heard += len(pcm)
            return None
        pcm = self._rest + pcm
        whole = len(pcm) // _FRAME * _FRAME
        self._rest = pcm[whole:]
        found = None
        for start in range(0, whole, _FRAME):
            self._heard += _FRAME
            rows = self._rows
            rows += self._frontend.process_samples(pcm[start : start + _FRAME]).features
            if len(rows) == _STEP * _BANDS:
                found = self._step(rows) or found
                rows.clear()
        return found

    def _step(self, rows: list[float]) -> Detection | None:
        """Three rows of features have been heard."""
        features = np.array(rows)
        at = self._heard / (2 * RATE)
        found = None
        for ear in self._ears:
            probability = ear.hear(features)
            if ear.watch.step(probability, at):
                found = self._fire(ear.word, probability, ear.watch.missed(at)) or found
        return found

    def _fire(self, word: WakeWord, confidence: float, missed: tuple[float, ...]) -> Detection | None:
        at = self._heard / (2 * RATE)
        if at < self._deaf_until:
            return None
        self._deaf_until = at + REFRACTORY
        return Detection(word, confidence, at, missed)


def hear(pcm: bytes, word: WakeWord) -> Heard:
    """Whether a word is heard in a whole recording. Raises `BadInput` for a word that cannot be heard."""
    detector = Detector((word,))
    found = None
    # What was said at the very end is known only after it.
    pcm += bytes(2 * RATE)
    for start in range(0, len(pcm), _PIECE):
        found = found or detector.feed(pcm[start : start + _PIECE])
    return Heard(found is not None, detector.strongest(word), found.at if found is not None else None)


def cutoff(shipped: float, sensitivity: float) -> float:
    """The probability above which a word fires.

    At 0.5 it is the model's own; from there it goes in a straight line up to 0.99 at 0, which only the clearest speech
    reaches, and down to half of the model's own at 1.
    """
    if sensitivity <= 0.5:
        return _NEVER + (shipped - _NEVER) * 2 * sensitivity
    return shipped * (1.5 - sensitivity)


def exponent(sounds: int, sensitivity: float) -> float:
    """A phrase of so many phonemes is found where it is at least 10 to the minus this as likely as anything else.

    A longer phrase has more places to be unlike. In a straight line from half of what 0.5 allows at 0 to one and a
    half of it at 1.
    """
    return _PER_SOUND * sounds * (0.5 + sensitivity)


class _Ear:
    """A model. It does what `MicroWakeWord.process_streaming_prob` does, in fewer steps of Python."""

    strongest: float

    def __init__(self, word: WakeWord, model: str) -> None:
        self.word = word
        self._model = MicroWakeWord.from_config(phrases.model_file(model))
        self._cutoff = cutoff(self._model.probability_cutoff, word.sensitivity)
        if self._model.stride != _STEP:
            raise Unavailable(
                f"The wake word model {model} is of another kind: install pymicro-wakeword 2.5.", code="engine_failed"
            )
        self._input = np.zeros(_STEP * _BANDS, self._model.input_dtype)
        self._input_at = self._input.ctypes.data_as(ctypes.c_void_p)
        self._output = ctypes.create_string_buffer(1)
        # One byte comes out, so all that it can mean is worked out beforehand, as the model does it.
        levels = np.arange(256, dtype=np.uint8).view(self._model.output_dtype).astype(np.float32)
        self._meaning = ((levels - self._model.output_zero_point) * self._model.output_scale).tolist()
        self._begin()

    def hear(self, features: NDArray[np.float64]) -> float:
        """The mean probability of the last steps; 0 while there have been too few."""
        model, lib = self._model, self._model.lib
        self._input[:] = np.rint(features / model.input_scale + model.input_zero_point)
        lib.TfLiteTensorCopyFromBuffer(model.input_tensor, self._input_at, self._input.nbytes)
        lib.TfLiteInterpreterInvoke(model.interpreter)
        lib.TfLiteTensorCopyToBuffer(model.output_tensor, self._output, 1)
        self._recent.append(self._meaning[self._output.raw[0]])
        if len(self._recent) < self._window:
            return 0.0
        probability: float = sum(self._recent) / self._window
        if probability > self.strongest:
            self.strongest = probability
        return probability

    def reset(self) -> None:
        self._model.reset()
        self._begin()

    def _begin(self) -> None:
        self._window = self._model.sliding_window_size
        self._recent: deque[float] = deque(maxlen=self._window)
        self.watch = Watch(self._cutoff)
        self.strongest = 0.0


class _Search:
    """One keyphrase search for all words without a model, and what tells it that somebody speaks.

    Searching costs ten times what a model does, and what a decoder remembers grows with the utterance: so one begins
    where somebody may be speaking, with what was just before it, and ends after a while.
    """

    _rest: bytes

    def __init__(self, words: Sequence[WakeWord]) -> None:
        self.strongest: dict[str, float] = {}
        self._words = {phrases.normalise(word.phrase): word for word in words}
        self._limits: dict[str, float] = {}
        lines = []
        spelt = sorted({each for phrase in self._words for each in phrase.split()})
        for phrase, word in self._words.items():
            self._limits[phrase] = exponent(phrases.sounds(phrase), word.sensitivity)
            lines.append(f"{phrase} /1e-{self._limits[phrase]:.1f}/\n")
        known = "".join(line for each in spelt for line in phrases.entries(each))
        with _file(known) as dictionary, _file("".join(lines)) as keyphrases:
            self._decoder = pocketsphinx.Decoder(
                hmm=str(Path(pocketsphinx.get_model_path("en-us"), "en-us")),
                dict=dictionary,
                kws=keyphrases,
                loglevel="FATAL",
            )
        self._searching = False
        self._begin()

    def feed(self, pcm: bytes) -> tuple[WakeWord, float] | None:
        """Hear some more audio; the word that was said in it, and how sure that is."""
        pcm = self._rest + pcm
        whole = len(pcm) // _LOOK * _LOOK
        self._rest = pcm[whole:]
        found = None
        for start in range(0, whole, _LOOK):
            found = self._look(pcm[start : start + _LOOK]) or found
        return found

    def reset(self) -> None:
        if self._searching:
            self._decoder.end_utt()
        self._begin()

    def _begin(self) -> None:
        # A new one, as it remembers what it took for noise.
        self._voice = webrtcvad.Vad(_LENIENT)
        self._rest = b""
        self._before: deque[bytes] = deque(maxlen=_OVERLAP)
        self._voiced, self._quiet, self._length = 0, 0, 0
        self._searching = False
        self.strongest.clear()

    def _look(self, piece: bytes) -> tuple[WakeWord, float] | None:
        voiced = self._voice.is_speech(piece, RATE)
        self._before.append(piece)
        if not self._searching:
            self._voiced = self._voiced + 1 if voiced else 0
            if self._voiced < _SURE:
                return None
            piece = b"".join(list(self._before)[-_RUN_UP:])
            self._start()
        self._quiet = 0 if voiced else self._quiet + 1
        self._length += 1
        self._decoder.process_raw(piece, False, False)
        found = self._found()
        if found is not None or self._quiet >= _OVER:
            return self._end() or found
        if self._length >= _LONGEST:
            found = self._end()
            if found is None:
                self._start()
                self._decoder.process_raw(b"".join(self._before), False, False)
        return found

    def _start(self) -> None:
        self._decoder.start_utt()
        self._searching, self._quiet, self._length = True, 0, 0

    def _end(self) -> tuple[WakeWord, float] | None:
        self._decoder.end_utt()
        self._searching, self._voiced = False, 0
        if (found := self._found()) is not None:
            self._before.clear()
        return found

    def _found(self) -> tuple[WakeWord, float] | None:
        """The longest phrase that has been found: who says “hey computer” says “computer” too."""
        if self._decoder.hyp() is None:
            return None
        likely = {segment.word.strip(): segment.prob for segment in self._decoder.seg()}
        phrase = max(likely, key=len)
        unlike = -(math.log(likely[phrase], _BASE) + _OFFSET) * _SHIFT * math.log10(_BASE)
        confidence = min(1.0, max(0.5, 1 - 0.5 * unlike / self._limits[phrase]))
        self.strongest[phrase] = max(confidence, self.strongest.get(phrase, 0.0))
        return self._words[phrase], confidence


@contextmanager
def _file(text: str) -> Iterator[str]:
    """A path at which the text can be read; in memory, so that a full disk does not stop it."""
    with open(os.memfd_create("agentvoicebox-words"), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"
