from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from flows.artifact import PROJECT_ROOT, Artifact
from flows.compression import quantize
from flows.compression.candidate import load_candidate
from flows.config.model import ModelConfig
from flows.config.quantize import QuantizeConfig, QuantizingConfig
from flows.export import program as program_stage
from flows.export.parity import compare
from flows.export.program import NextTokenScores
from flows.export.runtime import Program, ProgramError
from flows.model.checkpoint import save_decoder
from flows.model.decoder import Decoder, initialize

VOCAB = 300
CONFIG = ModelConfig(
    hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
LINEARS = 2 * 7 + 1
RESOLUTION = {"float": 1e4, "int8": 20}
"""Scores over tolerance: float32 has 24 bits; in INT8 one of 127 steps may be off by one."""
KINDS = tuple(RESOLUTION)


@pytest.fixture(scope="module")
def candidates(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("candidates")
    model = Decoder(CONFIG, VOCAB)
    initialize(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # sharper attention than at the start of training, norms that differ
        parameter.data.mul_(2.0 if parameter.dim() == 2 else 0.5 + torch.rand(64, generator=generator))
    save_decoder(root / "float", model.state_dict(), CONFIG, VOCAB, 128, 0)
    (root / "float" / "tokenizer.json").write_text('{"any": "tokenizer"}')
    (root / "int8").mkdir()
    config = QuantizingConfig(quantize=QuantizeConfig(), sequence_length=32)
    quantize.build(root / "int8", config, {"model": artifact(root / "float")})
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def other_process(tmp_path_factory, candidates):
    """Exports the INT8 candidate once more while the tests run."""
    script = (
        "import sys; from pathlib import Path; from flows.compression.candidate import load_candidate\n"
        "from flows.export.program import NextTokenScores, export_program\n"
        "export_program(NextTokenScores(load_candidate(Path(sys.argv[1]))).eval(), Path(sys.argv[2]))"
    )
    path = tmp_path_factory.mktemp("other") / "model.onnx"
    with subprocess.Popen([sys.executable, "-c", script, candidates["int8"], path], cwd=PROJECT_ROOT) as process:
        yield process, path
        process.kill()


@pytest.fixture(scope="module")
def built(tmp_path_factory, candidates, other_process) -> dict[str, tuple[Path, dict]]:
    root = tmp_path_factory.mktemp("programs")
    found = {}
    for kind, path in candidates.items():
        (root / kind).mkdir()
        found[kind] = (root / kind, program_stage.build(root / kind, None, {"model": artifact(path)}))
    return found


def artifact(path: Path) -> Artifact:
    return Artifact(path.name, f"{path.name}-key", "digest", path)


def padded(rows: list[list[int]], left: bool) -> tuple[np.ndarray, np.ndarray]:
    length = max(map(len, rows))
    ids, mask = np.full((len(rows), length), 7, np.int64), np.zeros((len(rows), length), np.int64)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def random_rows(batch: int, length: int, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, max(1, length - 3 * row)).tolist() for row in range(batch)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", range(1, 9))
def test_scores_are_the_candidates(candidates, built, kind, batch):
    """The last real position's scores, computed row by row with no padding, against the padded batch."""
    path, metrics = built[kind]
    program, model = Program(path), load_candidate(candidates[kind])
    for length in (1, 2, 17, 90):
        rows = random_rows(batch, length, seed=batch)
        with torch.no_grad():
            expected = torch.stack([model(torch.tensor([row]))[0, -1] for row in rows]).numpy()
        for left in (True, False):
            found = program.next_token_scores(*padded(rows, left))
            assert found.shape == (batch, VOCAB)
            assert found.dtype == np.float32
            # the tolerance that the stage derived from the candidate's float noise; twice, as here batch and padding
            # change the order of the candidate's own sums, too
            assert np.abs(found - expected).max() <= 2 * metrics["tolerance"]
            assert np.abs(expected).max() > RESOLUTION[kind] * metrics["tolerance"]  # or it would prove nothing


@pytest.mark.parametrize("kind", KINDS)
def test_metrics(built, kind):
    path, metrics = built[kind]
    assert metrics["program_bytes"] == (path / "model.onnx").stat().st_size
    assert metrics["parameters"] == 300 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176) + 5 * 64
    assert 0 <= metrics["largest_difference"] <= metrics["tolerance"]
    assert (path / "tokenizer.json").read_text() == '{"any": "tokenizer"}'


def graph_of(path: Path) -> onnx.GraphProto:
    return onnx.load(path / "model.onnx").graph


@pytest.mark.parametrize("kind", KINDS)
def test_interface_and_operations_are_standard(built, kind):
    model = onnx.load(built[kind][0] / "model.onnx")
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert not model.functions
    described = {
        value.name: (
            value.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in (*model.graph.input, *model.graph.output)
    }
    assert described == {
        "input_ids": (TensorProto.INT64, ["batch", "length"]),
        "attention_mask": (TensorProto.INT64, ["batch", "length"]),
        "logits": (TensorProto.FLOAT, ["batch", VOCAB]),
    }


def test_int8_multiplies_integers_and_keeps_no_float_copy(built):
    graph = graph_of(built["int8"][0])
    operations = [node.op_type for node in graph.node]
    assert operations.count("MatMulInteger") == LINEARS
    assert "Gemm" not in operations
    assert operations.count("MatMul") == 2 * 2  # attention: scores and values of each layer
    largest_float = max(
        numpy_helper.to_array(tensor).size for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT
    )
    assert largest_float == VOCAB  # the steps of the embedding's rows
    codes = sum(
        numpy_helper.to_array(tensor).size for tensor in graph.initializer if tensor.data_type == TensorProto.INT8
    )
    assert codes == built["int8"][1]["parameters"] - 5 * 64  # every matrix once, norms left out


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_one_pass_and_attention_repeats_and_mends_nothing(tmp_path, built, kind):
    """As onnxruntime runs the program."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "model.onnx"), 3
    onnxruntime.InferenceSession(str(built[kind][0] / "model.onnx"), options, providers=["CPUExecutionProvider"])
    operations = [node.op_type for node in graph_of(tmp_path).node]
    assert operations.count("SimplifiedLayerNormalization") == 5
    assert not {"Pow", "Expand", "IsNaN"} & set(operations)
    assert operations.count("Where") == 1  # the mask, made once for all layers


def test_shared_matrix_is_stored_once(built):
    graph = graph_of(built["float"][0])
    stored = sum(
        numpy_helper.to_array(tensor).size for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT
    )
    parameters = built["float"][1]["parameters"]
    assert parameters <= stored <= parameters + 100  # and a few constants


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_this_machine_is_inside(built, kind):
    content = (built[kind][0] / "model.onnx").read_bytes()
    for trace in (str(PROJECT_ROOT), sys.prefix, "site-packages", "flows", "decoder.py"):
        assert trace.encode() not in content


def test_another_process_writes_the_same_bytes(built, other_process):
    process, path = other_process
    assert process.wait(timeout=120) == 0
    assert path.read_bytes() == (built["int8"][0] / "model.onnx").read_bytes()


def test_a_row_does_not_depend_on_its_batch_mates(built):
    path, metrics = built["int8"]
    program = Program(path)
    row = random_rows(1, 20, seed=1)[0]
    alone = program.next_token_scores(*padded([row], left=True))
    for seed in range(3):
        mates = [row, *random_rows(3, 20, seed)]
        together = program.next_token_scores(*padded(mates, left=True))[:1]
        assert np.abs(together - alone).max() <= metrics["tolerance"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_of_other_weights_is_refused(tmp_path, candidates, built, kind):
    """One row of one matrix is zero."""
    model = load_candidate(candidates[kind])
    weight = model.model.layers[0].mlp.down_proj.weight
    weight[0, :] = 0
    expected = r"differs from the model by \d.*is allowed.*float32 noise.*VNNI.*leave out the quantize steps"
    with pytest.raises(ProgramError, match=expected):
        compare(NextTokenScores(model).eval(), Program(built[kind][0]), VOCAB)


def test_scores_that_are_no_numbers_are_refused(candidates, built):
    model = load_candidate(candidates["float"])
    model.model.norm.weight[0] = float("nan")
    with pytest.raises(ProgramError, match="differs from the model by nan"):
        compare(NextTokenScores(model).eval(), Program(built["float"][0]), VOCAB)


def test_a_program_that_cannot_be_loaded_is_named(tmp_path, built):
    with pytest.raises(ProgramError, match=re.escape(str(tmp_path / "model.onnx"))):
        Program(tmp_path)
    shutil.copy(built["float"][0] / "model.onnx", tmp_path)
    with (tmp_path / "model.onnx").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ProgramError, match="cannot be loaded"):
        Program(tmp_path)
