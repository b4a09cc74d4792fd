"""Layers of few bits compute in ONNX what they compute in torch, and their weights stay small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from flows.config.serving import CacheDtype
from flows.export.coded_cache import keep_cache_in
from flows.export.generation import CHECKED_BYTES, GENERATION, _TokenByToken, export_generation
from flows.export.graph import export_graph
from flows.export.parity import compare
from flows.export.program import NextTokenScores, export_program
from flows.export.runtime import PROGRAM, Program, ProgramError
from flows.export.shipped.layers import Layers
from flows.export.shipped.onnx_session import open_session
from tests.export.low_bit_models import FORMS, VOCAB, embedding, linear, low_bit_decoder

ROWS, COLUMNS, CHANNELS = 40, 96, 24
"""Three groups of 32 columns: an odd number of zero points, and a block of words that is cut short."""
IDS = torch.arange(ROWS).view(2, -1)
INT4, INT8 = "w4a16_asymmetric", "w8a16"


class EveryForm(nn.Module):
    """Rows of two embeddings, and what a layer of each form makes of one's."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(ROWS, COLUMNS, generator=generator)
        weight, bias = torch.randn(CHANNELS, COLUMNS, generator=generator), torch.randn(CHANNELS, generator=generator)
        self.embeddings = nn.ModuleList([embedding(INT4, rows), embedding(INT8, rows)])
        self.layers = nn.ModuleList([linear(form, weight, bias) for form in FORMS])
        self.shares = linear(INT4, rows, None)  # what the first embedding holds
        for name, tensor in self.embeddings[0].named_buffers():
            setattr(self.shares, name, tensor)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        four, eight = (layer(ids) for layer in self.embeddings)
        return four, eight, self.shares(eight), *(layer(eight) for layer in self.layers)


@pytest.fixture(scope="module")
def every_form(tmp_path_factory: pytest.TempPathFactory) -> tuple[EveryForm, Path]:
    module, path = EveryForm().eval(), tmp_path_factory.mktemp("forms") / "forms.onnx"
    free = {0: torch.export.Dim("rows"), 1: torch.export.Dim("columns")}
    export_graph(module, (IDS,), ["ids"], ["int4", "int8", "shares", *FORMS], (free,), path)
    return module, path


def test_every_form_computes_what_torch_computes(every_form: tuple[EveryForm, Path]) -> None:
    module, path = every_form
    found = open_session(path, 1).run(None, {"ids": IDS.flip(1).numpy()})
    expected, exact = module(IDS.flip(1)), module.double()(IDS.flip(1))
    module.float()
    for name, ours, theirs, true in zip(["int4", "int8", "shares", *FORMS], found, expected, exact, strict=True):
        noise = float((theirs - true).abs().max()) + 4 * np.finfo(np.float32).eps * float(theirs.abs().max())
        difference = np.abs(ours - theirs.numpy())
        if name in ("w8a8", "w8a8_static", "w4a8", "fp8", "fp8_static"):
            # a rounding error tips an activation over the edge between two codes: one step, of at most 1/8 of E4M3's
            # numbers and 1/127 of INT8's rows, times the largest weight; rare, as the error is 1e-5 of a step
            step = (1 / 8 if name.startswith("fp8") else 1 / 100) * 4.5
            assert difference.max() <= 4 * noise + step * 4.5, name
            assert (difference > 4 * noise).mean() < 0.03, name
        else:
            assert difference.max() <= 4 * noise, name
        assert float(theirs.abs().max()) > 100 * noise, name


def test_weights_are_stored_as_small_as_they_are(every_form: tuple[EveryForm, Path]) -> None:
    model = onnx.load(every_form[1])
    assert {(one.domain, one.version) for one in model.opset_import} == {("", 19), ("com.microsoft", 1)}
    by_kind: dict[int, int] = {}
    for tensor in model.graph.initializer:
        by_kind[tensor.data_type] = by_kind.get(tensor.data_type, 0) + numpy_helper.to_array(tensor).nbytes
    weights, rows, groups = CHANNELS * COLUMNS, ROWS * COLUMNS, COLUMNS // 32
    assert by_kind[TensorProto.FLOAT8E4M3FN] == 2 * weights
    assert by_kind[TensorProto.INT8] == 3 * weights + rows
    # two codes, or zero points, in a byte; once what the embedding shares with a layer, and w4a8 with w4a16; and the
    # zero point of INT8 activations
    assert by_kind[TensorProto.UINT8] == (2 * weights + rows) // 2 + 2 * (CHANNELS + ROWS) + 1
    assert by_kind[TensorProto.FLOAT] < 4 * (groups * (3 * CHANNELS + ROWS) + 8 * CHANNELS + ROWS) + 100
    operations = [node.op_type for node in model.graph.node]
    assert operations.count("MatMulNBits") == 4
    assert operations.count("MatMulInteger") == 2
    assert operations.count("GatherBlockQuantized") == 1


@pytest.mark.parametrize(
    ("kept", "other"), [(CacheDtype.int8, CacheDtype.fp8), (CacheDtype.fp8, CacheDtype.int8)], ids=str
)
def test_a_cache_in_8_bits_differs_from_other_caches(tmp_path: Path, kept: CacheDtype, other: CacheDtype) -> None:
    """The comparison tells them apart: it would not let a program round what its model does not."""
    export_generation(low_bit_decoder("w4a16"), tmp_path / GENERATION, kept)
    program = _TokenByToken(Layers(tmp_path / GENERATION, 0, CHECKED_BYTES))
    whole = low_bit_decoder("w4a16")
    for wrong in (CacheDtype.float32, other):
        keep_cache_in(wrong, whole)
        with pytest.raises(ProgramError, match="differs from the model"):
            compare(NextTokenScores(whole).eval(), program, VOCAB)
    keep_cache_in(kept, whole)
    compare(NextTokenScores(whole).eval(), program, VOCAB)


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", FORMS)
def test_decoders_of_every_form_pass_the_comparison(tmp_path: Path, form: str) -> None:
    tied = form not in ("w8a16", "w4a8", "fp8")
    scores = NextTokenScores(low_bit_decoder(form, tied=tied)).eval()
    export_program(scores, tmp_path / PROGRAM)
    compare(scores, Program(tmp_path), VOCAB)
    cache = {"w8a8_static": CacheDtype.fp8, "w4a16_asymmetric": CacheDtype.int8, "fp8": CacheDtype.fp8}.get(
        form, CacheDtype.float32
    )
    export_generation(low_bit_decoder(form, tied=tied), tmp_path / GENERATION, cache)
    whole = low_bit_decoder(form, tied=tied)
    keep_cache_in(cache, whole)
    compare(NextTokenScores(whole).eval(), _TokenByToken(Layers(tmp_path / GENERATION, 0, CHECKED_BYTES)), VOCAB)
