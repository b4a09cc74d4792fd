"""How a launch can end, other than well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.config import RunError

LAST_LINES = 12


def last_lines(path: Path) -> str:
    """The end of a log, indented for a message; empty if there is none."""
    lines = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
    return "\n".join(f"  | {line}" for line in lines[-LAST_LINES:])


def leave_exit_code(log_dir: Path, rank: int, code: int) -> None:
    """Leaves word of how a rank ended, for `exit_codes_left`; negative for signals."""
    partial = log_dir / f".rank-{rank}.exit"
    partial.write_text(str(code))
    partial.replace(log_dir / f"rank-{rank}.exit")


def exit_codes_left(log_dir: Path) -> dict[int, int]:
    """By rank, of those that have ended and left word."""
    paths = log_dir.glob("rank-*.exit")
    return {int(path.stem.removeprefix("rank-")): int(path.read_text()) for path in paths}


class RankError(RunError):
    """A rank failed, died or hung; the message holds its number, its exit code and its last lines."""

    def __init__(self, message: str, comes_again: bool = False) -> None:
        super().__init__(message)
        self.comes_again = comes_again
        """The rank understood what was wrong: starting it again would end the same way."""


class Preempted(RunError):
    """The ranks were asked to stop, saved and did; the same command goes on from there."""


class NotSubmitted(RunError):
    """The job's file was written and not submitted, as the user wished."""


_is_preemption: Callable[[BaseException], bool] = lambda error: False  # noqa: E731


def treat_as_preemption(rule: Callable[[BaseException], bool]) -> None:
    """Says which exceptions, raised in the process that waits for ranks, ask for a checkpoint before the end.

    All others, Ctrl-C first of all, end the ranks at once. Signals belong to a whole process, and so does this rule.
    """
    global _is_preemption
    _is_preemption = rule


def is_preemption(error: BaseException) -> Any:
    """Whether the ranks shall save before they end because of `error`."""
    return _is_preemption(error)
