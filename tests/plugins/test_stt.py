"""The tenant's ears: the platform hears as somebody speaks, the device where it cannot, and nobody's words mix."""

from __future__ import annotations

import base64
import io
import json
import threading
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from queue import Empty, Queue
from typing import Any

import numpy as np
import pytest
from ovos_bus_client.message import Message
from ovos_dinkum_listener.service import OVOSDinkumVoiceService
from ovos_dinkum_listener.voice_loop.voice_loop import ListeningState
from ovos_plugin_manager.templates.microphone import Microphone
from ovos_plugin_manager.templates.stt import STT, StreamingSTT, StreamThread
from ovos_plugin_manager.utils.audio import AudioData
from ovos_utils import classproperty
from ovos_utils.fakebus import FakeBus

from agentvoicebox.config.errors import BadInput
from agentvoicebox.plugins import stt as module
from agentvoicebox.plugins.device import local, wire
from agentvoicebox.plugins.device.language import TenantLanguage
from agentvoicebox.plugins.device.requests import Listening
from agentvoicebox.plugins.stt import TenantSTT

CHUNK = 2_048
MIC, SENT = 1_000, 2_000


def sound(level: int, seconds: float = 1.0) -> bytes:
    return np.full(int(16_000 * seconds), level, "<i2").tobytes()


def levels(pcm: bytes) -> str:
    """What a listener of these tests hears: which levels there are besides silence."""
    return " ".join(str(level) for level in np.unique(np.frombuffer(pcm, "<i2")) if level)


class Ear(STT):
    """A local engine that hears levels, in English."""

    loaded = 0

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        type(self).loaded += 1

    @classproperty
    def available_languages(cls) -> set[str]:
        return {"en-US"}

    def execute(self, audio: Any, language: str | None = None) -> str:
        if language != "en-US":
            raise BadInput("English only.", code="unsupported_language")
        heard = levels(audio.get_raw_data())
        return f"local {heard}" if heard else ""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The plugins that are on the device."""
    plugins: dict[str, Any] = {"agentvoicebox-stt-sphinx": Ear}
    monkeypatch.setattr(local, "plugin_class", lambda kind, name: plugins.get(name))
    monkeypatch.setattr(local, "LOADING", 60.0)
    return plugins


@pytest.fixture
def make(installed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TenantSTT]]:
    """Ears that are patient, unless a test says otherwise: this machine may stall."""
    monkeypatch.setattr(module, "_FLUSH", 30.0)
    made: list[TenantSTT] = []

    def make(link: Any = None, **config: Any) -> TenantSTT:
        made.append(TenantSTT({"lang": "en-US", "patience": 30, **config}, link=link))
        return made[-1]

    yield make
    for each in made:
        each.shutdown()


@pytest.fixture
def platform(platforms: Callable[..., Any]) -> Any:
    platform = platforms()
    platform.hear = lambda pcm, language: levels(pcm)
    return platform


@pytest.fixture
def link(platform: Any, links: Callable[..., Any]) -> Any:
    return links(platform, "listener")


def speak(ear: TenantSTT, pcm: bytes, lang: str | None = None) -> list[tuple[str, float]]:
    """As the listener does it when somebody speaks."""
    ear.stream_start()
    for start in range(0, len(pcm), CHUNK):
        ear.stream_data(pcm[start : start + CHUNK])
    return ear.transcribe(lang=lang or ear.lang)


def test_the_platform_hears_what_is_said(make: Any, link: Any, platform: Any):
    pcm = sound(MIC, 2.5)
    assert speak(make(link), pcm) == [(str(MIC), 0.9)]
    assert platform.heard == [("", pcm)], "in the tenant's language, all of it"


def test_it_hears_while_somebody_still_speaks(make: Any, link: Any, platform: Any, until: Any):
    ear = make(link)
    ear.stream_start()
    ear.stream_data(sound(MIC))
    until(lambda: platform.received == len(sound(MIC)))
    assert ear.transcribe() == [(str(MIC), 0.9)]


def test_silence_is_an_answer(make: Any, link: Any):
    assert speak(make(link), sound(0)) == [("", 0.0)]


def test_without_an_utterance_there_is_none(make: Any, link: Any):
    ear = make(link)
    ear.stream_data(sound(MIC))
    assert ear.transcribe() == []
    assert ear.stream_stop() is None
    assert speak(ear, sound(MIC)) == [(str(MIC), 0.9)]
    assert ear.transcribe() == [], "what was told is not told again"


def test_stream_stop_gives_the_text(make: Any, link: Any):
    ear = make(link)
    ear.stream_start()
    ear.stream_data(sound(MIC))
    assert ear.stream_stop() == str(MIC)


@pytest.mark.parametrize("when", ["before", "amid", "after"])
def test_the_device_hears_when_the_platform_is_gone(when: str, make: Any, link: Any, platform: Any, until: Any):
    ear = make(link)
    if when == "before":
        platform.die()
        until(lambda: link.state != "up")
    ear.stream_start()
    ear.stream_data(sound(MIC))
    if when == "amid":
        platform.die()
    if when == "after":

        def gone(pcm: bytes, language: str) -> str:
            raise platform.breaks

        platform.hear = gone
    ear.stream_data(sound(MIC + 1))
    assert ear.transcribe(lang=ear.lang) == [(f"local {MIC} {MIC + 1}", 1.0)], "nothing that was said is lost"
    if when != "after":
        platform.live()
    until(lambda: platform.reports)
    [told] = platform.reports
    assert (told["kind"], told["engine"], told["reason"]) == ("stt", "agentvoicebox-stt-sphinx", "platform_away")
    assert told["seconds"] == 2.0
    platform.hear = lambda pcm, language: levels(pcm)
    until(lambda: link.state == "up")
    assert speak(ear, sound(MIC)) == [(str(MIC), 0.9)], "it is back, of itself"


def test_the_device_hears_when_the_platform_has_a_problem(make: Any, link: Any, platform: Any, until: Any):
    platform.hear = lambda pcm, language: wire.Problem(0, "quota_exceeded", "The month is used up.")
    assert speak(make(link), sound(MIC)) == [(f"local {MIC}", 1.0)]
    until(lambda: platform.reports)
    assert platform.reports[0]["reason"] == "quota_exceeded"


@pytest.mark.parametrize("whole", [False, True])
def test_nobody_waits_for_a_platform_that_only_works(
    whole: bool, make: Any, link: Any, platform: Any, until: Any, monkeypatch: pytest.MonkeyPatch
):
    waits: list[float] = []
    result = Listening.result

    def wait(listening: Listening, timeout: float) -> wire.Transcript:
        waits.append(timeout)
        return result(listening, timeout if platform.hear is None else 30)

    monkeypatch.setattr(Listening, "result", wait)
    platform.hear = None  # no transcript ever comes, but for signs of work
    ear = make(link, patience=0.5)
    assert (ear.transcribe(sound(MIC), "en-US") if whole else speak(ear, sound(MIC))) == [(f"local {MIC}", 1.0)]
    assert waits == [0.75 if whole else 0.5], "of whole audio, which comes at once, a quarter of its length more"
    until(lambda: platform.reports)
    assert platform.reports[0]["reason"] == "platform_late"
    platform.hear = lambda pcm, language: levels(pcm)
    assert speak(ear, sound(MIC)) == [(str(MIC), 0.9)], "the next one is the platform's again"


def test_without_a_platform_the_device_hears(make: Any):
    assert speak(make(), sound(MIC)) == [(f"local {MIC}", 1.0)]
    assert make().transcribe(sound(MIC), "en-US") == [(f"local {MIC}", 1.0)]


@pytest.mark.parametrize("fallback", ["", "no-such-plugin"])
def test_without_anybody_who_hears_the_listener_is_told(fallback: str, make: Any, lines: list[str]):
    assert speak(make(fallback=fallback), sound(MIC)) == []
    assert "fallback" in " ".join(lines), "the remedy is named"
    assert str(MIC) not in " ".join(lines)


def test_a_local_engine_that_fails_is_no_end(make: Any, installed: dict[str, Any]):
    class Broken(Ear):
        def execute(self, audio: Any, language: str | None = None) -> str:
            raise SystemExit(3)

    installed["broken"] = Broken
    assert speak(make(fallback="broken"), sound(MIC)) == []


def test_a_local_engine_may_be_one_that_streams(make: Any, installed: dict[str, Any]):
    installed["streams"] = StockLike
    assert speak(make(fallback="streams"), sound(MIC)) == [(str(MIC), 1.0)]


def test_the_local_engine_is_loaded_before_it_is_needed(make: Any, installed: dict[str, Any], until: Any):
    class Late(Ear):
        loaded = 0

    installed["late"] = Late
    make(fallback="late")
    until(lambda: Late.loaded)


def test_what_sphinx_hears(make: Any, installed: dict[str, Any], say: Any):
    from agentvoicebox.plugins.sphinx import SphinxSTT

    installed["agentvoicebox-stt-sphinx"] = SphinxSTT
    pcm, rate = say("what time is it")
    assert rate == 16_000
    assert speak(make(), pcm) == [("what time is it", 1.0)]


# --- language ---------------------------------------------------------------------------------------------------------


def test_the_language_is_the_tenants_choice_while_it_runs(make: Any, link: Any, platform: Any, until: Any):
    ear = make(link)
    platform.configure(replace(platform.choices, language="de-DE"))
    until(lambda: ear.lang == "de-DE")
    assert speak(ear, sound(MIC)) == [(str(MIC), 0.9)]
    assert platform.heard[-1][0] == ""


def test_a_language_that_an_audio_transformer_finds_is_heard(make: Any, link: Any, platform: Any):
    ear = make(link)
    ear.stream_start()
    ear.stream_data(sound(MIC))
    ear.stream.language = "fr"  # as the listener's loop does it
    assert ear.transcribe(lang="fr") == [(str(MIC), 0.9)]
    assert platform.heard == [("fr", sound(MIC))], "all that was said, although it is told at the end"


def test_a_language_that_is_asked_for(make: Any, link: Any, platform: Any):
    ear = make(link)
    ear.transcribe(sound(SENT), "es-ES")
    ear.transcribe(sound(SENT), "en-US")
    ear.transcribe(sound(SENT), "en")
    ear.transcribe(sound(SENT), None)
    ear.transcribe(sound(SENT), "auto")
    assert [language for language, _ in platform.heard] == ["es-ES", "", "", "", ""]


def test_before_the_platform_was_heard_of_the_language_is_the_devices(make: Any):
    assert make(None, lang="nl-NL").lang == "nl-NL"


def test_the_core_is_told_the_tenants_language(make: Any, link: Any, platform: Any, listen: Any, until: Any):
    listener = listen(make(link))
    listener.service.transformers.loaded_plugins["agentvoicebox-language"] = TenantLanguage({}, link=link)
    platform.configure(replace(platform.choices, language="de-DE"))
    until(lambda: link.choices.language == "de-DE")
    both(listener, until)
    until(lambda: listener.told)
    assert listener.told[0][1].data["lang"] == "de-DE"
    assert TenantLanguage({}).transform(b"") == (b"", {}), "not without a platform"


# --- what is too much, or nothing -------------------------------------------------------------------------------------


def test_a_minute_is_heard_and_no_more(make: Any, link: Any, platform: Any):
    ear = make(link)
    assert speak(ear, sound(MIC, 61.5)) == [(str(MIC), 0.9)]
    assert len(platform.heard[-1][1]) == 60 * 32_000
    ear.transcribe(AudioData(sound(SENT, 75), 16_000, 2), "en-US")
    assert len(platform.heard[-1][1]) == 60 * 32_000


def test_audio_of_another_rate(make: Any, link: Any, platform: Any):
    ear = make(link)
    assert ear.transcribe(AudioData(sound(SENT, 3.0), 48_000, 2), "en-US")
    assert len(platform.heard[-1][1]) == pytest.approx(32_000, abs=4)


@pytest.mark.parametrize("audio", [b"", b"\x01", object()])
def test_no_audio_at_all(audio: Any, make: Any, link: Any):
    found = make(link).transcribe(audio, "en-US")
    assert found in ([], [("", 0.0)])


def test_a_key_that_is_revoked_while_somebody_speaks(make: Any, link: Any, platform: Any, until: Any):
    ear = make(link)
    ear.stream_start()
    ear.stream_data(sound(MIC))
    platform.turn_away(4001)
    assert ear.transcribe() == [(f"local {MIC}", 1.0)]
    until(lambda: link.state == "refused")
    assert speak(ear, sound(MIC)) == [(f"local {MIC}", 1.0)]


# --- H17 and H16, with the stock listener -----------------------------------------------------------------------------


class StockLike(StreamingSTT):
    """A streaming plugin as the template of ovos-plugin-manager suggests it."""

    def create_streaming_thread(self) -> StreamThread:
        return StockThread(self.queue, self.lang)

    @classproperty
    def available_languages(cls) -> set[str]:
        return {"en-US"}


class StockThread(StreamThread):
    def handle_audio_stream(self, audio: Any, language: str) -> None:
        self.text = levels(b"".join(audio))

    def finalize(self) -> str:
        self.join()
        return str(self.text)


@dataclass
class Microphones(Microphone):
    """A microphone that hears what a test says."""

    chunks: Queue[bytes] = field(default_factory=Queue)
    asked: bool = False

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def read_chunk(self) -> bytes | None:
        self.asked = True
        try:
            return self.chunks.get(timeout=0.05)
        except Empty:
            return None

    def hear(self, level: int, seconds: float) -> None:
        pcm = sound(level, seconds)
        for start in range(0, len(pcm), self.chunk_size):
            self.chunks.put(pcm[start : start + self.chunk_size])


class Loudness:
    """A VAD."""

    sample_rate = 16_000

    def is_silence(self, chunk: bytes) -> bool:
        return not levels(chunk)


class NoWords:
    """Nothing wakes the listener but the bus."""

    state: Any = None

    def load_hotword_engines(self) -> None: ...

    def update(self, chunk: bytes) -> None: ...

    def found(self) -> None: ...

    def reset(self) -> None: ...


class Listener:
    """The stock listener, on a bus in this process."""

    def __init__(self, stt: StreamingSTT) -> None:
        self.bus = FakeBus()
        self.bus.run_in_thread()
        self.told: list[tuple[str, Message]] = []
        for kind in ("recognizer_loop:utterance", "recognizer_loop:speech.recognition.unknown"):
            self.bus.on(kind, lambda message, kind=kind: self.told.append((kind, message)))
        self.bus.on("recognizer_loop:b64_transcribe.response", self._answer)
        self.bus.on("mycroft.volume.get", lambda message: self.bus.emit(message.response({"percent": 0.5})))
        self.answers: dict[str, list[list[Any]]] = {}
        self.mic = Microphones()
        self.service = OVOSDinkumVoiceService(
            mic=self.mic, bus=self.bus, stt=stt, vad=Loudness(), hotwords=NoWords(), disable_fallback=True,
            validate_source=False, daemon=True,
        )  # fmt: skip
        self.service.start()

    @property
    def state(self) -> ListeningState:
        state: ListeningState = self.service.voice_loop.state
        return state

    def ask(self, name: str, pcm: bytes, **context: Any) -> None:
        """Have audio transcribed over the bus, as another program does."""
        data = io.BytesIO()
        with wave.open(data, "wb") as wav:
            wav.setparams((1, 2, 16_000, 0, "NONE", ""))
            wav.writeframes(pcm)
        told = {"audio": base64.b64encode(data.getvalue()).decode()}
        self.bus.emit(Message("recognizer_loop:b64_transcribe", told, {"name": name, **context}))

    def utterances(self) -> list[str]:
        return [text for _, message in self.told for text in message.data.get("utterances", ["nothing"])]

    def close(self) -> None:
        self.service.stop()
        self.service.join(30)

    def _answer(self, message: Message) -> None:
        self.answers[message.context["name"]] = json.loads(json.dumps(message.data["transcriptions"]))


@pytest.fixture
def listen() -> Iterator[Callable[[StreamingSTT], Listener]]:
    made: list[Listener] = []

    def make(stt: StreamingSTT) -> Listener:
        made.append(Listener(stt))
        return made[-1]

    yield make
    for each in made:
        each.close()


def both(listener: Listener, until: Any, requests: int = 1) -> None:
    """Somebody speaks; in the middle of that other programs have their own audio transcribed."""
    until(lambda: listener.mic.asked)
    listener.bus.emit(Message("mycroft.mic.listen"))
    listener.mic.hear(MIC, 1.0)
    until(lambda: listener.state == ListeningState.IN_COMMAND and listener.mic.chunks.empty())
    threads = [
        threading.Thread(target=listener.ask, args=(str(number), sound(SENT + number))) for number in range(requests)
    ]
    for thread in threads:
        thread.start()
    listener.mic.hear(MIC + 1, 0.5)
    for thread in threads:
        thread.join(60)
    listener.mic.hear(0, 2.0)


@pytest.mark.parametrize("platform_there", [True, False])
def test_audio_of_the_bus_and_of_the_microphone_do_not_mix(
    platform_there: bool, make: Any, link: Any, listen: Any, until: Any
):
    listener = listen(make(link if platform_there else None))
    both(listener, until, requests=4)
    until(lambda: listener.told)
    by = "" if platform_there else "local "
    assert listener.utterances() == [f"{by}{MIC} {MIC + 1}"]
    assert {name: found[0][0] for name, found in listener.answers.items()} == {
        str(number): f"{by}{SENT + number}" for number in range(4)
    }
    both(listener, until)
    until(lambda: len(listener.told) == 2)
    assert listener.utterances()[1] == f"{by}{MIC} {MIC + 1}", "and the listener goes on"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_plugin_as_the_template_suggests_it_mixes_them(listen: Any, until: Any):
    """What the test above would find: it fails with such a plugin."""
    listener = listen(StockLike({"lang": "en-US"}))
    both(listener, until)
    until(lambda: listener.told or not listener.service.is_alive())
    assert listener.utterances() != [f"{MIC} {MIC + 1}"]


def test_silence_after_a_wake_word_is_no_utterance(make: Any, link: Any, listen: Any, until: Any):
    listener = listen(make(link))
    until(lambda: listener.mic.asked)
    listener.bus.emit(Message("mycroft.mic.listen"))
    listener.mic.hear(0, 6.0)
    until(lambda: listener.told)
    assert [kind for kind, _ in listener.told] == ["recognizer_loop:speech.recognition.unknown"]


def test_on_the_microphones_path_the_tenant_is_the_process_own(
    make: Any, link: Any, platform: Any, listen: Any, until: Any
):
    listener = listen(make(link))
    both(listener, until)
    until(lambda: listener.told)
    assert "tenant_id" not in listener.told[0][1].context, "no message tells whose it is"
    assert any(levels(pcm) == f"{MIC} {MIC + 1}" for _, pcm in platform.heard)


def test_what_another_tenant_sends_stays_on_the_device(make: Any, link: Any, platform: Any, listen: Any, until: Any):
    platform.configure(replace(platform.choices, language="de-DE"))
    ear = make(link)
    until(lambda: ear.lang == "de-DE")
    listener = listen(ear)
    until(lambda: listener.mic.asked)
    listener.ask("theirs", sound(SENT), tenant_id="other-id")
    listener.ask("ours", sound(SENT), tenant_id="acme-id")
    assert listener.answers["theirs"] == [[f"local {SENT}", 1.0]], "in the device's language, not our tenant's"
    assert listener.answers["ours"] == [[str(SENT), 0.9]]
    assert len(platform.heard) == 1
    assert not platform.reports


def test_nobody_knows_whose_device_it_is(make: Any, platform: Any, listen: Any, until: Any):
    class Unwelcome:
        welcome, state, reason, choices = None, "connecting", "", platform.choices

        def listen(self, language: str) -> None:
            raise AssertionError("nothing is sent")

    listener = listen(make(Unwelcome()))
    until(lambda: listener.mic.asked)
    listener.ask("theirs", sound(SENT), tenant_id="acme-id")
    assert listener.answers["theirs"] == [[f"local {SENT}", 1.0]]
