"""Who may import whom, and what every file has in common."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from configparser import ConfigParser
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "config": set(),
    "plugins": {"config", "skills"},
    "skills": {"config", "plugins"},
    "tenancy": {"config"},
    "bus_bridge": {"config", "plugins", "tenancy"},
    "admin_api": {"config", "plugins", "tenancy", "bus_bridge", "skills"},
}
ON_A_PI = ("config", "plugins", "skills")


def project_files() -> list[Path]:
    """The files of the project, as paths from its root: what git knows or would add, or all where there is no git."""
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        found = [*ROOT.glob("[!.]*"), *ROOT.glob("[!.]*/**/*")]
        listed = [str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts]
    paths = sorted(Path(name) for name in set(listed) if name and ".egg-info" not in name)
    return [path for path in paths if (ROOT / path).is_file()]


@cache
def trees() -> list[tuple[Path, ast.Module]]:
    """Every Python file, parsed."""
    scripts = [path for path in project_files() if path.suffix == ".py"]
    return [(path, ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))) for path in scripts]


def imports(nodes: Iterator[ast.AST], path: Path) -> Iterator[tuple[str, str]]:
    """Where `nodes` of the module at `path` import, and the full name of what."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["agentvoicebox", *path.parts[:-1]]
            start = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*start, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            yield f"{path}:{node.lineno}", name


def run_at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a module but the bodies of functions, and what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from run_at_import(node)


def test_a_folder_imports_only_what_it_may() -> None:
    wrong = []
    for path, tree in trees():
        if (folder := path.parts[0]) in MAY_IMPORT:
            for place, name in imports(ast.walk(tree), path):
                top, _, rest = name.partition(".")
                if top == "agentvoicebox" and rest.partition(".")[0] not in MAY_IMPORT[folder] | {folder}:
                    wrong.append(f"{place} imports {name}")
    assert wrong == []


def test_nobody_imports_a_folder_by_its_short_name() -> None:
    wrong = [(place, name) for path, tree in trees() for place, name in imports(ast.walk(tree), path)]
    assert [(place, name) for place, name in wrong if name.partition(".")[0] in {*MAY_IMPORT, "tests"}] == []


def test_what_a_pi_loads_imports_no_server_package() -> None:
    asked = requirements()
    only = asked["server"].difference(asked[""], asked["device"], asked["cell"], asked["speech"])
    wrong = []
    for path, tree in trees():
        if path.parts[0] in ON_A_PI:
            found = imports(run_at_import(tree), path)
            wrong += [f"{place} imports {name}" for place, name in found if distributions_of(name) & only]
    assert {"sqlalchemy", "fastapi", "uvicorn", "psycopg"} <= only
    assert wrong == []


def test_what_is_imported_is_asked_for_by_name() -> None:
    asked = set().union(*requirements().values(), {"agentvoicebox", "setuptools"})
    wrong = []
    for path, tree in trees():
        near = {each.name for each in (ROOT / "tests" / "bench").iterdir() if path.parts[0] == "tests"}
        if path.parts[:2] == ("docs", "examples"):
            near = {each.name for each in (ROOT / path).parent.parent.iterdir()}
        for place, name in imports(ast.walk(tree), path):
            top = name.partition(".")[0]
            if top not in {*sys.stdlib_module_names, *near} and not distributions_of(name) & asked:
                wrong.append(f"{place} imports {name}, which setup.cfg does not name")
    assert wrong == []


def requirements() -> dict[str, set[str]]:
    """The distributions that setup.cfg asks for, by extra."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
    return {
        extra: {canonicalize_name(Requirement(line).name) for line in text.split("\n") if line.strip()}
        for extra, text in texts.items()
    }


@cache
def owners() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def distributions_of(name: str) -> set[str]:
    """Which distributions bring the module `name`."""
    top = name.partition(".")[0]
    return {"agentvoicebox"} if top == "agentvoicebox" else {canonicalize_name(each) for each in owners().get(top, [])}


def test_a_module_says_what_it_is() -> None:
    assert [str(path) for path, tree in trees() if not ast.get_docstring(tree)] == []


def test_annotations_cost_nothing_at_import() -> None:
    wrong = []
    for path, tree in trees():
        defines = any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in tree.body)
        if defines and not any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body):
            wrong.append(str(path))
    assert wrong == []


def test_every_folder_is_a_typed_package_and_the_others_never_are() -> None:
    for folder in MAY_IMPORT:
        assert (ROOT / folder / "__init__.py").is_file()
        assert (ROOT / folder / "py.typed").is_file()
    assert [*(ROOT / "packaging").rglob("*.py"), *(ROOT / "tests").rglob("__init__.py")] == []


def test_no_file_names_a_machine_or_leaves_work_open() -> None:
    odd = re.compile(
        rb"/[w]ork/|/[r]oot/|/[t]mp/[a-z]|\b[T]ODO\b|\b[F]IXME\b|[N]otImplementedError|mark\.[s]kip\(|[x]fail"
    )
    texts = ((path, (ROOT / path).read_bytes()) for path in project_files())
    wrong = [(str(path), hit[0].decode()) for path, text in texts for hit in odd.finditer(text)]
    assert wrong == []


def test_the_change_log_keeps_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", each) for each in headings[1:])
    known = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= known
