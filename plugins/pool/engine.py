"""One loaded plugin of ovos-plugin-manager, whatever its signature, and whoever waits for its work.

Any STT or TTS plugin serves, by its stock name. Beyond the stock contract a plugin may offer, looked up by name:

- `thread_safe`: may be called from several threads at once; `parallel`: how many calls it does at once. Without
  either it is called from one thread at a time.
- STT: `batch` and `transcribe_batch(jobs: list[Heard])`, which answers up to `batch` jobs at once, in their order,
  each with `(text, confidence, language)` or an `AvbError`.
- TTS: `stream(sentence, lang, voice, speed)`, which yields `(pcm, rate)`, 16-bit mono audio, as it comes; `voice`
  is None for the engine's own choice. `voice_list()`, its `Voice`s; `voices`, their names. A plugin that tells neither
  chooses its voice itself, and so does one that has voices of the text's language where the wanted one is none of them.
- `memory`: the bytes it holds. Otherwise what the process grew by while it was loaded counts.
- `shares_cores`, on the class: its configuration takes `cores`, how many of the machine's it may use. It is told where
  it has to share them with other processes.
- `shutdown()` or `stop()`, called before it is forgotten.

An engine that can stop in the middle of its work asks `cancelled`, or gives `when_cancelled` something to do, so that
nobody's CPU is spent on answers nobody wants.
"""

from __future__ import annotations

import contextvars
import ctypes
import gc
import inspect
import logging
import math
import os
import tempfile
import threading
import wave
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soxr
from ovos_plugin_manager.utils import DEPRECATED_ENTRYPOINTS, PluginTypes
from ovos_plugin_manager.utils.audio import AudioData

from agentvoicebox.config.errors import AvbError, Unavailable
from agentvoicebox.plugins.pool.memory import LEAST
from agentvoicebox.plugins.pool.runner import (
    RATE,
    EngineSpec,
    Heard,
    Loaded,
    Speech,
    Transcript,
    Utter,
    Voice,
    elsewhere,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

_TYPES = {"stt": PluginTypes.STT.value, "tts": PluginTypes.TTS.value}


class Caller:
    """Whoever waits for a piece of work, and may go away."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._acts: list[Callable[[], None]] = []
        self.gone = False

    def leave(self) -> None:
        """Nobody waits any more: do what was asked for in that case."""
        with self._lock:
            self.gone = True
            acts, self._acts = self._acts, []
        for act in acts:
            act()

    @contextmanager
    def watched(self, act: Callable[[], None]) -> Iterator[None]:
        """While the block runs, do `act` when the caller leaves; at once when it has left."""
        with self._lock:
            if not self.gone:
                self._acts.append(act)
        if self.gone:
            act()
        try:
            yield
        finally:
            with self._lock, suppress(ValueError):
                self._acts.remove(act)

    def run(self, work: Callable[[], T]) -> T:
        """Do `work` for this caller: in it, `cancelled` and `when_cancelled` look at it."""
        context = contextvars.copy_context()
        context.run(_caller.set, self)
        return context.run(work)


_caller: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("caller", default=None)


def cancelled() -> bool:
    """Whether nobody wants the result of the work at hand any more. Always false outside a pool."""
    caller = _caller.get()
    return caller is not None and caller.gone


@contextmanager
def when_cancelled(act: Callable[[], None]) -> Iterator[None]:
    """While the block runs, call `act` (from another thread) as soon as nobody wants its result any more."""
    caller = _caller.get()
    with nullcontext() if caller is None else caller.watched(act):
        yield


def plugin_class(kind: str, name: str) -> Any:
    """The class of the installed plugin of that name, or None. Raises whatever importing it raises.

    Only that one is imported: ovos-plugin-manager's own look-up imports every plugin of the kind.
    """
    for group in _groups(kind):
        for entry in entry_points(group=group, name=name):
            return entry.load()
    return None


@cache
def installed(kind: str) -> frozenset[str]:
    """The names of all plugins of a kind, as they were when this was first asked."""
    return frozenset(entry.name for group in _groups(kind) for entry in entry_points(group=group))


def _groups(kind: str) -> list[str]:
    return [_TYPES[kind], *(old for old, new in DEPRECATED_ENTRYPOINTS.items() if new == _TYPES[kind])]


_MOST_SECONDS = 3_600.0
"""Of one file that an engine writes."""

_AGAIN = "try again, or choose another engine"
_DAMAGED = "its model may be damaged or its configuration wrong; fetch it again with `avb models pull`"


def guarded(spec: EngineSpec, work: Callable[[], T], doing: str = "failed", remedy: str = _AGAIN) -> T:
    """What `work` returns; any failure of a plugin is an `AvbError`."""
    try:
        return work()
    except AvbError:
        raise
    except BaseException as error:  # a plugin that calls sys.exit must not end the node
        if not cancelled():
            # What an engine says of its failure may quote what it was given: only the kind of failure is told.
            log.warning("engine %s %s: %s", spec.plugin, doing, type(error).__name__)
        raise Unavailable(
            f"The speech engine {spec.plugin} {doing} ({type(error).__name__}): {remedy}.",
            code="engine_failed",
        ) from error


class Engine:
    """A loaded plugin. Its methods are called from as many threads at once as `loaded.parallel` says."""

    def __init__(self, spec: EngineSpec, threads: int, cores: int = 0) -> None:
        self._spec, self._cores = spec, cores
        before = _resident()
        self._plugin: Any = guarded(spec, self._make, "cannot be loaded", _DAMAGED)
        grown = max(0, _resident() - before)
        told = getattr(self._plugin, "memory", None)
        # Plugins promise nothing about threads; those that can work in several at once say so.
        parallel = getattr(self._plugin, "parallel", None) or (
            threads if getattr(self._plugin, "thread_safe", False) else 1
        )
        batch = getattr(self._plugin, "batch", 1) if hasattr(self._plugin, "transcribe_batch") else 1
        self._speaks = {voice.name: voice.language for voice in self.voices()}
        self.loaded = Loaded(
            told if isinstance(told, int) else grown, max(1, int(parallel)), max(1, int(batch)), tuple(self._speaks)
        )
        self._accepts = set(inspect.signature(self._plugin.get_tts).parameters) if spec.kind == "tts" else set()

    def transcribe(self, jobs: list[Heard]) -> list[Transcript | AvbError]:
        """What each job says, in their order; a job that makes the engine fail harms no other."""
        try:
            return guarded(self._spec, lambda: self._hear_all(jobs))
        except AvbError as error:
            if len(jobs) == 1 or cancelled():
                return [error] * len(jobs)
            # One of them was too much for it: each for itself, so that the others have their answer.
            return [answer for job in jobs for answer in self.transcribe([job])]

    def stream(self, utter: Utter, directory: str) -> Generator[Speech]:
        """The parts of what is said, as they come; one, where the engine cannot speak in parts."""
        if not callable(getattr(self._plugin, "stream", None)):
            yield guarded(self._spec, lambda: self._speak(utter, directory))
            return
        voice = self._voice(utter)
        parts = guarded(self._spec, lambda: iter(self._plugin.stream(utter.text, utter.language, voice, utter.speed)))
        try:
            while (part := guarded(self._spec, lambda: next(parts, None))) is not None:
                yield self._speech(*part)
        finally:
            if hasattr(parts, "close"):
                guarded(self._spec, parts.close)

    def voices(self) -> list[Voice]:
        """Its voices, by name; none where it does not tell, or hears."""
        if self._spec.kind != "tts":
            return []
        return guarded(self._spec, self._voices)

    def close(self) -> None:
        """Let the plugin end what it has begun, forget it, and give its memory back to the system."""
        end = getattr(self._plugin, "shutdown", None) or getattr(self._plugin, "stop", None)
        if callable(end):
            with suppress(AvbError):
                guarded(self._spec, end, "failed to stop")
        self._plugin = end = None
        gc.collect()
        # The allocator of glibc keeps what it was given back; other systems have no such call.
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)

    def _make(self) -> Any:
        plugin = plugin_class(self._spec.kind, self._spec.plugin)
        if plugin is None:
            raise Unavailable(
                f"The speech engine {self._spec.plugin} is not installed: pip install it, or choose another one.",
                code="engine_missing",
            )
        config = dict(self._spec.config)
        if self._cores and getattr(plugin, "shares_cores", False):
            config.setdefault("cores", self._cores)
        return plugin(config=config)

    def _hear_all(self, jobs: list[Heard]) -> list[Transcript | AvbError]:
        if not hasattr(self._plugin, "transcribe_batch"):
            return [self._hear(job) for job in jobs]
        answers = list(self._plugin.transcribe_batch(jobs))
        if len(answers) != len(jobs):
            raise ValueError("not one answer for each job")
        return [
            answer if isinstance(answer, AvbError) else self._transcript(job, *answer)
            for job, answer in zip(jobs, answers, strict=True)
        ]

    def _hear(self, job: Heard) -> Transcript | AvbError:
        try:
            found = self._plugin.transcribe(AudioData(job.pcm16k, RATE, 2), job.language)
        except AvbError as error:
            return error
        text, confidence = found[0] if found else ("", None)
        return self._transcript(job, text, confidence, "")

    def _transcript(self, job: Heard, text: str | None, confidence: float | None, language: str) -> Transcript:
        sure = confidence is not None and math.isfinite(confidence)
        known = language or ("" if job.language == "auto" else job.language)
        return Transcript(
            (text or "").strip(),
            min(1.0, max(0.0, float(confidence or 0.0))) if sure else None,
            job.seconds,
            known,
            self._spec.plugin,
        )

    def _speak(self, utter: Utter, directory: str) -> Speech:
        choices: dict[str, Any] = {"lang": utter.language, "speed": utter.speed}
        if voice := self._voice(utter):
            choices["voice"] = voice
        handle, name = tempfile.mkstemp(suffix=f".{getattr(self._plugin, 'audio_ext', 'wav')}", dir=directory)
        os.close(handle)
        try:
            wanted = {key: value for key, value in choices.items() if key in self._accepts}
            path, _ = self._plugin.get_tts(utter.text, name, **wanted)
            return self._speech(*_read(str(path)))
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)

    def _speech(self, pcm: bytes, rate: int) -> Speech:
        return guarded(self._spec, lambda: _checked(Speech(bytes(pcm), rate, self._spec.plugin)))

    def _voice(self, utter: Utter) -> str | None:
        """What is handed to the plugin: None for its own choice."""
        if utter.voice == "auto" or utter.voice not in self._speaks:
            return None
        spoken, wanted = _primary(self._speaks[utter.voice]), _primary(utter.language)
        better = spoken != wanted and wanted in map(_primary, self._speaks.values())
        return None if spoken and better else utter.voice

    def _voices(self) -> list[Voice]:
        if hasattr(self._plugin, "voice_list"):
            return list(self._plugin.voice_list())
        languages = list(getattr(self._plugin, "available_languages", None) or ())
        language = languages[0] if len(languages) == 1 else ""
        return [Voice(str(name), language) for name in sorted(getattr(self._plugin, "voices", None) or ())]


def _checked(speech: Speech) -> Speech:
    if speech.rate <= 0 or len(speech.pcm) % 2:
        raise ValueError("not 16-bit audio of any rate")
    return speech


def _primary(language: str) -> str:
    return language.replace("_", "-").partition("-")[0].lower()


def _read(path: str) -> tuple[bytes, int]:
    """The audio in a file, mono, and its rate: that of 16-bit WAV, or 16 kHz of what else has to be decoded."""
    try:
        with wave.open(path, "rb") as wav:
            if wav.getsampwidth() != 2:
                raise wave.Error("not 16-bit audio")
            pcm, rate, channels = wav.readframes(wav.getnframes()), wav.getframerate(), wav.getnchannels()
    except (wave.Error, EOFError):
        return _decoded(Path(path).read_bytes()), RATE
    if channels > 1:
        pcm = np.frombuffer(pcm, "<i2").reshape(-1, channels).mean(axis=1).astype("<i2").tobytes()
    return pcm, rate


def _decoded(data: bytes) -> bytes:
    # Imported where it is needed: a machine whose engines all write WAV need not carry PyAV.
    from agentvoicebox.plugins.audio import decode

    try:
        return decode(data, longest=_MOST_SECONDS)
    except AvbError as error:  # what an engine writes is not the caller's input
        raise ValueError(error.code) from error


def at_rate(pcm: bytes, rate: int, wanted: int) -> bytes:
    """16-bit mono audio at `rate` Hz, at `wanted` Hz."""
    if rate == wanted:
        return pcm
    return bytes(soxr.resample(np.frombuffer(pcm, "<i2"), rate, wanted).astype("<i2").tobytes())


def expected(spec: EngineSpec) -> int:
    """Bytes that an engine which was never loaded will hold at least: what its model takes on disk, if that is here;
    little, where it is a service elsewhere; 0 when nobody knows.
    """
    path = Path(str(dict(spec.config).get("model") or ""))
    if elsewhere(spec):
        return LEAST
    if not path.is_absolute():
        return 0
    try:
        return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    except (OSError, ValueError):
        return 0


def _resident() -> int:
    """Bytes of memory this process holds; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
