"""The tenant's ears, as a stock OVOS listener loads them: the platform's, else an engine on the device."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from queue import Empty, Queue
from typing import Any

import numpy as np
import soxr
from ovos_bus_client.message import Message
from ovos_bus_client.session import SessionManager
from ovos_config import Configuration
from ovos_plugin_manager.templates.stt import StreamingSTT, StreamThread
from ovos_utils import classproperty
from ovos_utils.lang import standardize_lang_tag
from ovos_utils.log import LOG

from agentvoicebox.config.errors import AvbError
from agentvoicebox.plugins.device import caller, patience
from agentvoicebox.plugins.device.language import same_language
from agentvoicebox.plugins.device.link import Link, Listening, shared
from agentvoicebox.plugins.device.local import LocalEar
from agentvoicebox.plugins.pool.engine import at_rate

FALLBACK = "agentvoicebox-stt-sphinx"
"""The engine that stands in for the platform unless the configuration names another."""

RATE = 16_000
LONGEST = 60
"""Seconds of audio of one request; what comes after is not heard."""

WHOLE = 0.25
"""How much longer the answer to whole audio may take, as a part of its length: nothing of it was heard before."""

IDLE = 10.0
"""Seconds without audio after which nobody is taken to be at the microphone any more."""

_MOST = LONGEST * RATE * 2
_FLUSH = 2.0

Found = list[tuple[str, float]]


class TenantSTT(StreamingSTT):  # type: ignore[misc]
    """Hears with the platform as somebody speaks, and with a local engine where the platform cannot be asked.

    Configuration: `fallback`, the name of any STT plugin, configured in its own section (`agentvoicebox-stt-sphinx`;
    empty for none); `patience` (4), the seconds after the end of speech that a platform which is at work is waited for.

    The language is the tenant's choice, and follows it while the device runs: what `mycroft.conf` says counts only
    until the platform has been heard of. Where the device has been told otherwise for one utterance (an audio
    transformer has found another language, or a request names one) that one is heard instead.

    The microphone has one utterance at a time. Audio that is given to `transcribe` is a request of its own, which the
    microphone's neither disturbs nor joins (hazard H17); requests of the bus which name another tenant are heard on
    the device, and nothing of them leaves it (H16).
    """

    def __init__(self, config: dict[str, Any] | None = None, *, link: Link | None = None) -> None:
        super().__init__(config)
        self._link = link or shared("listener")
        self._ear = LocalEar(str(self.config.get("fallback", FALLBACK) or ""))
        self._patience = patience.of(self.config)
        self._lock = threading.Lock()
        self._taken = True
        self._away = False
        if self._link is None:
            LOG.warning("No platform is set up on this device: run `avb device init`. It hears by itself until then.")

    @classproperty  # type: ignore[untyped-decorator]
    def available_languages(cls) -> set[str]:
        """None that could be listed: what the tenant's engine on the platform hears, this does."""
        return set()

    @property
    def lang(self) -> str:
        """The language that is heard unless a request names one; of the tenant's choice, where that is known."""
        asked = caller.message()
        link = self._link
        chosen = ""
        if link is not None and link.choices.tenant and not caller.is_foreign(asked, link.welcome):
            chosen = link.choices.language
        return _tag(self._lang or chosen or self.config.get("lang") or SessionManager.get().lang)

    @lang.setter
    def lang(self, value: str) -> None:
        self._lang = _tag(value)

    # --- the microphone's utterance -----------------------------------------------------------------------------------

    def create_streaming_thread(self) -> _Utterance:
        """What takes the microphone's audio from now on."""
        return _Utterance(self.queue, self.lang, self._heard_by())

    def stream_start(self, language: str | None = None) -> None:
        """Somebody begins to speak. What was said before and nobody has asked for is forgotten."""
        asked = caller.message()
        if _brings_audio(asked):
            return  # the listener begins so before it gives us audio of its own
        link = self._heard_by(asked)
        with self._lock:
            self._forget()
            self.queue: Queue[bytes | None] = Queue()
            told = _tag(language) if language else ""
            self.stream = _Utterance(self.queue, told or self.lang, link, told)
            self._taken = False
            self.transcript_ready.clear()
            self.stream.start()

    def stream_data(self, data: bytes) -> None:
        """Add what the microphone has heard; without an utterance it is passed over."""
        with self._lock:
            if not self._taken:
                self.queue.put(data)

    def stream_stop(self) -> str | None:
        """End the microphone's utterance; returns its text, or None without one."""
        if _brings_audio(caller.message()):
            return None
        found = self._end(None)
        return None if found is None else (found[0][0] if found else "")

    def execute(self, audio: Any = None, language: str | None = None) -> str:
        """The text alone of what `transcribe` finds."""
        found = self.transcribe(audio, language)
        return found[0][0] if found else ""

    def transcribe(self, audio: Any = None, lang: str | None = None) -> Found:
        """What was said: in `audio` (`AudioData`, or 16-bit samples at 16 kHz), else to the microphone.

        `[("", 0.0)]` when nothing was said, so that nobody is asked to hear it again. Empty when nobody could hear
        it: the listener asks its `fallback_module` then, if it has one. Never raises.
        """
        asked = caller.message()
        try:
            if audio is None:
                return self._end(lang) or []
            return self._request(_pcm(audio), lang, asked)
        except Exception as error:
            # Whatever is wrong with the audio, the listener's one thread must go on.
            LOG.error("Speech was not understood (%s): say it again.", type(error).__name__)
            return []

    def shutdown(self) -> None:
        """End the utterance at hand and forget the local engine; the link serves the other plugins of the process."""
        with self._lock:
            self._forget()
        self._ear.close()

    def _heard_by(self, asked: Message | None = None) -> Link | None:
        """The link, unless this is for somebody else than its tenant."""
        link = self._link
        return None if link is None or caller.is_foreign(asked, link.welcome) else link

    def _forget(self) -> None:
        if self.stream is not None and not self._taken:
            self.stream.give_up()
        self._taken = True

    def _end(self, lang: str | None) -> Found | None:
        """What was said to the microphone; None without an utterance."""
        with self._lock:
            # The listener sets `stream.language` whenever it likes: the object stays, only its end is taken once.
            stream, taken, self._taken = self.stream, self._taken, True
        if stream is None or taken:
            return None
        language = _tag(lang or stream.language)
        listening = stream.listening
        if listening is not None and not same_language(language, stream.began):
            # Told only now that all has been said: it is all there still, and is heard anew.
            listening.cancel()
            listening = None
        stream.finish()
        try:
            if listening is None and stream.listening is not None:
                return self._request(stream.pcm, language, None)
            return self._answer(stream.pcm, listening, stream.error, language, stream.link, self._patience)
        finally:
            self.transcript_ready.set()

    # --- any audio ----------------------------------------------------------------------------------------------------

    def _request(self, pcm: bytes, lang: str | None, asked: Message | None) -> Found:
        """What whole audio says."""
        link = self._heard_by(asked)
        if link is None and self._link is not None:
            lang = (asked.data.get("lang") if asked is not None else None) or Configuration().get("lang", "en-US")
        language = _tag(lang) if lang and lang != "auto" else self.lang
        listening, error = _listen(link, "" if same_language(language, self.lang) else language)
        if listening is not None:
            for start in range(0, len(pcm), 2 * RATE):
                listening.send(pcm[start : start + 2 * RATE])
            listening.finish()
        return self._answer(pcm, listening, error, language, link, self._patience + WHOLE * len(pcm) / 2 / RATE)

    def _answer(
        self,
        pcm: bytes,
        listening: Listening | None,
        error: AvbError | None,
        language: str,
        link: Link | None,
        seconds: float,
    ) -> Found:
        """What the platform has understood within these seconds, else what the local engine understands."""
        if listening is not None:
            try:
                told = listening.result(seconds)
            except AvbError as failure:
                error = failure
            else:
                self._away = False
                sure = 1.0 if told.confidence is None else told.confidence
                return [(told.text, sure if told.text else 0.0)]
        return self._hear(pcm, language, error, link)

    def _hear(self, pcm: bytes, language: str, error: AvbError | None, link: Link | None) -> Found:
        """What the local engine understands."""
        try:
            found = self._ear.hear(pcm, language)
        except AvbError as failure:
            LOG.warning("Speech was not understood: %s %s", error.message if error else "", failure.message)
            return []
        if link is not None and error is not None:
            if not self._away:
                LOG.warning("%s hears instead of the platform: %s", self._ear.name, link.reason or error.message)
            self._away = True
            link.report("stt", engine=self._ear.name, seconds=round(len(pcm) / 2 / RATE, 3), reason=error.code)
        return [(found.text, 1.0 if found.confidence is None else found.confidence)] if found.text else [("", 0.0)]


class _Utterance(StreamThread):  # type: ignore[misc]
    """What is said to the microphone, on its way to the platform, and kept for the local engine."""

    def __init__(self, queue: Queue[bytes | None], language: str, link: Link | None, told: str = "") -> None:
        super().__init__(queue, language)
        self.daemon = True
        self.link, self.began = link, self.language
        self.listening, self.error = _listen(link, told)
        self._kept = bytearray()
        self._to_platform = _Resampled(_microphone_rate())
        self._over = threading.Event()

    @property
    def pcm(self) -> bytes:
        """All that was said."""
        return bytes(self._kept)

    def handle_audio_stream(self, audio: Iterable[bytes], language: str) -> None:
        """Take the audio as it comes."""
        for chunk in audio:
            self._take(self._to_platform(chunk))
        self._take(self._to_platform(b"", last=True))
        if self.listening is not None:
            self.listening.finish()
        self._over.set()

    def finish(self) -> None:
        """Nothing more will be said; returns when all of it has been taken."""
        self.queue.put(None)
        self._over.wait(_FLUSH)

    def finalize(self) -> None:
        """The text is told by `TenantSTT`, with its confidence."""
        self.finish()

    def give_up(self) -> None:
        """Nobody wants to know what was said."""
        if self.listening is not None:
            self.listening.cancel()
        self.queue.put(None)

    def _get_data(self) -> Iterable[bytes]:
        while True:
            try:
                chunk = self.queue.get(timeout=IDLE)
            except Empty:
                # The listener was told to do something else in the middle of an utterance.
                if self.listening is not None:
                    self.listening.cancel()
                return
            if chunk is None:
                return
            yield chunk

    def _take(self, pcm: bytes) -> None:
        pcm = pcm[: _MOST - len(self._kept)]
        self._kept += pcm
        if pcm and self.listening is not None:
            self.listening.send(pcm)


class _Resampled:
    """A microphone's audio at the rate that the platform hears."""

    def __init__(self, rate: int) -> None:
        self._stream = None if rate == RATE else soxr.ResampleStream(rate, RATE, 1, dtype="int16")

    def __call__(self, chunk: bytes, last: bool = False) -> bytes:
        if self._stream is None:
            return chunk
        return bytes(self._stream.resample_chunk(np.frombuffer(chunk, "<i2"), last=last).tobytes())


def _microphone_rate() -> int:
    return int((Configuration().get("listener") or {}).get("sample_rate") or RATE)


def _listen(link: Link | None, language: str) -> tuple[Listening | None, AvbError | None]:
    """What takes audio to the platform, or why nothing does."""
    if link is None:
        return None, None
    try:
        return link.listen(language), None
    except AvbError as error:
        return None, error


def _brings_audio(asked: Message | None) -> bool:
    """Whether a message of the bus brings audio of its own rather than being about the microphone."""
    return asked is not None and asked.msg_type.startswith("recognizer_loop:b64_")


def _pcm(audio: Any) -> bytes:
    """At most a minute of 16-bit mono audio at 16 kHz."""
    if isinstance(audio, bytes | bytearray):
        return bytes(audio[:_MOST])
    pcm = audio.get_raw_data(convert_width=2)[: LONGEST * audio.sample_rate * 2]
    return at_rate(pcm[: len(pcm) // 2 * 2], audio.sample_rate, RATE)


def _tag(language: str) -> str:
    return str(standardize_lang_tag(language))
