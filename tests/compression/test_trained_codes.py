"""A quantize step stores the very codes that quantization-aware training computed with."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from flows.compression.quantizer import quantize_
from flows.config.quantization_aware import BITS, QuantizationAwareConfig
from flows.config.quantize import QuantizeConfig, Scheme
from flows.model.decoder import Decoder
from flows.training.quantization_aware import round_while_training, weight_grid


@pytest.mark.parametrize("scheme", list(BITS))
@pytest.mark.parametrize("search", [True, False])
def test_codes_are_those_that_were_trained_with(model: Decoder, scheme: str, search: bool) -> None:
    aware = QuantizationAwareConfig(scheme=scheme, group_size=32, search=search)
    trained = deepcopy(model)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.dim() == 2}
    round_while_training(trained, aware)
    config = QuantizeConfig(scheme=Scheme(scheme), group_size=32, search=search, min_sqnr_db=0.0)
    _, coded = quantize_(model, config)
    assert f"{min(weights)}".removesuffix(".weight") in coded
    for name, weight in weights.items():
        grid = weight_grid(weight, aware)
        assert torch.equal(coded[name.removesuffix(".weight")].restored(), grid.restore(grid.codes(weight)))
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), trained(ids), rtol=1e-3, atol=1e-4)
