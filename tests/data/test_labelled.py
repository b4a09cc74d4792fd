"""Texts with labels: read from records and folders, counted, cut, and one target for each text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors

from flows.artifact import Artifact, ArtifactStore, Stage
from flows.config import ConfigError
from flows.config.data import CorpusConfig, DataConfig, Format, Source, TokenizerConfig
from flows.data.labelled import encode_to_classify, label_of, text_of
from flows.data.labelled_documents import LabelledDocuments
from flows.data.macro_f1 import by_label, macro_f1
from flows.data.mixture import open_split
from flows.data.splits import read_documents_of, read_stored
from flows.data.tokenizer import load_tokenizer

Chain = Callable[..., dict[str, Artifact]]
Write = Callable[..., Path]
SMALL = TokenizerConfig(vocab_size=300)
LENGTH = 16


def config(path: Path, **settings: Any) -> CorpusConfig:
    settings = {"validation_fraction": 0.2, "test_fraction": 0.2, **settings}
    return CorpusConfig(source=Source.files, paths=(str(path),), format=Format.labelled, **settings)


def data_of(corpus: CorpusConfig) -> DataConfig:
    return DataConfig(corpus=corpus, sequence_length=LENGTH)


def reviews(count: int = 60) -> list[dict[str, Any]]:
    return [{"text": f"it is number {n}", "label": ("bad", "good", "so so")[n % 3]} for n in range(count)]


def test_every_text_is_one_row_with_its_label_as_target(chain: Chain, write_json_lines: Write) -> None:
    corpus = config(write_json_lines([*reviews(), {"text": "word " * 40, "label": "good"}]))
    made = chain(corpus, SMALL, data_of(corpus).encoding())
    names = made["corpus"].metrics["labels"]["names"]
    assert names == ["bad", "good", "so so"]
    tokenizer = load_tokenizer(made["tokenizer"].path)
    for split in ("train", "validation", "test"):
        stored = [content for _, content in read_stored(made["corpus"].path, split)]
        dataset = open_split(made["tokens"].path, split, LENGTH)
        assert isinstance(dataset, LabelledDocuments)
        assert len(dataset) == len(stored) > 0
        for number, content in enumerate(stored):
            ids = [0, *tokenizer.encode(text_of(content)).ids[: LENGTH - 2], 0]
            row = dataset.row(number)
            assert row.input_ids_L.tolist() == ids + [0] * (LENGTH - len(ids))
            assert row.document_ids_L.tolist() == [0] * len(ids) + [1] * (LENGTH - len(ids))
            assert names[row.targets_L.item()] == label_of(content)
        counted = made["corpus"].metrics["labels"]["texts"][split]
        assert counted == {name: sum(label_of(one) == name for one in stored) for name in counted}
        assert [text for _, text in read_documents_of(made["corpus"].path, split)] == [text_of(one) for one in stored]
    assert sum(made["tokens"].metrics["splits"][split]["cut"] for split in ("train", "validation", "test")) == 1


def test_evaluations_see_the_whole_split_whatever_its_order(chain: Chain, write_json_lines: Write) -> None:
    corpus = config(write_json_lines(sorted(reviews(200), key=lambda one: one["label"])))
    made = chain(corpus, SMALL, data_of(corpus).encoding())
    dataset = open_split(made["tokens"].path, "test", LENGTH)
    chosen = dataset.first(9)
    assert len({*chosen.tolist()}) == 9
    assert {int(dataset.row(int(index)).targets_L[0]) for index in chosen} == {0, 1, 2}
    assert dataset.first(10**6).tolist() == [*range(len(dataset))]


def test_missing_and_unknown_labels_are_counted_and_named(chain: Chain, write_json_lines: Write) -> None:
    wrong = [{"text": "none"}, {"text": "null", "label": None}, {"text": "a list", "label": ["good"]}]
    others = [{"text": "another", "label": "odd"}, {"text": "empty", "label": ""}, {"label": "good"}, {"text": 3}]
    corpus = config(write_json_lines([*reviews(), *wrong, *others]), labels=("good", "bad"))
    made = chain(corpus, SMALL, data_of(corpus).encoding())
    metrics = made["corpus"].metrics
    assert metrics["labels"]["names"] == ["good", "bad"], "in the order that was asked for"
    assert metrics["dropped"]["missing label"]["documents"] == 4
    assert metrics["dropped"]["unknown label"]["documents"] == 1 + 20
    assert metrics["dropped"]["missing field"]["documents"] == 2


def test_a_label_that_training_lacks_is_left_out_and_counted(tmp_path: Path, write_json_lines: Write) -> None:
    records = [{**one, "text": one["text"] * 2} for one in reviews(90)] + reviews(90)
    corpus = config(write_json_lines(records))
    store = ArtifactStore(tmp_path / "store")
    made = {"corpus": store.make(Stage("corpus", "flows.data.corpus", corpus))}
    made["tokenizer"] = store.make(Stage("tokenizer", "flows.data.tokenizer", SMALL, dict(made)))
    names = made["corpus"].metrics["labels"]
    made["corpus"].metrics["labels"] = {**names, "names": ["bad", "so so"]}
    tokens = store.make(Stage("tokens", "flows.data.encode", data_of(corpus).encoding(), dict(made)))
    for split, texts in names["texts"].items():
        assert tokens.metrics["splits"][split]["unknown"] == texts["good"] > 0
        assert tokens.metrics["splits"][split]["documents"] == texts["bad"] + texts["so so"]


def test_folders_are_labels_and_pieces_of_a_file_stay_together(chain: Chain, write_files: Write) -> None:
    files: Mapping[str, str] = {
        f"{label}/{number}.txt": "".join(f"{label} {number} {line}\n" for line in range(40))
        for label in ("prose", "verse")
        for number in range(12)
    }
    corpus = config(write_files({**files, "stray.txt": "no folder"}), max_document_bytes=100)
    made = chain(corpus, SMALL, data_of(corpus).encoding())
    places: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        for name, content in read_stored(made["corpus"].path, split):
            assert label_of(content) == name.partition("/")[0]
            places.setdefault(name.partition("#")[0], set()).add(split)
    assert len(places) == len(files)
    # three documents are held back to fill splits that would be empty; none is here
    assert all(len(splits) == 1 for splits in places.values())
    assert made["corpus"].metrics["dropped"]["missing label"] == {"documents": 1, "first": ["stray.txt"]}


def test_parquet_columns_are_read_and_their_names_checked(chain: Chain, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [(f"line {n}", bool(n % 2)) for n in range(40)]
    pq.write_table(pa.table({"line": [row[0] for row in rows], "is_odd": [row[1] for row in rows]}), path)
    corpus = config(path, text_field="line", label_field="is_odd")
    assert chain(corpus, SMALL, data_of(corpus).encoding())["corpus"].metrics["labels"]["names"] == ["False", "True"]
    with pytest.raises(ConfigError, match=r"data.corpus.label_field=kind is not a column of .*is_odd"):
        chain(config(path, text_field="line", label_field="kind"), SMALL)


def test_labels_that_cannot_be_learnt_are_refused(chain: Chain, write_json_lines: Write) -> None:
    path = write_json_lines([one for one in reviews() if one["label"] == "good"])
    with pytest.raises(ConfigError, match=r"data.corpus.labels=\['good'\] cannot be learnt .* two or more"):
        chain(config(path), SMALL)
    with pytest.raises(ConfigError, match=r"data.corpus.labels=\['good', 'odd'\] cannot be learnt"):
        chain(config(path, labels=("good", "odd")), SMALL)


def test_a_tokenizers_own_special_tokens_stand_around_a_text(chain: Chain, write_json_lines: Write) -> None:
    corpus = config(write_json_lines(reviews()))
    tokenizer = load_tokenizer(chain(corpus, SMALL, data_of(corpus).encoding())["tokenizer"].path)
    text = "it is number 7"
    ids = tokenizer.encode(text).ids
    assert encode_to_classify(tokenizer, [text], 0, 64) == [([0, *ids, 0], False)]
    special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=special
    )
    assert encode_to_classify(tokenizer, [text], 0, 64) == [([1, *ids, 2], False)]
    assert encode_to_classify(tokenizer, [text], 0, 5) == [([1, *ids[:3], 2], True)]


def test_constant_answers_are_the_baseline(chain: Chain, write_json_lines: Write, tmp_path: Path) -> None:
    records = reviews(60) + [{"text": f"more {n}", "label": "bad"} for n in range(90)]
    corpus = config(write_json_lines(records))
    made = chain(corpus, SMALL, data_of(corpus).encoding())
    metrics = ArtifactStore(tmp_path / "artifacts").make(Stage("baselines", "flows.data.baselines", None, made)).metrics
    texts = made["corpus"].metrics["labels"]["texts"]
    test, train = texts["test"], texts["train"]
    share = test["bad"] / sum(test.values())
    assert metrics["majority"] == "bad"
    assert metrics["majority_accuracy"] == pytest.approx(share)
    assert metrics["majority_macro_f1"] == pytest.approx(2 * share / (1 + share) / len(test))
    nats = -sum(count * np.log(train[name] / sum(train.values())) for name, count in test.items())
    assert metrics["frequencies_loss"] == pytest.approx(nats / sum(test.values()))
    assert json.loads(json.dumps(metrics)) == metrics


def test_macro_f1_weighs_rare_labels_like_frequent_ones() -> None:
    confusion = np.array([[90, 10, 0], [5, 5, 0], [0, 0, 0]])
    expected = (2 * 90 / (100 + 95) + 2 * 5 / (10 + 15)) / 2  # a label that does not occur is left out
    assert macro_f1(confusion) == pytest.approx(expected)
    found = by_label(confusion, ["often", "rare", "never"])
    assert found["rare"] == {"texts": 10, "recall": 0.5, "precision": pytest.approx(1 / 3)}
    assert found["never"] == {"texts": 0, "recall": None, "precision": None}
