"""The kernels' README lists the operations that there are, and names files and commands that exist."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from kernels.workloads import all_workloads

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
README = (KERNELS / "README.md").read_text()


def test_the_table_has_every_operation_and_no_other() -> None:
    table = README.partition("| Operation | What it fuses |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert all(len(row) == 6 and all(row) for row in rows)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(listed) == sorted({workload.op for workload in all_workloads()})
    if not list((KERNELS / "results").glob("*.json")):
        assert {row[3] for row in rows} == {"not measured"}


def test_files_and_commands_exist(capsys) -> None:
    named = set(re.findall(r"`(\w+(?:/\w+)?\.(?:py|json))`", README))
    assert {"testing.py", "check_baseline.json", "test_norm.py"} <= named
    for name in named:
        assert (KERNELS / name).exists() or (KERNELS.parent / "tests" / "kernels" / name).exists(), name
    modules = set(re.findall(r"python -m (kernels\.\w+)", README))
    assert modules == {"kernels.bench", "kernels.check"}
    for module in modules:
        with pytest.raises(SystemExit, match="0"):
            import_module(module).main(["--help"])
        shown = capsys.readouterr().out
        for options in re.findall(rf"{module}([^`\n]*)", README):
            assert all(option in shown for option in re.findall(r"--[\w-]+", options)), f"{module}{options}"
