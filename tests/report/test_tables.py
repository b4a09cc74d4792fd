from __future__ import annotations

from pathlib import Path

import pytest

from flows.config import Config, to_plain
from flows.config.data import CorpusConfig, DataConfig, Source
from flows.config.quantize import QuantizeConfig, Scheme
from flows.report import tables
from flows.report.lineage import Drawing, draw_lineage
from flows.report.number_format import count, duration, significant, size
from tests.report.made_up_run import PRUNE_STEPS, STEPS, make_run


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (size, 0, "0 bytes"),
        (size, 999, "999 bytes"),
        (size, 999_999, "1.00 MB"),
        (size, 4_194_304, "4.19 MB"),
        (count, 9_999, "9,999"),
        (count, 1_258_291, "1.26 M"),
        (duration, 0.01, "< 0.1 s"),
        (duration, 0.42, "0.4 s"),
        (duration, 59.97, "1 min 00 s"),
        (duration, 125.2, "2 min 05 s"),
        (duration, 11_220, "3 h 07 min"),
        (significant, 0, "0"),
        (significant, 9.999, "10.0"),
        (significant, 123.456, "123"),
        (significant, 0.001234, "0.00123"),
        (significant, 2.4e-5, "2.40e-5"),
        (significant, -3.14159, "-3.14"),
        (significant, float("nan"), "nan"),
    ],
)
def test_numbers_as_people_read_them(function: object, value: float, text: str) -> None:
    assert callable(function)
    assert function(value) == text


def layer(name: str, sqnr_db: float, skipped_reason: str | None = None) -> dict[str, object]:
    return {"name": name, "scheme": Scheme.w8a8, "sqnr_db": sqnr_db, "skipped_reason": skipped_reason}


def test_layers_of_blocks_share_a_grid_and_others_have_their_own() -> None:
    layers = [
        layer("model.embed_tokens", 40.0),
        layer("model.layers.0.mlp.up_proj", 45.0),
        layer("model.layers.1.mlp.up_proj", 25.0),
        layer("model.layers.1.self_attn.q_proj", 35.0),
        layer("model.layers.0.self_attn.q_proj", 12.0, "matches a pattern"),
    ]
    blocks, others = tables.layer_grids(layers, QuantizeConfig())
    assert blocks.columns == ["up_proj", "q_proj"]
    assert blocks.rows["model.layers.0"][1] is None, "a skipped layer has no cell"
    assert [cell and (cell.value, cell.heat) for cell in blocks.rows["model.layers.1"]] == [(25.0, 1.0), (35.0, 0.5)]
    assert others.rows["model.embed_tokens"][0] == tables.Cell(40.0, 0.25)
    (ends,) = tables.layer_grids([layer("cold", 60.0), layer("hot", 20.0)], QuantizeConfig())
    assert [row[0] and row[0].heat for row in ends.rows.values()] == [0.0, 1.0], "heat stays within its scale"


def test_a_plan_is_held_against_the_steps_that_this_run_trained() -> None:
    plan = {"memory_bytes": 100, "step_s": 0.5, "tokens_per_s": 64.0}
    measured = {"step_ms_p50": 400.0, "tokens_per_s": 80.0, "train_s": 12.0}
    curve = [{"peak_memory_bytes": 90}, {"loss": 1.0}, {"peak_memory_bytes": 110}]
    run = {"plan": plan, "measured": measured, "steps": 40, "resumed_from_step": 10, "curve": curve}
    assert tables.plan_rows(run) == [
        ("Memory of a rank at its peak", 100, 110, "size"),
        ("A step, ms", 500.0, 400.0, "significant"),
        ("Tokens per second", 64.0, 80.0, "count"),
        ("30 steps", 15.0, 12.0, "duration"),
    ]
    with_share = run | {"plan": plan | {"mfu": 0.4}, "measured": measured | {"mfu": 0.3}}
    assert tables.plan_rows(with_share)[-1] == ("Share of the hardware's peak", 0.4, 0.3, "significant")
    assert tables.plan_rows(run | {"plan": None}) == []


def test_parity_is_the_worst_of_transports_and_paddings() -> None:
    def score(difference: float, padding: str) -> dict[str, object]:
        details = {"batch_size": 2, "length": 17, "padding": padding}
        return {"name": "scores", "worst_difference": difference, "tolerance": 2.0, "details": details}

    checks = [score(0.5, "none"), score(1.5, "left"), score(1.0, "right"), {"name": "digests", "details": {}}]
    grid = tables.parity_grid(checks)
    assert grid.columns == ["17"]
    assert grid.rows == {"2": [tables.Cell(0.75, 0.75)]}


def test_near_ties_are_counted_for_the_tokenizer_and_for_text() -> None:
    checks = [
        {"name": "tokenizer", "passed": True, "details": {"strings": 56, "near_ties": 2}},
        {"name": "greedy text", "passed": True, "details": {"reason": "near tie"}},
        {"name": "greedy text", "passed": False, "details": {"reason": "token 3: served 'a'"}},
    ]
    rows = tables.check_counts(checks)
    assert [(row["name"], row["checks"], row["passed"], row["near_ties"]) for row in rows] == [
        ("tokenizer", 1, 1, 2),
        ("greedy text", 2, 1, 1),
    ]
    assert rows[0]["worst_difference"] is None


def test_settings_read_as_they_are_typed() -> None:
    corpus = CorpusConfig(source=Source.files, paths=("a.txt", "b.txt"))
    found = tables.settings(to_plain(Config(data=DataConfig(corpus=corpus))))
    assert found["data.corpus.paths"] == "[a.txt,b.txt]"
    assert found["data.corpus.max_documents"] == "null"
    assert found["evaluate.gates.beat_unigram"] == "true"
    assert found["engine.deepspeed"] == "{}"


def lines(drawing: Drawing) -> set[tuple[str, str, bool]]:
    """(from, to, served) of each line, found by where it starts and ends."""
    found = set()
    for edge in drawing.edges:
        start, end = edge.path.replace("M", "").split("H")[0].split(), edge.path.split()[-2:]
        sources = [n.role for n in drawing.nodes if _is(start, n.x + drawing.box_width, n.y + drawing.box_height / 2)]
        targets = [n.role for n in drawing.nodes if _is(end, n.x, n.y + drawing.box_height / 2)]
        assert len(sources) == len(targets) == 1, edge.path
        found.add((sources[0], targets[0], edge.served))
    return found


def _is(place: list[str], x: float, y: float) -> bool:
    return place == [f"{x:g}", f"{y:g}"]


def test_lineage_leads_from_the_data_to_the_version_without_short_cuts(tmp_path: Path) -> None:
    config = Config(steps=STEPS)
    drawing = draw_lineage(make_run(tmp_path, config), config.candidates)
    served = {(start, end) for start, end, strong in lines(drawing) if strong}
    assert served == {
        ("corpus", "tokenizer"),
        ("tokenizer", "tokens"),
        ("tokens", "base"),
        ("base", "student"),
        ("student", "student_int8"),
        ("student_int8", "program:student_int8"),
        ("program:student_int8", "entry"),
        ("entry", "passport"),
        ("passport", "publish"),
    }
    others = {(start, end) for start, end, strong in lines(drawing) if not strong}
    assert others == {
        ("base", "base_int8"),
        *((name, f"program:{name}") for name in ("base", "student", "base_int8")),
        *((f"program:{name}", "gates") for name in config.candidates),
        ("gates", "publish"),
    }
    places = {(node.x, node.y) for node in drawing.nodes}
    assert len(places) == len(drawing.nodes), "no box lies on another"
    assert "version 3" in {node.title for node in drawing.nodes}


def test_a_line_of_descent_follows_the_weights() -> None:
    found = tables.descents(PRUNE_STEPS)
    assert found["healed"] == "base → prune: pruned → distill by base: healed"
    assert tables.descents(STEPS)["student_int8"] == "base → distill: student → quantize: student_int8"


def test_stages_are_timed_in_the_order_of_the_chain(tmp_path: Path) -> None:
    config = Config(steps=STEPS)
    run = make_run(tmp_path, config)
    times = tables.stage_times(run, config.candidates)
    assert len(times) == len(run)
    assert [artifact.stage for artifact, _ in times][:5] == ["corpus", "tokenizer", "tokens", "baselines", "base"]
    assert times[4][1] == 1.0, "the longest fills the bar"
    assert times[0][1] == pytest.approx(3.1 / 88.0)
