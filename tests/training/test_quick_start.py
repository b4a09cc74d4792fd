"""Ranks that compile nothing do not import the compiler; who wants it afterwards gets it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from flows.training.quick_start import keep_compiler_out
keep_compiler_out()
import torch
optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 2))], fused=True)
optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 2)
optimizer.step()
optimizer.zero_grad()
assert not [name for name in ("torch._inductor", "sympy", "torch._dynamo.convert_frame") if name in sys.modules]
double = torch.compile(lambda x: 2 * x, backend="eager")
assert double(torch.ones(2)).tolist() == [2, 2]
assert "torch._dynamo.convert_frame" in sys.modules
"""


@pytest.mark.exhaustive
def test_the_compiler_stays_out_until_it_is_wanted() -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
