"""The fault drill, as its users run it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flows.compose import CONF_DIR


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("words", "faults"),
    [([], 6), (["engine=zero2", "launcher=two_ranks"], 6), (["launcher=rendezvous", "launcher.max_restarts=0"], 8)],
    ids=["one rank", "two ranks that share", "torchrun"],
)
def test_every_fault_leaves_the_loss_curve_as_it_was(words: list[str], faults: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.drill", *words], cwd=CONF_DIR.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("outcome:") == faults
    assert done.stdout.count("largest difference of 60 losses: 0\n") == faults - 1
    assert "44 of 44: passed over, losses equal bit for bit" in done.stdout
