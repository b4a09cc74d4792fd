"""Which candidates no other beats in quality and in cost at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Measured(Protocol):
    """What is compared."""

    @property
    def name(self) -> str:
        """Unique."""

    @property
    def loss(self) -> float:
        """The lower, the better."""

    @property
    def passed(self) -> bool:
        """Whether it is to be had at all."""


def front(rows: Sequence[Measured], cost: str) -> list[str]:
    """Names of the candidates on the Pareto front, from the cheapest to the best.

    Candidates that did not pass are neither on it nor keep others off it. Of two that are equal both are on it.

    Args:
        rows: The candidates.
        cost: Name of the measure to weigh against loss; the lower, the better.
    """
    passed = [row for row in rows if row.passed]
    costs = {row.name: float(getattr(row, cost)) for row in passed}

    def beats(one: Measured, other: Measured) -> bool:
        mine, theirs = (costs[one.name], one.loss), (costs[other.name], other.loss)
        return mine[0] <= theirs[0] and mine[1] <= theirs[1] and mine != theirs

    best = [row for row in passed if not any(beats(other, row) for other in passed)]
    return [row.name for row in sorted(best, key=lambda row: (costs[row.name], row.name))]
