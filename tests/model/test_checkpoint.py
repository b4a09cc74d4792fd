"""Decoders on disk: equal to transformers' in both directions, and what the user sees when a directory is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

from flows.config import ConfigError
from flows.config.model import ModelConfig
from flows.model.checkpoint import check_initial_weights, load_decoder, load_initial_weights, save_decoder
from flows.model.config_json import CheckpointError
from flows.model.decoder import Decoder, initialize

VOCAB = 97
TINY = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_theta=5_000.0,
    rms_norm_eps=3e-5,
)
SHAPES = {
    "grouped, tied": TINY,
    "grouped, untied": replace(TINY, tie_word_embeddings=False),
    "all heads, untied": replace(TINY, num_key_value_heads=4, tie_word_embeddings=False),
    "qwen2": replace(TINY, qkv_bias=True),
    "qwen3": replace(TINY, qk_norm=True, attention_head_dim=16, tie_word_embeddings=False),
}


def class_of(config: ModelConfig) -> type[PreTrainedModel]:
    return Qwen3ForCausalLM if config.qk_norm else Qwen2ForCausalLM if config.qkv_bias else LlamaForCausalLM


NOISE = 64 * torch.finfo(torch.float32).eps
"""Relative noise of float32: sums of up to 48 terms in another order, over 2 layers."""


def made(config: ModelConfig = TINY) -> Decoder:
    model = Decoder(config, VOCAB)
    initialize(model, 0)
    with torch.no_grad():  # far from initial weights: norms count, attention is not uniform
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(4 * parameter if parameter.dim() > 1 else parameter + 0.2 * drawn)
    return model


def saved(directory: Path, config: ModelConfig = TINY) -> Decoder:
    model = made(config)
    save_decoder(directory, model.state_dict(), config, VOCAB, max_position_embeddings=64, eos_token_id=0)
    return model


def rewrite_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in weights.items() if value is not None}, path, {"format": "pt"})


@torch.no_grad()
def assert_same_logits(ours: Decoder, theirs: PreTrainedModel) -> None:
    tokens = torch.randint(0, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    real = mask.bool()
    for given in (None, mask):
        expected, actual = theirs.eval()(tokens, attention_mask=given).logits, ours(tokens, given)
        if given is not None:
            expected, actual = expected[real], actual[real]
        assert (actual - expected).abs().max() <= NOISE * expected.abs().max()
        assert expected.std() > 0.1


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_transformers_reads_what_we_save(config: ModelConfig, tmp_path: Path) -> None:
    ours = saved(tmp_path, config)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(theirs, class_of(config))
    assert not any(report.values())
    assert (theirs.dtype, theirs.config.eos_token_id) == (torch.float32, 0)
    assert theirs.config.max_position_embeddings == 64
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_we_read_what_transformers_saves(config: ModelConfig, shard: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind = class_of(config)
    theirs = kind(
        kind.config_class(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": 5_000.0},
            rms_norm_eps=3e-5,
            initializer_range=0.2,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    with torch.no_grad():  # they start as zeros and ones, which would hide a mix-up
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "10KB")
    ours = load_decoder(tmp_path)
    assert_same_logits(ours, theirs)
    started = Decoder(config, VOCAB)
    check_initial_weights(replace(config, initial_weights=tmp_path))
    load_initial_weights(started, tmp_path)
    assert_same_logits(started, theirs)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
def test_round_trip_keeps_every_bit(config: ModelConfig, tmp_path: Path) -> None:
    ours = saved(tmp_path / "one", config)
    again = load_decoder(tmp_path / "one")
    assert replace(again.config, kernels=config.kernels) == config
    assert again.state_dict().keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    saved(tmp_path / "two", config)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]


def test_bf16_files_load_as_float32(tmp_path: Path) -> None:
    model = made().bfloat16()
    save_decoder(tmp_path, model.state_dict(), TINY, VOCAB, max_position_embeddings=64, eos_token_id=0)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    loaded = load_decoder(tmp_path).state_dict()
    for name, value in model.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], value.float())


def test_old_checkpoints_with_a_rotary_table_load(tmp_path: Path) -> None:
    ours = saved(tmp_path)
    rewrite_weights(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    assert torch.equal(load_decoder(tmp_path).lm_head.weight, ours.lm_head.weight)


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path: Path) -> None:
    ours = saved(tmp_path)
    rewrite_weights(tmp_path, lm_head__weight=ours.lm_head.weight.detach().clone())
    load_decoder(tmp_path)
    rewrite_weights(tmp_path, lm_head__weight=ours.lm_head.weight.detach() + 1)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings=True, but in .* lm_head.weight differs"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"memory lack 1 tensors that a decoder of this shape has: model\.norm\.weight"),
        ({"model.extra": torch.ones(1)}, r"memory have 1 tensors that a decoder of this shape lacks: model\.extra"),
        ({"model.norm.weight": torch.ones(31)}, r"model\.norm\.weight has shape \[31\] in memory, not \[32\]"),
        ({"lm_head.weight": torch.ones(VOCAB, 32)}, r"tie_word_embeddings=True, but in memory lm_head\.weight differs"),
        ({"model.norm.weight": torch.ones(32).half()}, r"several dtypes: \['torch\.float16', 'torch\.float32'\]"),
    ],
)
def test_wrong_weights_are_not_saved(changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    state = {name: value for name, value in (made().state_dict() | changes).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        save_decoder(tmp_path, state, TINY, VOCAB, max_position_embeddings=64, eos_token_id=0)
    assert not list(tmp_path.iterdir())


def test_wrong_files_are_named(tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        saved(tmp_path / name)
        return tmp_path / name

    with pytest.raises(CheckpointError, match=r"nowhere/config\.json does not exist\. Name a Hugging Face model"):
        load_decoder(tmp_path / "nowhere")
    (broken("bad_json") / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"bad_json/config\.json is not readable as a JSON object"):
        load_decoder(tmp_path / "bad_json")
    (broken("no_weights") / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no_weights/model\.safetensors does not exist"):
        load_decoder(tmp_path / "no_weights")
    cut = broken("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cut/model\.safetensors is damaged: .* Copy the model again"):
        load_decoder(tmp_path / "cut")
    rewrite_weights(broken("lacks"), model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(CheckpointError, match=r"lack 1 tensors .*: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_decoder(tmp_path / "lacks")
    rewrite_weights(broken("shape"), model__norm__weight=torch.ones(16))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[16\] in .*, not \[32\]"):
        load_decoder(tmp_path / "shape")
    (broken("index") / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match=r"index\.json is not an index of weights"):
        load_decoder(tmp_path / "index")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type=gpt2, and our decoder computes model_type=llama, qwen2, qwen3 only"),
        ({"model_type": "qwen2", "use_sliding_window": True}, r"use_sliding_window=True, and our decoder computes"),
        ({"hidden_act": "gelu"}, r"hidden_act=gelu, and our decoder computes hidden_act=silu only"),
        ({"attention_bias": True}, r"attention_bias=True"),
        ({"head_dim": 7}, r"model\.attention_head_dim=7 must be an even number above 0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_type=llama3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rope_type=yarn"),
        (
            {"hidden_size": 33, "head_dim": None},
            r"describes no decoder of ours: model\.hidden_size=33 must be a multiple of",
        ),
        ({"quantization_config": {"bits": 8}}, r"has a quantization_config: its weights are not floating point"),
    ],
)
def test_other_architectures_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("intermediate_size", 64),
        ("num_hidden_layers", 3),
        ("num_key_value_heads", 1),
        ("qkv_bias", True),
        ("rope_theta", 10_000.0),
        ("rms_norm_eps", 1e-6),
        ("tie_word_embeddings", False),
    ],
)
def test_initial_weights_of_another_shape_are_refused(field: str, value: object, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()  # config.json alone decides
    config = replace(TINY, initial_weights=tmp_path, **{field: value})
    has = getattr(TINY, field)
    with pytest.raises(ConfigError) as refusal:
        check_initial_weights(config, "distill.student")
    assert f"distill.student.{field}={value} does not fit distill.student.initial_weights={tmp_path}" in str(
        refusal.value
    )
    assert f"which have {field}={has}. Set distill.student.{field}={has}" in str(refusal.value)


def test_a_shape_that_does_not_fit_is_answered_with_all_settings_to_paste(tmp_path: Path) -> None:
    saved(tmp_path, replace(TINY, attention_head_dim=8))  # which is what null means here
    check_initial_weights(replace(TINY, initial_weights=tmp_path))
    saved(tmp_path, SHAPES["qwen3"])
    with pytest.raises(ConfigError, match=r"Set model\.attention_head_dim=16 model\.qk_norm=True model\.tie_word_emb"):
        check_initial_weights(replace(TINY, initial_weights=tmp_path))


def test_initial_weights_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    check_initial_weights(TINY)
    with pytest.raises(
        ConfigError, match=r"model\.initial_weights=.*gone cannot be used: .*config\.json does not exist"
    ):
        check_initial_weights(replace(TINY, initial_weights=tmp_path / "gone"))
    saved(tmp_path)
    with pytest.raises(ConfigError, match=r"have vocab_size=97, and .* tokenizer 50\. Set data\.tokenizer\.directory"):
        load_initial_weights(Decoder(TINY, 50), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot be used: .*model\.safetensors does not exist"):
        load_initial_weights(Decoder(TINY, VOCAB), tmp_path)


def test_initial_weights_take_the_dtype_of_the_model(tmp_path: Path) -> None:
    ours = saved(tmp_path)
    started = Decoder(TINY, VOCAB).bfloat16()
    load_initial_weights(started, tmp_path)
    assert torch.equal(started.model.norm.weight, ours.model.norm.weight.bfloat16())
