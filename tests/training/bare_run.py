"""Any training run in one process without an engine: whole batches, torch's own clipping, nothing shared or saved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flows.config.engine import EngineConfig
from flows.config.launcher import LauncherConfig
from flows.config.model import ModelConfig
from flows.data.masking import view_of
from flows.data.mixture import open_split
from flows.data.packed import IGNORED
from flows.model.transformers_model import named_weights_module
from flows.training.batches import Batch, to_batch
from flows.training.growing_sparsity import is_due, share_of_zeros
from flows.training.job import TrainingJob
from flows.training.loop import initial_model
from flows.training.lora import merged
from flows.training.objectives import Distillation, LossModule
from flows.training.on_policy import own_batch, students_turn
from flows.training.optimizers import build_optimizer
from flows.training.quantization_aware import round_while_training
from flows.training.schedules import ema_decay, learning_rate
from flows.training.teacher_cache import TeacherCache
from flows.training.teaching import with_loss

Weights = dict[str, torch.nn.Parameter]


@dataclass
class BareRun:
    """What came out: one loss and gradient norm for each step, and the model that is saved."""

    losses: list[float]
    norms: list[float]
    validation_loss: float
    weights: dict[str, Tensor]


def bare_run(job: TrainingJob, dtype: torch.dtype = torch.float32) -> BareRun:
    """What the job's run has to give, whatever its engine and ranks; evaluated and saved after the last step alone."""
    torch.set_num_threads(1)  # too small to share
    run = replace(job.run, engine=EngineConfig(), launcher=LauncherConfig())
    job, train, size = replace(job, run=run), run.train, run.train.global_batch_size
    index = json.loads((job.tokens_dir / "index.json").read_text())
    model = initial_model(job, index["vocab_size"])
    cache = None if job.cache_dir is None else TeacherCache(job.cache_dir)
    module = with_loss(model, job, cache)
    if train.quantization_aware.scheme is not None:
        round_while_training(model, train.quantization_aware)
    _widen(module, dtype)
    trained = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    update = build_optimizer(module, train.optimizer, "reference")
    alive = _keep_alive(module) if train.sparsify.sparsity else {}
    average = {name: weight.detach().clone() for name, weight in trained.items()}
    seen = view_of(run.model.family, job.tokenizer_dir)
    dataset = open_split(job.tokens_dir, "train", run.sequence_length, run.document_masks, run.mixture)
    losses, norms = [], []
    for step in range(train.max_steps):
        shown = seen(dataset, train.masked_share, (run.seed, step))
        order = shown.order(step * size, size, run.seed)
        # How experts are balanced is a matter of each micro batch; the rest does not depend on how rows are cut.
        cut = train.micro_batch_size if run.model.num_experts else size
        parts = [order[first : first + cut] for first in range(0, size, cut)]
        batches = [to_batch([shown.row(int(index)) for index in part], "cpu") for part in parts]
        if cache is not None:
            known = [cache.records(part) for part in parts]
            batches = [batch._replace(records_BLR=records) for batch, records in zip(batches, known, strict=True)]
        module.wrote_itself = students_turn(run, step)
        if module.wrote_itself:
            seeds = (run.seed * train.max_steps + step) * size + torch.arange(size)
            batches = [own_batch(model, batches[0], run, seeds, index["eos_token_id"])]
        module.train()
        update.zero_grad()
        losses.append(_backward(module, batches, run.model))
        weights = [*trained.values()]
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights, train.gradient_clipping or torch.inf)))
        for group in update.param_groups:
            group["lr"] = learning_rate(train, step)
        update.step()
        for name, weight in trained.items():
            average[name].lerp_(weight.detach(), 1 - ema_decay(train, step))
        if is_due(train.sparsify, step + 1):
            _take_out(module, update, alive, average, share_of_zeros(train.sparsify, step + 1))
    with torch.no_grad():
        for name, weight in trained.items() if train.ema_decay else ():
            weight.copy_(average[name])
    validation = seen(
        open_split(
            job.validation_dir or job.tokens_dir, "validation", run.sequence_length, run.document_masks, run.mixture
        )
    )
    rows = [validation.row(int(i)) for i in validation.first(max(1, train.eval_tokens // run.sequence_length))]
    with torch.no_grad():
        loss = float(module.eval()(*to_batch(rows, "cpu")))
    saved = {name: weight.detach() for name, weight in named_weights_module(model).named_parameters()}
    return BareRun(losses, norms, loss, merged(saved, train.lora) if train.lora.enabled else saved)


def _widen(module: LossModule, dtype: torch.dtype) -> None:
    module.to(dtype)
    for loss in (module.loss, module.own_loss):
        if isinstance(loss, Distillation):
            loss._teacher.to(dtype)
    if module.features is not None:
        module.features._run_teacher.__self__.to(dtype)


def _backward(module: LossModule, batches: Sequence[Batch], config: ModelConfig) -> float:
    """The loss of all micro batches together; their gradients are added up."""
    counted = sum(int((batch.targets_BL != IGNORED).sum()) for batch in batches)
    routers = [layer.block_sparse_moe.gate for layer in module.model.model.layers] if config.num_experts else []
    total = 0.0
    for batch in batches:
        gates: list[Tensor] = []
        hooks = [gate.register_forward_hook(lambda _, x, y, gates=gates: gates.append(y)) for gate in routers]
        loss = module(*batch._replace(loss_tokens=torch.tensor(float(counted))))
        loss = loss + unbalance(gates, config) / len(batches)
        for hook in hooks:
            hook.remove()
        loss.backward()
        total += loss.item()
    return total


def unbalance(gates: Sequence[Tensor], config: ModelConfig) -> Tensor | float:
    """GShard's balance loss (arXiv:2006.16668) of each layer's scores [B, L, E], weighted; DeepSpeed counts the first
    choice if there are two, else each."""
    total: Tensor | float = 0.0
    for layer in gates:
        probabilities = layer.flatten(0, 1).softmax(-1)
        counted = 1 if config.num_experts_per_tok == 2 else config.num_experts_per_tok
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(counted, dim=1).indices, 1.0 / counted)
        total = total + config.num_experts * (probabilities.mean(0) * chosen.mean(0)).sum()
    return config.router_aux_loss_coef * total


def _matrices(module: LossModule) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, weight in module.named_parameters():
        if name.startswith("model.model.layers.") and weight.dim() == 2:
            yield name, weight


def _keep_alive(module: LossModule) -> dict[str, Tensor]:
    alive: dict[str, Tensor] = {}
    for name, weight in _matrices(module):
        alive[name] = weight.detach() != 0
        weight.register_hook(lambda gradient, name=name: gradient * alive[name])
    return alive


@torch.no_grad()
def _take_out(
    module: LossModule,
    update: torch.optim.Optimizer,
    alive: dict[str, Tensor],
    average: dict[str, Tensor],
    share: float,
) -> None:
    for name, weight in _matrices(module):
        smallest = weight.abs().flatten().argsort(stable=True)[: round(share * weight.numel())]
        kept = torch.ones(weight.numel(), dtype=torch.bool)
        kept[smallest] = False
        alive[name] = kept.view_as(weight) & (weight != 0)
        states = (state for state in update.state[weight].values() if torch.is_tensor(state) and state.dim())
        for tensor in (weight, average[name], *states):
            tensor *= alive[name]
