"""Ranks that fail, hang, are preempted or lose their parent: what the user reads, and that nothing stays behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.config.launcher import LauncherConfig
from flows.launcher import Preempted, RankError, launch_ranks, treat_as_preemption

RankModule = Callable[[str], str]
Leftovers = Callable[[], list[str]]
Until = Callable[[Callable[[], Any]], Any]
DEADLINE_S = 30.0


def launch(module: str, log_dir: Path, ranks: int = 2, **settings: Any) -> int:
    config = LauncherConfig(num_ranks=ranks, threads_per_rank=1, **({"stall_timeout_s": 30} | settings))
    return launch_ranks(module, log_dir, config, log_dir)


def test_ranks_get_their_numbers_and_share_the_cores(rank_module: RankModule, tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS"]
    launch(rank_module(f"print([os.environ[name] for name in {names}])"), tmp_path / "logs")
    for rank in range(2):
        log = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert f"['{rank}', '{rank}', '2', '127.0.0.1', '1']" in log
        assert log.startswith(f"$ RANK={rank} ")  # the line to run it again by hand


def test_a_failing_rank_is_named_with_its_last_lines_and_the_others_are_stopped(
    rank_module: RankModule, leftovers: Leftovers, tmp_path: Path
) -> None:
    module = rank_module("if rank == 1:\n    print('the last word')\n    sys.exit(3)\ntime.sleep(3600)")
    with pytest.raises(RankError, match=r"rank 1 ended with exit code 3; its last lines(.|\n)*the last word"):
        launch(module, tmp_path / "logs")
    assert not leftovers()


def test_a_spoken_error_replaces_the_log(rank_module: RankModule, tmp_path: Path) -> None:
    module = rank_module("speak_error(log_dir, 'the data is upside down')\nprint('noise')\nsys.exit(1)")
    with pytest.raises(RankError) as caught:
        launch(module, tmp_path / "logs", ranks=1)
    assert str(caught.value) == "rank 0 ended with exit code 1: the data is upside down"


def test_a_hung_rank_ends_the_run_with_the_stack_of_every_silent_rank(
    rank_module: RankModule, leftovers: Leftovers, tmp_path: Path
) -> None:
    module = rank_module(
        "def stuck_here():\n    time.sleep(3600)\n"
        "def waiting_for_the_other():\n    time.sleep(3600)\n"
        "(log_dir / f'here-{rank}').touch()\n"
        "while not (log_dir / f'here-{1 - rank}').exists():\n    time.sleep(0.01)\n"  # then both are overdue together
        "Heartbeat(log_dir).beat()\n"
        "stuck_here() if rank == 1 else waiting_for_the_other()"
    )
    with pytest.raises(
        RankError, match=r"rank [01] gave no sign of life for \d+ s, more than (.|\n)*(waiting_for_the_other|stuck_here)"
    ):
        launch(module, tmp_path / "logs", stall_timeout_s=1)
    assert "waiting_for_the_other" in (tmp_path / "logs" / "rank-0.log").read_text()
    assert "stuck_here" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert not leftovers()


def test_a_rank_that_died_is_started_again_and_it_is_said(
    rank_module: RankModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = rank_module(
        "first_time = not (log_dir / 'been_here').exists()\n"
        "(log_dir / 'been_here').touch()\n"
        "if first_time:\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    with caplog.at_level(logging.WARNING):
        assert launch(module, tmp_path / "logs", ranks=1, max_restarts=2) == 1
    (record,) = caplog.records
    assert (
        "restart 1 of launcher.max_restarts=2, from the last checkpoint: rank 0 was killed by SIGKILL" in record.message
    )


def test_restarts_come_to_an_end_and_are_not_wasted_on_a_fault_that_comes_again(
    rank_module: RankModule, tmp_path: Path
) -> None:
    count = "with (log_dir / 'starts').open('a') as file:\n    file.write('x')\n"
    with pytest.raises(RankError, match="rank 0 ended with exit code 3"):
        launch(rank_module(count + "sys.exit(3)"), tmp_path / "exits", ranks=1, max_restarts=1)
    assert (tmp_path / "exits" / "starts").read_text() == "xx"
    spoken = rank_module(count + "speak_error(log_dir, 'the data is upside down')\nsys.exit(1)")
    with pytest.raises(RankError, match="the data is upside down"):
        launch(spoken, tmp_path / "spoken", ranks=1, max_restarts=1)
    assert (tmp_path / "spoken" / "starts").read_text() == "x"


class Sigterm(BaseException):
    """What this process makes of SIGTERM."""


SAVES = """
(log_dir / f'alive-{rank}').touch()
while not asked_to_save():
    time.sleep(0.01)
(log_dir / f'saved-{rank}').touch()
sys.exit(EXIT_PREEMPTED)
"""


def test_sigterm_lets_the_ranks_save_first(
    rank_module: RankModule, leftovers: Leftovers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        if len(list(tmp_path.glob("logs/alive-*"))) == 2:
            raise Sigterm

    monkeypatch.setattr("flows.launcher.outcome._is_preemption", lambda error: False)  # and put back afterwards
    treat_as_preemption(lambda error: isinstance(error, Sigterm))
    config = LauncherConfig(num_ranks=2, threads_per_rank=1)
    with pytest.raises(Preempted, match="stopped by SIGTERM after the ranks had saved a checkpoint"):
        launch_ranks(rank_module(SAVES), tmp_path / "logs", config, tmp_path / "logs", interrupt)
    assert len(list(tmp_path.glob("logs/saved-*"))) == 2
    for path in tmp_path.glob("logs/alive-*"):
        path.unlink()
    hangs = rank_module("(log_dir / f'alive-{rank}').touch()\ntime.sleep(3600)")
    grace = LauncherConfig(num_ranks=2, threads_per_rank=1, preemption_grace_s=1)
    with pytest.raises(Preempted, match=r"the ranks did not save within launcher.preemption_grace_s=1"):
        launch_ranks(hangs, tmp_path / "logs", grace, tmp_path / "logs", interrupt)
    assert not leftovers()


def test_sigterm_to_a_rank_is_a_preemption_too(rank_module: RankModule, tmp_path: Path) -> None:
    module = rank_module("os.kill(os.getpid(), signal.SIGTERM)\n" + SAVES)
    with pytest.raises(Preempted, match="the ranks were sent SIGTERM, saved a checkpoint and stopped"):
        launch(module, tmp_path / "logs", max_restarts=3)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ranks_die_with_whoever_launched_them(
    ending: signal.Signals, rank_module: RankModule, leftovers: Leftovers, until: Until, tmp_path: Path
) -> None:
    module = rank_module("(log_dir / f'alive-{rank}').touch()\ntime.sleep(3600)")
    program = (
        "from pathlib import Path\nfrom flows.launcher import launch_ranks\n"
        "from flows.config.launcher import LauncherConfig\n"
        f"launch_ranks({module!r}, Path({str(tmp_path)!r}), LauncherConfig(num_ranks=2), Path({str(tmp_path)!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    until(lambda: len(list(tmp_path.glob("alive-*"))) == 2)
    os.kill(parent.pid, ending)
    parent.wait(DEADLINE_S)
    until(lambda: not leftovers())
