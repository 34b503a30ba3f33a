"""`./run`, as far as it goes without setting anything up; that it sets up a bare machine is what `.ci/run` shows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "run", *args], cwd=cwd, capture_output=True, text=True, check=False)


def test_it_is_valid_posix_shell() -> None:
    assert (ROOT / "run").read_text().startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", ROOT / "run"], check=True)


@pytest.mark.parametrize("asked", [[], ["help"], ["--help"]])
def test_help_lists_every_verb_on_standard_output_from_anywhere(asked: list[str], tmp_path: Path) -> None:
    done = run(*asked, cwd=tmp_path)
    listed = set(re.findall(r"^\./run (\w+)", done.stdout, re.MULTILINE))
    arms = re.findall(r"^([a-z][a-z |-]*)\)(?: |$)", (ROOT / "run").read_text(), re.MULTILINE)
    verbs = {verb for arm in arms for verb in arm.split(" | ")} - {"help", "-h", "--help"}
    assert (done.returncode, done.stderr) == (0, "")
    assert listed == verbs
    assert {"setup", "demo", "test", "check", "bench"} <= verbs


@pytest.mark.parametrize("asked", [["tests"], ["bench", "everything"], ["bench", "../conftest/../x"]])
def test_what_there_is_not_gets_one_line_and_2(asked: list[str]) -> None:
    done = run(*asked)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert asked[-1] in done.stderr


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_documents_name_only_commands_that_exist(document: str) -> None:
    named = set(re.findall(r"\./run ([a-z]\w*)", (ROOT / document).read_text()))
    assert named <= set(re.findall(r"\./run (\w+)", run("help").stdout))
    assert "test" in named


def test_every_measurement_that_the_documents_name_is_there() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for name in re.findall(r"\./run bench ([a-z]\w*)", (ROOT / document).read_text()):
            assert (ROOT / "tests" / "bench" / f"{name}.py").is_file()
