from __future__ import annotations

from dataclasses import dataclass

from flows.evaluation.pareto import front


@dataclass
class Candidate:
    name: str
    loss: float
    size: float
    passed: bool = True


def test_what_another_beats_in_both_is_left_out() -> None:
    rows = [
        Candidate("best", 1.0, 10.0),
        Candidate("middle", 2.0, 5.0),
        Candidate("beaten", 2.5, 6.0),
        Candidate("as good, larger", 2.0, 5.5),
        Candidate("smallest", 3.0, 1.0),
        Candidate("as small, worse", 3.5, 1.0),
    ]
    assert front(rows, "size") == ["smallest", "middle", "best"]


def test_equals_share_their_place() -> None:
    assert front([Candidate("b", 1.0, 1.0), Candidate("a", 1.0, 1.0)], "size") == ["a", "b"]


def test_a_rejected_candidate_neither_stands_on_the_front_nor_keeps_others_off() -> None:
    rows = [Candidate("rejected", 0.5, 0.5, passed=False), Candidate("kept", 1.0, 1.0)]
    assert front(rows, "size") == ["kept"]
    assert front(rows[:1], "size") == []
