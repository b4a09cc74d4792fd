"""What is refused of quantization before a run starts, and what each group file stands for."""

from __future__ import annotations

from typing import Any

import pytest

from flows.compose import CONF_DIR, compose_config
from flows.config import Config, ConfigError
from flows.config.calibration import CalibrationConfig
from flows.config.model import ModelConfig
from flows.config.quantize import Method, QuantizeConfig, Scheme
from flows.config.steps import StepConfig


@pytest.mark.parametrize("path", sorted((CONF_DIR / "quantize").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_file_is_named_after_what_it_sets(path: Any) -> None:
    quantize = compose_config([f"quantize={path.stem}"]).quantize
    scheme, _, method = path.stem.partition("_")
    if path.stem == "w8a8_static":
        scheme, method = path.stem, "smoothquant"
    expected = Method(method) if method else quantize.method if scheme == "mixed" else Method.nearest
    assert (quantize.scheme, quantize.method) == (Scheme(scheme), expected)


def test_steps_have_settings_of_their_own() -> None:
    steps = "steps={int8: {quantize: base}, int4: {quantize: base, settings: {scheme: w4a16, method: gptq}}}"
    config = compose_config([steps])
    assert config.quantizing("int8").quantize == QuantizeConfig()
    int4 = config.quantizing("int4")
    assert (int4.quantize.scheme, int4.quantize.needs_data, int4.sequence_length) == (Scheme.w4a16, True, 256)
    assert int4.calibration == CalibrationConfig()
    assert not config.quantizing("int8").quantize.needs_data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"scheme": "w4a16", "method": "smoothquant"},
            "quantize.method=smoothquant cannot be combined with quantize.scheme=w4a16: it is made for w8a8, "
            "w8a8_static. Set quantize.method=nearest, or quantize.scheme=w8a8.",
        ),
        ({"scheme": "w8a8", "method": "awq"}, "quantize.method=awq cannot be combined with quantize.scheme=w8a8"),
        ({"scheme": "fp8", "method": "gptq"}, "quantize.method=gptq cannot be combined with quantize.scheme=fp8"),
        ({"scheme": "w4a16", "group_size": 48}, r"quantize.group_size=48 must be one of \[32, 64, 128\]"),
        ({"symmetric": False}, "quantize.symmetric=False is for 4 bits; in quantize.scheme=w8a8 zero points would"),
        ({"act_order": True}, "quantize.act_order=True orders the columns of gptq, and quantize.method=nearest"),
        ({"alpha": 1.5}, "quantize.alpha=1.5 must lie between 0 and 1"),
        ({"scheme": "mixed"}, "quantize.max_bytes_ratio=None and quantize.max_kl=None must be one budget"),
        ({"scheme": "mixed", "max_kl": 0.1, "max_bytes_ratio": 0.2}, "must be one budget for .* not 2. Set one of"),
        ({"scheme": "mixed", "max_kl": 0.0}, "quantize.max_kl=0.0 must be greater than 0"),
        ({"max_kl": 0.1}, "quantize.max_kl=0.1 is a budget for quantize.scheme=mixed, not w8a8"),
        ({"calibration": {"sequences": 0}}, "quantize.calibration.sequences=0 must be greater than 0"),
        ({"calibration": {"seed": -1}}, "quantize.calibration.seed=-1 must not be negative"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("quantize.", "steps.small.settings.")):
        Config(steps={"small": StepConfig(quantize="base", settings=settings)})


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (
            {"intermediate_size": 688},
            {"scheme": "w4a16"},
            "quantize.group_size=32 must divide intermediate_size=688 of base. Set a width that is a multiple of 32.",
        ),
        (
            {},
            {"scheme": "w4a16", "group_size": 128},
            "quantize.group_size=128 must divide intermediate_size=704 of base. Set quantize.group_size=64, or",
        ),
        (
            {"num_experts": 4},
            {"method": "gptq"},
            "quantize.method=gptq with quantize.scheme=w8a8 measures inputs where every token passes through all",
        ),
    ],
)
def test_a_model_that_cannot_be_quantized_so_is_refused(
    model: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(model=ModelConfig(**model), steps={"small": StepConfig(quantize="base", settings=settings)})
    Config(model=ModelConfig(**model), steps={"small": StepConfig(quantize="base")})
