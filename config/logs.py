"""The log of a node or a command: to standard error, for people on a terminal, as JSON lines elsewhere."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import TextIO

from agentvoicebox.config.settings import Settings

_SECRETS = (
    (re.compile(r"(avb_[\w-]{8})[\w-]{12,}"), r"\1…"),  # our keys: what is shown of them elsewhere stays
    (re.compile(r"(bearer\s+)[^\s\"',;]+", re.IGNORECASE), r"\1…"),
    (re.compile(r"(://[^\s/:@]*:)[^\s/@]+@"), r"\1…@"),  # the password of a DSN
    (re.compile(r"([?&][\w.-]+=)[^\s&\"'#]+"), r"\1…"),  # values of a query string
)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_COLOURS = {"DEBUG": "\x1b[2m", "WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[1;31m"}
_RESET = "\x1b[0m"


def configure(settings: Settings, stream: TextIO | None = None) -> None:
    """Send all logging and warnings of this process to `stream` (standard error), in the format of the settings.

    Our own loggers begin at `settings.log_level`, others at warnings: what they say below that repeats query strings,
    headers and what people said. OVOS, which would write to standard output, is led into the same log.
    """
    stream = stream or sys.stderr
    formatter: logging.Formatter
    if settings.log_format == "json" or (settings.log_format == "auto" and not stream.isatty()):
        formatter = JsonFormatter()
    else:
        formatter = ConsoleFormatter(coloured=stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("agentvoicebox").setLevel(settings.log_level)
    _lead_ovos_here()


def scrub(text: str) -> str:
    """`text` without keys, bearer tokens, passwords of DSNs and values of query strings: the last belt."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (ISO 8601, UTC), level, logger, message, what `extra` held, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for `record`."""
        line = _extra(record) | {
            "time": _time(record).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return scrub(json.dumps(line, ensure_ascii=False, default=str))


class ConsoleFormatter(logging.Formatter):
    """One line per record, and the traceback below it."""

    def __init__(self, *, coloured: bool) -> None:
        super().__init__()
        self._coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        """The line for `record`; control characters in it are escaped, so that no message can pose as two."""
        more = "".join(f" {name}={value}" for name, value in _extra(record).items())
        text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", record.getMessage() + more)
        time = _time(record).astimezone().strftime("%H:%M:%S.%f")[:-3]
        line = f"{time} {record.levelname:8}{record.name.removeprefix('agentvoicebox.')}: {text}"
        if self._coloured and (colour := _COLOURS.get(record.levelname)):
            line = f"{colour}{line}{_RESET}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return scrub(line)


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _lead_ovos_here() -> None:
    """OVOS gives every line of code a logger that writes to standard output and hands nothing on."""
    from ovos_utils.log import LOG

    for logger in LOG._loggers.values():
        logger.handlers.clear()
        logger.propagate = True
    LOG.create_logger = staticmethod(lambda name, tostdout=True: logging.getLogger(name.rpartition(" - ")[2]))
    LOG.debug = LOG.info = staticmethod(lambda *args, **kwargs: None)  # it would walk the stack, then drop the line
