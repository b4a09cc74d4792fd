"""The rules of the house: imports run one way, Prefect and Hydra stay at the door, files stay small."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from flows.artifact import defined_names

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    "config",
    "artifact",
    "launcher",
    "data",
    "model",
    "training",
    "compression",
    "export",
    "evaluation",
    "serving",
    "report",
]
ONLY_THE_DOOR_KNOWS_HYDRA = {"flows/compose.py"}
SOURCES = sorted([*ROOT.glob("flows/**/*.py"), *ROOT.glob("kernels/**/*.py")])
SHIPPED = ROOT / "flows" / "export" / "shipped"
BANNED_NAMES = {"utils", "helpers", "common", "base", "manager", "triton", "prefect", "hydra", "torch"}


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # only what is shipped into a version directory, to import nothing of ours
                assert path.parent == SHIPPED, f"{path}: relative import"
                continue
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def layer(dotted: str) -> int | None:
    """Position of a library module in the order; None for verbs and what is not ours."""
    parts = dotted.split(".")
    return ORDER.index(parts[1]) if parts[0] == "flows" and len(parts) > 1 and parts[1] in ORDER else None


def dotted_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_there_is_something_to_check() -> None:
    assert {layer(dotted_name(path)) for path in SOURCES} >= set(range(len(ORDER)))


@pytest.mark.parametrize("path", SOURCES, ids=dotted_name)
def test_imports_run_one_way(path: Path) -> None:
    own = layer(dotted_name(path))
    packages = {name.split(".")[0] for name in imports(path)}
    if path.is_relative_to(ROOT / "kernels"):
        assert not packages & {"flows", "prefect", "hydra", "omegaconf", "deepspeed"}
        return
    if str(path.relative_to(ROOT)) not in ONLY_THE_DOOR_KNOWS_HYDRA:
        assert not packages & {"hydra", "omegaconf"}
    if own is None:
        return  # a verb may use everything
    assert "prefect" not in packages
    for name in imports(path):
        if name.startswith("flows."):
            other = layer(name)
            assert other is not None, f"{path.name} imports the verb {name}"
            assert other <= own, f"{path.name} imports {name}, which stands above it"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.py")), ids=lambda path: path.name)
def test_what_the_server_runs_imports_nothing_of_ours(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"flows", "kernels", "torch", "prefect", "hydra"}


def test_what_a_skipped_run_imports_needs_no_torch() -> None:
    """A run asks every stage for its fingerprint, and whether it still stands, also those that it skips."""
    named = set(re.findall(r'"(flows\.[a-z_.]+)"', (ROOT / "flows" / "chain.py").read_text()))
    asked = sorted(module for module in named if {"fingerprint", "is_current"} & defined_names(module))
    assert {"flows.training.stage", "flows.evaluation.quality_stage", "flows.serving.entry"} <= set(asked)
    program = f"import sys, flows.train_flow, {', '.join(asked)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_files_are_small_and_say_what_they_hold() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCES if path.name != "__init__.py"}
    assert statistics.median(lengths.values()) <= 150
    assert max(lengths.values()) <= 400
    assert not {path.stem for path in SOURCES} & BANNED_NAMES


def test_every_import_is_declared() -> None:
    """Whatever the sources import is the standard library, ours, or named in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    declared = "\n".join([*project["dependencies"], *extras]).lower().replace("-", "_")
    known_as = {"hydra": "hydra_core", "google": "protobuf", "ruamel": "ruamel.yaml"}
    not_ours_to_declare = {"triton_python_backend_utils"}  # the inference server brings it
    ours = {"flows", "kernels"}
    for path in SOURCES:
        for name in imports(path):
            package = name.split(".")[0]
            if package in sys.stdlib_module_names | ours | not_ours_to_declare or package == "__future__":
                continue
            assert known_as.get(package, package).lower() in declared, f"{path.relative_to(ROOT)} imports {package}"
