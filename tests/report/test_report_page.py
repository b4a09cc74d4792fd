"""The page as a whole: what it holds, that it needs nothing else, that it is always the same."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flows.artifact import Artifact
from flows.config import Config
from flows.config.serving import PublishConfig
from flows.report import stage
from flows.report.number_format import size
from tests.report.made_up_run import BITS_PER_BYTE, DROPPED_NAME, PROGRAM_BYTES, SKIPPED, STEPS, make_run

NAME = "<b onclick=x>my run"
CONFIG = Config(name=NAME, steps=STEPS, publish=PublishConfig(model_name="tiny"))
LOADING_ATTRIBUTES = ("src", "href", "srcset", "data", "poster", "action")
WORSE_THAN_UNIGRAM = {name: value + 0.7 for name, value in BITS_PER_BYTE.items()}


class Page(HTMLParser):
    """Elements, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text += " " if tag in ("td", "th", "li", "p", "dt", "dd", "h1", "h2", "h3", "text") else ""
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def build(directory: Path, config: Config, parents: dict[str, Artifact]) -> str:
    directory.mkdir()
    stage.build(directory, config, parents)
    return (directory / "report.html").read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return make_run(tmp_path_factory.mktemp("store"), CONFIG)


@pytest.fixture(scope="module")
def html(run: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("made") / "report", CONFIG, run)


def test_loads_nothing_from_anywhere(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    loaded = [value for name, value in page.attributes if name in LOADING_ATTRIBUTES or name.startswith("xlink")]
    assert loaded, "navigation and marks refer to parts of the page itself"
    assert [value for value in loaded if not str(value).startswith("#")] == []
    assert "url(" not in html.replace("url(#", "")
    assert "@import" not in html
    assert "http://" not in html
    assert "https://" not in html


def test_what_is_referred_to_is_in_the_page_once(html: str) -> None:
    attributes = Page(html).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {str(value)[1:] for name, value in attributes if name == "href"} <= set(ids)


def test_what_users_wrote_is_shown_as_text(html: str) -> None:
    page = Page(html)
    assert "img" not in page.tags
    assert "b" not in page.tags
    assert DROPPED_NAME in page.text
    assert NAME in page.text


def test_same_parents_give_the_same_bytes(html: str, run: dict[str, Artifact], tmp_path: Path) -> None:
    assert build(tmp_path / "again", CONFIG, run) == html


def test_says_what_was_published(html: str, run: dict[str, Artifact]) -> None:
    text = Page(html).text
    assert "tiny version 3 is published." in text
    assert "It serves student_int8: the fastest of 3 candidates that passed the gates, of 4 made" in text
    assert f"{run['passport'].metrics['checks']} comparisons passed" in text


def test_every_candidate_is_shown_with_its_numbers_and_reasons(html: str, run: dict[str, Artifact]) -> None:
    text = Page(html).text
    rows = run["gates"].metrics["candidates"]
    assert {row["name"]: row["passed"] for row in rows} == dict.fromkeys(CONFIG.candidates, True) | {"base_int8": False}
    for row in rows:
        verdict = "✗ rejected" if row["reasons"] else "✓"
        assert f"{row['name']} {verdict}" in text
        assert f"{row['bits_per_byte']:.3f} {row['loss']:.3f}" in text
        assert size(PROGRAM_BYTES[row["name"]]) in text
        for reason in row["reasons"]:
            assert reason in text
    assert "p50 latency in ms 9.87 is 1.049 x the 9.41 of base" in text


def test_quality_and_cost_of_every_candidate_with_its_line_of_descent(html: str) -> None:
    text = Page(html).text
    assert "student_int8 size, p50 97.0 % 0.0213" in text
    assert "3.20 MB 0.0127 base → distill: student → quantize: student_int8" in text
    assert "base_int8 rejected 97.0 %" in text
    assert "my_choice acc" in text
    assert 'id="front-program_bytes"' in html
    assert "<title>base_int8: p50 latency in ms 9.87 is 1.049 x" in html


def test_the_plots_are_files_too(run: dict[str, Artifact], tmp_path: Path) -> None:
    build(tmp_path / "report", CONFIG, run)
    for file in stage.PLOTS.values():
        assert ">student_int8</text>" in (tmp_path / "report" / file).read_text()


def test_says_why_nothing_was_published(tmp_path: Path) -> None:
    run = make_run(tmp_path / "store", CONFIG, WORSE_THAN_UNIGRAM)
    text = Page(build(tmp_path / "report", CONFIG, run)).text
    assert "Nothing was published. None of 4 candidates passed the gates." in text
    assert text.count("✗ rejected") == 4
    for row in run["gates"].metrics["candidates"]:
        assert f"bits per byte {row['bits_per_byte']:.4g} does not beat the unigram model's 3.081" in text
    assert "Proof" not in text
    assert "is published" not in text


def test_says_that_the_wanted_candidate_failed(tmp_path: Path) -> None:
    config = replace(CONFIG, publish=PublishConfig(candidate="base_int8"))
    run = make_run(tmp_path / "store", config)
    assert "publish.candidate=base_int8 did not pass the gates." in Page(build(tmp_path / "report", config, run)).text


def test_a_diverged_candidate_is_in_the_table_and_left_out_of_the_plots(tmp_path: Path) -> None:
    run = make_run(tmp_path / "store", CONFIG, BITS_PER_BYTE | {"student": float("nan")})
    html = build(tmp_path / "report", CONFIG, run)
    assert "test loss is nan" in Page(html).text
    assert 'id="p50_ms-base"' in html
    assert 'id="p50_ms-student"' not in html


def test_one_model_that_is_not_compressed_makes_a_page(tmp_path: Path) -> None:
    config = replace(CONFIG, steps={})
    text = Page(build(tmp_path / "report", config, make_run(tmp_path / "store", config))).text
    assert "It serves base" in text
    assert "Quantization" not in text


def test_shows_data_quantization_proof_and_settings(html: str, run: dict[str, Artifact]) -> None:
    text = Page(html).text
    assert "1,643 documents of 31.7 MB were read" in text
    assert "1,611 were kept and 32 dropped" in text
    assert "duplicate 31 idlelib/__init__.py" in text
    assert SKIPPED in text
    assert "24.3 dB its weights keep 24.3 dB, less than quantize.min_sqnr_db=25" in text
    assert "29 of 30 layers quantized (29 in w8a8, 1 in floating point), codes by nearest" in text
    assert "codes by nearest on 16,384 tokens of 64 training sequences (sha256 abababababab)" in text
    assert "sensitivity-student_int8-29" in html
    assert "sensitivity-base_int8-0" not in html
    assert "scores 288 of 288" in text
    assert "publish.model_name tiny" in text
    assert "torch 2.12.1, 2.13.0" in text, "the base model was made with another version"
    for artifact in run.values():
        assert artifact.digest in html
    for files in run["passport"].metrics["digests"]["served_files"].values():
        assert set(files.values()) <= set(text.split())


def test_compares_the_plan_with_what_was_measured(html: str, run: dict[str, Artifact]) -> None:
    text = Page(html).text
    plan = run["base"].metrics["plan"]
    assert f"Memory of a rank at its peak {size(plan['memory_bytes'])} 1.02 GB" in text
    assert "Tokens per second" in text
    assert text.count("Share of the hardware's peak") == 2


def test_without_a_plan_there_is_no_comparison(tmp_path: Path) -> None:
    run = make_run(tmp_path / "store", CONFIG)
    for name in CONFIG.trained_candidates:
        run[name] = replace(run[name], metrics={**run[name].metrics, "plan": None})
    text = Page(build(tmp_path / "report", CONFIG, run)).text
    assert "Planned and measured" not in text


def test_changing_the_template_makes_the_stage_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("report.html.jinja", "report.css"):
        (tmp_path / name).write_bytes((Path(stage.__file__).parent / name).read_bytes())
    before = stage.fingerprint(CONFIG)
    monkeypatch.setattr(stage, "__file__", str(tmp_path / "stage.py"))
    assert stage.fingerprint(CONFIG) == before
    (tmp_path / "report.css").write_text("body { color: red }")
    assert stage.fingerprint(CONFIG) != before
