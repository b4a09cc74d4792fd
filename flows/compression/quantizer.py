"""Puts a model's matrices into few bits, in place: in one pass where no data is needed, else block by block."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from flows.compression.calibration import Calibration
from flows.compression.candidate import EMBEDDING, HEAD, matrices, replace_layer
from flows.compression.coded_matrix import (
    Coded,
    embedding_scheme,
    fitted_grid,
    make_layer,
    nearest,
    on_grid,
    share_codes,
    with_input_scale,
)
from flows.compression.gptq import gptq
from flows.compression.int8 import sqnr_db
from flows.compression.layer_inputs import Inputs, walk_blocks
from flows.compression.quantized_linear import W8A8Linear
from flows.compression.scale_folding import awq_scales, fold_, input_groups, smoothing_scales
from flows.compression.sensitivity import Choice, choose_schemes, measure_sensitivity, stored_bytes
from flows.config.checks import require
from flows.config.quantize import IN_GROUPS, Method, QuantizeConfig, Scheme
from flows.model.decoder import Decoder
from kernels.w8a8_linear import MAX_INT8_COLUMNS

Names = tuple[str, ...]
"""Of the layers that share a matrix."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer."""

    name: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    """None = it stays in floating point."""
    sqnr_db: float
    """Of the weights as codes, whether or not they were kept."""
    output_sqnr_db: float | None = None
    """Of what the layer computes on calibration data, inputs rounded too; None = there was none."""
    sensitivity: float | None = None
    """Nats per token that the model's predictions diverge when this layer alone is quantized; None = not measured."""
    skipped_reason: str | None = None
    """Why the layer stays in floating point; None = it is quantized."""


@dataclass(frozen=True)
class QuantizeReport:
    """Every linear layer and embedding of a model."""

    layers: tuple[LayerReport, ...]

    @property
    def quantized(self) -> list[str]:
        """Names of the layers that are in few bits now."""
        return [layer.name for layer in self.layers if layer.skipped_reason is None]


@torch.no_grad()
def quantize_(
    model: nn.Module, config: QuantizeConfig, calibration: Calibration | None = None
) -> tuple[QuantizeReport, dict[str, Coded]]:
    """Replaces linear layers and embeddings by quantized ones, in place; layers that share a matrix are one.

    Args:
        model: In floating point; our decoder, where calibration data is needed.
        config: How.
        calibration: The data; needed where `config.needs_data`.

    Returns:
        A row for every such layer, skipped ones with their reason, and the matrices of the quantized ones by name.

    Raises:
        ConfigError: A pattern of `quantize.skip_modules` matches no layer, no layer is left to quantize, or a budget
            cannot be met.
    """
    quantizer = Quantizer(model, config)
    if config.needs_data:
        assert calibration is not None
        assert isinstance(model, Decoder)
        if config.sensitivity or config.scheme == Scheme.mixed:
            quantizer.measure(model, calibration)
        quantizer.walk(model, calibration)
    else:
        for names in quantizer.sharing:
            quantizer.replace(names)
    return quantizer.finish()


class Quantizer:
    """The matrices of one model on their way into few bits.

    Args:
        model: In floating point.
        config: How it is quantized.

    Raises:
        ConfigError: A pattern of `quantize.skip_modules` matches no layer.
    """

    def __init__(self, model: nn.Module, config: QuantizeConfig) -> None:
        self.model, self.config = model, config
        self.layers = matrices(model)
        for pattern in config.skip_modules:
            require(
                any(fnmatch(name, pattern) for name in self.layers),
                "quantize.skip_modules",
                pattern,
                f"matches none of the model's {len(self.layers)} layers, which have names such as "
                f"{sorted(self.layers)[0]}",
                "Set a pattern such as *.down_proj.",
            )
        sharing = defaultdict(list)
        for name, layer in self.layers.items():
            sharing[id(layer.weight)].append(name)
        self.sharing = [tuple(names) for names in sharing.values()]
        first = Scheme.w8a8 if config.scheme == Scheme.mixed else config.scheme
        self._schemes: dict[Names, Scheme] = {names: self._suited(names, first) for names in self.sharing}
        self._reasons = {names: self._left_out(names) for names in self.sharing}
        self._sensitivities: dict[Names, float] = {}
        self._rows: dict[str, LayerReport] = {}
        self._coded: dict[str, Coded] = {}

    def measure(self, model: Decoder, calibration: Calibration) -> None:
        """Measures what each matrix does by itself; with `mixed`, chooses the scheme of each."""
        mixed = self.config.scheme == Scheme.mixed
        forms: dict[Names, list[Coded]] = {}
        for names in self.sharing:
            tried = (Scheme.w8a8, Scheme.w4a16) if mixed else (self.config.scheme,)
            if self._reasons[names] is None:
                coded = [nearest(self._weight(names), self._suited(names, scheme), self.config) for scheme in tried]
                forms[names] = [one for one in coded if self._unfit(self._weight(names), one) is None]
        found = measure_sensitivity(model, calibration, forms)
        if not mixed:
            self._sensitivities = {names: kl[0] for names, kl in found.items() if kl}
            return
        choices = {}
        for names, coded in forms.items():
            whole = Choice(None, self._weight(names).nbytes, 0.0)
            measured = zip(coded, found[names], strict=True)
            choices[names] = [whole, *(Choice(one.scheme, stored_bytes(one), kl) for one, kl in measured)]
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
        others = sum(tensors.values()) - sum(forms[0].bytes for forms in choices.values())
        for names, choice in choose_schemes(choices, self.config, others).items():
            self._sensitivities[names] = choice.kl
            if choice.scheme is None:
                self._reasons[names] = "the budget has room for it in floating point"
            else:
                self._schemes[names] = choice.scheme

    def walk(self, model: Decoder, calibration: Calibration) -> None:
        """Quantizes the embedding, then block by block what calibration data, sent through those before, meets."""
        embedded = next(names for names in self.sharing if EMBEDDING in names)
        self.replace(embedded)
        for seen in walk_blocks(model, calibration, self.config.needs_gram):
            self._fold(model, seen)
            for name, inputs in seen.items():
                if name in embedded:
                    self._meet(name, inputs)
                else:
                    self.replace((name,), inputs)

    def replace(self, names: Names, inputs: Inputs | None = None) -> None:
        """Quantizes one matrix, or reports why not."""
        weight, scheme, reason = self._weight(names), self._schemes[names], self._reasons[names]
        coded = self._code(names[0], scheme, inputs if reason is None else None)
        reason = reason or self._unfit(weight, coded)
        ratio = round(sqnr_db(weight, coded.restored()), 2)
        for name in names:
            self._rows[name] = LayerReport(
                name,
                tuple(weight.shape),
                scheme if reason is None else None,
                ratio,
                sensitivity=self._sensitivities.get(names),
                skipped_reason=reason,
            )
            if reason is None:
                self._coded[name] = coded
                replace_layer(self.model, name, make_layer(self.layers[name], coded))
                if name != names[0]:
                    share_codes(self.model, names[0], name)
        if inputs is not None:
            self._meet(names[0], inputs)

    def finish(self) -> tuple[QuantizeReport, dict[str, Coded]]:
        """The report and the matrices by name.

        Raises:
            ConfigError: No layer is quantized.
        """
        report = QuantizeReport(tuple(self._rows[name] for name in self.layers))
        require(
            bool(report.quantized),
            "quantize.skip_modules",
            list(self.config.skip_modules),
            f"and quantize.min_sqnr_db={self.config.min_sqnr_db} leave none of {len(self.layers)} layers to quantize: "
            f"{next((row.skipped_reason for row in report.layers), None)}",
            "Skip fewer layers, or leave the step out.",
        )
        return report, {name: self._coded[name] for name in self.layers if name in self._coded}

    def _weight(self, names: Names) -> Tensor:
        return self.layers[names[0]].weight

    def _suited(self, names: Names, scheme: Scheme) -> Scheme:
        """The scheme of a matrix where linear layers have this one."""
        if isinstance(self.layers[names[0]], nn.Embedding):
            return embedding_scheme(scheme)
        return scheme

    def _left_out(self, names: Names) -> str | None:
        for pattern in self.config.skip_modules:
            for name in names:
                if fnmatch(name, pattern):
                    return f"{name} matches quantize.skip_modules={pattern}"
        return None

    def _unfit(self, weight: Tensor, coded: Coded) -> str | None:
        least, ratio = self.config.least_sqnr_db(coded.scheme), sqnr_db(weight, coded.restored())
        if ratio < least:
            return f"its weights keep {ratio:.1f} dB, less than quantize.min_sqnr_db={least:g}"
        if coded.scheme in (Scheme.w8a8, Scheme.w8a8_static) and weight.shape[1] > MAX_INT8_COLUMNS:
            return f"sums over {weight.shape[1]} columns may exceed INT32; {MAX_INT8_COLUMNS} are safe"
        return None

    def _code(self, name: str, scheme: Scheme, inputs: Inputs | None) -> Coded:
        weight, config = self.layers[name].weight, self.config
        if inputs is None or config.method != Method.gptq:
            # what queries and keys compute matters as products with each other: AWQ's authors do not clip them
            clips = inputs is not None and config.method == Method.awq and not name.endswith(("q_proj", "k_proj"))
            coded = nearest(weight, scheme, config, inputs.gram if inputs is not None and clips else None)
        else:
            assert inputs.gram is not None
            group_size = config.group_size if scheme in IN_GROUPS else None
            coded = on_grid(
                scheme,
                *gptq(
                    weight, inputs.gram, lambda some: fitted_grid(some, scheme, config), group_size, config.act_order
                ),
            )
        if inputs is not None and scheme == Scheme.w8a8_static:
            coded = with_input_scale(coded, float(inputs.largest.max()))
        return coded

    def _fold(self, model: Decoder, seen: dict[str, Inputs]) -> None:
        """Scales what the layers of a block read, where the method asks for it."""
        if self.config.method not in (Method.awq, Method.smoothquant):
            return
        block = next(iter(seen)).partition(".self_attn")[0]
        for group in input_groups(model, "" if block == HEAD else block):
            by_norm = not isinstance(model.get_submodule(group.producer), nn.Linear)
            readers = [name for name in group.readers if self._reasons[name,] is None]
            if not readers or (self.config.method == Method.smoothquant and not by_norm):
                continue
            weights, inputs = [self.layers[name].weight for name in readers], seen[readers[0]]
            if self.config.method == Method.smoothquant:
                scales = smoothing_scales(inputs, weights, self.config.alpha)
            else:
                scheme = self._schemes[readers[0],]

                def rounded(weight: Tensor, scheme: Scheme = scheme) -> Tensor:
                    return nearest(weight, scheme, replace(self.config, search=False)).restored()

                scales = awq_scales(inputs, weights, rounded, group)
            fold_(model, group, scales)
            seen |= dict.fromkeys(group.readers, inputs.divided(scales))

    def _meet(self, name: str, inputs: Inputs) -> None:
        """Completes a layer's row, and where the scheme asks for it its scale of inputs, by what it is given."""
        if self._rows[name].skipped_reason is not None:
            return
        coded = self._coded[name]
        if coded.scheme == Scheme.w8a8_static and coded.input_scale is None:
            self._coded[name] = with_input_scale(coded, float(inputs.largest.max()))
            layer = self.model.get_submodule(name)
            assert isinstance(layer, W8A8Linear)
            layer.input_scale = self._coded[name].input_scale
        x = torch.cat(inputs.sample)
        ratio = sqnr_db(self.layers[name](x), self.model.get_submodule(name)(x))
        self._rows[name] = replace(self._rows[name], output_sqnr_db=round(ratio, 2))
