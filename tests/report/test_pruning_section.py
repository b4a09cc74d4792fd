"""What the page says about pruned candidates, and their plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flows.config import Config
from flows.config.prune import PruneConfig
from flows.report.page import _pruning_figures
from tests.report.made_up_run import PRUNE_STEPS, make_run
from tests.report.test_figures import WRITTEN_DIGITS, assert_affine, drawn, element
from tests.report.test_report_page import Page, build

CONFIG = Config(steps=PRUNE_STEPS, prune=PruneConfig(intermediate_size=352))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    directory = tmp_path_factory.mktemp("pruned")
    run = make_run(directory / "store", CONFIG)
    return run, build(directory / "report", CONFIG, run)


def test_says_what_was_taken_out_and_what_healing_won_back(made: tuple[dict, str]) -> None:
    text = Page(made[1]).text
    assert "2.10 M of 4.00 M parameters are left" in text
    assert "parameters 4,000,000 2,100,000" in text
    assert "intermediate_size 704 352" in text
    assert f"On the 16,384 tokens of 64 training sequences (sha256 {'ab' * 6})" in text
    assert "the loss was 4.161 nats per token and is 4.512" in text
    assert "healed won back 75 % of what it had lost" in text  # 2.683 to 2.533 bits, of 2.683 to 2.483
    assert "base, from pruned" in text
    assert "distillation (forward_kl), T = 2, α = 0.5, from pruned" in text  # noqa: RUF001


def test_a_sparse_candidate_is_rejected_with_the_numbers_and_its_matrices_are_listed(made: tuple[dict, str]) -> None:
    run, html = made
    text = Page(html).text
    row = next(row for row in run["gates"].metrics["candidates"] if row["name"] == "sparse")
    assert row["reasons"][0].startswith("program size in MB 17.1 is 1 x the 17.1 of base, above")
    assert row["reasons"][1].startswith("0.5 of its layers' weights are zeros")
    assert all(reason.replace("'", "&#39;") in html for reason in row["reasons"])
    assert "up_proj model.layers.0 53 %" in text
    assert "lm_head stays as it is: every token meets it." in text


def test_plots_hold_every_score_and_where_the_width_was_cut(made: tuple[dict, str]) -> None:
    metrics = made[0]["pruned"].metrics
    figures = [str(figure) for figure in _pruning_figures("pruned", metrics, 0)]
    hollow = [number for number in range(4) if "fill: var(--card)" in _style(figures[0], f"importance-pruned-{number}")]
    assert hollow == [2]
    corners = drawn(figures[1], "neurons-pruned-3")
    cut = next(one for one in element(figures[1], "neurons-cut-pruned-3").iter() if one.tag == "use")
    x, y = float(cut.attrib["x"]), float(cut.attrib["y"])
    places = np.vstack([corners[[0, -1]], [(x, y)]])  # half of 20 scores are kept: the tenth is the last
    assert_affine(places[:, 0], np.array([0, 1, 9 / 19]), WRITTEN_DIGITS)
    assert_affine(places[:, 1], np.array([1.0, 0.24, 0.64]), WRITTEN_DIGITS)
    assert "heads-cut" not in figures[2]
    assert "channels-cut" not in figures[3]


def _style(svg: str, gid: str) -> str:
    found = element(svg, gid)
    return " ".join(one.attrib.get("style", "") for one in found.iter())


def test_without_pruning_there_is_no_section(tmp_path: Path) -> None:
    config = replace(CONFIG, steps={})
    assert "Pruning" not in Page(build(tmp_path / "report", config, make_run(tmp_path / "store", config))).text
