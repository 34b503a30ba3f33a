"""The tenant's voice: heard as it comes, in its order, by the device where the platform cannot, and by nobody else."""

from __future__ import annotations

import base64
import errno
import gc
import io
import os
import tempfile
import threading
import wave
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from ovos_audio.service import PlaybackService
from ovos_bus_client.message import Message
from ovos_plugin_manager.templates.tts import TTS, TTSContext
from ovos_utils import classproperty
from ovos_utils.fakebus import FakeBus

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins import tts as module
from agentvoicebox.plugins.device import local, player, stage, wire
from agentvoicebox.plugins.tts import TenantTTS

RATE, LOCAL = 24_000, 7
"""The rate of the platform's audio; the level of the local engine's."""

START, END = "recognizer_loop:audio_output_start", "recognizer_loop:audio_output_end"
LISTEN, HANDLED = "mycroft.mic.listen", "mycroft.stop.handled"


def sound(level: int, seconds: float = 0.5) -> bytes:
    return np.full(int(RATE * seconds), level, "<i2").tobytes()


def level(pcm: bytes) -> list[int]:
    """The levels of audio, in their order."""
    samples = np.frombuffer(pcm, "<i2")
    return [int(each) for each in samples[np.insert(np.diff(samples) != 0, 0, True)]] if samples.size else []


def heard(path: str) -> list[int]:
    with wave.open(path) as wav:
        return level(wav.readframes(wav.getnframes()))


class Voice(TTS):
    """A local engine: its level, at 16 kHz."""

    voices = frozenset({"kal"})
    asked: ClassVar[list[tuple[str, str | None]]] = []

    @classproperty
    def available_languages(cls) -> set[str]:
        return {"en-US"}

    def get_tts(self, sentence: str, wav_file: str, lang: str | None = None, voice: str | None = None) -> Any:
        self.asked.append((sentence, voice))
        with wave.open(wav_file, "wb") as wav:
            wav.setparams((1, 2, 16_000, 0, "NONE", ""))
            wav.writeframes(np.full(8_000, LOCAL, "<i2").tobytes())
        return wav_file, None


class Audio:
    """ovos-audio, on a bus in this process; what it plays is kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bus = FakeBus()
        self.told: list[tuple[str, Message]] = []
        for kind in (START, END, LISTEN, HANDLED, "recognizer_loop:utterance_start", "mycroft.audio.is_speaking"):
            self.bus.on(kind, lambda message, kind=kind: self.told.append((kind, message)))
        self.files: list[list[int]] = []
        self.answers: list[bytes] = []
        self.bus.on("speak:b64_audio.response", lambda message: self.answers.append(message.data["audio"]))
        TTS.queue = Queue()
        self.service = PlaybackService(
            bus=self.bus,
            tts=SimpleNamespace(playback=None),
            disable_ocp=True,
            validate_source=False,
            disable_fallback=True,
        )

    def use(self, tts: TTS) -> None:
        """Speak with this from now on."""
        tts.init(self.bus, self.service.playback_thread)
        self.service.tts = tts

    def speak(self, text: str, listen: bool = False, **context: Any) -> None:
        self.bus.emit(Message("speak", {"utterance": text, "expect_response": listen}, {"mark": text, **context}))

    def streamed(self) -> list[list[int]]:
        """The levels of what each run of the player was given."""
        return [level(path.read_bytes()) for path in sorted(self.directory.glob("*.raw"), key=_begun)]

    def kinds(self, *kinds: str) -> list[str]:
        return [kind for kind, _ in self.told if not kinds or kind in kinds]

    def play_file(self, path: str) -> None:
        self.files.append(heard(path))

    def close(self) -> None:
        self.service.playback_thread.stop()


def _begun(path: Path) -> int:
    return int(path.name.split("-")[0])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    plugins: dict[str, Any] = {"agentvoicebox-tts-flite": Voice}
    monkeypatch.setattr(local, "plugin_class", lambda kind, name: plugins.get(name))
    monkeypatch.setattr(local, "LOADING", 60.0)
    Voice.asked.clear()
    return plugins


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test has a cache of its own."""
    monkeypatch.setattr(TTSContext, "_caches", {})

    def place(name: str) -> str:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        return str(tmp_path / name)

    monkeypatch.setattr("ovos_plugin_manager.utils.tts_cache.get_tmp_cache_dir", place)
    monkeypatch.setattr(module, "get_cache_directory", place)


@pytest.fixture
def audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Audio]:
    class Nothing:
        def __init__(self, *args: Any, **more: Any) -> None: ...

    (tmp_path / "played").mkdir()
    monkeypatch.setattr("ovos_audio.service.AudioService", Nothing)
    audio = Audio(tmp_path / "played")
    monkeypatch.setattr("ovos_audio.playback.play_audio", audio.play_file)
    yield audio
    audio.close()


@pytest.fixture
def platform(platforms: Callable[..., Any]) -> Any:
    platform = platforms()
    platform.say = lambda text: iter([(sound(100), RATE), (sound(101), RATE)])
    return platform


@pytest.fixture
def make(installed: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., TenantTTS]]:
    """Voices that are patient, unless a test says otherwise: this machine may stall."""
    made: list[TenantTTS] = []

    def make(link: Any = None, **config: Any) -> TenantTTS:
        made.append(TenantTTS({"lang": "en-US", "patience": 30, **config}, link=link))
        return made[-1]

    yield make
    for each in made:
        each.shutdown()


@pytest.fixture
def keeping(tmp_path: Path) -> dict[str, Any]:
    """The configuration for streaming, to a player that writes down what it is given."""
    # Named after the time: process numbers begin anew some day.
    command = 'exec cat > "$0/$(date +%s%N)-$1.raw"'
    return {"enable_streaming": True, "player": ["sh", "-c", command, str(tmp_path / "played"), "{rate}"]}


@pytest.fixture
def link(platform: Any, links: Callable[..., Any]) -> Any:
    return links(platform, "audio")


# --- whole files ------------------------------------------------------------------------------------------------------


def test_a_file_of_what_the_platform_says(make: Any, link: Any, platform: Any, tmp_path: Path):
    path, phonemes = make(link).get_tts("Hello there.", str(tmp_path / "a.wav"))
    assert (heard(path), phonemes) == ([100, 101], None)
    with wave.open(path) as wav:
        assert (wav.getframerate(), wav.getnframes()) == (RATE, RATE)
    assert platform.said == [("Hello there.", "", "")], "voice and language are the tenant's choice"


@pytest.mark.parametrize("when", ["before", "amid", "refused", "nothing"])
def test_a_file_of_what_the_device_says(when: str, make: Any, link: Any, platform: Any, tmp_path: Path, until: Any):
    def say(text: str) -> Iterator[Any]:
        if when == "nothing":
            return
        if when == "refused":
            yield wire.Problem(0, "quota_exceeded", "The month is used up.")
        yield sound(100), RATE
        raise platform.breaks

    platform.say = say
    if when == "before":
        platform.die()
        until(lambda: link.state != "up")
    path, _ = make(link).get_tts("Hello there.", str(tmp_path / "a.wav"))
    assert heard(path) == [LOCAL], "half of a stream is nothing: the device says all of it"
    if when == "before":
        platform.live()
    until(lambda: platform.reports)
    reason = {"refused": "quota_exceeded", "nothing": "platform_silent"}.get(when, "platform_away")
    [told] = platform.reports
    assert (told["kind"], told["engine"], told["seconds"], told["reason"]) == (
        "tts", "agentvoicebox-tts-flite", 0.5, reason,
    )  # fmt: skip


@pytest.mark.parametrize("begun", [False, True])
def test_a_platform_that_is_at_work_and_comes_to_nothing(
    begun: bool, make: Any, link: Any, platform: Any, tmp_path: Path, until: Any, monkeypatch: pytest.MonkeyPatch
):
    def say(text: str) -> Iterator[Any]:
        yield sound(100), RATE
        yield from repeat(None)

    platform.say = say if begun else None  # nothing more ever comes, but for signs of work
    monkeypatch.setattr(module, "REST", 1_000.0)
    voice = make(link, patience=0.5)
    for text in ("Hello there.", "And good morning."):
        path, _ = voice.get_tts(text, str(tmp_path / "a.wav"))
        assert heard(path) == [LOCAL]
    until(lambda: len(platform.reports) == 2)
    assert len(platform.said) == 1, "nobody waits for each sentence of a reply"
    assert {told["reason"] for told in platform.reports} == {"platform_late"}
    platform.say = lambda text: iter([(sound(100), RATE)])
    monkeypatch.setattr(voice, "_late_until", 0.0)
    monkeypatch.setattr(voice, "_patience", 30.0)
    assert heard(voice.get_tts("Hello there.", str(tmp_path / "b.wav"))[0]) == [100], "it has its turn again"


@pytest.mark.parametrize("text", ["", " ", "…!"])
def test_nothing_to_say_is_a_moment_of_silence(text: str, make: Any, link: Any, platform: Any, tmp_path: Path):
    path, _ = make(link).get_tts(text, str(tmp_path / "a.wav"))
    assert heard(path) == [0]
    assert not platform.said
    assert not Voice.asked


def test_a_long_text_is_said_in_pieces(make: Any, link: Any, platform: Any, tmp_path: Path):
    text = " ".join(f"This is sentence number {number} of a long story." for number in range(200))
    assert len(text) > 8_000
    path, _ = make(link).get_tts(text, str(tmp_path / "a.wav"))
    pieces = [said for said, _, _ in platform.said]
    assert " ".join(pieces) == text
    assert max(map(len, pieces)) <= module.LONG
    assert heard(path) == [100, 101] * len(pieces)
    assert heard(str(make(link).synth(text)[0])) == heard(path), "as `speak:b64_audio` asks for it"


def test_a_long_text_that_breaks_off_is_said_once(make: Any, link: Any, platform: Any, tmp_path: Path):
    text = " ".join(f"This is sentence number {number} of a long story." for number in range(60))

    def say(text: str) -> Iterator[Any]:
        yield sound(100), RATE
        if "number 59" in text:
            raise platform.breaks

    platform.say = say
    path, _ = make(link).get_tts(text, str(tmp_path / "a.wav"))
    levels = heard(path)  # the one to the rate of the other, which rounds its edges
    assert levels[0] == 100
    assert levels.count(100) == 1, "what was said before is not said again, and its end by the device alone"
    assert LOCAL in levels


def test_nobody_can_speak(make: Any, tmp_path: Path):
    with pytest.raises(Unavailable, match="fallback"):
        make(fallback="").get_tts("Hello.", str(tmp_path / "a.wav"))


def test_a_local_engine_that_goes_leaves_the_playback_alone(make: Any, installed: dict[str, Any], audio: Audio):
    class Broken(Voice):
        def __init__(self, config: Any = None) -> None:
            super().__init__(config)
            raise OSError("no such program")

    installed["broken"] = Broken
    audio.use(make())
    broken = make(fallback="broken")
    with pytest.raises(Unavailable):
        broken.synth("Hello.")
    good = make()
    good.synth("Hello.")
    for each in (broken, good):
        each.shutdown()
    del broken
    gc.collect()
    assert audio.service.playback_thread.is_running, "the stock template stops the only playback thread there is"


# --- the tenant's choices ---------------------------------------------------------------------------------------------


def test_the_local_engine_takes_a_voice_that_it_has(make: Any, link: Any, platform: Any, until: Any, tmp_path: Path):
    platform.say = lambda text: iter([wire.Problem(0, "engine_failed", "No.")])
    voice = make(link)
    voice.get_tts("One.", str(tmp_path / "a.wav"))
    platform.configure(replace(platform.choices, voice="kal"))
    until(lambda: link.choices.voice == "kal")
    voice.get_tts("Two.", str(tmp_path / "a.wav"))
    assert Voice.asked[0][0] == "One."
    assert Voice.asked[1] == ("Two.", "kal")
    assert Voice.asked[0][1] != "af_heart"


def test_a_text_in_another_language_is_told_to_be(make: Any, link: Any, platform: Any, audio: Audio, until: Any):
    audio.use(make(link))
    for lang in ("en-US", "fr-FR"):
        audio.bus.emit(Message("speak", {"utterance": f"Text in {lang}", "lang": lang}))
    until(lambda: len(platform.said) == 2)
    assert [language for _, language, _ in platform.said] == ["", "fr-FR"]


def test_the_device_may_insist_on_a_voice(make: Any, link: Any, platform: Any, tmp_path: Path):
    make(link, voice="bf_emma").get_tts("Hello.", str(tmp_path / "a.wav"))
    assert platform.said == [("Hello.", "", "bf_emma")]


# --- the cache: H6, H28 -----------------------------------------------------------------------------------------------


def tenants(platforms: Any, links: Any) -> list[tuple[Any, Any]]:
    """Two tenants whose voices sound different."""
    made = []
    for number, name in enumerate(("one", "two")):
        platform = platforms(name)
        platform.say = lambda text, number=number: iter([(sound(200 + number), RATE)])
        made.append((platform, links(platform, "audio")))
    return made


def test_two_tenants_say_the_same_each_in_its_own_voice(
    make: Any, platforms: Any, links: Any, audio: Audio, until: Any
):
    voices = [make(link) for _, link in tenants(platforms, links)]
    for voice in (*voices, *voices):
        audio.use(voice)
        audio.speak("Good morning.")
    until(lambda: len(audio.files) == 4)
    assert audio.files == [[200], [201], [200], [201]]


def test_the_key_of_the_stock_cache_would_mix_them(audio: Audio, until: Any):
    """What the test above would find: it fails with a voice that is cached as the template does it."""

    class StockLike(TTS):
        def shutdown(self) -> None: ...

        @classproperty
        def available_languages(cls) -> set[str]:
            return {"en-US"}

        def get_tts(self, sentence: str, wav_file: str, lang: Any = None, voice: Any = None) -> Any:
            with wave.open(wav_file, "wb") as wav:
                wav.setparams((1, 2, RATE, 0, "NONE", ""))
                wav.writeframes(sound(self.config["level"]))
            return wav_file, None

    for number in (200, 201):
        voice = StockLike({"level": number})
        voice._plugin_id = "stock-like"
        audio.use(voice)
        audio.speak("Good morning.")
    until(lambda: len(audio.files) == 2)
    assert audio.files == [[200], [200]]


@pytest.mark.parametrize("change", [{"voice": "am_onyx"}, {"speed": 1.5}, {"persona": "Bo"}, {"language": "de-DE"}])
def test_a_change_on_the_platform_is_heard_in_the_next_sentence(
    change: dict[str, Any], make: Any, link: Any, platform: Any, audio: Audio, until: Any
):
    audio.use(make(link))
    audio.speak("Good morning.")
    audio.speak("Good morning.")
    assert len(platform.said) == 1, "said once, played twice"
    platform.configure(replace(platform.choices, **change))
    until(lambda: link.choices == platform.choices)
    audio.speak("Good morning.")
    assert len(platform.said) == 2
    until(lambda: len(audio.files) == 3)


def test_names_of_tenants_and_voices_are_no_paths(make: Any, platforms: Any, links: Any, tmp_path: Path):
    platform = platforms("..%2f")
    platform.choices = replace(platform.choices, voice="../../../etc", persona="a/b")
    voice = make(links(platform, "audio"))
    path = Path(str(voice.synth("Hello.")[0])).resolve()
    assert path.is_relative_to(tmp_path / "tts" / "agentvoicebox-tts")


def test_what_the_device_says_is_not_kept(make: Any, link: Any, platform: Any, audio: Audio, until: Any):
    audio.use(make(link))
    good = platform.say
    platform.say = lambda text: iter([wire.Problem(0, "engine_failed", "No.")])
    audio.speak("Good morning.")
    platform.say = good
    audio.speak("Good morning.")
    audio.speak("Good morning.")
    until(lambda: len(audio.files) == 3)
    assert audio.files == [[LOCAL], [100, 101], [100, 101]]
    assert len(platform.said) == 2


def test_what_was_said_is_there_without_the_platform(make: Any, link: Any, platform: Any, audio: Audio, until: Any):
    audio.use(make(link))
    audio.speak("Good morning.")
    platform.die()
    until(lambda: link.state != "up")
    audio.speak("Good morning.")
    until(lambda: len(audio.files) == 2)
    assert audio.files == [[100, 101]] * 2


def test_only_so_many_sentences_are_kept(make: Any, link: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "KEPT", 5)
    voice = make(link)
    for number in range(40):
        voice.synth(f"Sentence {number}.")
    files = list((tmp_path / "tts").rglob("*.wav"))
    assert 5 <= len(files) <= 5 + module._TIDY
    assert heard(str(voice.synth("Sentence 0.")[0])) == [100, 101], "what was deleted is made again"


def test_what_is_known_of_old_sentences_does_not_grow(make: Any, link: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "KEPT", 5)
    voice = make(link)
    for number in range(20):
        voice.synth(f"Sentence {number}.")
    [cache] = TTSContext._caches.values()
    assert len(cache.cached_sentences) == 5


def test_what_was_said_during_a_change_is_not_kept(make: Any, link: Any, platform: Any, until: Any):
    voice = make(link)
    before = platform.choices

    def say(text: str) -> Iterator[Any]:
        platform._loop.create_task(change())
        while link.choices.voice != "bf_emma":
            yield None
        yield sound(100), RATE

    async def change() -> None:
        platform.choices = replace(before, voice="bf_emma")
        said = wire.encode(wire.Configured(platform.choices.etag, platform.choices.as_dict()))
        for socket in platform._sockets:
            await socket.send(said)

    platform.say = say
    voice.synth("Good morning.")
    assert link.choices.voice == "bf_emma"
    platform.configure(before)
    until(lambda: link.choices == before)
    platform.say = lambda text: iter([(sound(101), RATE)])
    assert heard(str(voice.synth("Good morning.")[0])) == [101], "nobody knows in which voice the first one was said"


def test_what_one_tenant_has_to_say_is_not_told_to_the_next(make: Any, link: Any, platform: Any):
    voice = make(link)
    context = voice._get_ctxt()
    link.welcome = replace(link.welcome, tenant_id="another")
    assert heard(str(voice.synth("Good morning.", context)[0])) == [LOCAL]
    assert not platform.said


def test_it_may_be_told_to_keep_nothing(make: Any, link: Any, platform: Any):
    voice = make(link, enable_cache=False)
    assert heard(str(voice.synth("Hello.")[0])) == heard(str(voice.synth("Hello.")[0])) == [100, 101]
    assert len(platform.said) == 2


def test_what_another_tenant_says_stays_on_the_device(make: Any, link: Any, platform: Any, audio: Audio, until: Any):
    platform.configure(replace(platform.choices, voice="kal", speed=2.0))
    until(lambda: link.choices.voice == "kal")
    audio.use(make(link))
    audio.speak("Good morning.", tenant_id="acme-id")
    audio.speak("Good morning.", tenant_id="other-id")
    until(lambda: len(audio.files) == 2)
    assert audio.files == [[100, 101], [LOCAL]], "not even what was said before for us"
    audio.bus.emit(Message("speak:b64_audio", {"utterance": "Good morning."}, {"tenant_id": "other-id"}))
    [answer] = audio.answers
    with wave.open(io.BytesIO(base64.b64decode(answer))) as wav:
        assert level(wav.readframes(wav.getnframes())) == [LOCAL]
    assert [voice for _, voice in Voice.asked if voice] == [], "nor in our tenant's voice"
    assert len(platform.said) == 1
    assert not platform.reports


# --- as it comes ------------------------------------------------------------------------------------------------------


def test_it_is_heard_while_it_is_made(
    make: Any, link: Any, platform: Any, audio: Audio, keeping: dict[str, Any], until: Any
):
    more = threading.Event()

    def say(text: str) -> Iterator[Any]:
        yield sound(100), RATE
        while not more.is_set():
            yield None
        yield sound(101), RATE

    platform.say = say
    audio.use(make(link, **keeping))
    audio.speak("Good morning.", listen=True)
    until(lambda: audio.streamed() == [[100]])
    assert audio.kinds() == [START, "recognizer_loop:utterance_start"]
    audio.bus.emit(Message("mycroft.audio.speak.status"))
    assert audio.told.pop()[1].data == {"speaking": True}
    more.set()
    until(lambda: LISTEN in audio.kinds())
    assert audio.streamed() == [[100, 101]]
    assert audio.kinds() == [START, "recognizer_loop:utterance_start", END, LISTEN]
    assert {message.context["mark"] for _, message in audio.told} == {"Good morning."}
    assert not audio.files
    audio.bus.emit(Message("mycroft.audio.speak.status"))
    assert audio.told.pop()[1].data == {"speaking": False}


def test_the_rate_is_the_platforms(make: Any, link: Any, audio: Audio, keeping: dict[str, Any], until: Any):
    audio.use(make(link, **keeping))
    audio.speak("Good morning.")
    until(lambda: END in audio.kinds())
    [path] = audio.directory.iterdir()
    assert path.name.endswith(f"-{RATE}.raw")
    assert len(path.read_bytes()) == 2 * RATE


def test_what_was_streamed_is_kept_and_keeps_its_message(
    make: Any, link: Any, platform: Any, audio: Audio, keeping: dict[str, Any], until: Any
):
    """Hazard H28: the template drops the message of a sentence that it has in its cache."""
    audio.use(make(link, **keeping))
    for number in (1, 2):
        audio.speak("Good morning.", listen=True, number=number)
        until(lambda number=number: audio.kinds().count(LISTEN) == number)
    assert audio.streamed() == [[100, 101]]
    assert audio.files == [[100, 101]]
    assert len(platform.said) == 1
    assert [message.context["number"] for _, message in audio.told] == [1] * 4 + [2] * 4


@pytest.mark.parametrize("begun", [True, False])
def test_a_sentence_that_breaks_off_is_said_again(
    begun: bool, make: Any, link: Any, platform: Any, audio: Audio, keeping: dict[str, Any], until: Any
):
    def say(text: str) -> Iterator[Any]:
        if begun:
            yield sound(100), RATE
            for _ in range(20):
                yield None
        raise platform.breaks

    platform.say = say
    audio.use(make(link, **keeping))
    audio.speak("Good morning.", listen=True)
    until(lambda: LISTEN in audio.kinds())
    assert audio.streamed()[-1] == [LOCAL], "all of it, by the device"
    assert audio.kinds() == [START, "recognizer_loop:utterance_start", END, LISTEN]
    platform.say = lambda text: iter([(sound(100), RATE)])
    until(lambda: link.state == "up")
    audio.speak("Good morning.")
    until(lambda: audio.kinds().count(END) == 2)
    assert audio.streamed()[-1] == [100], "and it is the platform's turn again"
    assert not audio.files


def test_without_a_platform_the_device_is_heard(make: Any, audio: Audio, keeping: dict[str, Any], until: Any):
    audio.use(make(**keeping))
    audio.speak("Good morning.")
    until(lambda: END in audio.kinds())
    assert audio.streamed() == [[LOCAL]]


def test_without_anybody_who_speaks_it_still_ends(make: Any, audio: Audio, keeping: dict[str, Any], until: Any):
    audio.use(make(fallback="", **keeping))
    audio.speak("Good morning.", listen=True)
    until(lambda: LISTEN in audio.kinds())
    assert audio.kinds() == [START, END, LISTEN]


def test_all_is_played_in_its_order(
    make: Any, link: Any, platform: Any, audio: Audio, keeping: dict[str, Any], until: Any, tmp_path: Path
):
    chime = tmp_path / "chime.wav"
    with wave.open(str(chime), "wb") as wav:
        wav.setparams((1, 2, RATE, 0, "NONE", ""))
        wav.writeframes(sound(50))
    order: list[Any] = []
    platform.say = lambda text: iter([(sound(int(text[7])), RATE)])
    audio.use(make(link, **keeping))
    audio.bus.on(
        "recognizer_loop:utterance_start", lambda message: order.append(message.data.get("utterance", "chime"))
    )
    for step in ("Number 1.", chime, "Number 2.", "Number 3.", chime):
        if isinstance(step, str):
            audio.speak(step)
        else:
            audio.bus.emit(Message("mycroft.audio.queue", {"uri": str(step)}))
    until(lambda: len(order) == 5 and audio.kinds()[-1] == END)
    assert order == ["Number 1.", "chime", "Number 2.", "Number 3.", "chime"]
    assert audio.streamed() == [[1], [2], [3]]
    assert audio.files == [[50], [50]]
    assert audio.kinds(START, END) == [START, END] * audio.kinds().count(START)


@pytest.mark.parametrize("button", ["mycroft.stop", "mycroft.audio.speech.stop"])
def test_stop_stops_at_once(button: str, make: Any, link: Any, platform: Any, audio: Audio, until: Any):
    platform.say = lambda text: iter([(sound(100, 10.0), RATE)] * 3)
    audio.use(make(link, enable_streaming=True, player="sleep 600"))
    for text in ("One.", "Two.", "Three."):
        audio.speak(text, listen=True)
    until(lambda: START in audio.kinds())
    audio.bus.emit(Message(button, {}, {"mark": "stop"}))
    until(lambda: END in audio.kinds())  # long before the player is done
    assert audio.kinds(START, END, LISTEN, HANDLED) in ([START, HANDLED, END], [START, END, HANDLED])
    platform.say = lambda text: iter([(sound(100), RATE)])
    audio.use(make(link, enable_streaming=True, player="cat"))
    audio.speak("Four.")
    until(lambda: audio.kinds().count(END) == 2)


def test_stop_before_anything_is_heard(
    make: Any, link: Any, platform: Any, audio: Audio, keeping: dict[str, Any], until: Any
):
    platform.say = None
    audio.use(make(link, **keeping))
    audio.speak("Good morning.", listen=True)
    until(lambda: audio.service.is_speaking and platform.said)
    audio.bus.emit(Message("mycroft.stop"))
    until(lambda: END in audio.kinds())
    assert LISTEN not in audio.kinds()
    assert not audio.streamed()
    assert not Voice.asked
    until(lambda: platform.cancelled)


@pytest.mark.parametrize("command", ["false", "sh -c 'exit 3'", "true"])
def test_a_player_that_fails(
    command: str, make: Any, link: Any, platform: Any, audio: Audio, until: Any, lines: list[str]
):
    platform.say = lambda text: iter([(sound(100, 5.0), RATE)])
    audio.use(make(link, enable_streaming=True, player=command))
    audio.speak("Good morning.", listen=True)
    until(lambda: LISTEN in audio.kinds())
    assert audio.files == [[100]], "it is played from a file, as ovos-audio does it"
    assert audio.kinds(START, END, LISTEN) == [START, END, LISTEN]
    said = next(line for line in lines if "sound device" in line)
    assert "Good morning" not in said


def test_without_a_player_files_are_played(
    make: Any, link: Any, audio: Audio, until: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(player.shutil, "which", lambda name: None)
    audio.use(make(link, enable_streaming=True))
    audio.speak("Good morning.")
    until(lambda: END in audio.kinds())
    assert audio.files == [[100, 101]]


def test_a_full_disk_is_survived(
    make: Any, link: Any, platform: Any, audio: Audio, keeping: dict[str, Any], until: Any,
    monkeypatch: pytest.MonkeyPatch, lines: list[str],
):  # fmt: skip
    def full(name: str) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    audio.use(make(link, **keeping))
    with monkeypatch.context() as patch:
        patch.setattr(module, "get_cache_directory", full)
        audio.speak("Good morning.")
        until(lambda: END in audio.kinds())
        assert audio.streamed() == [[100, 101]]
        until(lambda: any("No space left" in line for line in lines))
    for number in (2, 3):
        audio.speak("Good morning.")
        until(lambda number=number: audio.kinds().count(END) == number)
    assert len(platform.said) == 2, "kept again as soon as there is a place"


def test_the_device_speaks_from_a_full_disk(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = tempfile.TemporaryDirectory

    def full(dir: str | None = None, **how: Any) -> Any:
        if dir is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return made(dir=dir, **how)

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    path, _ = make().get_tts("Good morning.", str(tmp_path / "a.wav"))
    assert heard(path) == [LOCAL]


def test_a_text_of_nothing_begins_and_ends(
    make: Any, link: Any, platform: Any, audio: Audio, keeping: dict[str, Any], until: Any
):
    audio.use(make(link, **keeping))
    audio.speak("<speak></speak>", listen=True)
    until(lambda: LISTEN in audio.kinds())
    assert audio.kinds() == [START, END, LISTEN]
    assert not platform.said


def test_a_voice_that_is_loaded_anew(
    make: Any, link: Any, platform: Any, audio: Audio, keeping: dict[str, Any], until: Any
):
    first = make(link, **keeping)
    audio.use(first)
    first.shutdown()
    second = make(link, **keeping)
    audio.use(second)
    first.shutdown()
    del first
    audio.speak("Good morning.")
    until(lambda: END in audio.kinds())
    assert audio.streamed() == [[100, 101]]
    second.shutdown()
    assert not {"_play", "clear_queue"} & set(vars(audio.service.playback_thread)), "the thread is as it was"


def test_transformers_of_files_have_their_files(
    make: Any, link: Any, audio: Audio, keeping: dict[str, Any], until: Any
):
    playback = audio.service.playback_thread
    playback.tts_transform.loaded_plugins["made"] = object()
    assert not stage.Stage.fits(playback)
    playback.tts_transform.loaded_plugins.clear()
    assert stage.Stage.fits(playback)


def test_a_long_sentence_that_breaks_off_is_played_to_its_end(tmp_path: Path, keeping: dict[str, Any]):
    sentence = stage.Sentence()
    sentence.add(sound(100), RATE)
    sentence.add(sound(101), RATE)
    sentence.again(1)
    sentence.add(sound(LOCAL), RATE)
    sentence.end()
    playing = threading.Thread(target=sentence.play, args=(player.find(keeping["player"]),), daemon=True)
    (tmp_path / "played").mkdir()
    playing.start()
    playing.join(60)
    assert not playing.is_alive()
    [path] = (tmp_path / "played").glob("*.raw")
    assert level(path.read_bytes()) == [100, LOCAL]


def test_a_player_that_fails_plays_no_file_after_a_stop(make: Any, link: Any, platform: Any, audio: Audio, until: Any):
    platform.say = lambda text: chain([(sound(100, 5.0), RATE)], repeat(None))
    audio.use(make(link, enable_streaming=True, player="false"))
    audio.speak("Good morning.", listen=True)
    until(lambda: "recognizer_loop:utterance_start" in audio.kinds())
    audio.bus.emit(Message("mycroft.stop"))
    until(lambda: END in audio.kinds())
    assert not audio.files
    assert LISTEN not in audio.kinds()


def test_nobody_hears_out_half_a_sentence(monkeypatch: pytest.MonkeyPatch, until: Any):
    """A player takes audio as slowly as it is heard: what has broken off must not be played to its end first."""
    runs: list[Any] = []

    class Slow:
        def __init__(self, command: Any, rate: int) -> None:
            self.rate, self.taken, self.stopped = rate, list[bytes](), threading.Event()
            runs.append(self)

        def write(self, pcm: bytes) -> None:
            self.taken.append(pcm)
            if self.rate == RATE and self.stopped.wait(60):
                raise player.PlayerBroke

        def finish(self) -> None: ...

        def stop(self) -> None:
            self.stopped.set()

        close = stop

    monkeypatch.setattr(stage, "Player", Slow)
    sentence = stage.Sentence()
    sentence.add(sound(100), RATE)
    playing = threading.Thread(target=sentence.play, args=(["player"],))
    playing.start()
    until(lambda: runs and runs[0].taken)
    sentence.again()
    sentence.add(sound(LOCAL), 16_000)
    sentence.end()
    playing.join(60)
    assert [level(b"".join(run.taken)) for run in runs] == [[100], [LOCAL]]


# --- players ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "command"),
    [
        ("aplay", "aplay -q -t raw -f S16_LE -r {rate} -c 1 --start-delay=50000"),
        ("aplay pacat", "pacat --playback --raw --format=s16le --rate={rate} --channels=1 --latency-msec=100"),
        (
            "ffplay pw-cat",
            "ffplay -nodisp -autoexit -loglevel error -probesize 32 -analyzeduration 0 -f s16le"
            " -sample_rate {rate} -ch_layout mono -i pipe:0",
        ),
        ("pw-cat", ""),
    ],
)
def test_players_that_are_found(there: str, command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(player.shutil, "which", lambda name: name if name in there.split() else None)
    assert player.find() == command.split()
    assert player.find("mine --rate {rate} 'a b'") == []
    monkeypatch.setattr(player.shutil, "which", lambda name: name)
    assert player.find("mine --rate {rate} 'a b'") == ["mine", "--rate", "{rate}", "a b"]
    assert player.find(["mine", "{rate}"]) == ["mine", "{rate}"]


def test_a_player_is_told_the_rate_and_takes_all_there_is(tmp_path: Path):
    playing = player.Player(["sh", "-c", f'cat > "{tmp_path}/$0"', "{rate}.raw"], RATE)
    playing.write(sound(9))
    playing.write(sound(7))
    playing.finish()
    assert (tmp_path / f"{RATE}.raw").read_bytes() == sound(9) + sound(7)


def test_a_player_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(player, "STUCK", 0.1)
    playing = player.Player(["sleep", "600"], RATE)
    with pytest.raises(player.PlayerBroke):
        playing.write(sound(9, 10.0))
    playing.close()
    assert playing._process.wait(30) < 0, "it was killed"
    assert not _open(playing._pipe)


def _open(handle: int) -> bool:
    try:
        os.fstat(handle)
    except OSError:
        return False
    return True
