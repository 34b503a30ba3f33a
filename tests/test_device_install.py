"""What a Raspberry Pi gets: wheels for it, few megabytes, units that systemd takes, and a README that works as written.

The package index is asked, as the set-up asks it: without one these tests fail, as a set-up would.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from configparser import ConfigParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDERS = ("admin_api", "bus_bridge", "config", "plugins", "skills", "tenancy")
UNITS = sorted((ROOT / "packaging" / "raspberry_pi").glob("*.service"))

STOCK = ("ovos-core", "ovos-messagebus", "ovos-audio", "ovos-dinkum-listener", "ovos-vad-plugin-silero")
"""OVOS on a device, before us."""
SOURCE_ONLY = ("combo-lock",)
"""What comes as source alone."""
SOURCE_ON_ARM = "timezonefinder"
"""What comes as source there, and has a wheel here; the skill that tells the time brings it."""
MOST = 60_000_000
"""Bytes that we may add."""

MACHINE = {"platform_machine": "aarch64", "sys_platform": "linux", "platform_system": "Linux"}
PYTHONS = ("3.11", "3.13")
"""Of Raspberry Pi OS 12 and 13."""
GLIBC = 36
"""Of Raspberry Pi OS 12; 13 has a newer one."""


CACHE = os.environ.get("PIP_CACHE_DIR") or str(Path(pwd.getpwuid(os.getuid()).pw_dir) / ".cache" / "pip")
"""Where the set-up has kept what it fetched; the tests have a home of their own."""


def pip(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    given = {**os.environ, "PIP_CACHE_DIR": CACHE, **environment}
    return subprocess.run(command, env=given, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, as somebody has it who has just cloned it."""
    copy = tmp_path_factory.mktemp("checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *FOLDERS]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
        names = [str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts]
    for name in [*names, "setup.py", "setup.cfg", "README.md", "LICENSE"]:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheels(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel, and those of what comes as source alone, built where there is no compiler."""
    made = tmp_path_factory.mktemp("wheels")
    constraints = ROOT / "config" / "constraints.txt"
    no_compiler = {"CC": "/bin/false", "CXX": "/bin/false"}
    for folder, names in ((made, SOURCE_ONLY), (made / "others", (SOURCE_ON_ARM,))):
        asked = ["--no-binary", ",".join(names), "-c", constraints, *names]
        done = pip("wheel", "-q", "--no-deps", "--wheel-dir", folder, *asked, **no_compiler)
        assert done.returncode == 0, done.stderr
    done = pip("wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", made, checkout)
    assert done.returncode == 0, done.stderr
    assert {path.name.rsplit("-", 2)[1:] == ["none", "any.whl"] for path in made.glob("*.whl")} == {True}
    return made


def for_a_pi(python: str) -> list[object]:
    """Flags by which pip takes what a 64-bit Raspberry Pi takes, and wheels only."""
    abi = f"cp{python.replace('.', '')}"
    older = [flag for minor in range(GLIBC, 16, -1) for flag in ("--platform", f"manylinux_2_{minor}_aarch64")]
    return [
        *("--only-binary", ":all:", "--implementation", "cp", "--python-version", python),
        *("--abi", abi, "--abi", "abi3", "--abi", "none", *older, "--platform", "manylinux2014_aarch64"),
        *("--platform", "linux_aarch64", "-c", ROOT / "config" / "constraints.txt"),
    ]


def by_hand() -> list[str]:
    """What the page about devices has pip install for those who have no OVOS yet, but for the skill with a source."""
    page = (ROOT / "docs" / "device.md").read_text().replace("\\\n", " ")
    [line] = re.findall(r"pip install -c config/constraints.txt (ovos-.*)", page)
    return [name for name in line.split() if name != "ovos-skill-date-time"]


@pytest.fixture(scope="module", params=PYTHONS)
def resolved(request: pytest.FixtureRequest, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What pip would install on a Pi: by canonical name, the metadata."""
    out = tmp_path_factory.mktemp("resolved")
    flags = ["--dry-run", "-q", "--ignore-installed", "--target", out / "none", "--find-links", wheels]
    asked = ["agentvoicebox[device]", *STOCK, *by_hand()]
    done = pip("install", *flags, *for_a_pi(request.param), "--report", out / "r.json", *asked)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "r.json").read_text())
    found = {canonicalize_name(each["metadata"]["name"]): each for each in report["install"]}
    return {"python": request.param, "packages": found}


def test_all_of_it_has_wheels_for_a_pi(resolved: dict[str, Any]) -> None:
    files = {name: each["download_info"]["url"] for name, each in resolved["packages"].items()}
    assert {"agentvoicebox", *STOCK, *by_hand(), "pocketsphinx", "pymicro-wakeword", "numpy"} <= set(files)
    assert [url for url in files.values() if not url.endswith(".whl")] == []
    assert [url for url in files.values() if not re.search(r"(aarch64|-none-any)\.whl$", url)] == []


@pytest.mark.parametrize("resolved", PYTHONS[:1], indirect=True)  # the other one differs by kilobytes
def test_it_adds_less_than_60_mb_to_stock_ovos(
    resolved: dict[str, Any], wheels: Path, tmp_path: Path, record_property: Any
) -> None:
    packages = resolved["packages"]
    added = sorted(closure(packages, ("agentvoicebox[device]",)) - closure(packages, STOCK))
    assert {"agentvoicebox", "pocketsphinx", "pymicro-wakeword"} <= set(added)
    assert not {"numpy", "onnxruntime"} & set(added)
    target = tmp_path / "site-packages"
    flags = ["-q", "--no-deps", "--target", target, "--find-links", wheels, *for_a_pi(resolved["python"])]
    done = pip("install", *flags, *added)
    assert done.returncode == 0, done.stderr
    sizes = {path.name: size(path) for path in target.iterdir()}
    total = sum(sizes.values())
    record_property("bytes_beyond_stock", total)
    print(f"{total / 1e6:.1f} MB beyond stock OVOS, with bytecode")
    assert total <= MOST, sorted(sizes.items(), key=lambda each: -each[1])[:8]


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(each.stat().st_size for each in [path, *path.rglob("*")] if each.is_file())


def closure(packages: dict[str, Any], roots: tuple[str, ...]) -> set[str]:
    """What the roots need, themselves included, by the metadata of what pip has found."""
    found: set[tuple[str, str]] = set()
    asked = [Requirement(root) for root in roots]
    open_ends = [(canonicalize_name(each.name), extra) for each in asked for extra in ("", *each.extras)]
    while open_ends:
        name, extra = open_ends.pop()
        if (name, extra) in found or name not in packages:
            continue
        found.add((name, extra))
        for line in packages[name]["metadata"].get("requires_dist") or []:
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({**MACHINE, "extra": extra}):
                open_ends += [(canonicalize_name(wanted.name), asked) for asked in ("", *wanted.extras)]
    return {name for name, _ in found}


# --- units ------------------------------------------------------------------------------------------------------------


def unit(path: Path) -> ConfigParser:
    parsed = ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment, method-assign]
    parsed.read(path)
    return parsed


def test_there_is_a_unit_for_pairing_and_for_each_stock_service() -> None:
    names = {"agentvoicebox-pair", "ovos-messagebus", "ovos-core", "ovos-audio", "ovos-listener"}
    assert {path.stem for path in UNITS} == names


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_each_unit_starts_a_program_that_gets_installed(path: Path) -> None:
    program = unit(path)["Service"]["ExecStart"].split()[0]
    assert program.startswith("%h/.venvs/ovos/bin/")
    assert metadata.entry_points(group="console_scripts", name=Path(program).name)
    assert unit(path)["Install"]["WantedBy"] == "default.target"


def test_pairing_begins_only_without_a_key_where_init_lets_it_be() -> None:
    from agentvoicebox.plugins.device import mycroft

    found = unit(ROOT / "packaging" / "raspberry_pi" / "agentvoicebox-pair.service")
    place = mycroft.user_file({"HOME": "%h"}).parents[1] / "agentvoicebox" / "device.key"
    assert found["Unit"]["ConditionPathExists"] == f"!{place}"


KNOWN = {
    "Unit": "Description After Wants Requires ConditionPathExists StartLimitIntervalSec StartLimitBurst",
    "Service": "Type ExecStart Restart RestartSec RestartPreventExitStatus TimeoutStartSec TimeoutStopSec",
    "Install": "WantedBy",
}
"""What our units say, section by section; systemd passes over a word that it does not know."""


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    for path in UNITS:
        told = unit(path)
        assert set(told.sections()) == set(KNOWN)
        for section in told.sections():
            assert set(told[section]) <= set(KNOWN[section].split()), path
    if shutil.which("systemd-analyze") is None:  # as in most containers
        return
    programs = tmp_path / ".venvs" / "ovos" / "bin"
    programs.mkdir(parents=True)
    for path in UNITS:
        program = programs / Path(unit(path)["Service"]["ExecStart"].split()[0]).name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    command = ["systemd-analyze", "verify", "--user", *map(str, UNITS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if "raspberry_pi" in line] == []
    assert done.returncode == 0


# --- the README, in a fresh directory ---------------------------------------------------------------------------------


class Platform(BaseHTTPRequestHandler):
    """A platform whose admin enters the code at once."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say(201, {"id": "a", "code": "42719035", "expires_at": "2026-01-01T00:00:00Z", "interval": 1})

    def do_GET(self) -> None:
        self._say(200, {"status": "ok", "state": "paired", "tenant": "Acme"})

    def _say(self, status: int, told: dict[str, Any]) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def platform() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Platform)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def lines_of(document: str) -> list[str]:
    """The commands of the first block of a document that has `avb device init` in it, without their comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    [block, *_] = [each for each in blocks if "avb device init" in each]
    lines = (re.sub(r"\s+# .*", "", line).strip() for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_the_readme_makes_a_device_of_a_fresh_directory(checkout: Path, platform: str, tmp_path: Path) -> None:
    lines = lines_of("README.md")
    assert len(lines) == 3
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    path = f"{tmp_path / 'venv' / 'bin'}:/usr/local/bin:/usr/bin:/bin"
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_")) or name == "LANG"}
    # Nobody waits for bytecode that is used once; pip reads this 0 as "do not".
    home = {"HOME": str(tmp_path / "home"), "PATH": path, "PIP_CACHE_DIR": CACHE, "PIP_NO_COMPILE": "0", **kept}

    def run(line: str) -> subprocess.CompletedProcess[str]:
        line = line.replace("https://voice.example.com", platform)
        return subprocess.run(["sh", "-ec", line], cwd=checkout, env=home, capture_output=True, text=True, check=False)

    for line in lines:
        done = run(line)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert "a device of Acme" in done.stdout
    done = run("avb device doctor --json")
    found = {each["what"]: each for each in json.loads(done.stdout)["findings"]}
    good = ("mycroft.conf", "plugins", "device key", "wake word", "offline ear", "offline voice")
    assert {what: found[what]["state"] for what in good} == dict.fromkeys(good, "ok"), found
    assert [each for each in found.values() if each["state"] == "fail" and not each["remedy"]] == []
