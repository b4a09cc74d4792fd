"""Quantized matrices in a model directory, as compressed-tensors lays them out, for transformers, vLLM and others.

`quantization_config` in config.json names the layers of each scheme and those that stay in floating point. W8A8 and FP8
keep codes as `weight` (int-quantized, float-quantized), weight-only schemes pack them into `weight_packed`
(pack-quantized, signed codes shifted to be unsigned); both with `weight_scale`. A tied output projection and its
embedding are of one group, and the embedding has the tensors of both.

transformers runs compressed layers as they are where the embedding is not quantized (`quantize.skip_modules`). With it,
it reads directories with `CompressedTensorsConfig(dequantize=True)`, which knows one way to store layers: not `mixed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flows.compression.coded_matrix import INT4_SCHEMES, Coded
from flows.config.quantize import Scheme
from flows.model.affine import pack_int32, unpack_int32
from kernels.reference import FP8, INT8

QUANT_METHOD = "compressed-tensors"
PACKED = (*INT4_SCHEMES, Scheme.w8a16)
"""Schemes whose codes are packed."""


STORED = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "input_scale")
"""Ends of the names of a quantized matrix's tensors."""


class LayoutError(ValueError):
    """A `quantization_config` or its tensors are of a kind that we do not read."""


def quantization_config(coded: Mapping[str, Coded], linear: Iterable[str]) -> dict[str, Any]:
    """What config.json says about a quantized model.

    Args:
        coded: Matrices by name of layer; a tied head and its embedding both.
        linear: Names of all linear layers, also those that stay in floating point.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, matrix in coded.items():
        group = _group(matrix)
        key = next((key for key, other in groups.items() if {**other, "targets": []} == group), None)
        if key is None:
            key = f"group_{len(groups)}"
            groups[key] = group
        groups[key]["targets"] = [*groups[key]["targets"], name]
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": QUANT_METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linear if name not in coded],
        "kv_cache_scheme": None,
    }


def _group(matrix: Coded) -> dict[str, Any]:
    scheme = matrix.scheme
    number = "float" if scheme == Scheme.fp8 else "int"
    weights = {"num_bits": matrix.bits, "type": number, "symmetric": matrix.zeros is None, "dynamic": False}
    group_size = matrix.codes.shape[1] // matrix.scales.shape[1]
    in_groups = scheme in INT4_SCHEMES
    weights |= {"strategy": "group", "group_size": group_size} if in_groups else {"strategy": "channel"}
    inputs = {"num_bits": 8, "type": number, "symmetric": True, "dynamic": scheme != Scheme.w8a8_static}
    if scheme == Scheme.w4a8:
        inputs |= {"strategy": "group", "group_size": group_size}
    else:
        inputs |= {"strategy": "token" if inputs["dynamic"] else "tensor"}
    return {
        "targets": [],
        "weights": weights,
        "input_activations": None if scheme in (Scheme.w4a16, Scheme.w8a16) else inputs,
        "format": "pack-quantized" if scheme in PACKED else f"{number}-quantized",
    }


def stored_tensors(matrix: Coded) -> dict[str, Tensor]:
    """The tensors of a matrix by the end of their name."""
    found = {"weight_scale": matrix.scales}
    if matrix.scheme not in PACKED:
        found["weight"] = matrix.codes
    else:
        found["weight_packed"] = pack_int32(matrix.codes, matrix.bits)
        found["weight_shape"] = torch.tensor(matrix.codes.shape)
    if matrix.zeros is not None:
        found["weight_zero_point"] = pack_int32(matrix.zeros.t(), matrix.bits).t()
    if matrix.input_scale is not None:
        found["input_scale"] = matrix.input_scale.view(1)
    return {end: tensor.contiguous() for end, tensor in found.items()}


def read_coded(tensors: Mapping[str, Tensor], scheme: Scheme, layer: nn.Module) -> Coded:
    """The matrix that `stored_tensors` stored.

    Args:
        tensors: By the end of their name.
        scheme: How the layer is to multiply.
        layer: The floating-point layer, whose shape is checked.

    Raises:
        KeyError: A tensor is missing.
        LayoutError: A tensor has another shape or dtype.
    """
    assert isinstance(layer.weight, Tensor)
    shape = tuple(layer.weight.shape)
    bits = 4 if scheme in INT4_SCHEMES else 8
    scales = tensors["weight_scale"]
    if scheme in PACKED:
        words = tensors["weight_packed"]
        _check("weight_packed", words, torch.int32, (shape[0], -(-shape[1] * bits // 32)))
        codes = unpack_int32(words, bits, shape[1])
    else:
        codes = tensors["weight"]
        _check("weight", codes, FP8 if scheme == Scheme.fp8 else INT8, shape)
    groups = scales.shape[-1]
    if scales.shape != (shape[0], groups) or not groups or shape[1] % groups or (bits == 8 and groups != 1):
        raise LayoutError(f"weight_scale has shape {list(scales.shape)}, which fits no matrix of {list(shape)}")
    zeros = None
    if "weight_zero_point" in tensors:
        words = tensors["weight_zero_point"]
        _check("weight_zero_point", words, torch.int32, (-(-shape[0] * bits // 32), groups))
        zeros = unpack_int32(words.t(), bits, shape[0]).t()
    static = scheme == Scheme.w8a8_static and isinstance(layer, nn.Linear)
    input_scale = tensors["input_scale"].float().view(()) if static else None
    return Coded(scheme, codes, scales if bits == 4 else scales.float(), zeros, input_scale)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise LayoutError(f"{name} is {tensor.dtype} {list(tensor.shape)}, and {dtype} {list(shape)} is expected")


def read_schemes(found: Mapping[str, Any], layers: Mapping[str, nn.Module]) -> dict[str, Scheme]:
    """The scheme of each layer that a `quantization_config` names; layers that stay in floating point are left out.

    Args:
        found: What config.json says.
        layers: Linear layers and embeddings by name.

    Raises:
        LayoutError: A scheme is none of ours.
    """
    schemes: dict[str, Scheme] = {}
    groups = [(group["targets"], _scheme(group)) for group in found["config_groups"].values()]
    for name, layer in layers.items():
        if any(_matches(name, layer, pattern) for pattern in found.get("ignore") or ()):
            continue
        exact = [scheme for targets, scheme in groups if name in targets]
        loose = [scheme for targets, scheme in groups if any(_matches(name, layer, one) for one in targets)]
        if exact or loose:
            schemes[name] = (exact or loose)[0]
    return schemes


def _matches(name: str, layer: nn.Module, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return name == pattern or (pattern == "Linear" and isinstance(layer, nn.Linear)) or pattern == type(layer).__name__


def _scheme(group: Mapping[str, Any]) -> Scheme:
    weights, inputs = group["weights"], group.get("input_activations")
    kind = (weights["type"], weights["num_bits"], weights.get("strategy"), weights.get("symmetric", True))
    if inputs is None:
        given = None
    else:
        symmetric = inputs["num_bits"] == 8 and inputs.get("symmetric", True) and inputs["type"] == weights["type"]
        given = (inputs.get("strategy"), bool(inputs.get("dynamic"))) if symmetric else ("", False)
    known: dict[Any, Scheme] = {
        (("int", 8, "channel", True), None): Scheme.w8a16,
        (("int", 8, "channel", True), ("token", True)): Scheme.w8a8,
        (("int", 8, "channel", True), ("tensor", False)): Scheme.w8a8_static,
        (("float", 8, "channel", True), ("token", True)): Scheme.fp8,
    }
    for symmetric in (True, False):
        known[("int", 4, "group", symmetric), None] = Scheme.w4a16
        known[("int", 4, "group", symmetric), ("group", True)] = Scheme.w4a8
    if (kind, given) not in known:
        raise LayoutError(
            f"weights={weights} with input_activations={inputs} is none of the schemes that our layers compute: "
            f"{', '.join(sorted(set(known.values())))}"
        )
    return known[kind, given]
