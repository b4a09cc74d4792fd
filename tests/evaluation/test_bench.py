from __future__ import annotations

from pathlib import Path

import pytest

from flows.config import ConfigError
from flows.config.model import ModelConfig
from flows.config.serving import CacheDtype
from flows.evaluation.bench import run
from flows.model.checkpoint import save_decoder
from flows.model.decoder import Decoder, initialize

CONFIG = ModelConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
)


@pytest.mark.exhaustive
def test_the_table_holds_every_number_of_every_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Decoder(CONFIG, 300)
    initialize(model, seed=0)
    save_decoder(tmp_path, model.state_dict(), CONFIG, 300, 128, 0)
    (tmp_path / "tokenizer.json").write_text("{}")
    found = run({"base": tmp_path, "same": tmp_path}, 16, 20, [2], CacheDtype.int8)
    assert list(found) == ["base", "same"]
    for values in found.values():
        assert list(values) == ["bytes", "resident", "p50 1 x 16", "p50 8 x 16", "tokens/s 2"]
        assert all(value > 0 for value in values.values())
    assert found["base"]["bytes"] == found["same"]["bytes"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["base", "same"]
    assert lines[-2].split()[1:] == ["1.000"] * 5


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"base=.* has no config.json"):
        run({"base": tmp_path}, 16, 20, [1], CacheDtype.float32)
