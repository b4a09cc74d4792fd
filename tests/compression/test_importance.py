from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from flows.artifact import Artifact
from flows.compression.calibration import Calibration, draw_calibration
from flows.compression.importance import mean_loss, measure_importance
from flows.config.calibration import CalibrationConfig
from flows.config.prune import LayerImportance, PruneConfig, PruningConfig
from flows.model.decoder import Decoder


def configured(sequences: int = 20, seed: int = 0) -> PruningConfig:
    chosen = CalibrationConfig(sequences=sequences, seed=seed)
    return PruningConfig(prune=PruneConfig(calibration=chosen), sequence_length=32)


@pytest.fixture
def calibration(tokens: Artifact) -> Calibration:
    return draw_calibration(tokens.path, configured())


def inputs_of(model: Decoder, name: str, ids: torch.Tensor) -> torch.Tensor:
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(ids)
    hook.remove()
    return seen[0].double()


def test_widths_are_scored_by_their_activations(model: Decoder, calibration: Calibration) -> None:
    found = measure_importance(model, calibration, LayerImportance.cosine)
    ids = torch.stack([torch.from_numpy(calibration.dataset[int(i)][:-1]) for i in calibration.indices])
    neurons = inputs_of(model, "model.layers.1.mlp.down_proj", ids)
    heads = inputs_of(model, "model.layers.0.self_attn.o_proj", ids).view(20, 32, 4, 16).norm(dim=-1)
    channels = sum(
        inputs_of(model, name, ids).abs().mean(1).norm(dim=0)
        for name in (
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.mlp.gate_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.mlp.gate_proj",
            "lm_head",
        )
    )
    rounding = {"rtol": 1e-5, "atol": 0.0}  # float32 sums of up to 512 numbers of one sign: 512 x 2^-24 = 3e-5 at worst
    torch.testing.assert_close(found.neurons[1], neurons.abs().mean(1).norm(dim=0), **rounding)
    torch.testing.assert_close(found.heads[0], heads.mean(1).norm(dim=0), **rounding)
    torch.testing.assert_close(found.channels, channels, **rounding)
    squares = neurons.square().mean((0, 1))
    torch.testing.assert_close(found.input_squares["model.layers.1.mlp.down_proj"], squares, **rounding)
    for one, other in (("self_attn.q_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        squares = found.input_squares
        assert torch.equal(squares[f"model.layers.0.{one}"], squares[f"model.layers.0.{other}"])


def test_layers_are_scored_by_how_far_they_turn_the_stream(model: Decoder, calibration: Calibration) -> None:
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.model.layers[1].mlp.down_proj.weight.zero_()
    scores = measure_importance(model, calibration, LayerImportance.cosine).layers
    assert scores[1].abs() < 1e-6  # it turns nothing
    ids = torch.stack([torch.from_numpy(calibration.dataset[int(i)][:-1]) for i in calibration.indices])
    entering, leaving = inputs_of(model, "model.layers.0", ids), inputs_of(model, "model.layers.1", ids)
    assert float(scores[0]) == pytest.approx(1 - float(cosine_similarity(entering, leaving, dim=-1).mean()), abs=1e-6)


def test_layers_are_scored_by_the_loss_without_them(model: Decoder, calibration: Calibration) -> None:
    whole = mean_loss(model, calibration)
    scores = measure_importance(model, calibration, LayerImportance.loss).layers
    assert len(model.model.layers) == 2
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.model.layers[0].mlp.down_proj.weight.zero_()
    assert float(scores[0]) == pytest.approx(mean_loss(model, calibration) - whole, abs=1e-6)


def test_the_choice_of_sequences_is_named_and_repeats(tokens: Artifact) -> None:
    first, again, other = (draw_calibration(tokens.path, configured(12, seed)) for seed in (0, 0, 1))
    assert first.to_metrics() == again.to_metrics()
    assert first.to_metrics()["tokens"] == 12 * 32
    assert first.to_metrics()["digest"] != other.to_metrics()["digest"]
    assert len(set(first.indices.tolist())) == 12
    assert len(draw_calibration(tokens.path, configured(500)).indices) == 40  # all there are, none twice
