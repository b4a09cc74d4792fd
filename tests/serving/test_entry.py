from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from flows.artifact import digest_file
from flows.export.runtime import ProgramError
from flows.export.shipped import encryption
from flows.serving import config_pbtxt
from tests.serving import tiny_model
from tests.serving.tiny_chain import ENTRY, EXPORT, NAME, Chain, build_entry


def read(path: Path) -> config_pbtxt.ModelConfig:
    return config_pbtxt.parse(path.read_text())


def test_config_says_what_the_graph_says(chain: Chain) -> None:
    model = chain.entry.path / "repo" / NAME
    production, embedded = read(model / "config.pbtxt"), read(model / "configs" / "embedded.pbtxt")
    assert config_pbtxt.signature(production) == config_pbtxt.signature(embedded)
    assert config_pbtxt.signature(production) == {
        "input input_ids": (config_pbtxt.ModelConfig().input.add(data_type="TYPE_INT64").data_type, (-1,), False),
        "input attention_mask": (config_pbtxt.ModelConfig().input.add(data_type="TYPE_INT64").data_type, (-1,), False),
        "output logits": (
            config_pbtxt.ModelConfig().output.add(data_type="TYPE_FP32").data_type,
            (tiny_model.VOCAB_SIZE,),
            False,
        ),
    }
    assert (production.backend, production.default_model_filename) == ("onnxruntime", "model.onnx")
    assert (embedded.backend, embedded.default_model_filename) == ("python", "")
    text = read(chain.entry.path / "repo" / f"{NAME}_text" / "config.pbtxt")
    assert text.model_transaction_policy.decoupled
    for config in (production, embedded, text):
        assert config.version_policy.latest.num_versions == ENTRY.keep_versions
    for config in (production, embedded):
        assert config.max_batch_size == EXPORT.max_batch_size
        assert config.dynamic_batching.max_queue_delay_microseconds == EXPORT.max_queue_delay_us
        assert config.model_warmup
    assert production.parameters["intra_op_thread_count"].string_value == "1"


def test_same_program_gives_same_bytes(chain: Chain, tmp_path: Path) -> None:
    assert build_entry(tmp_path / "again", chain.made_from).digest == chain.entry.digest


def test_versions_list_every_file_with_its_digest(chain: Chain) -> None:
    for name in (NAME, f"{NAME}_text"):
        version = chain.entry.path / "repo" / name / "1"
        listed = json.loads((version / "files.json").read_text())
        assert listed == {path.name: digest_file(path) for path in version.iterdir() if path.name != "files.json"}


def test_version_imports_nothing_of_ours(chain: Chain) -> None:
    for path in chain.entry.path.rglob("*.py"):
        assert not any(name in path.read_text() for name in ("from flows", "import flows", "from kernels"))


def test_carried_tokenizer_library_equals_the_installed_one(chain: Chain) -> None:
    version = chain.entry.path / "repo" / f"{NAME}_text" / "1"
    script = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("tokenizers", sys.argv[1] + "/tokenizers.abi3.so")
library = importlib.util.module_from_spec(importlib.util.spec_from_loader("tokenizers", loader))
loader.exec_module(library)
print(library.Tokenizer.from_file(sys.argv[1] + "/tokenizer.json").encode("def äß self").ids)
"""
    # -I -S: no site-packages, as in the official image
    bare = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, version], capture_output=True, text=True, check=True
    )
    from tokenizers import Tokenizer

    expected = Tokenizer.from_file(str(chain.tokenizer.path / "tokenizer.json")).encode("def äß self").ids
    assert json.loads(bare.stdout) == expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"output": "scores"}, "scores"),
        ({"dtype": onnx.TensorProto.INT32}, "INT32"),
        ({"input": "tokens"}, "tokens"),
    ],
)
def test_other_graphs_are_refused(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    make = onnx.helper.make_tensor_value_info
    kind = changes.get("dtype", onnx.TensorProto.INT64)
    inputs = [make(str(changes.get("input", "input_ids")), kind, ["b", "l"]), make("attention_mask", kind, ["b", "l"])]
    output = make(str(changes.get("output", "logits")), onnx.TensorProto.FLOAT, ["b", 5])
    value = onnx.numpy_helper.from_array(np.zeros((1, 5), np.float32), "zeros")
    node = onnx.helper.make_node("Identity", ["zeros"], [output.name])
    program = tmp_path / "program"
    program.mkdir()
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", inputs, [output], [value])), program / "model.onnx"
    )
    with pytest.raises(ProgramError, match=named):
        build_entry(tmp_path / "entry", {"program": tiny_model.artifact("program", program)})


def test_the_served_text_ends_with_the_token_that_the_models_tokenizer_names(chain: Chain, tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copytree(chain.program.path, program)
    (program / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    other = build_entry(tmp_path / "entry", {**chain.made_from, "program": replace(chain.program, path=program)})
    found = [
        json.loads(path.read_text())["end_of_text"]
        for entry in (chain.entry, other)
        for path in entry.path.glob("**/*_text/*/settings.json")
    ]
    assert found == ["<|endoftext|>", "<|im_end|>"]


OF_PROGRAMS = ("cache_dtype", "pipeline_stages")
"""Settings that the entry finds in the programs that it is made of."""


def test_every_setting_reaches_the_entry(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(encryption.KEY, "0f" * 32)
    digests = {chain.entry.digest}
    changed = [
        replace(ENTRY, sequence_length=16),
        replace(ENTRY, keep_versions=3),
        *(replace(ENTRY, export=replace(EXPORT, **{name: 7})) for name in vars(EXPORT) if name not in OF_PROGRAMS),
    ]
    for number, config in enumerate(changed):
        digests.add(build_entry(tmp_path / str(number), chain.made_from, config).digest)
    assert len(digests) == 1 + len(changed)
