"""`./run`, as far as it goes without setting anything up; that it sets up a bare machine is what `.ci/run` shows."""

from __future__ import annotations

import re
import shutil
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


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of somebody who is not root, on a system that has Debian's tools and the set-up, but no servers.

    The set-up is a copy of `run` whose `.venv` says that it is whole; its Python prints what it is asked to run.
    """
    home, programs = tmp_path / "home", tmp_path / "bin"
    for folder in (home / "config", home / ".venv" / "bin", programs):
        folder.mkdir(parents=True)
    for name in ("setup.cfg", "setup.py", "config/constraints.txt", "run"):
        shutil.copy(ROOT / name, home / name)
    for name in ("sh", "cat", "cksum", "dirname", "readlink"):
        (programs / name).symlink_to(str(shutil.which(name)))
    scripts = {
        programs / "apt-get": 'echo called >>"$0.log"',
        programs / "id": "echo 1000",
        home / ".venv" / "bin" / "python": 'echo "$*"',
        home / ".venv" / "bin" / "avb": 'echo "avb $*"',
    }
    for path, script in scripts.items():
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    ingredients = "cat setup.cfg setup.py config/constraints.txt | cksum; pwd -P; .venv/bin/python -ISc '{}'"
    version = "import sys; print(sys.version)"
    stamp = subprocess.run(ingredients.format(version), shell=True, cwd=home, capture_output=True, check=True).stdout
    (home / ".venv" / "stamp").write_bytes(stamp)
    return {"PATH": str(programs), "HOME": str(home)}


def run_bare(bare: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    home = Path(bare["HOME"])
    return subprocess.run([home / "run", *args], env=bare, capture_output=True, text=True, check=False, cwd=home)


def test_the_tests_name_the_servers_that_are_missing_and_go_on(bare: dict[str, str]) -> None:
    done = run_bare(bare, "test", "-k", "this")
    assert (done.returncode, done.stdout) == (0, "-m pytest -k this\n")
    assert "only root may install it" in done.stderr
    packages = done.stderr.split("--no-install-recommends ")[1].split()
    assert "redis-server" in packages
    assert set(packages) <= {
        "redis-server",
        "postgresql",
    }  # the latter is found where Debian puts it, whatever the path


@pytest.mark.parametrize("verb", ["demo", "avb"])
def test_who_only_uses_it_needs_no_servers(bare: dict[str, str], verb: str) -> None:
    done = run_bare(bare, verb, "--json")
    assert (done.returncode, done.stdout) == (0, "avb demo --json\n" if verb == "demo" else "avb --json\n")
    assert done.stderr == ""
