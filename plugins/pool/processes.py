"""Engines in processes of their own, which this one starts, replaces when they die, and takes with it when it dies.

`python -m agentvoicebox.plugins.pool.processes THREADS` is such a process: its standard input is a socket on which
numbered messages come and go, each after its length. When the other end is closed, it ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial

from agentvoicebox.config.errors import AvbError, Unavailable
from agentvoicebox.plugins.pool import wire
from agentvoicebox.plugins.pool.runner import EngineSpec, Heard, Loaded, Runner, Speech, Transcript, Utter, Voice
from agentvoicebox.plugins.pool.threads import Threads

log = logging.getLogger(__name__)

_LENGTH = 4
_GRACE = 5.0
"""Seconds that a process has to end by itself."""
PATIENCE = 10.0
"""Seconds that an engine may go on with what nobody waits for any more, before its process is replaced."""
_FAILURES = 3
"""Starts in a row that may fail before work is refused rather than kept waiting."""


class Processes:
    """A `Runner`. Every engine is loaded in each of `count` processes, and work goes to the least busy one.

    Work of a process that dies is given to another one, once: what makes two of them die is an error. A process whose
    engine does not end what was cancelled is killed, and so replaced.
    """

    def __init__(self, count: int = 2, threads: int = 0) -> None:
        self._count = count
        self._threads = threads or max(1, (os.cpu_count() or 1) // count)
        self._children: list[_Child] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._engines: set[EngineSpec] = set()
        self._failures = 0
        self._closed = False
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Start the processes when there are none, and wait until one of them is there. Raises `Unavailable`."""
        if not self._keepers:
            self._keepers = [asyncio.create_task(self._keep()) for _ in range(self._count)]
        while self._closed or not self._live():
            if self._closed or self._failures >= _FAILURES:
                raise Unavailable(
                    "There are no processes for speech engines, or they end as soon as they begin: see the log.",
                    code="engine_failed",
                )
            await self._changed.wait()

    async def load(self, spec: EngineSpec) -> Loaded:
        """Load an engine in every process that there is, and in those that will replace them."""
        for _ in range(2):
            await self.start()
            results = await asyncio.gather(*(child.load(spec) for child in self._live()), return_exceptions=True)
            refused = [each for each in results if isinstance(each, BaseException) and not isinstance(each, _Died)]
            if refused:
                await self.unload(spec)
                raise refused[0]
            if loaded := [each for each in results if isinstance(each, Loaded)]:
                self._engines.add(spec)
                one = max(loaded, key=lambda each: each.memory)
                return replace(one, memory=one.memory * self._count, parallel=one.parallel * self._count)
        raise _Died.of(spec)

    async def unload(self, spec: EngineSpec) -> None:
        """Forget an engine everywhere."""
        self._engines.discard(spec)
        having = [child for child in self._live() if spec in child.engines]
        for child in having:
            del child.engines[spec]
        await asyncio.gather(*(child.only(wire.Unload(spec)) for child in having), return_exceptions=True)

    async def transcribe(self, spec: EngineSpec, jobs: list[Heard]) -> list[Transcript | AvbError]:
        """What each of the jobs says, in their order."""
        async with aclosing(self._answers(wire.Hear(spec, jobs))) as answers:
            async for answer in answers:
                if isinstance(answer, wire.Understood):
                    return [each.error() if isinstance(each, wire.Failure) else each for each in answer.answers]
        raise _nonsense(spec)

    async def stream(self, spec: EngineSpec, utter: Utter) -> AsyncGenerator[Speech]:
        """The parts of what is said, as they come."""
        async with aclosing(self._answers(wire.Say(spec, utter))) as answers:
            async for answer in answers:
                if isinstance(answer, wire.Part):
                    yield answer.speech

    async def voices(self, spec: EngineSpec) -> list[Voice]:
        """The engine's voices."""
        async with aclosing(self._answers(wire.ListVoices(spec))) as answers:
            async for answer in answers:
                if isinstance(answer, wire.Voices):
                    return answer.voices
        raise _nonsense(spec)

    async def close(self) -> None:
        """Let the work at hand end, for some seconds at most, and end all processes."""
        self._closed = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await asyncio.gather(*(child.close() for child in self._children))
        self._children.clear()
        self._tell()

    async def _answers(self, ask: wire.Hear | wire.Say | wire.ListVoices) -> AsyncGenerator[wire.Answer]:
        """What a process answers, up to the last; nothing of it twice, when a second one has to begin again."""
        parts = 0
        for _ in range(2):
            child = await self._having(ask.spec)
            async with aclosing(child.ask(ask)) as answers:
                async for answer in answers:
                    if isinstance(answer, wire.Part):
                        if answer.number < parts:
                            continue
                        parts += 1
                    yield answer
                    if not isinstance(answer, wire.Part):
                        return
        raise _Died.of(ask.spec)

    async def _having(self, spec: EngineSpec) -> _Child:
        """The least busy process that has an engine; one that gets it, where none has it any more."""
        while True:
            await self.start()
            having = [child for child in self._live() if spec in child.engines]
            if having:
                return min(having, key=_Child.busy)
            await min(self._live(), key=_Child.busy).load(spec)

    def _live(self) -> list[_Child]:
        return [child for child in self._children if child.alive]

    async def _keep(self) -> None:
        """Keep one process running."""
        while True:
            try:
                child = await _Child.start(self._threads)
            except OSError as error:
                log.warning("A process for speech engines cannot be started: %s", error)
                self._failures += 1
            else:
                await self._watch(child)
            self._tell()
            await asyncio.sleep(min(0.1 * 2**self._failures, 5) if self._failures else 0)

    async def _watch(self, child: _Child) -> None:
        """Give a process work until it dies."""
        try:
            if not await child.there():
                log.warning("A process for speech engines has ended before it began.")
                self._failures += 1
                return
            self._failures = 0
            self._children.append(child)
            loading = asyncio.create_task(self._reload(child))
            self._tell()
            try:
                await child.gone()
            finally:
                loading.cancel()
            self._children.remove(child)
            log.warning("A process for speech engines has died; another one takes its place.")
        finally:
            if child not in self._children:
                await child.close()

    async def _reload(self, child: _Child) -> None:
        """Give a new process the engines of the others. One that kills it is not loaded again until it is asked for."""
        for spec in list(self._engines):
            try:
                await child.load(spec)
            except _Died:
                self._engines.discard(spec)
            except AvbError as error:
                log.warning("A new process has no engine %s: %s", spec.plugin, error.code)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class _Died(Unavailable):
    """The process has died of it, or while it was at it."""

    @classmethod
    def of(cls, spec: EngineSpec) -> _Died:
        return cls(
            f"The speech engine {spec.plugin} has ended its process: its model may be damaged; fetch it again with "
            "`avb models pull`, or choose another engine.",
            code="engine_failed",
        )


class _Child:
    """One process, as seen from this one."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.engines: dict[EngineSpec, Loaded] = {}
        self.alive = True
        self._process, self._writer = process, writer
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Queue[wire.Answer | None]] = {}
        self._rest = asyncio.Event()
        self._rest.set()
        self._loads: dict[EngineSpec, asyncio.Task[Loaded]] = {}
        """Those that are under way."""
        self._directory: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read(reader))

    @classmethod
    async def start(cls, threads: int) -> _Child:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", __spec__.name, str(threads)),
                    stdin=theirs.fileno(),
                    stdout=asyncio.subprocess.DEVNULL,
                    start_new_session=True,  # whoever interrupts this process at a terminal means this one
                )
            return cls(process, *await asyncio.open_unix_connection(sock=ours))
        except BaseException:
            ours.close()  # by which a process that was started ends
            raise

    def busy(self) -> int:
        """How much it has been asked that it has not answered."""
        return len(self._calls)

    async def there(self) -> bool:
        """Whether it has begun to work, rather than ended."""
        return await asyncio.shield(self._directory) is not None

    async def gone(self) -> None:
        """Returns when it has died."""
        await asyncio.shield(self._reading)

    async def load(self, spec: EngineSpec) -> Loaded:
        """Load an engine in it, once for all who ask. Raises `AvbError`."""
        if spec in self.engines:
            return self.engines[spec]
        if spec not in self._loads:
            self._loads[spec] = asyncio.create_task(self._load(spec))
            self._loads[spec].add_done_callback(partial(self._loaded, spec))
        return await asyncio.shield(self._loads[spec])

    async def only(self, ask: wire.Ask) -> wire.Answer:
        """The only answer. Raises `AvbError`."""
        async with aclosing(self.ask(ask)) as answers:
            async for answer in answers:
                return answer
        raise _Died.of(ask.spec)

    async def ask(self, ask: wire.Ask) -> AsyncGenerator[wire.Answer]:
        """What it answers; the last one is anything but a `Part`, unless it dies before. Raises `AvbError`."""
        number, answers = next(self._numbers), asyncio.Queue[wire.Answer | None]()
        if not self.alive:
            return
        self._calls[number] = answers
        self._rest.clear()
        _send(self._writer, number, ask)
        try:
            while (answer := await answers.get()) is not None:
                if isinstance(answer, wire.Failure):
                    raise answer.error()
                yield answer
        finally:
            if number in self._calls:
                _send(self._writer, number, wire.Cancel())
                try:
                    async with asyncio.timeout(PATIENCE):
                        await self._ended(number, answers)
                except TimeoutError:
                    log.warning("The engine %s does not end what was cancelled: its process does.", ask.spec.plugin)
                    self._kill()
                    await self._ended(number, answers)

    async def close(self) -> None:
        """Let it end what it does, for some seconds at most, and end it."""
        if self._directory.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(_GRACE):
                    await self._rest.wait()
        else:
            self._kill()
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()
        try:
            async with asyncio.timeout(_GRACE):
                await self._process.wait()
        except TimeoutError:
            self._kill()
            await self._process.wait()
        await self._reading

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def _ended(self, number: int, answers: asyncio.Queue[wire.Answer | None]) -> None:
        while number in self._calls:
            await answers.get()

    def _loaded(self, spec: EngineSpec, load: asyncio.Task[Loaded]) -> None:
        del self._loads[spec]
        if not load.cancelled():
            load.exception()  # whoever waited for it may have left

    async def _load(self, spec: EngineSpec) -> Loaded:
        answer = await self.only(wire.Load(spec))
        if not isinstance(answer, wire.Ready):
            raise _nonsense(spec)
        self.engines[spec] = answer.loaded
        return answer.loaded

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._heard(*await _receive(reader))
        except (asyncio.IncompleteReadError, OSError):
            pass
        except wire.Unreadable:
            log.warning("A process for speech engines says what is not understood: install it anew.")
            self._kill()
        self.alive = False
        if not self._directory.done():
            self._directory.set_result(None)
        elif directory := self._directory.result():
            # It removes it by itself, unless it was killed.
            shutil.rmtree(directory, ignore_errors=True)
        for answers in self._calls.values():
            answers.put_nowait(None)
        self._calls.clear()
        self._rest.set()

    def _heard(self, number: int, answer: wire.Ask | wire.Cancel | wire.Hello | wire.Answer) -> None:
        if isinstance(answer, wire.Hello):
            self._directory.set_result(answer.directory)
        elif number in self._calls and isinstance(answer, wire.Answer):
            self._calls[number].put_nowait(answer)
            if not isinstance(answer, wire.Part):
                del self._calls[number]
                if not self._calls:
                    self._rest.set()


def _nonsense(spec: EngineSpec) -> Unavailable:
    return Unavailable(f"What came back from the speech engine {spec.plugin} is no answer.", code="engine_failed")


def _send(writer: asyncio.StreamWriter, number: int, message: object) -> None:
    data = wire.encode((number, message))
    writer.writelines((len(data).to_bytes(_LENGTH, "big"), data))


async def _receive(reader: asyncio.StreamReader) -> tuple[int, wire.Ask | wire.Cancel | wire.Hello | wire.Answer]:
    length = int.from_bytes(await reader.readexactly(_LENGTH), "big")
    return wire.read_numbered(await reader.readexactly(length))


# --- in the process ---------------------------------------------------------------------------------------------------


async def answers(runner: Runner, ask: wire.Ask) -> AsyncGenerator[wire.Answer]:
    """What a runner answers, in our messages; the last one is anything but a `Part`."""
    try:
        if isinstance(ask, wire.Load):
            yield wire.Ready(await runner.load(ask.spec))
        elif isinstance(ask, wire.Unload):
            await runner.unload(ask.spec)
            yield wire.Done()
        elif isinstance(ask, wire.Hear):
            found = await runner.transcribe(ask.spec, ask.jobs)
            yield wire.Understood([wire.Failure.of(each) if isinstance(each, AvbError) else each for each in found])
        elif isinstance(ask, wire.ListVoices):
            yield wire.Voices(await runner.voices(ask.spec))
        else:
            count = 0
            async with aclosing(runner.stream(ask.spec, ask.utter)) as parts:
                async for speech in parts:
                    yield wire.Part(count, speech)
                    count += 1
            yield wire.Done(count)
    except AvbError as error:
        yield wire.Failure.of(error)


class _Work:
    """What the process does: one task for each thing that it is asked."""

    def __init__(self, writer: asyncio.StreamWriter, runner: Threads) -> None:
        self._writer, self._runner = writer, runner
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Work until the other end is closed."""
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                number, ask = await _receive(reader)
                if isinstance(ask, wire.Cancel) and number in self._tasks:
                    self._tasks[number].cancel()
                elif isinstance(ask, wire.Ask):
                    task = self._tasks[number] = asyncio.create_task(self._answer(number, ask))
                    task.add_done_callback(partial(self._ended, number))
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=_GRACE / 2)

    async def _answer(self, number: int, ask: wire.Ask) -> None:
        async with aclosing(answers(self._runner, ask)) as found:
            async for answer in found:
                _send(self._writer, number, answer)

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        del self._tasks[number]
        if task.cancelled():
            _send(self._writer, number, wire.Failure("Unavailable", "cancelled", "Nobody waits for this any more."))
        elif error := task.exception():
            log.error("speech process failed: %s", type(error).__name__)
            _send(self._writer, number, wire.Failure("AvbError", "internal_error", "The speech process has failed."))


async def _serve(threads: int, connection: socket.socket) -> None:
    runner = Threads(threads)
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    _send(writer, 0, wire.Hello(runner._directory.name))
    await _Work(writer, runner).run(reader)
    with suppress(TimeoutError):
        async with asyncio.timeout(_GRACE / 4):
            await runner.close()
    # An engine that does not end by itself ends here, together with all that it has started.
    os.killpg(0, signal.SIGKILL)


def main(threads: str) -> None:
    os.umask(0o077)
    connection = socket.socket(fileno=os.dup(0))
    # What an engine starts must not hold our end of the connection: our death would go unnoticed.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    asyncio.run(_serve(int(threads), connection))


if __name__ == "__main__":
    main(*sys.argv[1:])
