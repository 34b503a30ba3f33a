"""Engines on the device itself, which serve where the platform cannot be asked.

Any STT or TTS plugin that ovos-plugin-manager finds serves, by its name and with its own section of the device's
configuration. Each is loaded in the background, so that it is there when it is needed and start-up does not wait.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, Literal

from ovos_config import Configuration
from ovos_plugin_manager.templates.stt import StreamingSTT
from ovos_plugin_manager.templates.tts import TTS
from ovos_utils.file_utils import get_cache_directory
from ovos_utils.log import LOG

from agentvoicebox.config.errors import AvbError, Unavailable
from agentvoicebox.plugins.pool.engine import Engine, plugin_class
from agentvoicebox.plugins.pool.runner import EngineSpec, Heard, Speech, Transcript, Utter

LOADING = 10.0
"""Seconds that whoever needs an engine waits for it to be loaded."""

WORKING = 30.0
"""Seconds that whoever needs an engine waits for others to be done with it."""


class _Local:
    """An engine that is loaded in the background; whoever needs it earlier waits for it."""

    kind: Literal["stt", "tts"]

    def __init__(
        self, name: str, configuration: Mapping[str, Any] | None = None, *, patience: float | None = None
    ) -> None:
        self.name = name
        self._given = configuration
        self._patience = patience
        self._engine: _Plugin | None = None
        self._why: AvbError | None = None
        self._lock = threading.Lock()
        self._places = threading.Semaphore(1)
        self._closed = False
        self._loaded = threading.Event()
        if name:
            threading.Thread(target=self._load, name=f"local-{self.kind}", daemon=True).start()
        else:
            self._why = Unavailable(
                f'Nothing stands in for the platform: name an engine as "fallback" in the {self.kind} section of '
                "mycroft.conf.",
                code="engine_missing",
            )
            self._loaded.set()

    def __bool__(self) -> bool:
        """Whether there is one, or soon may be."""
        return self._why is None

    def close(self) -> None:
        """Forget the engine."""
        with self._lock:
            self._closed = True
            engine, self._engine = self._engine, None
            self._why = Unavailable("The engine of the device is shut down.", code="shutting_down")
        if engine is not None:
            engine.close()

    def _load(self) -> None:
        engine = None
        try:
            engine = _Plugin(self.kind, self.name, self._section())
        except AvbError as error:
            LOG.warning("Nothing stands in for the platform: %s", error.message)
            # Not the error itself: with it, all that a half-made plugin holds would stay.
            self._why = Unavailable(error.message, code=error.code)
        except Exception as error:
            LOG.warning("Nothing stands in for the platform: %s fails (%s).", self.name, type(error).__name__)
            self._why = Unavailable(f"The engine {self.name} cannot be loaded: choose another.", code="engine_failed")
        with self._lock:
            if engine is not None and not self._closed:
                self._places = threading.Semaphore(engine.loaded.parallel)
                self._engine, engine = engine, None
        self._loaded.set()
        if engine is not None:
            engine.close()

    def _section(self) -> dict[str, Any]:
        """What the device's configuration says of this engine."""
        if self._given is not None:
            return dict(self._given)
        told = Configuration()
        section = (told.get(self.kind) or {}).get(self.name)
        return {"lang": told.get("lang", "en-US"), "module": self.name, **(section or {})}

    def _ready(self) -> _Plugin:
        """The engine. Raises `Unavailable` when it is not there, or not in time."""
        if not self._loaded.wait(LOADING if self._patience is None else self._patience):
            raise Unavailable(f"The engine {self.name} is not loaded yet: try again.", code="engine_timeout")
        engine = self._engine
        if engine is None:
            raise self._why or Unavailable(f"The engine {self.name} is not loaded.", code="engine_missing")
        return engine

    def _take(self) -> threading.Semaphore:
        """A place among those who use the engine at once; the caller gives it back. Raises `Unavailable`."""
        places = self._places
        if not places.acquire(timeout=WORKING):
            raise Unavailable(f"The engine {self.name} is busy: try again in a moment.", code="engine_timeout")
        return places


class LocalEar(_Local):
    """A speech recogniser of the device; false where none is chosen or it could not be loaded."""

    kind = "stt"

    def hear(self, pcm: bytes, language: str) -> Transcript:
        """What 16-bit mono audio at 16 kHz says, from any thread. Raises `AvbError`."""
        engine = self._ready()
        places = self._take()
        try:
            [found] = engine.transcribe([Heard(pcm, language)])
        finally:
            places.release()
        if isinstance(found, AvbError):
            raise found
        return found


class LocalVoice(_Local):
    """A voice of the device; false where none is chosen or it could not be loaded."""

    kind = "tts"

    def speak(self, text: str, language: str, voice: str = "", speed: float = 1.0) -> Iterator[Speech]:
        """The parts of what is said, as they come, from any thread; another voice where it has none of that name.

        Raises `AvbError`.
        """
        engine = self._ready()
        places = self._take()
        try:
            with (
                tempfile.TemporaryDirectory(prefix="agentvoicebox-", dir=_memory()) as directory,
                closing(engine.stream(Utter(text, language, voice or "auto", speed), directory)) as parts,
            ):
                yield from parts
        finally:
            places.release()


class _Plugin(Engine):
    """A loaded plugin, in a process that has a playback thread and plugins of its own."""

    def __init__(self, kind: Literal["stt", "tts"], name: str, section: Mapping[str, Any]) -> None:
        super().__init__(EngineSpec(kind, name, tuple(sorted(section.items()))), threads=2)

    def _make(self) -> Any:
        found = plugin_class(self._spec.kind, self._spec.plugin)
        if found is None:
            raise Unavailable(
                f"The speech engine {self._spec.plugin} is not installed on this device: pip install it, or choose "
                f'another one as "fallback" in the {self._spec.kind} section of mycroft.conf.',
                code="engine_missing",
            )
        if self._spec.kind == "tts":
            found = _aside(found)
        return found(config=dict(self._spec.config))

    def _hear(self, job: Heard) -> Transcript | AvbError:
        if not isinstance(self._plugin, StreamingSTT):
            return super()._hear(job)
        # Those that hear as somebody speaks take no notice of audio given to `transcribe`.
        self._plugin.stream_start(job.language)
        self._plugin.stream_data(job.pcm16k)
        found = self._plugin.transcribe(None, job.language)
        text, confidence = found[0] if found else ("", None)
        return self._transcript(job, text, confidence, "")


def _memory() -> str:
    """A place for what is deleted in a moment: in memory, so that an SD card is neither worn nor may be full."""
    return str(get_cache_directory("agentvoicebox"))


def _aside(plugin: Any) -> Any:
    """The class of a voice, which leaves the playback of the process alone.

    `TTS.stop`, which every `shutdown` and even `__del__` ends in, stops the one playback thread that all voices of a
    process share: a local engine that is only reloaded, or fails to load, would make the device dumb.
    """
    if plugin.stop is not TTS.stop:
        return plugin
    return type(plugin.__name__, (plugin,), {"stop": lambda self: None, "__module__": plugin.__module__})
