"""Kernels compile for GPUs that are not here, and a bad one is reported."""

from dataclasses import replace
from functools import partial

import torch

from kernels import check, dispatch
from kernels.dispatch import MAX_COLUMNS
from kernels.norm_triton import norm_bwd, norm_fwd
from kernels.workloads import norm


def backward(rows: int, columns: int) -> None:
    x, weight, rstd = torch.empty(rows, columns), torch.empty(columns), torch.empty(rows)
    norm_bwd(x, None, x, weight, rstd[:0], rstd, False)


def test_sound_kernels_compile_once_for_each_architecture() -> None:
    def launch(rows: int) -> None:
        norm_fwd(torch.empty(rows, 256), None, torch.empty(256), None, 1e-5, False)
        backward(rows, 256)

    for architecture in (80, 90):
        made = check.compile_launches([partial(launch, 32), partial(launch, 64)], architecture)  # the same twice
        assert [kernel.kernel for kernel in made] == ["norm_triton._forward", "norm_triton._backward"]
        for kernel in made:
            assert kernel.architecture == architecture
            assert 8 < kernel.registers <= 255
            assert (kernel.spill_instructions, kernel.fault) == (0, None)
            assert "ROWS=8 BLOCK=256" in kernel.variant
            assert "warps=4" in kernel.variant


def test_spilled_registers_are_a_fault() -> None:
    (made,) = check.compile_launches([lambda: backward(64, 4 * MAX_COLUMNS)], 90)
    assert made.spill_instructions > 0
    assert made.fault == f"spills registers ({made.spill_instructions} instructions)"


def test_command_line_reports_every_launch(capsys) -> None:
    assert check.main(["--op", "rms_norm", "--architecture", "90"]) == 0
    report = capsys.readouterr().out.splitlines()
    assert report[-1] == "all sound"
    assert len(report) == 2 + 2 * 3 + 1  # two passes, three widths
    assert sum("*bf16" in line for line in report) == 6


def test_command_line_fails_on_a_fault(capsys, monkeypatch) -> None:
    wide = [replace(workload, small={"rows": 64, "columns": 4 * MAX_COLUMNS}) for workload in norm.WORKLOADS[-1:]]
    monkeypatch.setattr(check, "all_workloads", lambda: wide)
    monkeypatch.setattr(dispatch, "MAX_COLUMNS", 4 * MAX_COLUMNS)
    assert check.main(["--architecture", "90"]) == 1
    report = capsys.readouterr().out
    assert "<-- spills registers" in report
    assert report.endswith("1 at fault\n")
