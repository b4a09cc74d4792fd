"""A file of prompts through served models: order, errors, interruptions, lost servers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import predict as verb
from flows.artifact import Artifact, digest_file
from flows.config import Config, ConfigError, RunError
from flows.config.predict import PredictConfig
from flows.config.serving import PublishConfig
from flows.serving.client import Client, Transport
from flows.serving.prediction import predict as predict_module
from flows.serving.prediction.predict import parts_directory, predict
from flows.serving.releases import promotion
from flows.serving.releases.state import ReleaseError
from flows.serving.server import InferenceServer
from tests.serving.tiny_chain import NAME, Chain

pytestmark = pytest.mark.server
TEXT = f"{NAME}_text"
PROMPTS = [f"def f{number}(" for number in range(11)]
SHORT: dict[str, Any] = {"max_tokens": 6, "rows_per_part": 4, "requests_per_server": 3}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_keep_their_order_and_get_the_models_text(server: InferenceServer, tmp_path: Path, suffix: str) -> None:
    source = write_rows(tmp_path / f"in{suffix}", [{"id": n, "text": text} for n, text in enumerate(PROMPTS)])
    config = PredictConfig(input=source, output=tmp_path / f"out{suffix}", **SHORT)
    summary = predict(config, TEXT, [server.grpc_address])
    assert (summary.rows, summary.errors) == (len(PROMPTS), 0)
    rows = read_rows(tmp_path / f"out{suffix}")
    with Client(Transport.http, server.http_address) as client:
        for row, prompt in zip(rows, PROMPTS, strict=True):
            one = client.generate(TEXT, prompt, options={"max_tokens": 6})
            expected = {"text": prompt, "completion": one.text, "completion_finish_reason": one.finish_reason}
            assert row.items() >= expected.items()
            assert (row["completion_tokens"], row["completion_error"]) == (one.completion_tokens, None)
    assert [row["id"] for row in rows] == list(range(len(PROMPTS)))
    record = f"out{suffix}.predict.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"in{suffix}", f"out{suffix}", record]
    said = json.loads((tmp_path / record).read_text())
    assert (said["version"], said["rows"], said["errors"], said["passport"]) == (1, len(PROMPTS), 0, None)
    assert said["output_sha256"] == digest_file(tmp_path / f"out{suffix}")


def test_rows_that_cannot_be_answered_keep_their_place_and_say_why(server: InferenceServer, tmp_path: Path) -> None:
    lines = [
        b'{"text": "a"}',
        b"{broken",
        b'{"text": 3}',
        b"",
        b'{"other": 1}',
        b"[1]",
        b'{"text": "\xff"}',
        b'{"text": ""}',
        b'{"text": "\\ud800"}',
        b'{"text": "a", "other": "\\ud800"}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    config = PredictConfig(input=tmp_path / "in.jsonl", output=tmp_path / "out.jsonl", **SHORT)
    assert predict(config, TEXT, [server.grpc_address]).errors == 6
    rows = read_rows(tmp_path / "out.jsonl")
    errors = [row["completion_error"] for row in rows]
    assert errors[0] is errors[6] is errors[8] is None
    assert errors[7] == "text holds half of a character (a lone surrogate)"
    assert rows[8]["other"] == "\ud800"
    reasons = ["line 2 of in.jsonl is not JSON", "text is no text: int", "text is missing", "line 6", "line 7"]
    assert all(found.startswith(reason) for found, reason in zip(errors[1:6], reasons, strict=True))


def test_a_setting_that_the_model_refuses_ends_the_run_before_a_row_is_spent(
    server: InferenceServer, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"text": "a"}])
    config = PredictConfig(input=source, output=tmp_path / "out.jsonl", max_tokens=10_000)
    with pytest.raises(ConfigError, match=r"predict.max_tokens is 10000: it must lie between 0 and 30. Set it so"):
        predict(config, TEXT, [server.grpc_address])
    assert predict(replace(config, max_tokens=2), TEXT, [server.grpc_address]).errors == 0


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("in.jsonl", {"prompt": "a"}, r"predict.field=text is no column of .*\['prompt'\]"),
        ("in.parquet", {"prompt": "a"}, r"predict.field=text is no column of .*\['prompt'\]"),
        ("in.parquet", {"text": 3}, r"predict.field=text of .* holds int64, not texts"),
    ],
)
def test_a_column_without_texts_is_said_before_anything_is_written(
    tmp_path: Path, name: str, row: dict[str, Any], message: str
) -> None:
    source = write_rows(tmp_path / name, [row, row])
    with pytest.raises(ConfigError, match=message):
        predict(PredictConfig(input=source, output=tmp_path / f"out-{name}"), TEXT, [])
    assert [path.name for path in tmp_path.iterdir()] == [name]


class Interrupted(Exception):
    """Stands for whatever ends the process."""


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(
    server: InferenceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in PROMPTS])
    settings: dict[str, Any] = {"input": source, "temperature": 0.8, "top_p": 0.9, "seed": 5, **SHORT}
    whole = PredictConfig(output=tmp_path / "whole.jsonl", **settings)
    predict(whole, TEXT, [server.grpc_address])

    def interrupt(*_: object) -> None:
        raise Interrupted

    config = PredictConfig(output=tmp_path / "out.jsonl", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(predict_module, "join_parts", interrupt)
        with pytest.raises(Interrupted):
            predict(config, TEXT, [server.grpc_address])
    (tmp_path / "out.jsonl.parts" / "part-000001.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"predict.temperature=0.5 was 0.8 when .* was begun. Set it back"):
        predict(PredictConfig(output=config.output, **{**settings, "temperature": 0.5}), TEXT, [server.grpc_address])
    state_path = parts_directory(tmp_path / "out.jsonl") / predict_module.STATE
    state = json.loads(state_path.read_text())
    state_path.write_text(json.dumps(state | {"passport": "one"}))
    with pytest.raises(ConfigError, match="left from a run with another passport"):
        predict(config, TEXT, [server.grpc_address], "another")
    state_path.write_text(json.dumps(state))
    write_rows(tmp_path / "other.jsonl", [{"text": "b"}])
    with pytest.raises(ConfigError, match="left from a run with another input"):
        predict(
            PredictConfig(output=config.output, **{**settings, "input": tmp_path / "other.jsonl"}),
            TEXT,
            [server.grpc_address],
        )
    summary = predict(
        PredictConfig(**{**settings, "output": config.output, "requests_per_server": 1}), TEXT, [server.grpc_address]
    )
    assert summary.repeated_parts == 2
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.fixture
def second_server(chain: Chain, tmp_path: Path) -> Iterator[InferenceServer]:
    shutil.copytree(chain.entry.path / "repo", tmp_path / "second")
    with InferenceServer(tmp_path / "second", [NAME, TEXT], tmp_path / "second.log") as running:
        yield running


def test_a_server_that_is_killed_loses_no_row(
    server: InferenceServer, second_server: InferenceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"class C{number}:" for number in range(60)]
    source = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in prompts])
    first_part = iter([lambda: os.killpg(second_server._process.pid, signal.SIGKILL)])  # type: ignore[union-attr]
    columns = predict_module._columns

    def kill_after_the_first_answer(answer: Any) -> Any:
        next(first_part, lambda: None)()
        return columns(answer)

    monkeypatch.setattr(predict_module, "_columns", kill_after_the_first_answer)
    config = PredictConfig(input=source, output=tmp_path / "out.jsonl", patience_s=1, **SHORT)
    summary = predict(config, TEXT, [second_server.grpc_address, server.grpc_address])
    assert (summary.rows, summary.errors) == (60, 0)
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["text"] for row in rows] == prompts
    other = PredictConfig(input=source, output=tmp_path / "again.jsonl", patience_s=1, **SHORT)
    with pytest.raises(RunError, match=r"has not answered for predict.patience_s=1\. Start it"):
        predict(other, TEXT, [second_server.grpc_address])


def test_the_live_version_answers_whatever_was_published_after_it(
    publish_to: Callable[[Path, Chain, Artifact], Artifact],
    chain: Chain,
    passport: Artifact,
    other_chain: Chain,
    other_passport: Artifact,
    tmp_path: Path,
) -> None:
    repository = tmp_path / "repo"
    publish_to(repository, chain, passport)
    publish_to(repository, other_chain, other_passport)
    promotion.rollback(repository, NAME)
    source = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in PROMPTS[:2]])

    def answering(output: str, **settings: Any) -> tuple[int, str]:
        asked = PredictConfig(input=source, output=tmp_path / output, **{**SHORT, **settings})
        published = PublishConfig(model_name=NAME, model_repo=repository)
        verb.predict(Config(artifacts_dir=tmp_path / "artifacts", publish=published, predict=asked))
        said = json.loads((tmp_path / f"{output}.predict.json").read_text())
        assert said["errors"] == 0
        return said["version"], said["passport"]

    passports = {number: digest_file(repository / NAME / str(number) / "passport.json") for number in (1, 2)}
    assert answering("live.jsonl") == (1, passports[1])
    parts = parts_directory(tmp_path / "begun.jsonl")
    parts.mkdir()
    began = json.loads((tmp_path / "live.jsonl.predict.json").read_text()) | {"version": 2, "passport": passports[2]}
    (parts / predict_module.STATE).write_text(json.dumps(began))
    assert answering("begun.jsonl") == (2, passports[2])
    with pytest.raises(ReleaseError, match=r"tiny has no version 7 in .*; there are \[1, 2\]"):
        answering("none.jsonl", version=7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "predict.input and predict.output must both be set"),
        (["predict.input=none.jsonl", "predict.output=o.jsonl"], "predict.input=none.jsonl does not exist"),
        (["predict.input=README.md"], "must end in one of .jsonl, .parquet"),
        (["predict.input=a.jsonl", "predict.output=a.parquet"], "must have the format of predict.input=a.jsonl"),
        (["predict.top_p=0"], "predict.top_p=0.0 must be above 0 and at most 1"),
        (["predict.servers=[nowhere]"], "predict.servers=nowhere must be host:port"),
    ],
)
def test_mistakes_are_said_before_anything_starts(words: list[str], message: str) -> None:
    command = [sys.executable, "-m", "flows.predict", *words]
    if not any("servers" in word for word in words):
        command.append("predict.servers=[127.0.0.1:1]")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr


def test_columns_that_are_taken_or_missing_are_said(server: InferenceServer, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.parquet", [{"prompt": "a", "completion": "b"}])
    config = {"input": source, "output": tmp_path / "out.parquet"}
    with pytest.raises(ConfigError, match=r"predict.field=text is no column of .*\['prompt', 'completion'\]"):
        predict(PredictConfig(**config), TEXT, [server.grpc_address])
    with pytest.raises(ConfigError, match=r"predict.output_field=completion gives columns that .* has already"):
        predict(PredictConfig(**config, field="prompt"), TEXT, [server.grpc_address])
