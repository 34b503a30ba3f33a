"""What the commands share: settings from flags, progress for people, JSON for machines."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from agentvoicebox.config import settings as all_settings
from agentvoicebox.config.settings import Settings

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def add_data(parser: argparse.ArgumentParser) -> None:
    """The flags by which a command finds the store."""
    parser.add_argument("--data", metavar="DIR", help="data directory (AVB_DATA, else the user's data directory)")
    parser.add_argument("--database", metavar="DSN", help="a PostgreSQL of yours instead of the embedded one")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The flag for machines."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def settings(found: argparse.Namespace, **more: Any) -> Settings:
    """Settings from file, environment and this command's flags. Raises `BadInput`."""
    names = Settings.__dataclass_fields__
    flags = {name: value for name, value in vars(found).items() if name in names}
    return all_settings.load({**flags, **more})


def emit(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on stdout."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        # An id is there to be copied: it is shown whole, whatever becomes of the rest.
        shown.add_column(column, no_wrap=column == "id", min_width=36 if column == "id" else None, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    stdout.print(shown)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being waited for, with the seconds since the start."""
    begin = time.monotonic()

    def line(step: str) -> str:
        return f"[dim]{time.monotonic() - begin:5.1f} s[/dim]  {step}"

    if not stderr.is_terminal:
        yield lambda step: print(f"{time.monotonic() - begin:5.1f} s  {step}", file=sys.stderr, flush=True)
        return
    with stderr.status("starting") as status:

        def tell(step: str) -> None:
            stderr.print(line(step))
            status.update(step)

        yield tell
