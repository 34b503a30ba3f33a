"""What happened on a device, until the platform knows it: each event once, also over restarts and without a network."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import os
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from ovos_utils.log import LOG

from agentvoicebox.plugins.device import kept, wire
from agentvoicebox.plugins.device.connection import aside
from agentvoicebox.plugins.device.requests import Away, Failed

MOST = 10_000
"""Events that wait to be told; of more, the oldest are forgotten."""

SOON = 5.0
"""Seconds after which what could not be told is put on disk."""

LARGEST = 4096
"""Bytes of one event."""

TRIES = 5
"""How often an event is told alone that the platform does not take, before it is forgotten."""

_SOONEST, _LATEST = 1.0, 60.0
_LATER = frozenset(("service_unavailable", "store_unavailable", "rate_limit_exceeded", "tenant_limit_exceeded"))
"""Codes of problems that are not the events'."""

_UNTIDY = 2500
"""Events that are on disk although they have been told, or forgotten, after which the file is written anew."""

_END = 253_402_300_800.0
"""The year 10000: no clock of ours gets there."""

_SLOTS = 8
"""Processes of one name that each have a file of their own."""

Send = Callable[[list[dict[str, Any]]], Awaitable[None]]


class Outbox:
    """Events of one process. Several processes of the same name share `path` without harm."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._events: dict[str, dict[str, Any]] = {}
        self._on_disk: set[str] = set()
        self._unkept_since: float | None = None
        self._forgotten = False
        self._disk = _Disk(path)
        self._platform: tuple[float, float] | None = None
        self._batch, self._tries = wire.MOST_EVENTS, 0
        self._woken = asyncio.Event()

    def __len__(self) -> int:
        return len(self._events)

    # --- on any thread ------------------------------------------------------------------------------------------------

    def add(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Have an event told. Never raises: what JSON cannot say, and what is too large, is left out with a line."""
        event = {**facts, "id": uuid.uuid4().hex, "kind": kind, **_now()}
        try:
            if len(json.dumps(event, allow_nan=False).encode()) > LARGEST:
                raise ValueError("it is too large")
        except (TypeError, ValueError, RecursionError) as error:
            LOG.error(f"an event of the kind {kind} is not reported: {error}")
            return
        with self._lock:
            self._events[event["id"]] = event
            self._limit()
            if self._unkept_since is None:
                self._unkept_since = time.monotonic()

    def set_clock(self, now: float) -> None:
        """What the platform's clock says now, in seconds since 1970; what no clock says is passed over."""
        if 0 < now < _END:
            self._platform = now, _up()

    def close(self) -> None:
        """Put on disk what has not been told."""
        self.keep()
        self._disk.close()

    def keep(self) -> None:
        """Put on disk what is not there yet; if that cannot be, it is kept in memory."""
        with self._disk.lock:
            self._disk.claim()
            with self._lock:
                new = [event for number, event in self._events.items() if number not in self._on_disk]
                self._unkept_since = None
            if new and self._disk.append(new):
                self._on_disk.update(event["id"] for event in new)
        if self._untidy() > _UNTIDY:
            self._tidy()  # of a device that is away for months, the oldest are forgotten on disk too

    # --- on the link's thread -----------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There is something to tell, or somebody to tell it to."""
        self._woken.set()

    async def tell(self, send: Send) -> None:
        """Tell what is there, and what comes, for ever. `send` raises `Away` when it cannot be told now."""
        await aside(self._remember)
        wait = 0.0
        while True:
            self._woken.clear()
            try:
                while await self._tell_some(send):
                    wait = 0.0
            except Away:
                wait = 0.0
            except (Failed, TimeoutError):
                wait = min(max(wait * 2, _SOONEST), _LATEST)
            except Exception:
                LOG.exception("events could not be reported")
                wait = _LATEST
            await self._rest(wait)

    async def _tell_some(self, send: Send) -> bool:
        """Tell the oldest events; false when there are none. Raises `Away`, `Failed`."""
        with self._lock:
            batch = [event for _, event in zip(range(self._batch), self._events.values(), strict=False)]
        if not batch:
            return False
        try:
            await send([self._dated(event) for event in batch])
        except Failed as error:
            self._blame(batch, error)
            raise
        self._batch, self._tries = wire.MOST_EVENTS, 0
        await self._done(batch)
        return True

    def _blame(self, batch: list[dict[str, Any]], error: Failed) -> None:
        """Find the event that the platform does not take, so that it does not keep the others back."""
        if error.code in _LATER:
            return
        if len(batch) > 1:
            self._batch = len(batch) // 2
            return
        self._tries += 1
        if self._tries >= TRIES:
            kind = batch[0]["kind"]
            LOG.error(f"an event of the kind {kind} is forgotten: the platform does not take it ({error.code})")
            self._batch, self._tries = wire.MOST_EVENTS, 0
            with self._lock:
                self._events.pop(batch[0]["id"], None)

    async def _done(self, batch: list[dict[str, Any]]) -> None:
        numbers = {event["id"] for event in batch}
        with self._lock:
            for number in numbers:
                self._events.pop(number, None)
            if not self._events:
                self._unkept_since = None
        # Rewriting the file for each batch would wear out an SD card; what is told twice after a crash counts once.
        if (told := self._untidy()) and (told == len(self._on_disk) or told > _UNTIDY):
            await aside(self._tidy)

    async def _rest(self, wait: float) -> None:
        """Until there is a reason to tell again; what cannot be told soon is put on disk meanwhile."""
        until = time.monotonic() + wait if wait else None
        while True:
            now = time.monotonic()
            keep = None if self._unkept_since is None else self._unkept_since + SOON
            if keep is not None and keep <= now:
                await aside(self.keep)
                continue
            times = [each - now for each in (until, keep) if each is not None]
            try:
                async with asyncio.timeout(max(0.0, min(times)) if times else None):
                    await self._woken.wait()
            except TimeoutError:
                if until is not None and until <= time.monotonic():
                    return
                continue
            if until is None:
                return
            # A new event is no reason to try sooner what has just failed.
            self._woken.clear()

    def _dated(self, event: dict[str, Any]) -> dict[str, Any]:
        """The event with its time by the platform's clock, however wrong this device's was or is."""
        told = {name: value for name, value in event.items() if name not in ("wall", "boot", "up")}
        platform, then = self._platform or (time.time(), _up())
        now = platform + _up() - then
        ago = _up() - event["up"] if event["boot"] == _boot() else time.time() - event["wall"]
        return {**told, "at": round(now - min(max(0.0, ago), now), 3)}

    def _limit(self) -> None:
        while len(self._events) > MOST:
            del self._events[next(iter(self._events))]
            if not self._forgotten:
                LOG.error(f"more than {MOST} events wait to be reported: the oldest are forgotten")
            self._forgotten = True

    # --- on a thread aside --------------------------------------------------------------------------------------------

    def _remember(self) -> None:
        """Take up what an earlier process could not tell."""
        with self._disk.lock:
            self._disk.claim()
            found = {event["id"]: event for event in self._disk.read()}
            with self._lock:
                self._events = {**found, **self._events}
                self._limit()
            self._on_disk |= found.keys()

    def _untidy(self) -> int:
        """How many are on disk that need not be there any more."""
        with self._lock:
            return len(self._on_disk) - sum(number in self._on_disk for number in self._events)

    def _tidy(self) -> None:
        """Have no more on disk than is still to be told."""
        with self._disk.lock:
            with self._lock:
                left = [event for number, event in self._events.items() if number in self._on_disk]
            if self._disk.replace(left):
                self._on_disk = {event["id"] for event in left}


class _Disk:
    """The file of an outbox: one JSON object in each line. Its `lock` is held for each call."""

    def __init__(self, path: Path) -> None:
        self.lock = threading.Lock()
        self._wanted = path
        self._path: Path | None = None
        self._claims: list[int] = []
        self._works = True

    def claim(self) -> None:
        """Have a file that no other process writes to: the first that is free."""
        if self._path is not None:
            return
        for slot in range(_SLOTS):
            path = self._slot(slot)
            if (claim := self._lock_file(path)) is not None:
                self._path, self._claims = path, [claim]
                return
            if not self._works:
                return

    def read(self) -> list[dict[str, Any]]:
        """What is in the file, and in those of processes that are no more; which are emptied into this one."""
        if self._path is None:
            return []
        events = _lines(self._path)
        for slot in range(_SLOTS):
            path = self._slot(slot)
            if path == self._path or not os.path.exists(path) or (claim := self._lock_file(path)) is None:
                continue
            if (left := _lines(path)) and self.append(left):
                events += left
                with contextlib.suppress(OSError):
                    path.unlink()
            os.close(claim)
        return events[-MOST:]

    def append(self, events: list[dict[str, Any]]) -> bool:
        """Add events; false, and nothing is added, when that cannot be."""
        if self._path is None:
            return False
        try:
            _append(self._path, _text(events))
        except OSError as error:
            return self._failed(error)
        self._works = True
        return True

    def replace(self, events: list[dict[str, Any]]) -> bool:
        """Have these in the file and no others; false, and nothing is changed, when that cannot be."""
        if self._path is None:
            return False
        try:
            if events:
                kept.replace(self._path, _text(events))
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            return self._failed(error)
        return True

    def close(self) -> None:
        """Leave the file to others."""
        with self.lock:
            for claim in self._claims:
                os.close(claim)
            self._claims, self._path = [], None

    def _slot(self, number: int) -> Path:
        path = self._wanted
        return path if not number else path.with_name(f"{path.stem}-{number}{path.suffix}")

    def _lock_file(self, path: Path) -> int | None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            number = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self._failed(error)
            return None
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(number)
            return None
        return number

    def _failed(self, error: OSError) -> bool:
        if self._works:
            LOG.warning(
                f"{self._wanted} cannot be written ({error.strerror}): free some space; reports that cannot be told "
                "are kept in memory only"
            )
        self._works = False
        return False


def _text(events: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(event) + "\n" for event in events).encode()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The events in a file; lines that are none are passed over."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST * LARGEST)
    except OSError:
        return []
    return [event for line in content.splitlines() if (event := _event(line)) is not None]


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
        good = (
            all(isinstance(event[name], str) for name in ("id", "kind", "boot"))
            and all(isinstance(event[name], int | float) and 0 <= event[name] < _END for name in ("wall", "up"))
            and len(line) <= LARGEST
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return event if good else None


def _append(path: Path, content: bytes) -> None:
    """Add all of it to a file, or nothing. Raises `OSError`."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        before = os.fstat(number).st_size
        try:
            while content:
                content = content[os.write(number, content) :]
            os.fsync(number)
        except OSError:
            # Half a line would spoil the next one.
            os.ftruncate(number, before)
            raise
    finally:
        os.close(number)


def _now() -> dict[str, Any]:
    """The time by a clock that may be wrong, and by one that only runs since the device was switched on."""
    return {"wall": time.time(), "boot": _boot(), "up": _up()}


def _up() -> float:
    """Seconds since the device was switched on, the same for all of its processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@functools.cache
def _boot() -> str:
    """Which time it is that the device has been switched on."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return uuid.uuid4().hex
