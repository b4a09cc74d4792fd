"""Hydra in, one typed Config out: every file of conf/, every kind of mistake, both ways in."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from flows.compose import CONF_DIR, compose_config
from flows.config import Config, ConfigError, from_json, from_plain, to_json, to_plain
from flows.config.optimizer import Optimizer
from flows.config.reference import field_references
from flows.preflight import check

ROOT = CONF_DIR.parent
GROUP_FILES = sorted(
    path for path in CONF_DIR.rglob("*.yaml") if path.parent not in (CONF_DIR, CONF_DIR / "deployment")
)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.train", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: str(path.relative_to(CONF_DIR)))
def test_every_file_composes(path: Path) -> None:
    group = path.parent.relative_to(CONF_DIR)
    prefix = "+" if group.name == "experiment" else ""
    needs = {
        "four_ranks": ["train.global_batch_size=32", "distill.train.global_batch_size=32"],
        "files": ["data.corpus.paths=[x.txt]"],
        "chat": ["data.corpus.paths=[x.jsonl]"],
        "labelled": ["data.corpus.paths=[x.jsonl]", "+experiment=classify", "data.corpus.labels=[]"],
        "huggingface": ["data.corpus.dataset=x"],
        "kubernetes": ["launcher.kubernetes.image=registry.example.com/millrace"],
    }
    needs["prune_heal"] = ["prune=half"]
    needs["compress"] = ["prune.hidden_size=128"] if group.name == "steps" else []
    needs["lora_finetune"] = ["model.initial_weights=x", *needs["files"]]
    needs["encoder_finetune"] = needs["lora_finetune"]
    shared = "2" in path.stem and group.name == "engine" and not path.stem.startswith("zero")
    ranks = [f"launcher.num_ranks={2 if shared else 1}"] if group.name in ("experiment", "engine") else []
    config = compose_config([f"{prefix}{group}={path.stem}", *needs.get(path.stem, []), *ranks])
    assert isinstance(config, Config)


def test_conf_is_not_empty() -> None:
    assert {path.parent.name for path in GROUP_FILES} >= {"data", "model", "train", "engine", "launcher", "experiment"}


def test_json_round_trip() -> None:
    config = compose_config(["+experiment=quickstart", "engine.deepspeed={zero_allow_untested_optimizer: true}"])
    assert from_json(Config, to_json(config)) == config


def test_unknown_fields_of_a_written_section_are_refused_however_deep() -> None:
    plain = to_plain(compose_config(["engine.deepspeed.communication_data_type=fp32"]))
    assert from_json(Config, json.dumps(plain)) == compose_config(["engine.deepspeed.communication_data_type=fp32"])
    plain["distill"]["train"]["optimizer"]["beta3"] = 0.5
    with pytest.raises(ConfigError, match=r"distill.train.optimizer.beta3 is not a field of Config. Remove it"):
        from_json(Config, json.dumps(plain))


def test_the_command_line_and_a_deployment_see_the_same_configuration() -> None:
    overrides = ["+experiment=quickstart", "train.max_steps=7", "seed=3"]
    printed = command(*overrides, "--cfg", "job")
    assert printed.returncode == 0, printed.stderr
    assert from_plain(Config, yaml.safe_load(printed.stdout)) == compose_config(overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_step=3", r"train.max_step is not a setting. Did you mean train.max_steps\?"),
        ("+data.mixture.x.corpus.pahts=[a]", "data.mixture.x.corpus.pahts is not a setting. Leave it"),
        ("+data.mixture.x.wieght=3", "data.mixture.x.wieght is not a setting. Leave it"),
        ("+data.mixture.x.weight=0", "data.mixture.x.weight=0 must be greater than 0. Set whole numbers"),
        ("distil.temperature=3", r"distil is not a setting. Did you mean distill\?"),
        ("max_steps=3", r"max_steps is not a setting. Did you mean train.max_steps"),
        ("train.optimizer.lr=3", "train.optimizer.lr is not a setting. Settings there: .*learning_rate"),
        ("+train.max_step=3", r"train.max_step is not a setting. Did you mean train.max_steps\?"),
        ("+max_steps=3", r"max_steps is not a setting. Did you mean train.max_steps or distill.train.max_steps\?"),
        ("optimizer=adamw", r"optimizer is not a setting. Did you mean train/optimizer=adam\|adamw\|.*\?"),
        ("train.optimizer=adamw", r"train.optimizer is a section of settings, .* train/optimizer=adam\|adamw"),
        ("train.trainable=lm_head", r"train.trainable takes a list. .* brackets, .* 'train.trainable=\[one,two\]'"),
        ("name=Ünï", "name=Ünï cannot be read. .* needs quotes of its own"),
        ("data.corpus.paths=[a", "cannot be read. Close every bracket"),
        ("quickstart", "quickstart is not a setting with a value. Write name=value"),
        ("train.max_steps=many", "train.max_steps: Value 'many' of type 'str' could not be converted to Integer"),
        (
            "train.schedule=step",
            r"train.schedule: Invalid value 'step', expected one of \[cosine, linear, constant, wsd\]",
        ),
        ("train.max_steps=-1", "train.max_steps=-1 must be greater than 0. Set train.max_steps=1 or more."),
        ("train.global_batch_size=9", "train.global_batch_size=9 must be a multiple of .* = 8. Set .*=8"),
        ("model.num_key_value_heads=3", "model.num_key_value_heads=3 must divide model.num_attention_heads=4"),
        ("engine.zero_stage=4", "engine.zero_stage=4 must be 0, 1, 2 or 3"),
        (
            "steps.student_int8.quantize=tutor",
            r"steps.student_int8.quantize=tutor is not made before it; before it are \['base', 'student', 'base_",
        ),
        ("~steps.student", r"quantize=student is not made before it; .*, or leave the step out: ~steps.student_int8"),
        ("+steps.small.quantize=base_int8", "quantize=base_int8 is quantized, .* Set steps.small.quantize=base"),
        ("+steps.small.distil=base", "steps.small.distil is not a setting. Leave it out"),
        ("+steps.small.settings.alpha=1", r"steps.small=\[\] must say one of \['distill', 'prune', 'quantize'\]"),
        ("+steps.student.quantize=base", r"steps.student=\['distill', 'quantize'\] must say one of"),
        ("+steps.Base={distill: base}", "steps=Base must be small letters, digits and '_'"),
        ("+steps.student.settings.alpah=1", "steps.student.settings.alpah is not a setting. Settings there: .*alpha"),
        (
            "+steps.student.settings.alpha=2",
            "^steps.student.settings.alpha=2.0 must lie .* Set steps.student.settings.alp",
        ),
        ("+steps.student.settings.train.max_steps=0", "^steps.student.settings.train.max_steps=0 must be greater"),
        ("+steps.student_int8.settings.scheme=w2", "^steps.student_int8.settings.scheme=w2: Input should be"),
        ("distill.train.max_steps=0", "^distill.train.max_steps=0 .* Set distill.train.max_steps=1 or more"),
        (
            "distill.student.hidden_size=7",
            "^distill.student.hidden_size=7 .* distill.student.num_att.* Set distill.stu",
        ),
        (
            "+data.mixture.x.corpus.source=files",
            "^data.mixture.x.corpus.source=files .* Set data.mixture.x.corpus.paths",
        ),
        ("+data.mixture.x.corpus.test_fraction=0", "^data.mixture.x.corpus.test_fraction=0.0 leaves no text to meas"),
        ("data.corpus.validation_fraction=0", "data.corpus.validation_fraction=0.0 leaves no text to measure on"),
        ("train.optimizer.learning_rate=-1", "learning_rate=-1.0 must be .* Set train.optimizer.learning_rate above 0"),
        ("+steps.student.settings.train.max_steps=x", "max_steps=x: Input should be a valid integer"),
        ("publish.candidate=best", "publish.candidate=best is not a candidate of this run, which makes"),
        ("publish.model_name=a/b", "publish.model_name=a/b must be 1-64 letters"),
        ("verify.lengths=[9999]", r"verify.lengths=\[9999\] must not .* Set verify.lengths=\[1\]"),
        ("data=nope", "data=nope does not exist. Choose one of: chat, files, huggingface, labelled, mixture, stdlib."),
        ("+experiment=nope", "experiment=nope does not exist. Choose one of: .*quickstart"),
        ("data=files", "data.corpus.source=files needs at least one path. Set data.corpus.paths"),
        (
            "launcher.num_nodes=2",
            "launcher.num_nodes=2 cannot be started by launcher.kind=local, .* Set launcher=rendez",
        ),
        ("launcher.submit=false", "launcher.submit=False has nothing to write for launcher.kind=local"),
        ("launcher.kind=hostfile", "launcher.kind=hostfile needs a list of hosts. Set launcher.hostfile"),
        ("launcher.kind=kubernetes", "launcher.kubernetes.image='' must be given"),
        ("launcher.slurm.directives=[gpu]", r"launcher.slurm.directives=\['gpu'\] holds 'gpu', and each one must read"),
        ("monitor.targets=[a/b:1]", r"monitor.targets=a/b:1 must be host:port, .* Set monitor.targets=\["),
        ("launcher={kind: rendezvous, num_nodes: 2}", "rendezvous_endpoint='' must be host:port, where the .*=2 nodes"),
        ("serve.replicas=65", "serve.replicas=65 must lie between 0 and 64. Set serve.replicas=2."),
        ("serve.tls_certificate_path=x.pem", "serve.tls_certificate_path=x.pem needs the proxy, and serve.replicas=0"),
        ("serve.canary.max_latency_ratio=1", "serve.canary.max_latency_ratio=1.0 must be above 1"),
        ("export.pipeline_stages=0", "export.pipeline_stages=0 must be greater than 0"),
        (
            "export.pipeline_stages=5",
            "export.pipeline_stages=5 must not exceed the 4 layers of base, which may be published. Set export.pipel",
        ),
        ("name=../x", "name=../x must be usable as a directory name"),
    ],
)
def test_mistakes_are_answered_with_field_value_rule_and_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config([override])


def test_bf16_without_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine.precision=bf16 cannot be combined with engine.zero_stage=0"):
        compose_config(["engine.zero_stage=0", "engine.precision=bf16"])


NOT_HERE = [
    (["model.initial_weights=no/such", "data.tokenizer.directory=no/such"], "no/such"),
    ([f"artifacts_dir={__file__}/x"], "artifacts_dir=.*x cannot be written to: .*test_compose.py is not a directory"),
    ([f"publish.model_repo={__file__}"], "publish.model_repo=.* is not a directory. Set publish.model_repo to a direc"),
    (["engine.device=cuda"], "engine.device=cuda needs one GPU for each of launcher.num_ranks=1"),
    (["model.kernels=triton"], "model.kernels=triton cannot run here"),
    (["engine.deepspeed={gradient_clipping: 7}"], "engine.deepspeed.gradient_clipping=7 contradicts"),
]


@pytest.mark.parametrize(("words", "message"), NOT_HERE)
def test_what_is_not_here_is_refused_before_any_work(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(compose_config(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.max_step=3"], "error: train.max_step is not a setting"),
        (["seed=1", "--multirun", "train.max_steps=-1,-2"], "error: train.max_steps=-1 must be greater than 0"),
        (["data=files", "data.corpus.paths=[no/such/*.txt]"], r"no/such/\*.txt"),
        *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in NOT_HERE),
    ],
)
def test_the_command_line_says_it_in_one_message_and_writes_nothing(
    words: list[str], message: str, tmp_path: Path
) -> None:
    started = time.monotonic()
    done = command(f"artifacts_dir={tmp_path}/artifacts", f"publish.model_repo={tmp_path}/repo", *words)
    seconds = time.monotonic() - started
    assert done.returncode not in (0, -1)
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "multirun.yaml"]
    print(f"answered in {seconds:.1f} s")


def test_help_is_worth_reading() -> None:
    done = command("--help")
    assert done.returncode == 0
    for expected in ("python -m flows.train +experiment=quickstart", "+experiment", "--multirun", "--cfg job"):
        assert expected in done.stdout
    for reference in field_references():
        assert f"  {reference.name} (" in done.stdout
        assert reference.doc, f"{reference.name} has no meaning"
    assert "mixture (dict[str, MixedCorpus]) = {}" in done.stdout
    assert "`local`: This process, on this machine;" in done.stdout  # a choice's meaning stands beside it in the schema
    assert "distill.train.max_steps (int) = 300  as train.max_steps\n" in done.stdout  # said once


def test_every_setting_is_read_by_something() -> None:
    """No dead keys: each field of the schema is an attribute that some source outside the schema reads."""
    read = set()
    for path in ROOT.glob("flows/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add((path.parent.name == "config", node.attr))
    outside = {name for in_schema, name in read if not in_schema}
    derived = {
        "head_dim": ["hidden_size", "attention_head_dim"],
        "gradient_accumulation_steps": ["global_batch_size"],
        "weights": ["main_weight"],
        "shapes": ["student_every"],
        "sequences": ["teacher_sequences"],
    }
    outside |= {name for source, names in derived.items() if source in outside for name in names}
    dead = [reference.name for reference in field_references() if reference.name.rpartition(".")[2] not in outside]
    assert not dead


@pytest.mark.parametrize("name", [member.value for member in Optimizer])
def test_every_optimizer_has_a_file_of_constants(name: str) -> None:
    config = compose_config([f"train/optimizer={name}", f"train/optimizer@distill.train.optimizer={name}"])
    assert config.train.optimizer.name == name
    assert config.distill.train.optimizer == config.train.optimizer
    wanted = yaml.safe_load((CONF_DIR / "train" / "optimizer" / f"{name}.yaml").read_text())
    assert {key: getattr(config.train.optimizer, key) for key in wanted} == wanted


ENCODER = [
    "model.architecture=transformers",
    "model.family=masked_lm",
    "model.initial_weights=x",
    "data.tokenizer.directory=x",
    "steps=none",
    "publish.candidate=none",
]
CLASSIFIER = ["+experiment=classify"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*CLASSIFIER, "publish.candidate=auto"], "publish.candidate=auto cannot be combined with model.family=seq"),
        ([*CLASSIFIER, "steps=int8"], r"steps=\['base_int8'\] cannot be combined with model.architecture=transformers"),
        ([*CLASSIFIER, "model.family=masked_lm"], "needs a model to start from, and model.initial_weights is null"),
        (
            [*CLASSIFIER, "data.corpus.format=text", "data.corpus.labels=[]"],
            r"data.corpus.format=text cannot be combined with .* Set data.corpus.format=labelled",
        ),
        (["data.corpus.format=labelled"], "data.corpus.format=labelled cannot be combined with model.family=causal_lm"),
        (["data.corpus.labels=[a,b]"], r"data.corpus.labels=\['a', 'b'\] are not read with data.corpus.format=text"),
        ([*CLASSIFIER, "data.corpus.labels=[xml]"], r"data.corpus.labels=\['xml'\] must be two or more"),
        (
            [*CLASSIFIER, "+data.mixture.more={corpus: {source: stdlib}}"],
            "data.corpus.format=labelled cannot be combined with data.mixture",
        ),
        (
            [*CLASSIFIER, "train.lora.rank=4", "model.initial_weights=x", "data.tokenizer.directory=x"],
            "train.lora.rank=4 cannot be combined with model.family=sequence_classification: .* as it was drawn",
        ),
        (
            ["train/optimizer=muon", "engine=zero3"],
            "train.optimizer.name=muon cannot be combined with engine.zero_stage=3",
        ),
        (["train.ema_decay=1"], "train.ema_decay=1.0 must be 0 or more and below 1"),
        (["train.lora.rank=-1"], "train.lora.rank=-1 must not be negative"),
        (["train.lora={rank: 4, targets: []}"], r"train.lora.targets=\[\] names no module for the adapters"),
        (["train.lora.dropout=1"], "train.lora.dropout=1.0 must be 0 or more and below 1"),
        (
            ["model.initial_weights=dir"],
            r"model.initial_weights=dir know the tokens .* Set data.tokenizer.directory=dir",
        ),
        (
            ["model.architecture=transformers", "model.initial_weights=x"],
            r"steps=\['student', .*\] cannot be combined with model.architecture=transformers: .* Set steps=none",
        ),
        (
            ["model.architecture=transformers", "model.initial_weights=x", "steps=none"],
            r"data.document_masks=True cannot be combined with model.architecture=transformers",
        ),
        (
            [
                *("model.architecture=transformers", "model.initial_weights=x", "steps=none"),
                *("data.document_masks=false", "export.pipeline_stages=2"),
            ],
            "export.pipeline_stages=2 cannot be combined with model.architecture=transformers",
        ),
        (["model.architecture=transformers"], "model.architecture=transformers needs a model to start from"),
        (
            [*ENCODER, "publish.candidate=auto"],
            r"publish.candidate=auto cannot .* Set publish.candidate=none: the model",
        ),
        (
            [*ENCODER, "data=chat", "data.corpus.paths=[x]"],
            r"data.corpus.format=messages cannot be combined with model.family=masked_lm",
        ),
        ([*ENCODER, "train.masked_share=1"], r"train.masked_share=1.0 must be above 0 and below 1"),
        (
            ["distill.student={architecture: transformers, family: masked_lm, initial_weights: x}"],
            r"distill.student.family=masked_lm is not what is distilled",
        ),
        (["train.lora.rank=4"], "train.lora.rank=4 needs trained weights to adapt"),
        (["train.lora.rank=4", "train.freeze=[x]"], r"train.freeze=\['x'\] cannot be combined with train.lora.rank=4"),
    ],
)
def test_what_cannot_be_trained_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config(overrides)


def test_an_encoder_is_trained_and_not_published() -> None:
    config = compose_config(ENCODER)
    assert config.training_runs()["base"].document_masks
    assert config.gating().candidate == "none"
