"""Speech engines shared by all sessions of a process: loaded once for equal configuration, worked off the event loop.

Any ovos-plugin-manager STT or TTS plugin serves, by its stock name. An engine that can stop in the middle of its work
asks `cancelled`, or gives `when_cancelled` something to do, so that nobody's CPU is spent on answers nobody wants.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import os
import tempfile
import threading
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import soxr
from ovos_plugin_manager.stt import load_stt_plugin
from ovos_plugin_manager.tts import load_tts_plugin
from ovos_plugin_manager.utils.audio import AudioData

from agentvoicebox.config.errors import AvbError, Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

_LISTENING_RATE = 16_000

_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of our own in it; engines hand audio over in files


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What makes an engine the same engine: its kind, its plugin's name and its configuration."""

    kind: Literal["stt", "tts"]
    plugin: str
    config: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was understood; empty text when nothing was heard."""

    text: str
    confidence: float | None
    """0 to 1, where the engine tells."""
    audio_seconds: float


@dataclass(frozen=True, slots=True)
class Speech:
    """16-bit little-endian mono audio at `rate` Hz."""

    pcm: bytes
    rate: int

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return len(self.pcm) / 2 / self.rate


class _Caller:
    """Whoever waits for a piece of work, and may go away."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._acts: list[Callable[[], None]] = []
        self.gone = False

    def leave(self) -> None:
        with self._lock:
            self.gone = True
            acts, self._acts = self._acts, []
        for act in acts:
            act()

    @contextmanager
    def watched(self, act: Callable[[], None]) -> Iterator[None]:
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


_caller: contextvars.ContextVar[_Caller | None] = contextvars.ContextVar("caller", default=None)


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


class Pool:
    """The engines of one process. Cancelling a task that awaits one of its methods cancels the engine's work."""

    def __init__(self, threads: int = 0) -> None:
        # The order of the work is decided here and nowhere else: first come, first served; no ear waits for a voice.
        count = threads or max(2, os.cpu_count() or 2)
        self._threads = {kind: ThreadPoolExecutor(count, thread_name_prefix=kind) for kind in ("stt", "tts")}
        self._engines: dict[EngineSpec, asyncio.Task[_Engine]] = {}
        memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
        self._directory = tempfile.TemporaryDirectory(prefix="agentvoicebox-", dir=memory)

    async def load(self, spec: EngineSpec) -> None:
        """Load an engine now rather than at its first use. Raises `Unavailable`."""
        await self._engine(spec)

    async def transcribe(self, spec: EngineSpec, pcm: bytes, rate: int, language: str) -> Transcript:
        """What is said in 16-bit mono audio at `rate` Hz. Raises `AvbError`."""
        engine = await self._engine(spec)
        return await self._work(spec, lambda: engine.transcribe(pcm, rate, language))

    async def speak(
        self, spec: EngineSpec, text: str, language: str, voice: str = "auto", speed: float = 1.0
    ) -> Speech:
        """Say a text; a voice the engine does not have becomes its own choice. Raises `AvbError`."""
        engine = await self._engine(spec)
        return await self._work(spec, lambda: engine.speak(text, language, voice, speed, self._directory.name))

    def close(self) -> None:
        """Let the work at hand end, start no more, and forget all engines."""
        for threads in self._threads.values():
            threads.shutdown(cancel_futures=True)
        self._engines.clear()
        self._directory.cleanup()

    async def _engine(self, spec: EngineSpec) -> _Engine:
        task = self._engines.get(spec)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._engines[spec] = asyncio.create_task(self._work(spec, lambda: _Engine(spec)))
        # One caller that leaves must not take the engine from the others that wait for the same load.
        return await asyncio.shield(task)

    async def _work(self, spec: EngineSpec, work: Callable[[], T]) -> T:
        caller = _Caller()
        context = contextvars.copy_context()
        context.run(_caller.set, caller)
        job = asyncio.get_running_loop().run_in_executor(
            self._threads[spec.kind], context.run, _guarded, spec, caller, work
        )
        try:
            return await job
        except asyncio.CancelledError:
            caller.leave()
            raise


def _guarded(spec: EngineSpec, caller: _Caller, work: Callable[[], T]) -> T:
    try:
        return work()
    except AvbError:
        raise
    except Exception as error:
        if not caller.gone:
            # What an engine says of its failure may quote what it was given: only the kind of failure is told.
            log.warning("engine %s failed: %s", spec.plugin, type(error).__name__)
        raise Unavailable(f"The speech engine {spec.plugin} failed.", code="engine_failed") from error


class _Engine:
    """One loaded plugin, with what our calls need to know of its signature."""

    def __init__(self, spec: EngineSpec) -> None:
        load = load_stt_plugin if spec.kind == "stt" else load_tts_plugin
        plugin = load(spec.plugin)
        if plugin is None:
            raise Unavailable(
                f"The speech engine {spec.plugin} is not installed: pip install it, or choose another one.",
                code="engine_missing",
            )
        self._plugin: Any = plugin(config=dict(spec.config))
        # Plugins promise nothing about threads; those that can work in several at once say so.
        self._lock = nullcontext() if getattr(plugin, "thread_safe", False) else threading.Lock()
        self._accepts = set(inspect.signature(plugin.get_tts).parameters) if spec.kind == "tts" else set()

    def transcribe(self, pcm: bytes, rate: int, language: str) -> Transcript:
        with self._lock:
            found = self._plugin.transcribe(AudioData(_at_listening_rate(pcm, rate), _LISTENING_RATE, 2), language)
        text, confidence = found[0] if found else ("", None)
        return Transcript((text or "").strip(), confidence, len(pcm) / 2 / rate)

    def speak(self, text: str, language: str, voice: str, speed: float, directory: str) -> Speech:
        choices: dict[str, Any] = {"lang": language, "speed": speed}
        if voice in getattr(self._plugin, "voices", (voice,)) and voice != "auto":
            choices["voice"] = voice
        handle, name = tempfile.mkstemp(suffix=".wav", dir=directory)
        os.close(handle)
        try:
            with self._lock:
                wanted = {key: value for key, value in choices.items() if key in self._accepts}
                path, _ = self._plugin.get_tts(text, name, **wanted)
            return _read(str(path))
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)


def _at_listening_rate(pcm: bytes, rate: int) -> bytes:
    """What the stock listener hands over; plugins such as faster-whisper's take any audio for 16 kHz."""
    if rate == _LISTENING_RATE:
        return pcm
    samples = np.frombuffer(pcm[: len(pcm) // 2 * 2], "<i2")
    return bytes(soxr.resample(samples, rate, _LISTENING_RATE).astype("<i2").tobytes())


def _read(path: str) -> Speech:
    with wave.open(path, "rb") as wav:
        if wav.getsampwidth() != 2:
            raise ValueError("not 16-bit audio")
        pcm, rate, channels = wav.readframes(wav.getnframes()), wav.getframerate(), wav.getnchannels()
    if channels > 1:
        pcm = np.frombuffer(pcm, "<i2").reshape(-1, channels).mean(axis=1).astype("<i2").tobytes()
    return Speech(pcm, rate)
