"""The page for skill authors, done as it is written: every file and every command of it, from the first to the last."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "skill-hello-tenant"
PAGE = (ROOT / "docs" / "skills.md").read_text(encoding="utf-8")

_BLOCK = re.compile(r"(?:`([\w./-]+)`:\n\n)?```(\w+)\n(.*?)```\n", re.DOTALL)
_END = "END-OF-THE-FILE"


class Block(NamedTuple):
    """A block of the page."""

    file: str
    """Where its content belongs; empty for commands and what they print."""
    kind: str
    text: str


BLOCKS = [Block(*found) for found in _BLOCK.findall(PAGE)]


def script() -> Iterator[str]:
    """All that the reader does, as one script."""
    yield "set -euo pipefail"
    yield "trap 'kill $(jobs -p) 2>/dev/null' EXIT"
    for block in BLOCKS:
        if block.file:
            yield f"cat > {shlex.quote(block.file)} <<'{_END}'\n{block.text}{_END}"
        elif block.kind == "sh":
            yield block.text


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A directory in which the project seems to be set up: its `.venv` finds all that ours has, and takes more."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    ours = sysconfig.get_paths()["purelib"]
    theirs = tmp_path / ".venv" / "lib" / Path(ours).parent.name / "site-packages"
    (theirs / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    commands = {"pip": "-m pip", "avb": "-P -m agentvoicebox.admin_api.cli"}
    for name, module in commands.items():
        _script(tmp_path / ".venv" / "bin" / name, f'exec {tmp_path}/.venv/bin/python {module} "$@"')
    _script(tmp_path / "run", '[ "$*" = setup ]')
    return tmp_path


def _script(file: Path, text: str) -> None:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def test_the_page_has_the_example_and_nothing_else() -> None:
    shown = {block.file.removeprefix("skill-hello-tenant/"): block.text for block in BLOCKS if block.file}
    files = [path for path in EXAMPLE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert shown == {str(path.relative_to(EXAMPLE)): path.read_text(encoding="utf-8") for path in files}
    assert PAGE.count("```") == 2 * len(BLOCKS)
    assert {block.kind for block in BLOCKS if not block.file} == {"sh", "text"}


def test_the_page_does_what_it_says(checkout: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    done = subprocess.run(
        ["bash", "-c", "\n".join(script()).replace("65020", port)],
        cwd=checkout,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(checkout),
            "AVB_PORT": port,
            # Nothing comes from elsewhere: what a build needs is there.
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    log = checkout / "up.log"
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + (log.read_text() if log.exists() else "")
    assert "3 passed" in done.stdout
    (printed,) = [block.text for block in BLOCKS if not block.file and block.kind == "text"]
    for line in printed.splitlines():
        assert line in done.stdout.splitlines(), done.stdout[-3000:]
