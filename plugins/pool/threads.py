"""Engines in this process, each with threads of its own: no engine waits for another, and no ear for a voice."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from agentvoicebox.config.errors import AvbError, Unavailable
from agentvoicebox.plugins.pool.engine import Caller, Engine
from agentvoicebox.plugins.pool.runner import EngineSpec, Heard, Loaded, Speech, Transcript, Utter, Voice

T = TypeVar("T")

_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of our own in it; engines hand audio over in files

_AHEAD = 4
"""Parts of speech that a thread may be ahead of the loop."""
_EVERYTHING = 1_000_000


class Threads:
    """A `Runner`. `threads` is how many calls an engine does at once that can do any number of them, and how many cores
    those may use that ask for it.

    A thread cannot be ended from outside: an engine that hangs keeps its place until this process ends. Where engines
    are not to be trusted so far, `processes.Processes` replaces what hangs.
    """

    def __init__(self, threads: int = 0) -> None:
        self._threads = threads or max(2, os.cpu_count() or 2)
        self._cores = threads
        self._engines: dict[EngineSpec, tuple[Engine, ThreadPoolExecutor]] = {}
        self._rooms: set[threading.Semaphore] = set()
        # Loading has threads of its own: an engine that loads for a minute keeps nobody from speaking.
        self._loaders = ThreadPoolExecutor(4, thread_name_prefix="load")
        memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
        self._directory = tempfile.TemporaryDirectory(prefix="agentvoicebox-", dir=memory)

    async def load(self, spec: EngineSpec) -> Loaded:
        """Make the plugin of that name here; its memory is what it tells, or what the process grew by."""
        if spec not in self._engines:
            engine = await _done_by(self._loaders, lambda: Engine(spec, self._threads, self._cores))
            workers = ThreadPoolExecutor(engine.loaded.parallel, thread_name_prefix=spec.kind)
            self._engines[spec] = engine, workers
        return self._engines[spec][0].loaded

    async def unload(self, spec: EngineSpec) -> None:
        """Forget an engine, and give its memory back to the system."""
        if spec in self._engines:
            engine, workers = self._engines.pop(spec)
            workers.shutdown(wait=False)
            await _done_by(self._loaders, engine.close)

    async def transcribe(self, spec: EngineSpec, jobs: list[Heard]) -> list[Transcript | AvbError]:
        """What each of the jobs says, in their order."""
        engine, workers = self._engine(spec)
        return await _done_by(workers, lambda: engine.transcribe(jobs))

    async def stream(self, spec: EngineSpec, utter: Utter) -> AsyncGenerator[Speech]:
        """The parts of what is said, as they come; the thread is at most four of them ahead."""
        engine, workers = self._engine(spec)
        loop, caller = asyncio.get_running_loop(), Caller()
        parts: asyncio.Queue[Speech | None] = asyncio.Queue()
        room = threading.Semaphore(_AHEAD)
        self._rooms.add(room)

        def work() -> None:
            with caller.watched(room.release), closing(engine.stream(utter, self._directory.name)) as spoken:
                for part in spoken:
                    room.acquire()
                    if caller.gone:
                        return
                    loop.call_soon_threadsafe(parts.put_nowait, part)

        task = asyncio.ensure_future(_done_by(workers, work, caller))
        task.add_done_callback(lambda _: parts.put_nowait(None))
        try:
            while (part := await parts.get()) is not None:
                room.release()
                yield part
            await task
        finally:
            task.cancel()
            await asyncio.wait([task])
            _looked_at(task)
            self._rooms.discard(room)

    async def voices(self, spec: EngineSpec) -> list[Voice]:
        """The engine's voices."""
        engine, _ = self._engine(spec)
        return await _done_by(self._loaders, engine.voices)

    def shutdown(self) -> None:
        """Let the work at hand end, and forget all engines. Blocks so long."""
        for room in tuple(self._rooms):  # the loop may be what waits here, and take nothing meanwhile
            room.release(_EVERYTHING)
        for _, workers in self._engines.values():
            workers.shutdown(cancel_futures=True)
        self._loaders.shutdown(cancel_futures=True)
        self._engines.clear()
        self._directory.cleanup()

    async def close(self) -> None:
        """Let the work at hand end, and forget all engines."""
        await asyncio.to_thread(self.shutdown)

    def _engine(self, spec: EngineSpec) -> tuple[Engine, ThreadPoolExecutor]:
        if spec not in self._engines:
            raise Unavailable(f"The speech engine {spec.plugin} is not loaded: try again.", code="engine_failed")
        return self._engines[spec]


async def _done_by(workers: ThreadPoolExecutor, work: Callable[[], T], caller: Caller | None = None) -> T:
    """What `work` returns, done by a thread. Who is cancelled leaves, and returns when the thread is at rest."""
    caller = caller or Caller()
    begun = workers.submit(caller.run, work)
    try:
        return await asyncio.wrap_future(begun)
    except asyncio.CancelledError:
        caller.leave()
        if not begun.cancel():
            rest = asyncio.wrap_future(begun)
            await asyncio.wait([rest])
            _looked_at(rest)
        raise


def _looked_at(job: asyncio.Future[T]) -> None:
    """Nobody wants to know how it ended."""
    if not job.cancelled():
        job.exception()
