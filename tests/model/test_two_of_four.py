"""2:4 matrices come back bit for bit, from fewer bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flows.compression.candidate import load_candidate
from flows.compression.prune_weights import prune_weights_
from flows.config.model import ModelConfig
from flows.config.prune import PruneConfig
from flows.model.checkpoint import load_decoder, save_decoder
from flows.model.config_json import read_json
from flows.model.decoder import Decoder, initialize
from flows.model.two_of_four import compress, restore

SHAPE = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)


def test_the_layout_spelt_out() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, 7.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0]])
    found = compress(weight)
    assert found is not None
    values, places = found
    assert values.tolist() == [[5.0, 7.0, 1.0, 2.0, 0.0, 3.0]]
    # places 1, 3 and 0, 1 in the first byte; 0, 3 in the second
    assert places.tolist() == [0b0100_1101, 0b0000_1100]
    assert torch.equal(restore(values, places), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (5, 64)])
def test_any_such_matrix_comes_back(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).unflatten(1, (-1, 4))
    weight = weight.where(weight.abs() >= weight.abs().kthvalue(3, -1, keepdim=True).values, 0.0).flatten(1)
    found = compress(weight)
    assert found is not None
    assert torch.equal(restore(*found), weight)
    assert sum(part.nbytes for part in found) <= weight.nbytes * (0.5 + 1 / 8 / weight.element_size()) + 1


@pytest.mark.parametrize(
    "weight", [[[1.0, 2.0, 3.0, 0.0]], [[1.0, 0.0, 0.0, -0.0]], [[1.0, 0.0]], [1.0, 0.0, 0.0, 0.0]]
)
def test_what_would_not_come_back_is_left_alone(weight: list[list[float]]) -> None:
    assert compress(torch.tensor(weight)) is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_pruned_decoder_is_smaller_on_disk_and_the_same_when_loaded(tmp_path: Path, tied: bool) -> None:
    shape = replace(SHAPE, tie_word_embeddings=tied)
    model = Decoder(shape, 64).requires_grad_(False)
    initialize(model, seed=0)
    save_decoder(tmp_path / "dense", model.state_dict(), shape, 64, 16, 0)
    prune_weights_(model, PruneConfig(sparsity=0.5, pattern="2:4"), {})
    save_decoder(tmp_path / "sparse", model.state_dict(), shape, 64, 16, 0)
    for loaded in (load_decoder(tmp_path / "sparse"), load_candidate(tmp_path / "sparse")):
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], one) for name, one in model.state_dict().items())
    dense, sparse = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "sparse"))
    blocks = sum(one.nbytes for name, one in dense.items() if name.startswith("model.layers.") and one.dim() == 2)
    # half of the values and 1 bit for each weight of 32
    expected = blocks * (1 - 0.5 - 1 / 32)
    assert sum(one.nbytes for one in dense.values()) - sum(one.nbytes for one in sparse.values()) == expected
    assert "quantization_config" not in read_json(tmp_path / "dense")
    assert read_json(tmp_path / "sparse")["quantization_config"] == {"quant_method": "millrace_2_of_4"}
