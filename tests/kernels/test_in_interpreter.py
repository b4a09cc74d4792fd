"""Runs the kernel tests on the CPU: Triton has to be told to interpret before it is imported, hence another process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_interpreted(marked: str, timeout_seconds: int) -> None:
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-q", "--tb=short", "-m", marked, str(here)],
        cwd=here.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout


def test_kernels_in_the_interpreter() -> None:
    run_interpreted("not exhaustive", timeout_seconds=300)


@pytest.mark.exhaustive
def test_more_cases_in_the_interpreter() -> None:
    run_interpreted("exhaustive", timeout_seconds=3600)
