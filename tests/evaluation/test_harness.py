"""The evaluation harness on a tiny model and a tiny task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from flows.config import ConfigError
from flows.data.tokenizer import END_OF_TEXT
from flows.evaluation.task_files import check_tasks, fingerprint_tasks, read_tasks

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: letters.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
LETTERS = "abcdefgh"
QUESTIONS = [("abc", ["d", "a"], 0), ("cd", ["b", "e"], 1), ("efg", ["ha", "hg"], 0), ("fg", ["h", "a"], 1)]
"""The last one's answer is the wrong one."""


class Alphabet(nn.Module):
    """Expects the next letter, and `a` after the last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(8.0 * torch.eye(size).roll(1, 1), requires_grad=False)
        self.scores[size - 1].copy_(8.0 * torch.eye(size)[1])

    def forward(self, ids_BL: Tensor) -> Tensor:
        return self.scores[ids_BL]


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """Token 0 ends a document, 1 to 8 are the letters."""
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate([END_OF_TEXT, *LETTERS])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def tasks_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "tasks"
    directory.mkdir()
    (directory / "letters.yaml").write_text(TASK)
    lines = [json.dumps(dict(zip(("question", "choices", "answer"), one, strict=True))) for one in QUESTIONS]
    (directory / "letters.jsonl").write_text("\n".join(lines))
    return directory


@pytest.mark.exhaustive
def test_a_multiple_choice_task_is_answered(
    tokenizer_dir: Path, tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from flows.evaluation.harness import run_tasks

    assert run_tasks(Alphabet(9), tokenizer_dir, tasks_dir, None, 16) == {"letters acc": 0.75}
    assert run_tasks(Alphabet(9), tokenizer_dir, tasks_dir, 3, 16) == {"letters acc": 1.0}


@pytest.mark.exhaustive
def test_likelihoods_and_greedy_text_are_those_of_the_model(tokenizer_dir: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from flows.evaluation.harness import CandidateLM

    model = Alphabet(9)
    log_p = model.scores.log_softmax(-1)

    def asked(kind: str, *args: object) -> list[Instance]:
        return [Instance(request_type=kind, doc={}, arguments=args, idx=0)]

    for max_length in (16, 3):  # the context is longer than what is read of it
        adapter = CandidateLM(model, tokenizer_dir, max_length)
        ((likelihood, greedy),) = adapter.loglikelihood(asked("loglikelihood", "abcd", "eg"), disable_tqdm=True)
        assert likelihood == pytest.approx(float(log_p[4, 5] + log_p[5, 7]), rel=1e-6)
        assert not greedy
        ((_, greedy),) = adapter.loglikelihood(asked("loglikelihood", "abcd", "ef"), disable_tqdm=True)
        assert greedy
        (rolled,) = adapter.loglikelihood_rolling(asked("loglikelihood_rolling", "abcdb"))
        steps = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 2)]
        assert rolled == pytest.approx(sum(float(log_p[step]) for step in steps), rel=1e-6)
        options = {"until": ["a"], "max_gen_toks": 6}
        assert adapter.generate_until(asked("generate_until", "ef", options)) == ["gh"]


def test_what_would_need_the_network_or_run_code_is_refused(tasks_dir: Path) -> None:
    assert [task["task"] for task in read_tasks(tasks_dir)] == ["letters"]
    before = fingerprint_tasks(tasks_dir)
    (tasks_dir / "letters.jsonl").write_text("")
    assert fingerprint_tasks(tasks_dir) != before
    for wrong, message in {
        TASK.replace("json\n", "hellaswag\n"): r"letters.yaml must name its task and files on this machine",
        TASK.replace("letters.jsonl", "gone.jsonl"): r"gone.jsonl, which does not exist",
        TASK + "process_docs: !function code.run\n": r"letters.yaml is not plain YAML: could not determine a constr",
    }.items():
        (tasks_dir / "letters.yaml").write_text(wrong)
        with pytest.raises(ConfigError, match=message):
            check_tasks(tasks_dir)
    (tasks_dir / "letters.yaml").unlink()
    with pytest.raises(ConfigError, match=r"evaluate.tasks.directory=.* has no task: no file in it ends with .yaml"):
        check_tasks(tasks_dir)
