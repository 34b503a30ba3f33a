"""`avb worker`: speech engines for the nodes that share a Redis, until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable
from urllib.parse import urlsplit

import uvloop

from agentvoicebox.admin_api.cli import console
from agentvoicebox.config import logs
from agentvoicebox.config.errors import BadInput, Unavailable
from agentvoicebox.config.settings import Settings

_KINDS = ("stt", "tts")


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `avb worker`."""
    parser.add_argument("--redis", metavar="URL", help="the Redis that it shares with the nodes (AVB_REDIS)")
    parser.add_argument("--models", metavar="DIR", help="directory of its speech models (AVB_MODELS)")
    parser.add_argument("--kinds", metavar="stt,tts", default="stt,tts", help="ears, voices or both (stt,tts)")
    parser.add_argument("--processes", dest="speech_processes", metavar="N", help="processes of its engines (2)")
    parser.set_defaults(run=run)


def run(found: argparse.Namespace) -> int:
    """Work until SIGINT or SIGTERM, and bring to an end what is at hand then."""
    settings = console.settings(found)
    if not settings.redis:
        raise BadInput("Name the Redis that the nodes use, with --redis redis://host:6379/0 or AVB_REDIS.")
    kinds = tuple(dict.fromkeys(kind.strip() for kind in found.kinds.split(",") if kind.strip()))
    if not kinds or not set(kinds).issubset(_KINDS):
        raise BadInput(f"--kinds {found.kinds!r}: choose stt, tts or both, as in --kinds stt,tts.")
    logs.configure(settings)
    with console.progress() as tell:
        uvloop.run(_work(settings, settings.redis, kinds, tell))
    return 0


async def _work(settings: Settings, redis: str, kinds: tuple[str, ...], tell: Callable[[str], None]) -> None:
    try:
        from agentvoicebox.plugins.pool.processes import Processes
        from agentvoicebox.plugins.pool.worker import Worker
    except ImportError as error:
        raise Unavailable(
            f"avb worker needs {error.name}, which is not installed: pip install 'agentvoicebox[speech,redis]'"
        ) from error
    runner = Processes(settings.speech_processes)
    memory = settings.speech_memory * 1024**2
    try:
        worker = Worker(redis, runner, kinds=kinds, models=settings.models, memory=memory)

        def stop() -> None:
            tell("finishing the work at hand")
            worker.stop()

        def ready() -> None:
            tell(f"{worker.name} takes {' and '.join(kinds)} work from Redis at {_place(redis)}")
            tell(f"{settings.speech_processes} processes, models in {settings.models}")
            print("ready", flush=True)

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        await runner.start()
        await worker.run(ready)
    finally:
        await runner.close()
    tell("ended")


def _place(redis: str) -> str:
    """Where it is, without the password."""
    url = urlsplit(redis)
    return f"{url.hostname}:{url.port or 6379}" if url.hostname else url.path
