"""One hotword that follows its tenant, in the container and the loop of the stock listener."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ovos_bus_client.message import Message
from ovos_dinkum_listener.voice_loop import hotwords
from ovos_dinkum_listener.voice_loop.hotwords import HotwordContainer
from ovos_dinkum_listener.voice_loop.voice_loop import DinkumVoiceLoop
from ovos_plugin_manager.wakewords import OVOSWakeWordFactory, find_wake_word_plugins
from ovos_utils.fakebus import FakeBus

from agentvoicebox.config.errors import BadInput
from agentvoicebox.plugins import wake_word
from agentvoicebox.plugins.detector import RATE, Detection
from agentvoicebox.plugins.device.choices import Choices, WakeWord
from agentvoicebox.plugins.wake_word import Outcomes, TenantWakeWord

CHUNK = 4_096
ENTRY = {"module": "agentvoicebox-ww", "listen": True, "active": True}
NABU, JARVIS = WakeWord("okay nabu", id="1"), WakeWord("hey jarvis", id="2")
TenVoices = Callable[[str], Sequence[bytes]]


@dataclass
class Chooser:
    """A link whose platform says what the test says."""

    choices: Choices = field(default_factory=Choices)
    followers: list[Callable[[Choices], None]] = field(default_factory=list)
    reports: queue.SimpleQueue[dict[str, Any]] = field(default_factory=queue.SimpleQueue)

    def on_choices(self, callback: Callable[[Choices], None]) -> Callable[[], None]:
        self.followers.append(callback)
        callback(self.choices)
        return lambda: self.followers.remove(callback)

    def choose(self, *words: WakeWord) -> None:
        """The tenant has chosen these, and the link's thread says so."""
        self.choices = Choices(tenant="Acme", wake_words=words)
        telling = threading.Thread(target=lambda: [follow(self.choices) for follow in self.followers])
        telling.start()
        telling.join()

    def report(self, kind: str, **facts: Any) -> None:
        self.reports.put({"kind": kind, **facts})

    def told(self) -> list[dict[str, Any]]:
        """What has been reported since this was asked last."""
        return [self.reports.get() for _ in range(self.reports.qsize())]


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Chooser:
    found = Chooser()
    monkeypatch.setattr("agentvoicebox.plugins.device.link.shared", lambda process: found)
    return found


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no section, hence no platform."""
    monkeypatch.setattr("agentvoicebox.plugins.device.link.shared", lambda process: None)


def said(engine: TenantWakeWord, pcm: bytes) -> int:
    """How often the engine found its word in audio that comes in chunks."""
    found = 0
    for start in range(0, len(pcm), CHUNK):
        engine.update(pcm[start : start + CHUNK])
        found += engine.found_wake_word()
    return found


def quiet(seconds: float) -> bytes:
    """A room in which nobody speaks."""
    return np.random.default_rng(2).normal(0, 30, int(seconds * RATE)).astype("<i2").tobytes()


# --- what it hears ----------------------------------------------------------------------------------------------------


def test_stock_ovos_finds_it_under_the_name_of_its_group():
    assert find_wake_word_plugins()["agentvoicebox-ww"] is TenantWakeWord


def test_without_a_platform_it_hears_its_configured_phrases(alone: None, ten_voices: TenVoices):
    engine = OVOSWakeWordFactory.create_hotword(
        "ours", {"hotwords": {"ours": {**ENTRY, "phrases": ["Okay Nabu!", "hey jarvis"], "sensitivity": 0.5}}}
    )
    assert isinstance(engine, TenantWakeWord)
    engine.bind(FakeBus())
    assert said(engine, ten_voices("okay nabu")[1] + quiet(1)) == 1
    assert said(engine, ten_voices("hey jarvis")[1] + quiet(1)) == 1
    assert said(engine, ten_voices("alexa")[1] + quiet(1)) == 0
    assert engine.found_wake_word() is False


@pytest.mark.parametrize(("name", "heard"), [("hey_jarvis", "hey jarvis"), ("agentvoicebox", "hey mycroft")])
def test_without_any_configuration_it_hears_its_own_name_or_the_stock_phrase(
    name: str, heard: str, alone: None, ten_voices: TenVoices
):
    engine = TenantWakeWord(name, dict(ENTRY))
    assert said(engine, ten_voices(heard)[1] + quiet(1)) == 1


def test_its_configuration_names_the_module_which_the_listener_asks_for(alone: None):
    given = {"phrases": ["alexa"]}
    assert TenantWakeWord("ours", given).config["module"] == "agentvoicebox-ww"
    assert given == {"phrases": ["alexa"]}, "what was given is not changed"


def test_until_the_platform_has_been_heard_of_the_configuration_counts(platform: Chooser, ten_voices: TenVoices):
    engine = TenantWakeWord("ours", {**ENTRY, "phrases": ["hey jarvis"]})
    assert said(engine, ten_voices("hey jarvis")[1] + quiet(1)) == 1
    platform.choose(NABU)
    assert said(engine, ten_voices("hey jarvis")[1] + quiet(1)) == 0
    assert said(engine, ten_voices("okay nabu")[1] + quiet(1)) == 1


def test_a_broken_section_is_said_and_the_words_are_heard(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ten_voices: TenVoices
):
    def shared(process: str) -> None:
        raise BadInput("the url is none")

    monkeypatch.setattr("agentvoicebox.plugins.device.link.shared", shared)
    said_so: list[str] = []
    monkeypatch.setattr(wake_word.LOG, "error", said_so.append)
    engine = TenantWakeWord("ours", {**ENTRY, "phrases": ["alexa"]})
    assert said(engine, ten_voices("alexa")[1] + quiet(1)) == 1
    assert said_so == ["wake words go on without the platform: the url is none"]


def test_what_cannot_be_heard_is_left_out_with_a_line(
    platform: Chooser, ten_voices: TenVoices, monkeypatch: pytest.MonkeyPatch
):
    lines: list[str] = []
    monkeypatch.setattr(wake_word.LOG, "warning", lines.append)
    engine = TenantWakeWord("ours", dict(ENTRY))
    platform.choose(NABU, WakeWord("hey xqzzt"))
    assert [line for line in lines if "xqzzt" in line and "pronounced" in line] == lines
    assert len(lines) == 1
    assert said(engine, ten_voices("okay nabu")[1] + quiet(1)) == 1
    platform.choose(WakeWord("hey xqzzt"))
    assert lines[-1].endswith("still listening for okay nabu")
    assert said(engine, ten_voices("okay nabu")[1] + quiet(1)) == 1


def test_a_device_that_only_knows_what_nobody_can_say_hears_its_own_words(platform: Chooser, ten_voices: TenVoices):
    platform.choices = Choices(tenant="Acme", wake_words=(WakeWord("hey xqzzt"),))
    engine = TenantWakeWord("ours", {**ENTRY, "phrases": ["alexa"]})
    assert said(engine, ten_voices("alexa")[1] + quiet(1)) == 1
    engine = TenantWakeWord("ours", {**ENTRY, "phrases": ["xqzzt xqzzt"]})
    assert said(engine, ten_voices("hey mycroft")[1] + quiet(1)) == 1
    platform.choose(NABU)
    assert said(engine, ten_voices("okay nabu")[1] + quiet(1)) == 1


def test_an_engine_that_fails_takes_one_line_and_hears_again(
    platform: Chooser, ten_voices: TenVoices, monkeypatch: pytest.MonkeyPatch
):
    engine = TenantWakeWord("ours", dict(ENTRY))
    platform.choose(NABU)
    lines: list[str] = []
    monkeypatch.setattr(wake_word.LOG, "error", lines.append)

    def broken(detector: object, pcm: bytes) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(wake_word.Detector, "feed", broken)
        assert said(engine, quiet(2)) == 0
    assert len(lines) == 1, "and not eight in a second"
    assert said(engine, ten_voices("okay nabu")[1] + quiet(1)) == 1


def test_a_detector_that_cannot_be_made_leaves_the_old_one(
    platform: Chooser, ten_voices: TenVoices, monkeypatch: pytest.MonkeyPatch
):
    engine = TenantWakeWord("ours", dict(ENTRY))
    platform.choose(NABU)

    def full(words: object) -> None:
        raise OSError(28, "No space left on device")

    lines: list[str] = []
    monkeypatch.setattr(wake_word, "Detector", full)
    monkeypatch.setattr(wake_word.LOG, "error", lines.append)
    platform.choose(JARVIS)
    assert len(lines) == 1
    assert "No space left" in lines[0]
    assert said(engine, ten_voices("okay nabu")[1] + quiet(1)) == 1


def test_with_all_words_disabled_nothing_is_heard(platform: Chooser, ten_voices: TenVoices):
    engine = TenantWakeWord("ours", dict(ENTRY))
    platform.choose()
    assert said(engine, ten_voices("hey mycroft")[1] + quiet(1)) == 0
    platform.choose(WakeWord("hey mycroft"))
    assert said(engine, ten_voices("hey mycroft")[1] + quiet(1)) == 1


def test_a_change_in_the_middle_of_a_word_loses_nothing(platform: Chooser, ten_voices: TenVoices):
    engine = TenantWakeWord("ours", dict(ENTRY))
    platform.choose(NABU)
    spoken = quiet(1) + ten_voices("okay nabu")[1] + quiet(1)
    half = len(quiet(1)) + (len(spoken) - 2 * len(quiet(1))) // CHUNK // 2 * CHUNK
    assert said(engine, spoken[:half]) == 0
    platform.choose(WakeWord("okay nabu", sensitivity=0.6, id="1"), JARVIS)
    assert said(engine, spoken[half:]) == 1


def test_what_was_said_before_a_change_does_not_fire_after_it(platform: Chooser, ten_voices: TenVoices):
    engine = TenantWakeWord("ours", dict(ENTRY))
    platform.choose(NABU)
    assert said(engine, ten_voices("okay nabu")[1]) == 1
    platform.choose(NABU, JARVIS)
    assert said(engine, quiet(2)) == 0


# --- what came of it --------------------------------------------------------------------------------------------------


DETECTION = Detection(NABU, 0.91234, 3.0)


def heard(name: str, session: str | None = "default") -> Message:
    return Message(name, {}, {"session": {"session_id": session}} if session else {})


@pytest.fixture
def outcomes(platform: Chooser) -> Iterator[tuple[Outcomes, FakeBus]]:
    bus = FakeBus()
    found = Outcomes(platform)  # type: ignore[arg-type]
    found.bind(bus)
    yield found, bus
    found.close()


def outcome_of(platform: Chooser) -> list[str]:
    return [event["outcome"] for event in platform.told()]


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("recognizer_loop:utterance", "detected"),
        ("recognizer_loop:speech.recognition.unknown", "false_positive"),
    ],
)
@pytest.mark.parametrize("session", ["default", None])
def test_what_is_heard_next_tells_whether_the_word_was_meant(
    name: str, outcome: str, session: str | None, platform: Chooser, outcomes: tuple[Outcomes, FakeBus]
):
    told, bus = outcomes
    told.detected(DETECTION)
    assert platform.told() == []
    bus.emit(heard(name, session))
    assert platform.told() == [
        {"kind": "wake", "phrase": "okay nabu", "wake_word": "1", "confidence": 0.912, "outcome": outcome}
    ]
    bus.emit(heard("recognizer_loop:utterance"))
    bus.emit(heard("recognizer_loop:speech.recognition.unknown"))
    assert platform.told() == [], "one outcome for each detection"


def test_what_others_say_to_the_assistant_is_no_outcome(platform: Chooser, outcomes: tuple[Outcomes, FakeBus]):
    told, bus = outcomes
    told.detected(DETECTION)
    bus.emit(heard("recognizer_loop:utterance", "a-satellite"))
    bus.emit(heard("recognizer_loop:speech.recognition.unknown", "a-satellite"))
    assert platform.told() == []


def test_nothing_for_a_while_was_a_false_alarm(platform: Chooser):
    told = Outcomes(platform, patience=0.01)  # type: ignore[arg-type]
    told.bind(FakeBus())
    told.detected(DETECTION)
    assert platform.reports.get(timeout=30)["outcome"] == "false_positive"
    told.close()
    assert platform.told() == []


def test_a_word_said_twice_without_a_sentence_was_for_nothing_once(
    platform: Chooser, outcomes: tuple[Outcomes, FakeBus]
):
    told, bus = outcomes
    told.detected(DETECTION)
    told.detected(DETECTION)
    assert outcome_of(platform) == ["false_positive"]
    bus.emit(heard("recognizer_loop:utterance"))
    assert outcome_of(platform) == ["detected"]


def test_what_was_missed_is_told_with_how_sure_it_was(platform: Chooser, outcomes: tuple[Outcomes, FakeBus]):
    told, bus = outcomes
    told.detected(Detection(NABU, 0.95, 3.0, missed=(0.6, 0.7)))
    bus.emit(heard("recognizer_loop:utterance"))
    assert [(event["outcome"], event["confidence"]) for event in platform.told()] == [
        ("missed", 0.6), ("missed", 0.7), ("detected", 0.95)
    ]  # fmt: skip


def test_without_a_bus_a_detection_is_one(platform: Chooser, ten_voices: TenVoices):
    engine = TenantWakeWord("ours", dict(ENTRY))
    platform.choose(NABU)
    assert said(engine, ten_voices("okay nabu")[1] + quiet(1)) == 1
    (event,) = platform.told()
    assert (event["wake_word"], event["outcome"]) == ("1", "detected")
    assert 0.85 < event["confidence"] <= 1


def test_who_stops_while_waiting_is_not_counted_as_wrong(platform: Chooser, outcomes: tuple[Outcomes, FakeBus]):
    told, _ = outcomes
    told.detected(DETECTION)
    told.close()
    assert outcome_of(platform) == ["detected"]


# --- with a link of its own -------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Two devices of two tenants."""

    acme: TenantWakeWord
    globex: TenantWakeWord


@pytest.fixture
def pair(platforms: Any, links: Any, until: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Pair, Any, Any]]:
    """Two devices with links of their own, and their platforms: acme's hears “okay nabu”, globex's “hey jarvis”."""
    engines = []
    for tenant, word in (("acme", NABU), ("globex", JARVIS)):
        platform = platforms(tenant)
        own = links(platform, "listener")
        monkeypatch.setattr("agentvoicebox.plugins.device.link.shared", lambda process, own=own: own)
        engine = TenantWakeWord("agentvoicebox", dict(ENTRY))
        platform.configure(replace(platform.choices, wake_words=(word,)))
        until(lambda engine=engine, word=word: [each.id for each in engine._ears.detector.words] == [word.id])
        engines.append((engine, platform))
    (acme, first), (globex, second) = engines
    yield Pair(acme, globex), first, second
    acme.stop()
    globex.stop()


def test_a_tenants_words_wake_its_own_devices_only(pair: tuple[Pair, Any, Any], until: Any, ten_voices: TenVoices):
    """Hazard H16: no message tells an engine whose it is."""
    engines, acme, globex = pair
    spoken = ten_voices("okay nabu")[1] + quiet(1)
    assert said(engines.acme, spoken) == 1
    assert said(engines.globex, spoken) == 0
    until(lambda: acme.reports)
    (event,) = acme.reports
    assert (event["kind"], event["phrase"], event["wake_word"], event["outcome"]) == (
        "wake",
        "okay nabu",
        "1",
        "detected",
    )
    assert globex.reports == []


def test_without_its_platform_it_hears_and_tells_later_once(
    pair: tuple[Pair, Any, Any], until: Any, ten_voices: TenVoices
):
    engines, acme, _ = pair
    acme.die()
    assert said(engines.acme, ten_voices("okay nabu")[1] + quiet(1)) == 1
    acme.live()
    until(lambda: acme.reports)
    assert len({event["id"] for event in acme.reports}) == 1


# --- in the stock listener --------------------------------------------------------------------------------------------


class Microphone:
    """Chunks that the test speaks, and a word when all of them have been heard."""

    sample_width, chunk_size, seconds_per_chunk = 2, CHUNK, CHUNK / 2 / RATE

    def __init__(self) -> None:
        self._chunks: queue.Queue[bytes] = queue.Queue()

    def speak(self, pcm: bytes) -> None:
        """Returns when the loop has taken it all."""
        for start in range(0, len(pcm), CHUNK):
            self._chunks.put(pcm[start : start + CHUNK])
        self._chunks.join()

    def read_chunk(self) -> bytes | None:
        try:
            chunk = self._chunks.get(timeout=0.05)
        except queue.Empty:
            return None
        self._chunks.task_done()
        return chunk


class Ear:
    """An STT that hears nothing."""

    lang = "en-us"

    def stream_start(self) -> None: ...
    def stream_data(self, chunk: bytes) -> None: ...
    def transcribe(self, lang: str) -> list[tuple[str, float]]:
        return []


@dataclass
class Listener:
    """A stock voice loop on a thread of its own."""

    bus: FakeBus
    microphone: Microphone
    container: HotwordContainer
    loop: Any
    thread: threading.Thread
    woken: list[str]

    def hears(self, pcm: bytes) -> int:
        """How often it is woken by this, and by the quiet after it."""
        before = len(self.woken)
        self.microphone.speak(pcm + quiet(2))
        return len(self.woken) - before


@pytest.fixture
def listen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, Any]], Listener]]:
    """`listen(hotwords)` starts a listener with these entries of the configuration."""
    started: list[Listener] = []
    configuration: dict[str, Any] = {"lang": "en-us", "listener": {"wake_word": "agentvoicebox"}}
    monkeypatch.setattr(hotwords, "Configuration", lambda: configuration)
    factory = SimpleNamespace(create_hotword=lambda word: OVOSWakeWordFactory.create_hotword(word, configuration))
    monkeypatch.setattr(hotwords, "OVOSWakeWordFactory", factory)
    monkeypatch.setattr(HotwordContainer, "_plugins", {})
    monkeypatch.setattr(HotwordContainer, "_loaded", threading.Event())

    def start(entries: dict[str, Any]) -> Listener:
        configuration["hotwords"] = entries
        bus, microphone, woken = FakeBus(), Microphone(), []
        container = HotwordContainer(bus, autoload=True)
        loop = DinkumVoiceLoop(
            mic=microphone,
            hotwords=container,
            stt=Ear(),
            fallback_stt=None,
            vad=SimpleNamespace(is_silence=lambda chunk: True),
            transformers=SimpleNamespace(
                feed_audio=lambda chunk: None, feed_hotword=lambda chunk: None, transform=lambda chunk: (chunk, {})
            ),
            timeout_seconds=0.5,
            timeout_seconds_with_silence=0.5,
            listenword_audio_callback=lambda pcm, told: woken.append(told["module"]),
            vad_pre_wake_enabled=False,
        )
        loop.start()
        thread = threading.Thread(target=loop.run, daemon=True)
        thread.start()
        started.append(Listener(bus, microphone, container, loop, thread, woken))
        return started[-1]

    yield start
    for each in started:
        each.loop.stop()
        each.thread.join(30)
        each.container.shutdown()


def test_a_change_is_heard_at_once_and_the_loop_goes_on(
    platform: Chooser, listen: Callable[..., Listener], ten_voices: TenVoices
):
    platform.choose(NABU)
    listener = listen({"agentvoicebox": ENTRY})
    engine = weakref.ref(listener.container.plugins[0])
    assert listener.hears(ten_voices("okay nabu")[1]) == 1
    assert listener.woken == ["agentvoicebox-ww"]
    assert listener.hears(ten_voices("hey jarvis")[1]) == 0
    platform.choose(JARVIS)
    assert listener.hears(ten_voices("hey jarvis")[1]) == 1
    assert listener.hears(ten_voices("okay nabu")[1]) == 0
    assert listener.thread.is_alive()
    assert listener.container.plugins == [engine()], "the same engine as before"


def test_the_stock_way_to_change_stops_the_loop(alone: None, listen: Callable[..., Listener], ten_voices: TenVoices):
    entry = {**ENTRY, "phrases": ["okay nabu"]}
    listener = listen({"agentvoicebox": entry})
    assert listener.hears(ten_voices("okay nabu")[1]) == 1
    before = listener.container.plugins
    # As ovos_dinkum_listener.service reloads: hazard H18.
    listener.loop.stop()
    listener.container.shutdown()
    listener.thread.join(30)
    assert not listener.thread.is_alive(), "nobody hears what is said now"
    entry["phrases"] = ["hey jarvis"]
    listener.container.load_hotword_engines()
    assert listener.container.plugins != before, "and what was half heard is lost"


def test_nothing_is_left_of_an_engine_after_a_reload(platform: Chooser, listen: Callable[..., Listener]):
    platform.choose(NABU)
    listener = listen({"agentvoicebox": ENTRY})
    handlers = len(listener.bus.ee.listeners("recognizer_loop:utterance"))
    for _ in range(3):
        listener.container.shutdown()
        listener.container.load_hotword_engines()
    assert len(platform.followers) == 1
    assert len(listener.bus.ee.listeners("recognizer_loop:utterance")) == handlers == 1
    # This is how it reloads when a word went missing: nobody stops the engine that is replaced.
    listener.container.load_hotword_engines()
    gc.collect()
    assert len(platform.followers) == 1
    assert len(listener.bus.ee.listeners("recognizer_loop:utterance")) == 1


def test_who_is_stopped_hears_nothing_and_may_still_be_fed(platform: Chooser, ten_voices: TenVoices):
    engine = TenantWakeWord("ours", dict(ENTRY))
    platform.choose(NABU)
    engine.stop()
    engine.stop()
    assert platform.followers == []
    assert said(engine, ten_voices("okay nabu")[1] + quiet(1)) == 0
    engine.reset()


def test_changes_while_the_microphone_runs_never_break_it(platform: Chooser, ten_voices: TenVoices):
    engine = TenantWakeWord("ours", dict(ENTRY))
    platform.choose(NABU)
    failed: list[BaseException] = []
    done = threading.Event()

    def change() -> None:
        try:
            while not done.is_set():
                platform.followers[0](Choices(tenant="Acme", wake_words=(NABU, JARVIS)))
                platform.followers[0](Choices(tenant="Acme", wake_words=(NABU, WakeWord("alexa"))))
        except BaseException as error:
            failed.append(error)

    changing = threading.Thread(target=change)
    changing.start()
    said(engine, (ten_voices("okay nabu")[1] + quiet(1.5)) * 5)
    done.set()
    changing.join()
    assert failed == []
    assert said(engine, quiet(1.5) + ten_voices("okay nabu")[1] + quiet(1)) == 1
