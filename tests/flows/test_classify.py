"""The whole chain on texts with labels, as its user types it: trained, measured and kept, and nothing published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from tests.flows.workplace import Workplace

LABELS = ["question", "answer"]
WORDS = [
    "+experiment=classify",
    "data=labelled",
    f"data.corpus.labels=[{','.join(LABELS)}]",
    "data.tokenizer.vocab_size=300",
    "data.sequence_length=32",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=1",
    "train.max_steps=60",
    "train.warmup_steps=5",
    "train.eval_interval_steps=30",
    "evaluate.latency.tokens=16",
    "evaluate.latency.requests=20",
    "verify.lengths=[1]",
]


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_texts_are_told_apart_measured_and_reported(tmp_path: Path) -> None:
    records = [
        {"text": f"{('why is it', 'it is as')[number % 2]} {number}", "label": LABELS[number % 2]}
        for number in range(400)
    ]
    path = tmp_path / "texts.jsonl"
    stray = [{"text": "what", "label": "neither"}, {"text": "nothing said"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records + stray))
    place = Workplace(tmp_path / "place")
    words = [*WORDS, f"data.corpus.paths=[{path}]"]
    refused = place.run("train", *words, "publish.candidate=auto")
    assert refused.returncode == 2
    assert "Set publish.candidate=none" in refused.stderr
    done = place.run("train", *words)
    assert done.returncode == 0, done.stderr
    assert "Nothing is published, as publish.candidate=none: 1 of 1 candidates passed the gates" in done.stdout
    assert {"base", "base_program", "base_quality", "gates", "report"} <= set(place.ran("classify"))
    store = tmp_path / "place/artifacts/store"
    (trained,), (measured,) = store.glob("base-*"), store.glob("base_quality-*")
    model, report = AutoModelForSequenceClassification.from_pretrained(trained, output_loading_info=True)
    assert not any(report.values())
    assert model.config.id2label == dict(enumerate(LABELS))
    assert json.loads((measured / "quality.json").read_text())["accuracy"] > 0.9, "a word tells them apart"
    page = (tmp_path / "place/artifacts/runs/classify/report.html").read_text()
    for said in ("Macro<br>F1", "unknown label", "missing label", "whoever always says so", "loss, nats per text"):
        assert said in page
    again = place.run("train", *words)
    assert again.returncode == 0, again.stderr
    assert not place.ran("classify")
