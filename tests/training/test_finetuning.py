"""Fine-tuning a Hugging Face directory: adapters merged, read back by transformers and by peft; wrong patterns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from flows.artifact import Artifact
from flows.compression.candidate import count_parameters, load_candidate
from flows.config import ConfigError
from flows.config.engine import EngineConfig
from flows.config.lora import LoraConfig
from flows.config.model import Architecture, ModelConfig
from flows.config.sparsify import SparsifyConfig
from flows.config.training import TrainConfig, TrainingRun
from flows.model import arithmetic
from flows.model.checkpoint import load_decoder
from flows.model.config_json import counted_shape
from flows.model.decoder import Decoder
from flows.training.lora import ADAPTER_DIR, add_adapters, merged
from flows.training.trainable import choose_weights
from tests.training.conftest import TINY, VOCAB_SIZE

Trained = Callable[..., Artifact]
Run = Callable[..., TrainingRun]
NOISE = 64 * torch.finfo(torch.float32).eps
"""Relative noise of float32: sums of up to 48 terms in another order, over 2 layers."""


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@torch.no_grad()
def test_adapters_merged_are_what_transformers_and_peft_compute(
    llama: Path, trained: Trained, tiny_run: Run, tmp_path: Path
) -> None:
    run = tiny_run(max_steps=6)
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.1, replaced=("lm_head",))
    model = replace(TINY, initial_weights=llama, tie_word_embeddings=False)
    artifact = trained(replace(run, model=model, train=replace(run.train, lora=lora)))
    tokens = torch.randint(0, VOCAB_SIZE, (3, 11), generator=torch.Generator().manual_seed(1))
    ours = load_decoder(artifact.path).eval()(tokens)
    theirs, report = AutoModelForCausalLM.from_pretrained(artifact.path, output_loading_info=True)
    assert not any(report.values())
    before = AutoModelForCausalLM.from_pretrained(llama)
    noise = NOISE * ours.abs().max()
    assert (theirs.eval()(tokens).logits - ours).abs().max() <= noise
    assert (before.eval()(tokens).logits - ours).abs().max() > 1000 * noise
    adapted = PeftModel.from_pretrained(before, artifact.path / ADAPTER_DIR).eval()
    assert (adapted(tokens).logits - ours).abs().max() <= noise
    start, end = load_file(llama / "model.safetensors"), load_file(artifact.path / "model.safetensors")
    assert {name for name in start if not torch.equal(start[name], end[name])} == {
        name for name in start if "_proj" in name or name == "lm_head.weight"
    }
    adapter = sum(
        value.numel() for value in load_file(artifact.path / ADAPTER_DIR / "adapter_model.safetensors").values()
    )
    assert artifact.metrics["trainable_parameters"] == adapter
    assert artifact.metrics["parameters"] == sum(value.numel() for value in start.values())


@torch.no_grad()
def test_a_model_of_the_library_is_trained_as_it_is(trained: Trained, tiny_run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=16))
    start.save_pretrained(tmp_path / "gpt2")
    run = tiny_run(max_steps=8, freeze=("transformer.wpe.weight",), warmup_steps=0, engine=EngineConfig(zero_stage=3))
    model = ModelConfig(architecture=Architecture.transformers, initial_weights=tmp_path / "gpt2")
    artifact = trained(replace(run, model=model))
    losses = [event["train_loss"] for event in artifact.metrics["curve"] if "train_loss" in event]
    assert losses[-1] < losses[0]
    tokens = torch.randint(0, VOCAB_SIZE, (3, 11), generator=torch.Generator().manual_seed(1))
    theirs = GPT2LMHeadModel.from_pretrained(artifact.path).eval()
    ours = load_candidate(artifact.path)
    expected = theirs(tokens).logits
    assert (ours(tokens) - expected).abs().max() <= NOISE * expected.abs().max()
    assert count_parameters(ours) == artifact.metrics["parameters"] == start.num_parameters()
    kept = {n for n, p in theirs.named_parameters() if torch.equal(p, start.get_parameter(n))}
    assert kept == {"transformer.wpe.weight"}
    counted = arithmetic.parameter_count(counted_shape(model), VOCAB_SIZE)
    assert counted == pytest.approx(start.num_parameters(), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_what_the_adapters_computed(dtype: torch.dtype) -> None:
    config = LoraConfig(rank=3, alpha=5.0, targets=("layer",))
    model = torch.nn.Sequential()
    model.add_module("layer", torch.nn.Linear(6, 5).to(dtype))
    add_adapters(model, config, seed=0)
    x = torch.randn(4, 6, dtype=dtype)
    layer = model.get_submodule("layer")
    assert torch.equal(model(x), torch.nn.functional.linear(x, layer.weight, layer.bias))  # B is zero
    torch.nn.init.normal_(layer.lora_B.weight)
    weights = merged({name: value.detach() for name, value in model.named_parameters()}, config)
    assert weights.keys() == {"layer.weight", "layer.bias"}
    expected = torch.nn.functional.linear(x, weights["layer.weight"], weights["layer.bias"])
    assert weights["layer.weight"].dtype == dtype
    assert (model(x) - expected).abs().max() <= 32 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"freeze": ("model.layer.0.*",)},
            r"train\.freeze=model\.layer\.0\.\* matches none of .* such as model\.layers\.0",
        ),
        ({"trainable": ("head",)}, r"train\.trainable=head matches none of the model's 20 weights"),
        ({"freeze": ("*",)}, r"train\.freeze=\['\*'\] leaves none of 20 weights to train"),
        ({"lora": LoraConfig(rank=2, targets=("*.qproj",))}, r"train\.lora\.targets=\*\.qproj matches none .*q_proj"),
        (
            {"lora": LoraConfig(rank=2, targets=("*norm",))},
            r"train\.lora\.targets=\*norm matches none of the model's 15",
        ),
        ({"lora": LoraConfig(rank=2, replaced=("head",))}, r"train\.lora\.replaced=head matches none"),
        (
            {"lora": LoraConfig(rank=2, replaced=("lm_head",))},
            r"lm_head.weight and model.embed_tokens.weight are one matrix: both would change",
        ),
        (
            {"lora": LoraConfig(rank=2, targets=("*_proj", "lm_head"))},
            r"train\.lora\.targets=.* names lm_head, but lm_head.weight and model.embed_tokens.weight are one matrix",
        ),
        (
            {"sparsify": SparsifyConfig(sparsity=0.5), "freeze": ("*.layers.0.mlp.*",)},
            r"train\.sparsify\.sparsity=0\.5 makes zeros in every matrix .* 3 of them, model\.layers\.0\.mlp",
        ),
    ],
)
def test_patterns_that_fit_nothing_are_refused_with_names_that_are_near(train: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        choose_weights(Decoder(TINY, VOCAB_SIZE), TrainConfig(**train), seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"freeze": ("model.layers.1.*",)}, r"model\.layers\.1 has none to train with a decay of 0, as others have"),
        ({"trainable": ("model.norm.weight",)}, r"needs weights of the same kinds .* model\.layers\.0 has none"),
        (
            {"lora": LoraConfig(rank=2, replaced=("model.norm",))},
            r"model\.layers\.0 has none to train with a decay of 0",
        ),
    ],
)
def test_stages_that_would_wait_for_each_other_are_refused(train: dict[str, object], message: str) -> None:
    with torch.device("meta"):
        choose_weights(Decoder(TINY, VOCAB_SIZE), TrainConfig(**train), seed=0)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message):
            choose_weights(Decoder(TINY, VOCAB_SIZE), TrainConfig(**train), seed=0, pipeline_stages=2)  # type: ignore[arg-type]


def test_trainable_and_freeze_choose_by_name() -> None:
    model = Decoder(TINY, VOCAB_SIZE)
    choose_weights(model, TrainConfig(trainable=("*.mlp.*",), freeze=("*.layers.0.*",)), seed=0)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }


def test_adapters_need_trained_weights_and_freeze_everything_else(tiny_run: Run) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.lora\.rank=2 needs trained weights .*model\.initial_weights is null"
    ):
        tiny_run(lora=LoraConfig(rank=2))
    with pytest.raises(ConfigError, match=r"train\.freeze=\['x'\] cannot be combined with train\.lora\.rank=2"):
        TrainConfig(freeze=("x",), lora=LoraConfig(rank=2))
    assert ModelConfig().initial_weights is None
