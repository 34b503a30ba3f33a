"""Wake words in speech, and in what is none."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pocketsphinx import Decoder
from pymicro_wakeword import MicroWakeWord, MicroWakeWordFeatures

from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.plugins import detector, phrases
from agentvoicebox.plugins.detector import RATE, Detection, Detector, Watch, cutoff, exponent, hear
from agentvoicebox.plugins.device.choices import WakeWord

CHUNK = 4_096
NABU, ALEXA, COMPUTER = WakeWord("okay nabu"), WakeWord("alexa"), WakeWord("hey computer")
TenVoices = Callable[[str], Sequence[bytes]]


def feed(ear: Detector, pcm: bytes, chunk: int = CHUNK) -> list[Detection]:
    """What is detected in audio that comes in chunks."""
    found = (ear.feed(pcm[start : start + chunk]) for start in range(0, len(pcm), chunk))
    return [detection for detection in found if detection is not None]


def bare(phrase: str, pcm: bytes) -> list[float]:
    """The probabilities of the engine as it comes, a step each."""
    model = MicroWakeWord.from_config(phrases.model_file(phrases.check(phrase).model))
    rows = list(MicroWakeWordFeatures().process_streaming(pcm))
    heard = [model.process_streaming_prob(row) for row in rows]
    return [probability or 0.0 for probability in heard[2::3]]


def noise(seconds: float, level: float = 30) -> bytes:
    """A room in which nothing happens."""
    samples = np.random.default_rng(1).normal(0, level, int(seconds * RATE))
    return samples.astype("<i2").tobytes()


@pytest.mark.parametrize("phrase", phrases.available())
@pytest.mark.parametrize("chunk", [2, 320, 1_001, CHUNK, 10**6])
def test_probabilities_are_those_of_the_bare_engine(phrase: str, chunk: int, say: Any, monkeypatch: pytest.MonkeyPatch):
    pcm, _ = say(phrase)
    heard: list[float] = []
    step = Watch.step
    monkeypatch.setattr(Watch, "step", lambda self, chance, at: heard.append(chance) or step(self, chance, at))
    feed(Detector([WakeWord(phrase)]), pcm, chunk)
    assert heard == bare(phrase, pcm)


@pytest.mark.parametrize("word", [NABU, ALEXA])
def test_recall_is_the_bare_engines_voice_by_voice(word: WakeWord, ten_voices: TenVoices):
    shipped = MicroWakeWord.from_config(phrases.model_file(phrases.check(word.phrase).model)).probability_cutoff
    spoken = [pcm + bytes(RATE) for pcm in ten_voices(word.phrase)]
    expected = [max(bare(word.phrase, pcm)) > shipped for pcm in spoken]
    assert sum(expected) >= 8
    ears = [Detector([NABU, ALEXA]) for _ in spoken]
    found = [[each.word for each in feed(ear, pcm)] for ear, pcm in zip(ears, spoken, strict=True)]
    assert found == [[word] if fires else [] for fires in expected], "each once, and no other word"


def test_nothing_fires_in_four_minutes_of_commands(commands: bytes):
    assert len(commands) / 2 / RATE > 240
    assert feed(Detector([WakeWord(phrase) for phrase in phrases.available()]), commands) == []
    assert feed(Detector([COMPUTER]), commands[: len(commands) // 8 * 2]) == []


def test_one_utterance_fires_once_and_the_next_again(ten_voices: TenVoices):
    said = ten_voices("okay nabu")[1] + noise(0.8)
    first, second = feed(Detector([NABU]), said * 2)
    length = len(said) / 2 / RATE
    assert first.word == second.word == NABU
    assert 0.85 < first.confidence <= 1
    assert 0.5 < first.at < length < second.at < 2 * length, "in seconds of audio"


def test_what_two_ears_hear_at_once_is_one_detection(ten_voices: TenVoices):
    spelt = WakeWord("alexa", model="sphinx")
    said = ten_voices("alexa")[1] + noise(1.5)
    assert len(feed(Detector([spelt]), said)) == len(feed(Detector([ALEXA]), said)) == 1
    assert len(feed(Detector([ALEXA, spelt]), said * 2)) == 2


def test_the_surer_the_sensitivity_wants_to_be_the_less_fires(ten_voices: TenVoices):
    fires = [
        sum(hear(pcm, WakeWord("okay nabu", sensitivity)).detected for pcm in ten_voices("okay nabu"))
        for sensitivity in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert fires == sorted(fires)
    assert fires[0] < fires[2] < fires[4] == 10


@pytest.mark.parametrize("phrase", phrases.available())
def test_half_the_sensitivity_is_the_shipped_cutoff(phrase: str):
    model = MicroWakeWord.from_config(phrases.model_file(phrases.check(phrase).model))
    assert cutoff(model.probability_cutoff, 0.5) == model.probability_cutoff


@given(st.sampled_from([0.85, 0.9, 0.95, 0.97]), st.floats(0, 1), st.floats(0, 1))
def test_more_sensitivity_never_needs_more(shipped: float, one: float, other: float):
    low, high = sorted((one, other))
    assert cutoff(shipped, low) >= cutoff(shipped, high)
    assert shipped / 2 <= cutoff(shipped, high) <= 0.99
    assert exponent(10, low) <= exponent(10, high)


def steps(watch: Watch, *told: tuple[float, float]) -> list[float]:
    """When it fired, of (seconds, probability) with a step each."""
    return [at for at, probability in told if watch.step(probability, at)]


def test_what_nearly_fired_before_a_detection_was_missed():
    watch = Watch(0.8)
    fired = steps(watch, (0, 0.1), (1, 0.6), (1.1, 0.7), (1.2, 0.1), (2, 0.1), (4, 0.6), (4.1, 0.9), (4.2, 0.95))
    assert fired == [4.1]
    assert watch.missed(4.1) == (0.7,)
    assert watch.missed(4.1) == (), "it is told once"


def test_what_nearly_fired_long_before_was_something_else():
    watch = Watch(0.8)
    assert steps(watch, (1, 0.7), (2, 0.1), (6.5, 0.9)) == [6.5]
    assert watch.missed(6.5) == ()


def test_rising_to_a_detection_is_not_missing_it():
    watch = Watch(0.8)
    assert steps(watch, (1, 0.5), (1.1, 0.3), (1.3, 0.6), (1.4, 0.9), (1.5, 0.7), (2.5, 0.1), (4, 0.9)) == [1.4, 4]
    assert watch.missed(4) == ()


def test_it_fires_again_only_after_it_came_down():
    watch = Watch(0.8)
    assert steps(watch, (1, 0.9), (2, 0.7), (3, 0.9), (4, 0.3), (5, 0.9)) == [1, 5]


def test_a_word_said_again_because_it_was_not_heard_is_told(ten_voices: TenVoices):
    voices = ten_voices("okay nabu")
    slow, clear = voices[5], voices[1]
    assert not hear(slow, NABU).detected
    assert hear(slow, NABU).confidence > 0.5
    (found,) = feed(Detector([NABU]), slow + noise(1) + clear + noise(0.5))
    assert len(found.missed) == 1
    assert 0.425 < found.missed[0] <= 0.85


def test_a_day_of_a_muted_microphone_costs_nothing(ten_voices: TenVoices):
    ear = Detector([NABU, COMPUTER])
    muted = bytes(CHUNK)
    for _ in range(10 * RATE):
        ear.feed(muted)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(24 * 3_600 * RATE * 2 // CHUNK):
        ear.feed(muted)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 10_000
    spoken = ten_voices("okay nabu")[1]
    (found,) = feed(ear, spoken)
    assert found.word == NABU
    assert found.at > 24 * 3_600, "time has gone on"


@pytest.mark.parametrize("phrase", phrases.available())
@pytest.mark.parametrize("pieces", [(CHUNK, 200), (3_000, 333), (322, 3_001)])
def test_skipped_silence_changes_nothing_that_is_heard_after_it(
    phrase: str, pieces: tuple[int, int], ten_voices: TenVoices, monkeypatch: pytest.MonkeyPatch
):
    size, count = pieces
    loud = noise(3, 9_000)
    told: list[list[tuple[float, float]]] = []
    step = Watch.step
    for settled in (detector.SETTLED, 10**9):
        monkeypatch.setattr(detector, "SETTLED", settled)
        heard: list[tuple[float, float]] = []

        def record(self: Watch, chance: float, at: float, kept: list[tuple[float, float]] = heard) -> bool:
            kept.append((chance, at))
            return step(self, chance, at)

        monkeypatch.setattr(Watch, "step", record)
        ear = Detector([WakeWord(phrase)])
        feed(ear, loud)
        for _ in range(count):
            ear.feed(bytes(size))
        heard.clear()
        feed(ear, ten_voices(phrase)[0])
        told.append(heard)
    # A step that silence had begun is made up for, so that there may be one more.
    assert told[0][-60:] == told[1][-60:]
    assert len(told[0]) - len(told[1]) in (0, 1)


def test_memory_stays_as_it_is_in_a_room_where_people_talk(commands: bytes):
    ear = Detector([NABU, COMPUTER])
    feed(ear, commands[: 12 * RATE])
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    feed(ear, commands[: 40 * RATE])
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 100_000


@pytest.mark.parametrize("phrase", ["hey computer", "computer", "okay jeeves"])
def test_phrases_without_a_model_are_heard_by_their_sound(phrase: str, ten_voices: TenVoices):
    word = WakeWord(phrase)
    clear = [hear(pcm, word) for pcm in ten_voices(phrase)[:2]]
    assert all(each.detected for each in clear)
    assert all(0.5 <= each.confidence <= 1 for each in clear)
    assert all(each.at is not None and 0.3 < each.at < 2.5 for each in clear)
    other = hear(ten_voices("what time is it")[0], word)
    assert (other.detected, other.confidence, other.at) == (False, 0.0, None)


def test_the_longer_phrase_is_the_one_that_was_said(ten_voices: TenVoices):
    ear = Detector([WakeWord("computer"), COMPUTER])
    (found,) = feed(ear, ten_voices("hey computer")[1] + bytes(RATE))
    assert found.word == COMPUTER


class Counted:
    """A decoder that keeps the lengths of its utterances."""

    lengths: list[int]

    def __init__(self, **settings: Any) -> None:
        self._decoder = Decoder(**settings)

    def start_utt(self) -> None:
        self.lengths.append(0)
        self._decoder.start_utt()

    def process_raw(self, pcm: bytes, *how: bool) -> None:
        self.lengths[-1] += len(pcm)
        self._decoder.process_raw(pcm, *how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


@pytest.fixture
def utterances(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each utterance that pocketsphinx was given."""
    found: list[int] = []
    monkeypatch.setattr(Counted, "lengths", found, raising=False)
    monkeypatch.setattr("pocketsphinx.Decoder", Counted)
    return found


def test_while_nobody_speaks_nothing_is_searched(utterances: list[int]):
    feed(Detector([COMPUTER]), noise(60))
    assert sum(utterances) < 3 * RATE


def test_no_search_grows_for_ever(utterances: list[int], commands: bytes, ten_voices: TenVoices):
    talk = b"".join(commands[start : start + 2 * RATE] for start in range(8_000, 20 * 2 * RATE, 2 * RATE))
    ear = Detector([COMPUTER])
    feed(ear, talk)
    assert max(utterances) < 10 * 2 * RATE
    found = feed(ear, talk[: 6 * RATE] + ten_voices("hey computer")[1] + bytes(RATE))
    assert [each.word for each in found] == [COMPUTER], "and in between somebody is heard"


def test_a_full_disk_keeps_no_phrase_from_being_loaded(monkeypatch: pytest.MonkeyPatch, ten_voices: TenVoices):
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    assert hear(ten_voices("hey computer")[1], COMPUTER).detected


@pytest.mark.parametrize("pcm", [b"", b"\\1", bytes(7), noise(0.01), noise(0.5)[:-1]])
def test_next_to_nothing_is_nothing(pcm: bytes):
    for word in (NABU, COMPUTER):
        assert not hear(pcm, word).detected


def test_a_model_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch):
    load = MicroWakeWord._load_model
    monkeypatch.setattr(MicroWakeWord, "_load_model", lambda self: (load(self), setattr(self, "stride", 1)))
    with pytest.raises(Unavailable, match="install pymicro-wakeword"):
        Detector([NABU])


@pytest.mark.parametrize(
    ("word", "code"),
    [
        (WakeWord("hey xqzzt"), "phrase_unpronounceable"),
        (WakeWord("hey xqzzt", model="sphinx"), "phrase_unpronounceable"),
        (WakeWord("okay nabu", model="micro/none"), "model_unknown"),
        (WakeWord("okay nabu", model="/etc/passwd"), "model_unknown"),
    ],
)
def test_a_word_that_cannot_be_heard_is_refused(word: WakeWord, code: str):
    with pytest.raises(BadInput) as refused:
        Detector([word])
    assert refused.value.code == code


def test_without_words_nothing_is_heard():
    assert feed(Detector([]), noise(1)) == []


def test_after_a_reset_what_was_begun_is_forgotten(ten_voices: TenVoices):
    for phrase in ("okay nabu", "hey computer"):
        said = ten_voices(phrase)[1]
        ear = Detector([WakeWord(phrase)])
        half = len(said) // 4 * 2
        assert feed(ear, said[:half]) == []
        ear.reset()
        assert feed(ear, said[half:] + bytes(RATE)) == []
        assert len(feed(ear, said + bytes(RATE))) == 1
