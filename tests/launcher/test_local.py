"""Ranks that fail, hang or lose their parent: what the user reads, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flows.config.launcher import LauncherConfig
from flows.launcher import RankError, launch_ranks

DEADLINE_S = 30.0
PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from flows.launcher import Heartbeat, follow_parent, speak_error
follow_parent()
rank = int(os.environ["RANK"])
log_dir = Path(sys.argv[1])
"""


@pytest.fixture
def rank_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module for ranks to run, from its body."""

    def write(body: str) -> str:
        (tmp_path / "rank_under_test.py").write_text(PREAMBLE + body)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).resolve().parents[2]}")
        return "rank_under_test"

    return write


def launch(module: str, log_dir: Path, ranks: int = 2, stall_timeout_s: int = 30) -> None:
    config = LauncherConfig(num_ranks=ranks, threads_per_rank=1, stall_timeout_s=stall_timeout_s)
    launch_ranks(module, log_dir, config, log_dir)


def leftovers() -> list[str]:
    lines = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [line for line in lines if "-m rank_under_test" in line]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.01)


def test_ranks_get_their_numbers_and_share_the_cores(rank_module: Callable[[str], str], tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS"]
    launch(rank_module(f"print([os.environ[name] for name in {names}])"), tmp_path / "logs")
    for rank in range(2):
        log = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert f"['{rank}', '{rank}', '2', '127.0.0.1', '1']" in log
        assert log.startswith(f"$ RANK={rank} ")  # the line to run it again by hand


def test_a_failing_rank_is_named_with_its_last_lines_and_the_others_are_stopped(
    rank_module: Callable[[str], str], tmp_path: Path
) -> None:
    module = rank_module("if rank == 1:\n    print('the last word')\n    sys.exit(3)\ntime.sleep(3600)")
    with pytest.raises(RankError, match=r"rank 1 ended with exit code 3; its last lines(.|\n)*the last word"):
        launch(module, tmp_path / "logs")
    assert not leftovers()


def test_a_spoken_error_replaces_the_log(rank_module: Callable[[str], str], tmp_path: Path) -> None:
    module = rank_module("speak_error(log_dir, 'the data is upside down')\nprint('noise')\nsys.exit(1)")
    with pytest.raises(RankError) as caught:
        launch(module, tmp_path / "logs", ranks=1)
    assert str(caught.value) == "rank 0 ended with exit code 1: the data is upside down"


def test_a_hung_rank_ends_the_run_with_its_stack(rank_module: Callable[[str], str], tmp_path: Path) -> None:
    module = rank_module(
        "def stuck_here():\n    time.sleep(3600)\n"
        "if rank == 1:\n    stuck_here()\n"
        "while True:\n    Heartbeat(log_dir).beat()\n    time.sleep(0.05)"
    )
    with pytest.raises(RankError, match=r"rank 1 gave no sign of life for (.|\n)*stuck_here"):
        launch(module, tmp_path / "logs", stall_timeout_s=3)
    assert not leftovers()


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ranks_die_with_whoever_launched_them(
    ending: signal.Signals, rank_module: Callable[[str], str], tmp_path: Path
) -> None:
    module = rank_module("(log_dir / f'alive-{rank}').touch()\ntime.sleep(3600)")
    program = (
        "from pathlib import Path\nfrom flows.launcher import launch_ranks\n"
        "from flows.config.training import LauncherConfig\n"
        f"launch_ranks({module!r}, Path({str(tmp_path)!r}), LauncherConfig(num_ranks=2), Path({str(tmp_path)!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    until(lambda: len(list(tmp_path.glob("alive-*"))) == 2)
    os.kill(parent.pid, ending)
    parent.wait(DEADLINE_S)
    until(lambda: not leftovers())
