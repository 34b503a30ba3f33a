"""The tenant's voice, as stock ovos-audio loads it: the platform's, else an engine on the device."""

from __future__ import annotations

import asyncio
import hashlib
import json
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ovos_bus_client.message import Message
from ovos_bus_client.session import SessionManager
from ovos_config import Configuration
from ovos_plugin_manager.templates.tts import TTS, StreamingTTS, TTSContext
from ovos_plugin_manager.utils.tts_cache import AudioFile, hash_sentence
from ovos_utils import classproperty
from ovos_utils.file_utils import get_cache_directory
from ovos_utils.lang import standardize_lang_tag
from ovos_utils.log import LOG

from agentvoicebox.config.errors import AvbError
from agentvoicebox.plugins.clauses import Sentences
from agentvoicebox.plugins.device import caller, patience, player
from agentvoicebox.plugins.device.choices import Choices
from agentvoicebox.plugins.device.language import same_language
from agentvoicebox.plugins.device.link import Away, Failed, Link, shared
from agentvoicebox.plugins.device.local import LocalVoice
from agentvoicebox.plugins.device.stage import Sentence, Stage

FALLBACK = "agentvoicebox-tts-flite"
"""The engine that stands in for the platform unless the configuration names another."""

NAME = "agentvoicebox-tts"

LONG = 2_000
"""Characters that are spoken as one; longer texts are cut between sentences."""

REST = 30.0
"""Seconds for which the device speaks by itself after a platform was late, lest each sentence of a reply is."""

LARGEST = 32 * 1024 * 1024
"""Bytes of audio that `LONG` characters may have: ten minutes."""

AHEAD = 4 * 1024 * 1024
"""Bytes of audio that are made before their turn to be played."""

BACKLOG = 64
"""Sentences that may wait to be made."""

STUCK = 600.0
"""Seconds that one more waits for a place among them."""

KEPT, KEPT_BYTES = 200, 32 * 1024 * 1024
"""Files of speech that are kept, and what they may take of the memory that they lie in."""

_TIDY = 16
"""New files between two looks at how many there are."""


class Context(TTSContext):  # type: ignore[misc]
    """How and for whom a sentence is said."""

    link: Link | None
    """Who says it; None where that is the device alone."""
    tenant: str
    """Whose device that link has made this one; empty while nobody knows."""
    choices: Choices
    """The tenant's; the defaults for somebody else's message."""
    language: str
    """What the platform is told; empty for the tenant's choice."""
    named: str
    """The voice that was asked for by name; empty for the tenant's choice."""
    kept: bool
    """Whether what the platform says may be played again for the same sentence."""


class TenantTTS(StreamingTTS):  # type: ignore[misc]
    """Speaks with the platform, and with a local engine where the platform cannot be asked.

    Configuration: `fallback`, the name of any TTS plugin, configured in its own section (`agentvoicebox-tts-flite`;
    empty for none); `patience` (4), the seconds that a platform which is at work is waited for before it says anything,
    and between what it says; `enable_streaming`, to be heard while the rest of a sentence is still made, by `player`, a
    command that plays 16-bit mono audio from its standard input, `{rate}` in it for the rate (found by itself);
    `voice`, one of the platform's, to have another than the tenant has chosen; `enable_cache` (true).

    Voice, speed, persona and language are the tenant's choice, from the next sentence on. The language of a text is
    told to the platform only where it is another than the device's and the tenant's.

    What the platform has said may be played again, for the same tenant, voice, speed and persona only (hazard H6), and
    what the device has said never is. It costs the tenant nothing. `KEPT` sentences are kept until the device restarts.
    A message of the bus that names another tenant is spoken on the device, and nothing of it leaves it (H16).
    """

    def __init__(self, config: dict[str, Any] | None = None, *, link: Link | None = None, **more: Any) -> None:
        self._closed = False
        self._stage: Stage | None = None
        self._jobs: queue.Queue[tuple[Sentence, str, Context] | None] = queue.Queue(BACKLOG)
        self._worker: threading.Thread | None = None
        self._away = False
        self._late_until = 0.0
        self._written = 0
        super().__init__(config, audio_ext="wav", **more)
        self._plugin_id = NAME
        self._patience = patience.of(self.config)
        self._link = link or shared("audio")
        self._voice = LocalVoice(str(self.config.get("fallback", FALLBACK) or ""))
        if self._link is None:
            LOG.warning("No platform is set up on this device: run `avb device init`. It speaks by itself until then.")

    @classproperty  # type: ignore[untyped-decorator]
    def available_languages(cls) -> set[str]:
        """None that could be listed: what the tenant's engine on the platform speaks, this does."""
        return set()

    def init(self, bus: Any = None, playback: Any = None, callbacks: Any = None) -> None:
        """Called by ovos-audio. `callbacks` are not needed: streams go through its own playback thread, in order."""
        TTS.init(self, bus, playback)
        self.callbacks = callbacks
        if not self.config.get("enable_streaming"):
            return
        command = player.find(self.config.get("player"))
        if command and Stage.fits(playback):
            self._stage = Stage(playback, command)
        elif not command:
            LOG.warning("No player for streamed speech: install pulseaudio-utils or alsa-utils. Files are played.")

    # --- what ovos-audio asks for -------------------------------------------------------------------------------------

    def preprocess_sentence(self, sentence: str) -> list[str]:
        """The pieces that a text is spoken in: one, unless it is a very long one. The platform finds its own pauses."""
        if len(sentence) <= LONG:
            return [sentence]
        cut = Sentences(self._choices().language)
        pieces = [""]
        for each in (*cut.feed(sentence), *cut.end()):
            if len(pieces[-1]) + len(each) >= LONG:
                pieces.append("")
            pieces[-1] = f"{pieces[-1]} {each}".strip()
        return [piece for piece in pieces if piece] or [""]

    def synth(self, sentence: str, ctxt: TTSContext | None = None, **kwargs: Any) -> tuple[AudioFile, None]:
        """A file with the whole sentence: one from before where that may be. Raises `AvbError`."""
        context = ctxt if isinstance(ctxt, Context) else self._get_ctxt(kwargs)
        found = self._found(sentence, context)
        if found is None:
            spoken = Sentence()
            found = self._make(spoken, sentence, context) or self._file(sentence, context)
            if not Path(str(found)).exists():
                spoken.write(str(found))
        return found, None

    def get_tts(
        self, sentence: str, wav_file: str, lang: str | None = None, voice: str | None = None
    ) -> tuple[str, None]:
        """Write all of a sentence, or of a longer text, to `wav_file`. Raises `AvbError` when nobody can speak."""
        context = self._get_ctxt({key: value for key, value in (("lang", lang), ("voice", voice)) if value})
        spoken = Sentence()
        self._say_all(spoken, sentence, context)
        spoken.end()
        spoken.write(wav_file)
        return wav_file, None

    async def stream_tts(
        self, sentence: str, lang: str | None = None, voice: str | None = None
    ) -> AsyncIterator[bytes]:
        """A WAV file with all of a sentence, as soon as all of it is there.

        For others than ovos-audio: there a sentence can be begun anew when the platform breaks off in its middle.
        """
        context = self._get_ctxt({key: value for key, value in (("lang", lang), ("voice", voice)) if value})
        audio, _ = await asyncio.to_thread(self.synth, sentence, context)
        yield await asyncio.to_thread(Path(str(audio)).read_bytes)

    def stop(self) -> None:
        """Be silent. The playback thread goes on: it is not only ours."""
        if self._stage is not None:
            self._stage.stop()

    def shutdown(self) -> None:
        """Be silent, and forget the local engine; the link serves the other plugins of the process."""
        if self._closed:
            return
        self._closed = True
        if self._stage is not None:
            self._stage.leave()
        with suppress(queue.Full):
            self._jobs.put_nowait(None)
        if voice := getattr(self, "_voice", None):
            voice.close()

    def _execute(self, sentence: str, ident: str, listen: bool, preprocess: bool = True, **kwargs: Any) -> None:
        """Queue a text for playback; the microphone opens at its end if `listen`."""
        context = self._get_ctxt(kwargs)
        asked = kwargs.get("message") or caller.message() or Message("speak", {}, {"session": {"session_id": ident}})
        pieces = self.preprocess_sentence(sentence) if preprocess else [sentence]
        for number, piece in enumerate(pieces, 1):
            # One message of its own for each piece: they are played long after this has returned.
            message = Message(asked.msg_type, {**asked.data, "utterance": piece}, asked.context)
            self._put(piece, context, listen and number == len(pieces), message)

    def _put(self, piece: str, context: Context, listen: bool, message: Message) -> None:
        stage, found = self._stage, self._found(piece, context)
        if stage is None or found is not None:
            audio = found or self.synth(piece, context)[0]
            TTS.queue.put((str(audio), None, listen, context.tts_id, message))
            return
        sentence = Sentence()
        self._begin_working()
        self._jobs.put((sentence, piece, context), timeout=STUCK)
        stage.put(sentence, listen, context.tts_id, message)

    def _get_ctxt(self, kwargs: Mapping[str, Any] | None = None) -> Context:
        """How and for whom a sentence is said: what the message tells, and the tenant has chosen."""
        told = dict(kwargs or {})
        asked: Message | None = told.get("message") or caller.message()
        link = self._link
        if link is None or caller.is_foreign(asked, link.welcome):
            link = None
        choices = self._choices() if link is not None else Choices(language=self._device())
        language = told.get("lang") or (_language(asked) if asked is not None else "")
        if any(same_language(language, known) for known in (self._device(), choices.language)):
            language = ""
        named = str(told.get("voice") or "")
        if named in ("", "default"):
            named = str(self.config.get("voice") or "") if link is not None else ""
        context = Context(
            self.plugin_id,
            language or choices.language,
            _digest(link, choices, named),
            {"lang": language or choices.language, "voice": named},
        )
        context.link, context.choices, context.language, context.named = link, choices, language, named
        context.tenant = link.welcome.tenant_id if link is not None and link.welcome is not None else ""
        context.kept = bool(self.enable_cache and context.tenant)
        return context

    def _choices(self) -> Choices:
        """The tenant's choices; of the device's language where nothing is known of them."""
        choices = self._link.choices if self._link is not None else Choices()
        return choices if choices.tenant else Choices(language=self._device())

    def _device(self) -> str:
        """The language of the device."""
        return str(standardize_lang_tag(self._lang or Configuration().get("lang") or "en-US"))

    # --- files --------------------------------------------------------------------------------------------------------

    def _found(self, sentence: str, context: Context) -> AudioFile | None:
        """What the platform has said before, of the same sentence in the same way."""
        if not context.kept:
            return None
        try:
            audio, _ = _cache(context).cached_sentences.get(hash_sentence(sentence), (None, None))
            if audio is None or not audio.path.exists():
                return None
            audio.path.touch()  # the ones that were not heard for long go first
        except OSError:
            return None  # gone, or no place for anything: it is said anew
        found: AudioFile = audio
        return found

    def _file(self, sentence: str, context: Context) -> AudioFile:
        """A new file, which no other sentence has or gets."""
        audio: AudioFile = _cache(context).define_audio_file(f"{hash_sentence(sentence)}-{uuid.uuid4().hex[:12]}")
        audio.path.parent.mkdir(parents=True, exist_ok=True)
        self._written += 1
        if self._written % _TIDY == 0:
            _tidy(audio.path.parents[2])
        return audio

    # --- how it is said -----------------------------------------------------------------------------------------------

    def _begin_working(self) -> None:
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="agentvoicebox-tts", daemon=True)
            self._worker.start()

    def _work(self) -> None:
        """Make one sentence after the other: two at once would both be late."""
        while not self._closed and (job := self._jobs.get()) is not None:
            sentence, text, context = job
            stage = self._stage
            while stage is not None and stage.waiting() > AHEAD and not sentence.stopped:
                time.sleep(0.1)
            try:
                self._make(sentence, text, context)
            except AvbError as error:
                LOG.error("A sentence is not spoken: %s", error.message)
            except Exception as error:
                LOG.error("A sentence is not spoken (%s): it is passed over.", type(error).__name__)
            finally:
                sentence.end()
            del job, sentence, context

    def _make(self, sentence: Sentence, text: str, context: Context) -> AudioFile | None:
        """Make all of a sentence; returns a file with it where that may be played again. Raises `AvbError`."""
        if not (self._say_all(sentence, text, context) and context.kept):
            sentence.end()
            return None
        sentence.end()
        try:
            audio = self._file(text, context)
            sentence.write(str(audio))
            # After a change of tenant or voice meanwhile nobody can tell whose it is.
            if _digest(context.link, self._choices(), context.named) == context.voice:
                _know(_cache(context).cached_sentences, hash_sentence(text), audio)
        except OSError as error:
            LOG.warning("Speech is not kept (%s): look whether the disk is full.", error.strerror)
            return None
        return audio

    def _say_all(self, sentence: Sentence, text: str, context: Context) -> bool:
        """Add a text of any length; returns whether the platform has said all of it. Raises `AvbError`."""
        return all([self._say(sentence, piece, context) for piece in self.preprocess_sentence(text)])

    def _say(self, sentence: Sentence, text: str, context: Context) -> bool:
        """Add a text to a sentence; returns whether it was the platform that has said it. Raises `AvbError`."""
        if not any(letter.isalnum() for letter in text) or sentence.stopped:
            return False
        error: AvbError | None = None
        if context.link is not None:
            before = sentence.mark()
            try:
                self._ask(sentence, text, context, context.link)
            except AvbError as failure:
                if sentence.stopped:
                    return False
                error = failure
                if error.code == "platform_late" and time.monotonic() >= self._late_until:
                    self._late_until = time.monotonic() + REST
                sentence.again(before)
            else:
                self._away = False
                return True
        self._speak(sentence, text, context, error)
        return False

    def _ask(self, sentence: Sentence, text: str, context: Context, link: Link) -> None:
        """Have the platform say it."""
        size = 0
        if time.monotonic() < self._late_until:
            raise Away("The platform was late a moment ago: look at its load.", code="platform_late")
        if context.tenant and (link.welcome is None or link.welcome.tenant_id != context.tenant):
            raise Away("The device has been paired with another tenant since this was to be said.")
        with link.speak(text, context.language, context.named) as speaking:
            speaking.patience = self._patience
            sentence.when_stopped(speaking.cancel)
            for pcm, rate in speaking:
                size += len(pcm)
                if size > LARGEST:
                    raise Failed("The platform comes to no end with a sentence.", code="too_long")
                sentence.add(pcm, rate)
        if not size:
            raise Failed("The platform says nothing: look at the voice that is chosen there.", code="platform_silent")

    def _speak(self, sentence: Sentence, text: str, context: Context, error: AvbError | None) -> None:
        """Have the device say it."""
        choices, seconds = context.choices, 0.0
        try:
            for speech in self._voice.speak(text, context.lang, context.named or choices.voice, choices.speed):
                if sentence.stopped:
                    break
                sentence.add(speech.pcm, speech.rate)
                seconds += speech.seconds
        except AvbError as failure:
            if error is None:
                raise
            raise failure from error
        if context.link is not None and error is not None:
            if not self._away:
                LOG.warning("%s speaks instead of the platform: %s", self._voice.name, error.message)
            self._away = True
            context.link.report("tts", engine=self._voice.name, seconds=round(seconds, 3), reason=error.code)


def _language(asked: Message) -> str:
    """The language of the text that a message brings."""
    return str((asked.data or {}).get("lang") or SessionManager.get(asked).lang or "")


def _digest(link: Link | None, choices: Choices, named: str) -> str:
    """A name for everything that makes a sentence sound the way it does; safe as that of a folder."""
    if link is None or link.welcome is None:
        return "device"
    told = [link.welcome.tenant_id, named or choices.voice, choices.speed, choices.persona]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:32]


def _cache(context: Context) -> Any:
    """The stock cache for what sounds like this, all of it in shared memory: nothing is written to an SD card.

    Not as the configuration says: a `preloaded_cache` there would be one place for all tenants and voices.
    """
    place = {"preloaded_cache": get_cache_directory(f"tts/{context.tts_id}"), "persist_cache": False}
    return context.get_cache("wav", place)


def _know(known: dict[str, tuple[AudioFile, None]], sentence: str, audio: AudioFile) -> None:
    """Find this file for the sentence from now on, and forget the oldest of too many: files go, their names stay."""
    known.pop(sentence, None)
    known[sentence] = audio, None
    while len(known) > KEPT:
        known.pop(next(iter(known)), None)


def _tidy(place: Path) -> None:
    """Delete what has not been heard for longest of too many files."""
    try:
        files = sorted(((file.stat(), file) for file in place.rglob("*.wav")), key=lambda each: -each[0].st_mtime)
    except OSError:
        return  # somebody else tidies up
    size = 0
    for number, (known, file) in enumerate(files):
        size += known.st_size
        if number >= KEPT or size > KEPT_BYTES:
            with suppress(OSError):
                file.unlink()
