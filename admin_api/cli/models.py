"""`avb models`: which speech models are here, which could be, and fetching them."""

from __future__ import annotations

import argparse

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from agentvoicebox.admin_api.cli import console
from agentvoicebox.config.settings import Settings
from agentvoicebox.plugins import models


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `avb models`."""
    console.add_json(parser)
    parser.set_defaults(run=show)
    pull = parser.add_subparsers(dest="action").add_parser("pull", help="fetch models")
    pull.add_argument("names", nargs="+", metavar="NAME")
    console.add_json(pull)
    pull.set_defaults(run=fetch)


def show(found: argparse.Namespace) -> int:
    """List the catalogue."""
    settings = console.settings(found)
    rows = models.available(settings.models)
    if found.json:
        console.emit([{"name": m.name, "kind": m.kind, "bytes": m.size, "installed": m.installed} for m in rows])
        return 0
    lines = [[m.name, m.kind, f"{m.size / 1e6:.0f} MB", "[green]yes[/green]" if m.installed else "no"] for m in rows]
    console.table(f"Speech models in {settings.models}", ["model", "kind", "size", "here"], lines)
    console.stdout.print("Fetch one with: avb models pull NAME")
    return 0


def fetch(found: argparse.Namespace) -> int:
    """Fetch models with progress and checksum."""
    settings = console.settings(found)
    for name in found.names:
        _pull(settings, name)
        if not found.json:
            console.stderr.print(f"{name} is here.")
    if found.json:
        console.emit({"installed": found.names})
    return 0


def _pull(settings: Settings, name: str) -> None:
    def pull(tell: models.Tell) -> None:
        models.pull(name, settings.models, tell, url=settings.models_url)

    if not console.stderr.is_terminal:
        pull(lambda done, total: None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console.stderr) as bar:
        task = bar.add_task(name, total=None)
        pull(lambda done, total: bar.update(task, completed=done, total=total))
