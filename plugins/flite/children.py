"""Processes that speak with flite, started when they are needed and kept for the next sentence."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from agentvoicebox.config.errors import Unavailable
from agentvoicebox.plugins.flite.child import PART, REQUEST
from agentvoicebox.plugins.pool import cancelled, when_cancelled

_COMMAND = [sys.executable, "-I", "-S", str(Path(__file__).with_name("child.py"))]

PATIENCE = 10.0
"""Seconds without a byte after which a process counts as hanging."""

_MOST = 1 << 20
"""Bytes of one part at most: more is no part, but something that C code wrote over."""


def available() -> bool:
    """Whether flite's libraries are here. They are looked for in another process: this one never loads them."""
    try:
        return not subprocess.run(
            _COMMAND,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            timeout=PATIENCE,
        ).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


class Children:
    """At most so many processes, one sentence at a time in each. May be used from any thread."""

    def __init__(self, most: int) -> None:
        self._places = threading.Semaphore(most)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._closed = False

    def speak(self, text: bytes, voice: str, stretch: float) -> Generator[tuple[bytes, int]]:
        """The audio of a text in UTF-8 without NUL, as it is made: 16-bit mono, and its rate in Hz.

        Raises `Unavailable` when the process dies or hangs, or when all are busy for too long.
        """
        with self._one() as child:
            yield from child.speak(text, voice, stretch)

    def close(self) -> None:
        """End those that are idle now, and the others as soon as they are done."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()

    @contextmanager
    def _one(self) -> Iterator[_Child]:
        if not self._places.acquire(timeout=PATIENCE):
            raise Unavailable("All voices of flite are busy: try again.", code="busy")
        try:
            child = self._take()
            try:
                with when_cancelled(child.kill):
                    yield child
            except BaseException:
                # Whatever it still has to say belongs to this sentence: nobody else may hear it.
                child.end()
                raise
            self._keep(child)
        finally:
            self._places.release()

    def _take(self) -> _Child:
        while True:
            with self._lock:
                child = self._idle.pop() if self._idle else None
            if child is None:
                return _Child()
            if child.alive():
                return child
            child.end()

    def _keep(self, child: _Child) -> None:
        with self._lock:
            # Of a caller who has just left, the kill may still be under way.
            keep = not (self._closed or cancelled())
            if keep:
                self._idle.append(child)
        if not keep:
            child.end()


class _Child:
    """A process of `child`, used by one thread at a time; `kill` may come from any."""

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                _COMMAND,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_environment(),
            )
        except OSError as error:
            raise _broken() from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to = self._process.stdin.fileno()
        self._from = self._process.stdout.fileno()
        self._ready = select.poll()
        self._ready.register(self._from, select.POLLIN)

    def speak(self, text: bytes, voice: str, stretch: float) -> Generator[tuple[bytes, int]]:
        """The parts of a text. Unless all of them were taken, it cannot be used again. Raises `Unavailable`."""
        self._write(REQUEST.pack(voice.encode(), stretch, len(text)) + text)
        while True:
            rate, size = PART.unpack(self._read(PART.size))
            if not size:
                return
            if size > _MOST:
                raise _broken()
            yield self._read(size), rate

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """Kill it, and leave nothing of it behind."""
        with self._process:
            self._process.kill()

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._to, data) :]
        except OSError as error:
            raise _broken() from error

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not self._ready.poll(PATIENCE * 1_000):
                raise _broken()
            part = os.read(self._from, size - len(data))
            if not part:
                raise _broken()
            data += part
        return data


def _environment() -> dict[str, str]:
    """What it takes to find libraries, and none of the secrets that the node was given."""
    return {name: value for name, value in os.environ.items() if name.startswith("LD_")}


def _broken() -> Unavailable:
    return Unavailable("flite failed to speak: try again.", code="engine_failed")
