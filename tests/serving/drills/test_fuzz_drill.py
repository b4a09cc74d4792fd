"""The public endpoint under malformed requests, and with a server behind it that dies."""

from __future__ import annotations

import pytest

from flows.serving.drills import fuzz_drill
from flows.serving.drills.fuzz_requests import make_request
from tests.serving.tiny_chain import NAME, Published

pytestmark = pytest.mark.server


@pytest.mark.parametrize("requests", [300, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_nothing_crashes_and_the_neighbour_is_unharmed(
    published: Published, requests: int, capsys: pytest.CaptureFixture[str]
) -> None:
    code = fuzz_drill.main([str(published.repository / NAME / "1"), "--requests", str(requests), "--seed", "11"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert f"{requests + 2 * fuzz_drill.RELOADS + 4} requests and reloads, 0 problems" in said
    assert "killed the server 2 x 503" in said


def test_a_seed_gives_the_same_requests_of_every_kind() -> None:
    first, again = ([make_request(number, NAME, "key", 3) for number in range(60)] for _ in range(2))
    assert first == again
    assert len({request.kind for request in first}) == 10
    assert first != [make_request(number, NAME, "key", 4) for number in range(60)]


def test_what_is_no_answer_counts_as_a_problem() -> None:
    request = make_request(9, NAME, "key", 0)
    assert request.kind == "good"
    for status, is_problem in (("200", False), ("401", False), ("404", True), ("500", True), ("no answer", True)):
        assert (fuzz_drill.problem(request, status) is not None) == is_problem
