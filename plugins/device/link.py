"""The one link of a process to its platform: made, lost and made again by itself, and asked from any thread.

A daemon thread with an event loop carries it. It costs next to nothing while nothing is asked: a sign of life every 20
seconds, and a look at the key file every two.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import itertools
import math
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, TypeVar

from ovos_utils.log import LOG

from agentvoicebox.config.errors import TooLarge
from agentvoicebox.plugins.device import choices, kept, section, trouble, wire
from agentvoicebox.plugins.device.choices import Choices
from agentvoicebox.plugins.device.connection import Connection, Loop, aside
from agentvoicebox.plugins.device.kept import Kept
from agentvoicebox.plugins.device.reports import Outbox
from agentvoicebox.plugins.device.requests import Answer, Asking, Away, Failed, Listening, Request, Speaking
from agentvoicebox.plugins.device.section import Section
from agentvoicebox.plugins.device.trouble import NoKey, State, Trouble

__all__ = ["Asking", "Away", "Failed", "Link", "Listening", "Speaking", "State", "shared"]

SOONEST, LATEST = 0.25, 30.0
"""Seconds between tries to connect: doubled each time, with jitter."""

LOOK = 2.0
"""Seconds between looks at the key file."""

STEADY = 10.0
"""Seconds after which a link that breaks was a good one, and is tried for again soon."""

_R = TypeVar("_R", bound=Request)


class Link:
    """The link. Everything may be called from any thread; what is asked while it is not up raises `Away` at once."""

    def __init__(self, section: Section, process: str, *, name: str = "") -> None:
        self.section = section
        self.process = process
        self.name = name or socket.gethostname()
        self.state = State.CONNECTING
        self.reason = ""
        """Why it is not up, in one line with the remedy; empty when it is."""
        self.welcome: wire.Welcome | None = None
        """Who the platform takes this device for: the latest it has said."""
        self._pid = os.getpid()
        self._numbers = itertools.count(1)
        self._outbox = Outbox(section.state / f"reports-{process}.jsonl")
        self._file = section.state / "choices.json"
        self._kept = kept.read(self._file, section.key())
        self._keeps = True
        self._keeping: asyncio.Task[None] | None = None
        self._newest = 1, self._kept.choices if self._kept else Choices()
        self._subscribers: list[_Subscriber] = []
        self._connection: Connection | None = None
        self._up_since = 0.0
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._loop = Loop()
        self._thread = threading.Thread(target=self._work, name="agentvoicebox-link", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def choices(self) -> Choices:
        """The newest that is known: told by the platform, or kept from earlier, or else the defaults."""
        return self._newest[1]

    @property
    def closed(self) -> bool:
        """Whether it has ended: it will not be up again."""
        return self._closing or not self._thread.is_alive()

    def on_choices(self, callback: Callable[[Choices], None]) -> Callable[[], None]:
        """Have `callback` called with the choices, now and at each change; returns what ends that.

        Changes come on a thread of the link's that may be kept waiting, one at a time, the newest last.
        """
        subscriber = _Subscriber(callback)
        self._subscribers.append(subscriber)
        subscriber.tell(*self._newest)

        def unsubscribe() -> None:
            subscriber.ended = True
            with contextlib.suppress(ValueError):
                self._subscribers.remove(subscriber)

        return unsubscribe

    # --- what can be asked --------------------------------------------------------------------------------------------

    def listen(self, language: str = "", *, partials: Callable[[str], None] | None = None) -> Listening:
        """Have speech understood while it is spoken; `partials` is called on the link's thread, and must not block.

        Raises `Away`.
        """
        number = self._number()
        opening = wire.Listen(number, language, partials is not None)
        return self._asked(Listening(opening, number, self._post, partials))

    def speak(self, text: str, language: str = "", voice: str = "") -> Speaking:
        """Have a text spoken. Raises `Away`, and `TooLarge` for a text that no frame holds."""
        number = self._number()
        return self._asked(Speaking(wire.Speak(number, text, language, voice), number, self._post))

    def ask(self, text: str = "", language: str = "", messages: list[Any] | None = None) -> Asking:
        """Ask the persona. Raises `Away`, and `TooLarge` for a question that no frame holds."""
        number = self._number()
        return self._asked(Asking(wire.Ask(number, text, language, messages), number, self._post))

    def about(self, skill: str = "", timeout: float = 1.0) -> dict[str, Any]:
        """Whose device this is, and what the tenant has set for the skill. Raises `Away`, `Failed`."""
        number = self._number()
        return _about(self._asked(Answer(wire.About(number, skill), number, self._post)), timeout)

    def choose(self, persona: str, timeout: float = 2.0) -> str:
        """Let this persona answer from now on; returns who does. Raises `Away`, `Failed`."""
        number = self._number()
        told = _about(self._asked(Answer(wire.Choose(number, persona), number, self._post)), timeout)
        return str(told.get("persona", ""))

    def report(self, kind: str, **facts: Any) -> None:
        """Tell the platform what happened, now or when it can be told. Never blocks, never raises."""
        self._outbox.add(kind, facts)
        self._call(self._outbox.wake)

    def close(self) -> None:
        """End the link: what is open gets `Away`, and reports that could not be told are kept on disk."""
        if os.getpid() != self._pid or self._closing:
            return  # a process that was forked has none of the parent's threads, and nothing to keep
        self._closing = True
        atexit.unregister(self.close)
        self._call(self._leave)
        if threading.current_thread() is not self._thread:
            self._thread.join(3)
        self._outbox.close()

    # --- requests, on any thread --------------------------------------------------------------------------------------

    def _number(self) -> int:
        """The number of the next request. Raises `Away` unless the link is up."""
        if self.state is not State.UP:
            raise self._away()
        return next(self._numbers)

    def _asked(self, request: _R) -> _R:
        if request.size > wire.LARGEST_FRAME:
            raise TooLarge("This is more text than the platform takes at once: send less.")
        self._post(request)
        return request

    def _post(self, request: Request) -> None:
        """Something of this request is to be sent."""
        if not self._call(self._pass_on, request):
            request.end(self._away())

    def _call(self, function: Callable[..., object], *arguments: Any) -> bool:
        """Have it called on the link's thread; false when there is none."""
        if os.getpid() != self._pid:
            return False
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            return False
        return True

    def _away(self) -> Away:
        code = "key_refused" if self.state is State.REFUSED else "platform_away"
        return Away(self.reason or "There is no link to the platform yet: this device goes on by itself.", code=code)

    # --- the link's thread --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._stay())
        except asyncio.CancelledError:
            pass
        except Exception as error:
            # Nothing is known to get here. If something does, plugins use their local engines from now on.
            LOG.exception("the link to the platform has ended")
            self._turn(trouble.of(error, self.section))

    def _leave(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _pass_on(self, request: Request) -> None:
        if self._connection is None:
            request.end(self._away())
        else:
            self._connection.post(request)

    async def _stay(self) -> None:
        """Connect, and again, until the link is closed."""
        self._task = asyncio.current_task()
        telling = asyncio.create_task(self._outbox.tell(self._report))
        wait = SOONEST
        try:
            while not self._closing:
                mark = self._mark()
                stubborn = await self._be_connected()
                if stubborn:
                    wait = LATEST
                elif self._up_since and time.monotonic() - self._up_since > STEADY:
                    wait = SOONEST
                chance = random.uniform(0.5, 1)  # noqa: S311  (chance, not a secret)
                await self._rest(wait * chance, mark)
                wait = min(wait * 2, LATEST) if mark == self._mark() else SOONEST
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    async def _be_connected(self) -> bool:
        """Connect, and carry what is asked until that ends; returns whether it is no use to try again soon."""
        connection, self._up_since = None, 0.0
        try:
            key = self.section.key()
            if key is None:
                raise NoKey
            self._belong_to(key)
            hello = wire.Hello(self.process, self.name, _version(), self._kept.etag if self._kept else "")
            connection = await Connection.open(self.section, key, hello, functools.partial(self._configure, key))
            self._up_since = time.monotonic()
            self.welcome = connection.welcome
            self._outbox.set_clock(connection.welcome.time)
            self._connection = connection
            self._turn(Trouble(State.UP, ""))
            self._outbox.wake()
            looking = asyncio.create_task(self._look_for_another(key, connection))
            try:
                await connection.run()
            finally:
                looking.cancel()
        except Exception as error:
            found = trouble.of(error, self.section)
            self._turn(found)
            return found.stubborn
        except asyncio.CancelledError:
            self.reason, self.state = "The link to the platform has been closed.", State.AWAY
            if connection is not None:
                connection.end_all(self._away())
                await connection.close()
            raise
        finally:
            self._connection = None
            if connection is not None:
                connection.drop()
                connection.end_all(self._away())

    async def _rest(self, seconds: float, mark: object) -> None:
        """Wait before the next try, but not after the key file has changed."""
        for _ in range(math.ceil(seconds / LOOK)):
            await asyncio.sleep(min(seconds, LOOK))
            if self._mark() != mark:
                return

    async def _look_for_another(self, key: str, connection: Connection) -> None:
        """Drop the connection once the file holds another key: the device has been paired anew, maybe elsewhere."""
        mark: object = None
        while True:
            await asyncio.sleep(LOOK)
            if mark != (mark := self._mark()) and self.section.key() not in (None, key):
                connection.drop()

    def _mark(self) -> object:
        """Differs when the key file does."""
        try:
            stat = os.stat(self.section.key_file or "")
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _turn(self, now: Trouble) -> None:
        """Be in another state, and say so once."""
        before = self.state, self.reason
        # The reason first: whoever sees the state may ask for it.
        self.reason = now.reason
        self.state = now.state
        if before == (now.state, now.reason):
            return
        if now.state is State.UP:
            tenant = self.welcome.tenant_name if self.welcome else ""
            LOG.info(f"linked to the platform at {self.section.url}, for {tenant}")
        else:
            LOG.warning(now.reason)

    async def _report(self, events: list[dict[str, Any]]) -> None:
        """Tell these events. Raises `Away`, `Failed`."""
        number = self._number()
        await self._asked(Answer(wire.Report(number, events), number, self._post)).arrive()

    # --- choices ------------------------------------------------------------------------------------------------------

    def _belong_to(self, key: str) -> None:
        """Forget what was told to another key: it may have been another tenant's."""
        if self._kept is not None and self._kept.owner != kept.owner(key):
            self._kept = None
            self._spread(Choices())

    def _configure(self, key: str, said: wire.Configured) -> None:
        try:
            told = choices.of(said.choices)
        except ValueError as error:
            LOG.warning(f"what the platform says of its tenant's choices cannot be used: {error}")
            return
        self._kept = Kept(told, said.etag, kept.owner(key))
        self._spread(told)
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        """Have on disk what was told last."""
        written = None
        while self._kept is not None and self._kept is not written:
            written = self._kept
            try:
                await aside(kept.write, self._file, written)
                self._keeps = True
            except OSError as error:
                if self._keeps:
                    LOG.warning(
                        f"{self._file} cannot be written ({error.strerror}): free some space; it goes on without"
                    )
                self._keeps = False

    def _spread(self, told: Choices) -> None:
        """Tell everybody who wants to know, without waiting for them."""
        version, before = self._newest
        if told != before:
            self._newest = version + 1, told
            threading.Thread(target=self._tell_all, name="agentvoicebox-choices", daemon=True).start()

    def _tell_all(self) -> None:
        for subscriber in list(self._subscribers):
            subscriber.tell(*self._newest)


class _Subscriber:
    """Somebody who wants to know of choices: each version once, and none after a later one."""

    def __init__(self, callback: Callable[[Choices], None]) -> None:
        self.ended = False
        self._callback = callback
        self._known = 0
        self._lock = threading.RLock()

    def tell(self, version: int, told: Choices) -> None:
        with self._lock:
            if version <= self._known or self.ended:
                return
            self._known = version
            try:
                self._callback(told)
            except Exception:
                LOG.exception("a change of the tenant's choices could not be followed")


_mine: Link | None = None
_lock = threading.Lock()


def shared(process: str) -> Link | None:
    """The one link of this process, by its mycroft.conf; None where that names no platform.

    Ask for it whenever it is used: after a change of the section there is a new one.
    """
    global _mine
    from ovos_config.config import Configuration

    wanted = section.read(Configuration())
    with _lock:
        if _mine is not None and (_mine.closed or _mine.section != wanted):
            threading.Thread(target=_mine.close, daemon=True).start()
            _mine = None
        if _mine is None and wanted is not None:
            _mine = Link(wanted, process)
        return _mine


def _forked() -> None:
    """A child has none of its parent's threads: its link will be its own."""
    global _mine, _lock
    _mine, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forked)


def _about(request: Answer, timeout: float) -> dict[str, Any]:
    said = request.result(timeout)
    if not isinstance(said, wire.Told):
        raise Failed("The platform's answer makes no sense: update agentvoicebox there.", code="platform_garbled")
    return said.about


@functools.cache
def _version() -> str:
    try:
        return metadata.version("agentvoicebox")
    except metadata.PackageNotFoundError:
        return ""
