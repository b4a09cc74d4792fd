"""Which implementation runs on a machine without a GPU, and what the user hears when it cannot."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import dispatch, reference
from kernels.norm import rms_norm

X, WEIGHT = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), torch.linspace(0.5, 2, 16)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_cpu_runs_the_reference(kernels: str) -> None:
    assert torch.equal(rms_norm(X, WEIGHT, 1e-5, kernels), reference.rms_norm(X, WEIGHT, 1e-5))
    assert dispatch.unavailable_reason(kernels, "cpu") is None


def test_kernels_on_the_cpu_are_refused() -> None:
    reason = dispatch.unavailable_reason("triton", "cpu")
    assert reason == "Triton-language kernels run on CUDA, not on cpu, unless TRITON_INTERPRET=1 interprets them"
    with pytest.raises(dispatch.KernelError) as refusal:
        rms_norm(X, WEIGHT, 1e-5, "triton")
    assert str(refusal.value) == f'kernels="triton" is not possible: {reason}. Use "auto" or "reference".'


def test_kernels_on_cuda_are_available() -> None:
    assert dispatch.WITH_TRITON
    assert dispatch.unavailable_reason("triton", "cuda") is None


def test_all_but_what_launches_can_be_imported_without_triton() -> None:
    """With Triton out of reach, as on a machine without it: operations, workloads, benchmark."""
    package = Path(dispatch.__file__).parent
    needing = {path for path in package.glob("*.py") if re.search(r"^(import|from) triton", path.read_text(), re.M)}
    modules = [
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted({*package.rglob("*.py")} - needing)
    ]
    assert {"kernels.reference", "kernels.workloads", "kernels.bench", "kernels.testing"} <= set(modules)
    code = f"import sys; sys.modules['triton'] = None; import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_on_the_cpu_imports_no_triton() -> None:
    code = (
        "import sys, torch; from flows.config.model import ModelConfig; from flows.model.decoder import Decoder;"
        "Decoder(ModelConfig(), 50)(torch.zeros(1, 2, dtype=torch.int64)).sum().backward();"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
