"""Kernels compile for GPUs that are not here, and a bad or worsened one is reported."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import check, check_baseline, compile_only
from kernels.binary import PROCESSORS, Compiled, blocks
from kernels.dispatch import KernelError
from kernels.workloads import Cost, Workload, all_workloads


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i)).to(c_ptr.dtype.element_ty))


@triton.jit
def _center(x_ptr, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK) * stride
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x - tl.sum(x, 0) / BLOCK)


@triton.jit
def _broken(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + UNKNOWN)  # noqa: F821


def multiply(dtype: torch.dtype, size: int = 128) -> None:
    a = torch.empty(size, size).to(dtype)
    _product[(1,)](a, a, torch.empty(size, size, dtype=torch.int32 if dtype == torch.int8 else torch.float32), N=size)


def scale(x: Tensor, stride: int = 16, block: int = 256) -> Tensor:
    _center[(1,)](x.detach(), stride, BLOCK=block, num_warps=4)
    return x


def workload(dtype: torch.dtype = torch.float32, call: Callable[[Tensor], object] = scale, size: int = 1) -> Workload:
    return Workload(
        op="scale",
        dtype=dtype,
        sizes={"size": size},
        small={"size": size},
        inputs=lambda sizes, dtype, device: {"x": torch.empty(sizes["size"], dtype=dtype, device=device)},
        kernel=call,
        plain=call,
        forward=lambda sizes: Cost(1),
    )


def test_sound_kernels_compile_once() -> None:
    some = [lambda: scale(torch.empty(1)), lambda: scale(torch.empty(2), 32), lambda: scale(torch.empty(1), 3)]
    made = compile_only.compile_launches(some, 90)  # twice the same to a compiler
    assert [kernel.kernel for kernel in made] == ["test_check._center"] * 2
    assert made[0].variant == "*fp32 BLOCK=256 warps=4 stages=3"
    assert made[1].variant == "*fp32 BLOCK=256 odd=stride warps=4 stages=3"
    for kernel in made:
        assert kernel.architecture == 90
        assert 8 <= kernel.registers <= 255
        assert (kernel.spill_instructions, kernel.matrix_units, kernel.fault) == (0, (), None)
        assert kernel.blocks == 16  # 2048 threads / 128


@pytest.mark.parametrize(
    ("architecture", "dtype", "units"),
    [
        (80, torch.bfloat16, ("HMMA",)),
        (80, torch.int8, ("IMMA",)),
        (90, torch.bfloat16, ("WGMMA",)),
        (90, torch.float8_e4m3fn, ("WGMMA-fp8",)),
        (100, torch.bfloat16, ("tcgen05",)),
    ],
)
def test_matrix_units_are_recognized(architecture: int, dtype: torch.dtype, units: tuple[str, ...]) -> None:
    (made,) = compile_only.compile_launches([lambda: multiply(dtype)], architecture)
    assert made.matrix_units == units
    assert made.shared_bytes >= 2 * 128 * 128 * dtype.itemsize - (architecture == 80) * 128 * 128 * dtype.itemsize


def test_small_products_use_no_tensor_cores_of_a_newer_kind() -> None:
    (made,) = compile_only.compile_launches([lambda: multiply(torch.bfloat16, 16)], 90)
    assert made.matrix_units == ("HMMA",)  # what a baseline of WGMMA would call lost


def test_blocks_on_a_processor() -> None:
    hopper = PROCESSORS[90]
    assert blocks(hopper, registers=32, shared_bytes=0, threads=128) == 16  # 2048 threads
    assert blocks(hopper, registers=32, shared_bytes=0, threads=32) == 32  # blocks
    assert blocks(hopper, registers=129, shared_bytes=0, threads=128) == 3  # 136 x 128 of 65536 registers
    assert blocks(hopper, registers=32, shared_bytes=57 * 1024, threads=128) == 3  # 58 of 228 KiB
    assert blocks(PROCESSORS[100], registers=32, shared_bytes=0, threads=128, tensor_memory_columns=256) == 2


def test_spilled_registers_are_a_fault() -> None:
    (made,) = compile_only.compile_launches([lambda: scale(torch.empty(1), block=1 << 15)], 90)  # 256 for each thread
    assert made.spill_instructions > 0
    assert made.fault == f"spills registers ({made.spill_instructions} instructions)"


def test_more_shared_memory_than_there_is_is_a_fault() -> None:
    fits = Compiled("op.kernel", "", 80, 32, 0, 163 * 1024, (), 1)
    assert fits.fault is None
    assert replace(fits, shared_bytes=163 * 1024 + 1).fault == "needs more shared memory than 166912 bytes"


TWINS = {"layer_norm", "add_rms_norm", "geglu"}
"""Operations whose kernels are those of add_layer_norm, rms_norm and swiglu, with another constant."""


def test_the_first_workload_of_each_operation_keeps_its_baseline() -> None:
    first = {each.op: each for each in reversed(all_workloads()) if each.op not in TWINS}
    baseline = check_baseline.load(check_baseline.FILE)
    for outcome in check.outcomes(list(first.values()), [90], processes=1):
        assert (outcome.failure, outcome.skipped) == (None, None), outcome.workload
        for made in outcome.compiled:
            assert (made.fault or baseline.fault(made)) is None, made


@pytest.mark.exhaustive
def test_every_kernel_keeps_its_baseline(capsys) -> None:
    assert check.main(["--strict", "--processes", "2"]) == 0, capsys.readouterr().out


def test_what_is_worse_than_the_baseline_is_a_fault() -> None:
    made = Compiled("op.kernel", "*fp32 BLOCK=8", 90, 32, 0, 1024, ("WGMMA",), 1)
    baseline = check_baseline.Baseline({"op.kernel": {"*fp32 BLOCK=8": {"sm_90": (30, 1024, "WGMMA")}}})
    assert baseline.fault(made) is None
    assert baseline.fault(replace(made, registers=8, shared_bytes=0, matrix_units=("WGMMA", "HMMA"))) is None
    assert baseline.fault(replace(made, registers=33)) == "needs more registers than before: 30"
    assert baseline.fault(replace(made, shared_bytes=1025)) == "needs more shared memory than before: 1024 bytes"
    assert baseline.fault(replace(made, matrix_units=("HMMA",))) == "no longer uses WGMMA"
    unknown = f"not in the baseline of triton {triton.__version__}: --write-baseline"
    for other in ({"architecture": 80}, {"variant": "*fp32 BLOCK=16"}, {"kernel": "op.other"}):
        assert baseline.fault(replace(made, **other)) == unknown
    assert list(baseline.missing([], [80, 90])) == ["op.kernel sm_90 *fp32 BLOCK=8"]
    assert not list(baseline.missing([("op.kernel", "*fp32 BLOCK=8", 90)], [80, 90]))


def test_writing_a_baseline_keeps_other_versions_and_architectures(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    path.write_text('{"3.0.0": {"op.kernel": {"*fp32": {"sm_90": [1, 2, ""]}}}}')
    made = Compiled("op.kernel", "*fp32", 80, 32, 0, 1024, ("HMMA",), 1)
    check_baseline.write(path, [made], [80])
    check_baseline.write(path, [replace(made, architecture=90, registers=40)], [90])
    check_baseline.write(path, [replace(made, variant="*fp16")], [80])
    assert json.loads(path.read_text()) == {
        "3.0.0": {"op.kernel": {"*fp32": {"sm_90": [1, 2, ""]}}},
        triton.__version__: {
            "op.kernel": {"*fp16": {"sm_80": [32, 1024, "HMMA"]}, "*fp32": {"sm_90": [40, 1024, "HMMA"]}}
        },
    }
    assert check_baseline.load(path).fault(replace(made, variant="*fp16")) is None
    assert check_baseline.load(tmp_path / "none.json").kernels == {}


def test_the_baseline_holds_the_same_launches_for_every_version() -> None:
    """Who writes it for one version of Triton only leaves the other's behind."""
    versions = json.loads(check_baseline.FILE.read_text())
    held = {
        version: {
            (kernel, variant, architecture)
            for kernel, variants in kernels.items()
            for variant, needs in variants.items()
            for architecture in needs
        }
        for version, kernels in versions.items()
    }
    assert set(held) == {"3.6.0", "3.7.1"}
    assert held["3.6.0"] == held["3.7.1"]


def run(workloads: list[Workload], capsys, monkeypatch, *arguments: str) -> tuple[int, list[str]]:
    monkeypatch.setattr(check, "all_workloads", lambda: workloads)
    return check.main(["--architecture", "90", *arguments]), capsys.readouterr().out.splitlines()


def test_command_line_reports_every_launch(capsys, monkeypatch, tmp_path: Path) -> None:
    some, path = [workload(), workload(torch.bfloat16), workload(size=2)], str(tmp_path / "baseline.json")
    code, report = run(some, capsys, monkeypatch, "--strict", "--baseline", path)
    assert code == 1
    assert report[-1] == "2 at fault"
    assert sum(f"not in the baseline of triton {triton.__version__}" in line for line in report) == 2
    code, report = run(some, capsys, monkeypatch, "--write-baseline", "--baseline", path)
    assert code == 0
    assert report[-1] == "all sound"
    assert len(report) == 2 + 2 + 1  # the third is the same to a compiler as the first
    assert sum("*bf16" in line for line in report) == 1
    assert run(some, capsys, monkeypatch, "--strict", "--baseline", path)[0] == 0
    code, report = run(some[:1], capsys, monkeypatch, "--strict", "--baseline", path)
    assert code == 1
    assert sum(line.endswith("<-- in the baseline, and launched by no workload") for line in report) == 1


def test_command_line_fails_on_a_fault(capsys, monkeypatch) -> None:
    code, report = run([workload(call=partial(scale, block=1 << 15))], capsys, monkeypatch)
    assert code == 1
    assert any("<-- spills registers" in line for line in report)
    assert report[-1] == "1 at fault"


def test_refusals_are_reported_and_failures_fail(capsys, monkeypatch) -> None:
    def refuses(x: Tensor) -> None:
        raise KernelError("needs 8-bit floats, which sm_80 has not")

    def breaks(x: Tensor) -> None:
        _broken[(1,)](x)

    code, report = run([workload(call=refuses), workload()], capsys, monkeypatch)
    assert code == 0
    assert report[2].endswith("sm_90: skipped: needs 8-bit floats, which sm_80 has not")
    assert report[-1] == "all sound"
    code, report = run([workload(call=breaks), workload()], capsys, monkeypatch)
    assert code == 1
    assert "sm_90: <-- does not compile: " in report[2]
    assert "UNKNOWN" in report[2]
    assert "test_check._center" in report[3]  # the others are still checked
    assert report[-1] == "1 at fault"
