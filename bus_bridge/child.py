"""A process of a cell: it ends with its parent, writes no endless logs, and then becomes a stock service.

`python -m agentvoicebox.bus_bridge.child messagebus FD` or `… core`, in the cell's directory.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

_GRACE = 1.0
"""Seconds a process has to end by itself after its parent is gone."""
_ERRORS_BYTES = 1_000_000


def main() -> None:
    service, *arguments = sys.argv[1:]
    os.umask(0o077)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    sys.stderr = Bounded(Path("logs", f"{service}.errors"))
    _keep_locks_private()
    _silence_stock_log()
    import_module(f"agentvoicebox.bus_bridge.{service}").main(*arguments)


def replace(owner: Any, name: str, ours: Any) -> None:
    """Put `ours` in the place of something of OVOS; a version without it is none that we know, and stops here."""
    if not hasattr(owner, name):
        raise RuntimeError(f"{owner} has no {name}: install the OVOS versions in config/constraints.txt")
    setattr(owner, name, ours)


class Bounded(io.TextIOBase):
    """A text stream into a log file whose size is bounded."""

    def __init__(self, file: Path) -> None:
        self._handler = _Quiet(file, maxBytes=_ERRORS_BYTES, backupCount=1, delay=True)
        self._handler.terminator = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._handler.handle(logging.makeLogRecord({"msg": text}))
        return len(text)

    def close(self) -> None:
        with suppress(OSError):
            self._handler.close()
        super().close()


class _Quiet(RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Drop it: the standard answer to a full disk, a report on stderr, would come straight back here."""


def _end_with_parent() -> None:
    """Wait until the parent's end of the pipe is closed, then end this process and all that it has started.

    The thread depends on nothing that skills can block, so a deadlocked core ends as well.
    """
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.killpg(0, signal.SIGKILL)


def _keep_locks_private() -> None:
    """combo_lock keeps its lock files in shared memory, writable by every user of the machine, who may hold them."""
    from combo_lock import combo_lock

    replace(combo_lock, "get_ram_directory", _private_directory)


def _private_directory(folder: str) -> str:
    path = Path(os.environ["TMPDIR"], folder)
    path.mkdir(mode=0o700, exist_ok=True)
    return str(path)


def _silence_stock_log() -> None:
    """ovos_utils' LOG walks the whole stack before it looks at its level, at every line that it then drops."""
    from ovos_utils.log import LOG

    for name in ("debug", "info"):
        replace(LOG, name, staticmethod(lambda *args, **kwargs: None))


if __name__ == "__main__":
    main()
