# mypy: disable-error-code="import-untyped"
"""A published version's checkpoint as a model of the inference server's vLLM backend, which nobody has proven.

`<name>_vllm` beside the proven models: config.pbtxt, and in its version directory the engine's arguments (model.json),
the Hugging Face checkpoint, and a passport.json that says that it is not verified, so that nothing releases it. What
vLLM loads of compressed-tensors, and which argument names there are, was read in its source; vLLM itself was not run.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from flows.artifact import Artifact, digest_file, write_json_atomically
from flows.compression.compressed_tensors_layout import QUANT_METHOD, LayoutError, read_schemes
from flows.config.checks import require
from flows.config.quantize import Scheme
from flows.config.serving import PassportConfig
from flows.data.tokenizer import copy_tokenizer
from flows.model.checkpoint import WEIGHTS
from flows.model.config_json import CONFIG, read_json
from flows.serving import config_pbtxt
from flows.serving.repository import CONFIG as MODEL_CONFIG
from flows.serving.repository import PASSPORT

SUFFIX = "_vllm"
ENGINE_ARGUMENTS, CHECKPOINT = "model.json", "checkpoint"
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM")
HEAD_WIDTHS = (32, 64, 96, 128, 160, 192, 224, 256)
"""`get_supported_head_sizes` of vLLM's FlashAttention backend."""
LOADED = (Scheme.w8a8, Scheme.w8a8_static, Scheme.w8a16, Scheme.w4a16, Scheme.fp8)
"""Schemes that vllm/model_executor/layers/quantization/compressed_tensors knows, each alone in its directory."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that vLLM makes one of, so that they need one scheme."""
VERDICT = "not verified"
DIFFERS = (
    "vLLM reads <|...|> in a prompt as control tokens; the proven text model reads all of it as text",
    "quantized layers compute in bfloat16 between their codes, the proven program in float32",
)


def build(directory: Path, name: str, version: int, config: PassportConfig, model: Artifact, mount: str) -> Path:
    """Writes `<name>_vllm` for one version.

    Args:
        directory: Repository to write it into.
        name: Published name.
        version: Its number, which the model keeps.
        config: What the version's proof depended on: its limits.
        model: The checkpoint that the version was proven to equal.
        mount: Where the server will find the repository.

    Raises:
        ConfigError: vLLM does not load this form of checkpoint.
    """
    found = read_json(model.path)
    check_loaded(name, found)
    target = directory / f"{name}{SUFFIX}"
    place = target / str(version) / CHECKPOINT
    place.mkdir(parents=True)
    for file in (CONFIG, WEIGHTS):
        shutil.copyfile(model.path / file, place / file)
    copy_tokenizer(model.path, place)
    arguments = engine_arguments(f"{mount}/{target.name}/{version}/{CHECKPOINT}", target.name, found, config)
    write_json_atomically(place.parent / ENGINE_ARGUMENTS, arguments)
    files = {str(path.relative_to(place.parent)): digest_file(path) for path in sorted(place.parent.rglob("*.*"))}
    stated = {
        "verdict": VERDICT,
        "why": "vLLM and a GPU were not there: nobody has compared what it serves with the checkpoint",
        "model_name": target.name,
        "digests": {"model": model.digest, "served_files": {target.name: files}},
        "equals": f"the checkpoint that version {version} of {name} was proven to equal, byte for byte",
        "differs": list(DIFFERS),
    }
    write_json_atomically(place.parent / PASSPORT, stated)
    (target / MODEL_CONFIG).write_text(config_pbtxt.to_text(model_config(target.name)))
    return target


def model_config(name: str) -> config_pbtxt.ModelConfig:
    """config.pbtxt as in the backend's own sample: the engine batches and answers when it likes."""
    settings = {
        "name": name,
        "backend": "vllm",
        "input": [
            {"name": "text_input", "dataType": "TYPE_STRING", "dims": [1]},
            {"name": "stream", "dataType": "TYPE_BOOL", "dims": [1], "optional": True},
            {"name": "sampling_parameters", "dataType": "TYPE_STRING", "dims": [1], "optional": True},
        ],
        "output": [{"name": "text_output", "dataType": "TYPE_STRING", "dims": [-1]}],
        "modelTransactionPolicy": {"decoupled": True},
        "instanceGroup": [{"count": 1, "kind": "KIND_MODEL"}],
    }
    return json_format.ParseDict(settings, config_pbtxt.ModelConfig())


def engine_arguments(checkpoint: str, name: str, found: Mapping[str, Any], config: PassportConfig) -> dict[str, Any]:
    """Content of model.json.

    Args:
        checkpoint: Its directory, as the server sees it.
        name: Of the served model.
        found: The checkpoint's config.json.
        config: Limits of the proven version.
    """
    is_quantized = found.get("quantization_config") is not None
    return {
        "model": checkpoint,
        "tokenizer": checkpoint,
        "served_model_name": name,
        "load_format": "safetensors",
        # "auto" would halve float32; vLLM's quantized layers compute in 16 bits only
        "dtype": "bfloat16" if is_quantized else found["torch_dtype"],
        "max_model_len": config.sequence_length,
        "max_num_seqs": config.export.max_running,
        "seed": config.seed,
    }


def check_loaded(name: str, found: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless vLLM's source says that it loads such a checkpoint.

    Args:
        name: Published name.
        found: The checkpoint's config.json.
    """

    def refuse_unless(holds: bool, what: object, rule: str, remedy: str) -> None:
        told = f"cannot be done for {name}, whose checkpoint has {what}: {rule}"
        require(holds, "manifests.vllm", True, told, remedy)

    architecture = next(iter(found.get("architectures") or []), None)
    refuse_unless(
        architecture in ARCHITECTURES,
        f"architecture {architecture}",
        f"only {', '.join(ARCHITECTURES)} are written for vLLM",
        "Set manifests.vllm=false.",
    )
    width = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
    refuse_unless(
        width in HEAD_WIDTHS,
        f"heads {width} wide",
        f"vLLM's attention takes {', '.join(map(str, HEAD_WIDTHS))}",
        "Train with another model.hidden_size or model.num_attention_heads.",
    )
    quantization = found.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method")
    refuse_unless(
        method == QUANT_METHOD,
        f"quant_method {method}",
        f"vLLM reads quantized weights as {QUANT_METHOD}",
        "Publish the candidate before it.",
    )
    refuse_unless(
        "num_local_experts" not in found,
        "quantized experts",
        "vLLM fuses them, which was not looked into",
        "Publish a candidate in floating point.",
    )
    targets = [target for group in quantization["config_groups"].values() for target in group["targets"]]
    outside = [one for one in ("model.embed_tokens", "lm_head") if one in targets]
    refuse_unless(
        not outside,
        f"codes in {' and '.join(outside)}",
        "vLLM quantizes layers between them only",
        "Quantize with quantize.skip_modules=[model.embed_tokens,lm_head].",
    )
    schemes = _schemes(quantization, targets)
    kinds = set(schemes.values())
    refuse_unless(
        len(kinds) == 1 and kinds <= set(LOADED),
        f"schemes {', '.join(sorted(kinds))}",
        f"vLLM loads one of {', '.join(LOADED)}",
        "Set quantize.scheme to one of them.",
    )
    for group in quantization["config_groups"].values():
        refuse_unless(
            group["weights"]["symmetric"],
            "zero points",
            "vLLM's packed weights were read as symmetric ones",
            "Set quantize.symmetric=true.",
        )
    for parts in FUSED:
        stems = {target.removesuffix(part) for target in targets for part in parts if target.endswith(f".{part}")}
        torn = [stem for stem in sorted(stems) if any(f"{stem}{part}" not in targets for part in parts)]
        refuse_unless(
            not torn,
            f"codes in a part of {', '.join(f'{torn[0]}{part}' for part in parts) if torn else ''}",
            "vLLM makes one layer of them",
            "Quantize all of them, or none, with quantize.skip_modules.",
        )


def _schemes(quantization: Mapping[str, Any], targets: list[str]) -> dict[str, Scheme]:
    from torch import nn

    try:
        return read_schemes(quantization, {target: nn.Identity() for target in targets})
    except LayoutError as error:
        raise AssertionError(f"a checkpoint of the chain: {error}") from error
