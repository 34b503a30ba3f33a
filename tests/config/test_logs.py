"""The log: readable by people or by machines, never a secret in it, never on standard output."""

from __future__ import annotations

import json
import logging
import os
import pty
import subprocess
import sys
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentvoicebox.config import logs

KEY = "avb_Zt8kYwPq2LmN4vXcB6hJ9sDfG1aQeR3uI5oK7yT0_-w"
FORMATTERS = [logs.JsonFormatter(), logs.ConsoleFormatter(coloured=False), logs.ConsoleFormatter(coloured=True)]
PROGRAM = """
import logging, warnings
from agentvoicebox.config import logs, settings
from ovos_utils.log import LOG
LOG.warning("before")
logs.configure(settings.load())
ours = logging.getLogger("agentvoicebox.bus_bridge")
ours.debug("too quiet")
ours.info("ready", extra={"cell": 1})
logging.getLogger("uvicorn.error").info("GET /?api_key=x")
LOG.info("too quiet")
LOG.warning("from ovos")
warnings.warn("a warning")
"""


def record(message: object, *args: object, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "agentvoicebox.tenancy.keys", "msg": message, "args": args} | extra)
    made.levelno, made.levelname = level, logging.getLevelName(level)
    return made


def run(**environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **environ}, capture_output=True, text=True, check=True
    )


def test_a_json_line_holds_time_level_logger_message_and_extra() -> None:
    line = json.loads(logs.JsonFormatter().format(record("cell %d is back", 2, cell=2, tenant="acme")))
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert line == {
        "level": "info",
        "logger": "agentvoicebox.tenancy.keys",
        "message": "cell 2 is back",
        "cell": 2,
        "tenant": "acme",
    }


def test_extra_cannot_replace_what_the_log_itself_says() -> None:
    line = json.loads(logs.JsonFormatter().format(record("real", level=logging.ERROR, **{"logger": "x", "time": "y"})))
    assert (line["logger"], line["level"]) == ("agentvoicebox.tenancy.keys", "error")
    assert line["time"] != "y"


def test_what_json_cannot_hold_is_written_as_text() -> None:
    assert json.loads(logs.JsonFormatter().format(record("x", path=object)))["path"] == "<class 'object'>"


def test_an_exception_is_written_with_its_traceback() -> None:
    try:
        raise ValueError(KEY)
    except ValueError:
        failed = record("no", exc_info=sys.exc_info())
    for formatter in FORMATTERS:
        text = formatter.format(failed)
        assert "ValueError: avb_Zt8kYwPq…" in text
        assert "test_logs.py" in text
        assert KEY not in text


def test_a_console_line_is_one_line_whatever_is_in_it() -> None:
    line = logs.ConsoleFormatter(coloured=False).format(record("a\nERROR forged \x1b[31m", why="b\r\nc"))
    assert line.endswith("INFO    tenancy.keys: a\\x0aERROR forged \\x1b[31m why=b\\x0d\\x0ac")


def test_only_a_coloured_console_has_colours() -> None:
    warning = record("careful", level=logging.WARNING)
    assert logs.ConsoleFormatter(coloured=True).format(warning).startswith("\x1b[33m")
    assert "\x1b" not in logs.ConsoleFormatter(coloured=False).format(warning)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"key {KEY} is unknown", "key avb_Zt8kYwPq… is unknown"),
        (f"avb_operator_{KEY[4:]}", "avb_operator…"),
        ("Authorization: Bearer eyJhbGciOi.J9.x", "Authorization: Bearer …"),
        ("postgresql://avb:p:a$$@db/avb", "postgresql://avb:…@db/avb"),
        ("GET /v1/realtime?model=m&token=abc HTTP/1.1", "GET /v1/realtime?model=…&token=… HTTP/1.1"),
        ("listening on http://127.0.0.1:65020", "listening on http://127.0.0.1:65020"),
        ("role avb_ledger may not. Really?", "role avb_ledger may not. Really?"),
    ],
)
def test_secrets_are_scrubbed_and_nothing_else(text: str, kept: str) -> None:
    assert logs.scrub(text) == kept


@given(st.text(), st.text(), st.sampled_from(FORMATTERS))
def test_no_formatter_lets_a_key_through(before: str, after: str, formatter: logging.Formatter) -> None:
    for hidden in (
        record(f"{before}{KEY}{after}"),
        record("%s", f"{before}{KEY}{after}"),
        record({"key": KEY}),
        record(before, header={"authorization": [KEY]}),
    ):
        assert KEY not in formatter.format(hidden)


def test_a_process_writes_json_lines_to_standard_error_and_nothing_to_standard_output() -> None:
    done = run(AVB_LOG_FORMAT="auto")
    assert "before" in done.stdout  # how OVOS is when nobody leads it
    assert done.stdout.count("\n") == 1
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["message"] for line in lines[:2]] == ["ready", "from ovos"]
    assert lines[0]["cell"] == 1
    assert [line["logger"] for line in lines[1:]] == [":<module>:12", "py.warnings"]


def test_levels_and_formats_can_be_chosen() -> None:
    console = run(AVB_LOG_FORMAT="console", AVB_LOG_LEVEL="DEBUG").stderr
    assert "DEBUG   bus_bridge: too quiet" in console
    assert "\x1b" not in console
    assert "ready" not in run(AVB_LOG_LEVEL="ERROR").stderr


def test_on_a_terminal_it_is_for_people() -> None:
    master, slave = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.DEVNULL, stderr=slave) as process:
        os.close(slave)
        process.wait()
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert "INFO    bus_bridge: ready cell=1" in shown
    assert "\x1b[33m" in shown
