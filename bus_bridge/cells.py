"""A cell: one stock message bus and one stock ovos-core with its skills, in processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import websockets

from agentvoicebox.config import ovos
from agentvoicebox.config.errors import AvbError, Unavailable
from agentvoicebox.config.tasks import end, within

Tell = Callable[[str], None]

_START = 90.0
"""Seconds after which a start that has not ended is given up: more than any machine we know needs."""
_STEADY = 60.0
"""Seconds a cell must have lived for its next loss to count as the first one."""
_LONGEST_PAUSE = 30.0


class Cell:
    """One stock OVOS stack without audio services. Start it, talk to `url`, stop it; it can be started again.

    `directory` belongs to the cell alone: configuration, settings of skills, `logs`. The route in `url` is new with
    each start and secret: who knows it is on the bus, and the bus asks for no other key. `node` is where its persona
    asks; without one it has none.
    """

    def __init__(self, name: str, directory: Path, languages: Sequence[str], node: ovos.Node | None = None) -> None:
        self.name = name
        self.directory = directory.absolute()
        self.url = ""
        self._languages = tuple(languages)
        self._node = node
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    @property
    def pids(self) -> dict[str, int]:
        """Process id of `messagebus` and `core`, while the cell is started."""
        return {name: process.pid for name, process in self._processes.items()}

    async def start(self, tell: Tell = lambda step: None) -> None:
        """Start both processes and return when a turn can be spoken; `tell` hears what is being waited for.

        Raises `Unavailable` (code `cell_failed`) and leaves nothing running if that does not come about.
        """
        await self.stop(grace=0)
        if absent := ovos.missing():
            raise self._failure(f"the OVOS plugin {absent[0]} is not installed: pip install 'agentvoicebox[cell]'")
        try:
            async with asyncio.timeout(_START):
                await self._launch()
                await self._first_of(self._become_ready(tell), self.died())
        except TimeoutError as error:
            failure = self._failure(f"it was not ready after {_START:.0f} s", "core")
            await self.stop(grace=0)
            raise failure from error
        except (OSError, websockets.WebSocketException) as error:
            await self.stop(grace=0)
            raise self._failure(str(error)) from error
        except BaseException:
            await self.stop(grace=0)
            raise

    async def answers(self) -> bool:
        """Whether the canary goes all the way through the cell, on a connection of its own. Waits without limit."""
        nonce = secrets.token_hex(8)
        try:
            async with self._connect() as bus:
                await bus.send(json.dumps(question(nonce)))
                async for frame in bus:
                    if is_answer(json.loads(frame), nonce):
                        return True
        except (OSError, websockets.WebSocketException):
            pass
        return False

    async def died(self) -> str:
        """Wait until a process of the cell has ended; returns which and how, as in "core was ended by SIGKILL"."""
        if not self._processes:
            return "the cell is not running"
        waits = {asyncio.create_task(process.wait()): name for name, process in self._processes.items()}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        ended = next(iter(done))
        return f"{waits[ended]} {_ending(ended.result())}"

    async def stop(self, grace: float = 3.0) -> None:
        """End all processes of the cell and those they have started: politely for `grace` seconds, then by force."""
        processes, self._processes, self.url = self._processes, {}, ""
        try:
            for process in reversed(processes.values()):  # the bus last: core says goodbye on it
                if grace and process.returncode is None:
                    process.terminate()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(grace):
                            await process.wait()
        finally:
            for process in processes.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for process in processes.values():
            await process.wait()
            if process.stdin:
                process.stdin.close()

    async def _launch(self) -> None:
        """Begin both processes. The socket is ours and listens already, so core may knock before the bus is up."""
        with socket.create_server((ovos.HOST, 0)) as listening:
            port, route = listening.getsockname()[1], f"/{secrets.token_urlsafe(24)}"
            ovos.write(self.directory, languages=self._languages, port=port, route=route, node=self._node)
            await self._spawn("messagebus", listening.fileno())
            await self._spawn("core")
        self.url = f"ws://{ovos.HOST}:{port}{route}"

    async def _spawn(self, service: str, *descriptors: int) -> None:
        errors = os.open(self._errors(service), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            self._processes[service] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "agentvoicebox.bus_bridge.child", service, *map(str, descriptors)),
                cwd=self.directory,
                env=ovos.environment(self.directory, os.environ),
                stdin=asyncio.subprocess.PIPE,  # closed with us, by whatever we die of: then it ends, too
                stdout=asyncio.subprocess.DEVNULL,
                stderr=errors,
                pass_fds=descriptors,
                start_new_session=True,
            )
        finally:
            os.close(errors)

    async def _become_ready(self, tell: Tell) -> None:
        tell("waiting for messagebus")
        nonce = secrets.token_hex(8)
        async with self._connect() as bus:
            tell("waiting for core")
            async for frame in bus:
                message = json.loads(frame)
                match message.get("type"):
                    case "mycroft.skills.loaded":
                        tell(f"loading skills: {_short(message['data']['id'])}")
                    case "mycroft.skills.loading_failure":
                        tell(f"skill {_short(message['data']['id'])} cannot be loaded, see {self.directory / 'logs'}")
                    case "mycroft.skills.initialized":
                        tell("waiting for the first turn")
                        await bus.send(json.dumps(question(nonce)))
                    case _ if is_answer(message, nonce):
                        return
        raise ConnectionError("the message bus has closed the connection")

    def _connect(self) -> websockets.connect:
        return websockets.connect(self.url, compression=None, proxy=None, ping_interval=None, open_timeout=_START)

    async def _first_of(self, ready: Awaitable[None], death: Awaitable[str]) -> None:
        """Wait for `ready`; raises `Unavailable` if `death` comes first, or is why `ready` failed."""
        tasks = [asyncio.ensure_future(ready), asyncio.ensure_future(death)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done() and tasks[0].exception():
                await asyncio.wait(tasks[1:], timeout=1)
            if tasks[1].done():
                reason = str(tasks[1].result())
                raise self._failure(reason, reason.partition(" ")[0])
            await tasks[0]
        finally:
            await end(*tasks)

    def _errors(self, service: str) -> Path:
        return self.directory / "logs" / f"{service}.errors"

    def _failure(self, reason: str, service: str | None = None) -> Unavailable:
        """What went wrong, with the last line that `service` left behind."""
        message = f"Cell {self.name} cannot be started: {reason}."
        stock = {"messagebus": "bus.log", "core": "skills.log"}
        if service in stock:
            for log in (self._errors(service), self.directory / "logs" / stock[service]):
                if line := _last_line(log):
                    message += f" The last line of {log} is: {line}"
                    break
        return Unavailable(message, code="cell_failed")


async def keep(
    cell: Cell,
    canary: Callable[[], Awaitable[bool]],
    *,
    lost: Callable[[str], None],
    ready: Callable[[str], None],
    tell: Tell = lambda step: None,
    every: float = 2.0,
    patience: float = 2.5,
) -> None:
    """Keep a started cell alive until cancelled: replace it when a process of it ends or `canary` fails.

    `canary` is asked `every` so many seconds and has `patience` seconds to return true, in which a healthy core does,
    however busy. `lost` hears why the cell is gone, or why it could not be started again; `ready` hears its new URL.
    Each loss in a row doubles the pause.
    """
    losses = 0
    while True:
        began = time.monotonic()
        lost(await _loss(cell, canary, every, patience))
        losses = 0 if time.monotonic() - began > _STEADY else losses
        while True:
            await cell.stop(grace=0)
            await asyncio.sleep(min(2**losses - 1, _LONGEST_PAUSE))
            losses += 1
            try:
                await cell.start(tell)
                break
            except Unavailable as error:
                lost(error.message)
        ready(cell.url)


async def _loss(cell: Cell, canary: Callable[[], Awaitable[bool]], every: float, patience: float) -> str:
    """Wait until the cell is of no more use, and say why."""
    death = asyncio.create_task(cell.died())
    try:
        while True:
            await asyncio.wait([death], timeout=every)
            if death.done():
                return death.result()
            try:
                alive = await within(patience, canary())
            except (AvbError, OSError, websockets.WebSocketException):
                alive = False
            if not alive and not death.done():
                return f"core did not answer within {patience} s"
    finally:
        death.cancel()


def question(nonce: str) -> dict[str, Any]:
    """The bus message that a living cell answers; `is_answer` knows the answer by the same nonce."""
    return {
        "type": "recognizer_loop:utterance",
        "data": {"utterances": [ovos.CANARY_UTTERANCE]},
        "context": {
            "source": ovos.CANARY_SESSION,
            "destination": ["skills"],
            "session": {"session_id": ovos.CANARY_SESSION},
            "avb_canary": nonce,
        },
    }


def is_answer(message: dict[str, Any], nonce: str) -> bool:
    """Whether a bus message ends the turn of the canary with this nonce."""
    context = message.get("context") or {}
    return message.get("type") == "ovos.utterance.handled" and context.get("avb_canary") == nonce


def _short(skill: str) -> str:
    """`date-time` of `ovos-skill-date-time.openvoiceos`."""
    return skill.partition(".")[0].removeprefix("ovos-skill-").removeprefix("skill-")


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""
