"""`avb up`: everything embedded, until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

import uvloop

from agentvoicebox.admin_api.cli import console
from agentvoicebox.admin_api.stack import Stack
from agentvoicebox.config import logs
from agentvoicebox.config.errors import Unavailable
from agentvoicebox.config.settings import Settings
from agentvoicebox.tenancy import keys


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `avb up`."""
    console.add_data(parser)
    parser.add_argument("--host", help="address to listen on (127.0.0.1); others need TLS or a declared proxy")
    parser.add_argument("--port", help="port to listen on (65020)")
    parser.add_argument("--tls-cert", metavar="F")
    parser.add_argument("--tls-key", metavar="F")
    parser.add_argument("--workers", metavar="N", help="node processes (1)")
    parser.add_argument("--cells", metavar="N", help="OVOS stacks (1)")
    parser.set_defaults(run=run)


def run(found: argparse.Namespace) -> int:
    """Run until SIGINT or SIGTERM."""
    settings = console.settings(found)
    logs.configure(settings)
    uvloop.run(_serve(settings))
    return 0


async def _serve(settings: Settings) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    with console.progress() as tell:
        stack = Stack(settings, tell)
        starting = asyncio.create_task(stack.start())
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait([starting, stop], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()  # once: it stops all that it has started, however long that takes
            await asyncio.gather(starting, return_exceptions=True)
            return
        starting.result()
        if stack.operator_key_made:
            _greet_operator(settings)
        tell(f"listening on {stack.url}")
    try:
        print(f"ready {stack.url}", flush=True)
        serving = asyncio.create_task(stack.finished())
        await asyncio.wait([serving, stop], return_when=asyncio.FIRST_COMPLETED)
        if serving.done() and not stop.done():
            raise Unavailable("The server has ended by itself.", code="server_failed") from serving.exception()
    finally:
        await stack.stop()


def _greet_operator(settings: Settings) -> None:
    """Show the operator key, to a person only."""
    secret, _ = keys.operator_key(settings.data)
    where = settings.data / "operator.key"
    if sys.stderr.isatty() and os.isatty(2):
        console.stderr.print(f"Operator key, shown only now and kept in {where}:\n[bold]{secret}[/bold]")
    else:
        print(f"The operator key is in {where}.", file=sys.stderr)
