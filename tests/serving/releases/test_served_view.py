"""The links that a server loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.serving.releases import promotion
from flows.serving.releases.served_view import Pool, ServedView
from flows.serving.repository import CONFIG
from tests.serving.made_up_repository import NAME, add_version


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for version in (1, 2):
        add_version(tmp_path / "repo", version)
    add_version(tmp_path / "repo", 3, live=False)
    return tmp_path / "repo"


def versions(view: ServedView) -> list[list[int]]:
    view.refresh()
    return [
        sorted(int(path.name) for path in (view.path / model).iterdir() if path.name.isdigit())
        for model in (NAME, f"{NAME}_text")
    ]


def test_the_highest_number_is_what_answers(repository: Path, tmp_path: Path) -> None:
    live = ServedView(repository, tmp_path / "live", Pool.live)
    candidate = ServedView(repository, tmp_path / "candidate", Pool.candidate)
    assert versions(live) == [[1, 2]] * 2
    promotion.canary(repository, NAME, 0.1)
    assert versions(live) == [[1, 2]] * 2
    assert versions(candidate) == [[1, 2, 3]] * 2
    promotion.promote(repository, NAME)
    assert versions(live) == [[1, 2, 3]] * 2
    promotion.rollback(repository, NAME)
    assert versions(live) == [[1, 2]] * 2
    promotion.rollback(repository, NAME)
    assert versions(live) == [[1]] * 2
    assert versions(candidate) == versions(live), "without a canary both serve the same"


def test_a_version_is_served_with_the_configuration_that_it_was_published_with(
    repository: Path, tmp_path: Path
) -> None:
    view = ServedView(repository, tmp_path / "view", Pool.live)
    view.refresh()
    assert (view.path / NAME / CONFIG).read_text().endswith("# 2")
    promotion.promote(repository, NAME)
    view.refresh()
    assert (view.path / NAME / CONFIG).read_text().endswith("# 3")
    promotion.rollback(repository, NAME)
    view.refresh()
    assert (view.path / NAME / CONFIG).read_text().endswith("# 2")


def test_only_what_changed_has_another_state(repository: Path, tmp_path: Path) -> None:
    add_version(repository, 1, name="other")
    view = ServedView(repository, tmp_path / "view", Pool.live)
    before = view.refresh()
    assert list(before) == [NAME, f"{NAME}_text", "other", "other_text"]
    assert view.refresh() == before
    promotion.promote(repository, NAME)
    after = view.refresh()
    assert [name for name in before if before[name] != after[name]] == [NAME, f"{NAME}_text"]
