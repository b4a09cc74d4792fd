from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from flows.artifact import Artifact
from flows.data import bench


def test_bench_prints_both_ratios(
    email_chain: dict[str, Artifact], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.compare(tmp_path, email_chain)
    printed = capsys.readouterr().out
    assert "ids are equal" in printed
    assert re.search(r"stage against bare encode_batch: \d+\.\d\d \(at least 0.9\)", printed)
    assert re.search(r"stage against datasets.map: \d+\.\d\d \(at least 1.5\)", printed)


def test_bench_refuses_to_time_a_wrong_result() -> None:
    bench._check_equal(np.array([5, 6, 0, 7, 0]), [[5, 6], [7]])
    with pytest.raises(RuntimeError, match="are not those of bare encode_batch"):
        bench._check_equal(np.array([5, 6, 0, 8, 0]), [[5, 6], [7]])
