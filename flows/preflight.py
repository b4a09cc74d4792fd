"""Everything that can be known to be impossible before any work starts."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from flows.config import Config, ConfigError
from flows.config.checks import require
from flows.config.data import corpus_section
from flows.config.engine import Device, Precision
from flows.config.json_form import spoken_at
from flows.config.launcher import LauncherKind
from flows.config.model import Architecture, Kernels
from flows.config.serving import NO_CANDIDATE
from flows.config.training import TrainingRun
from flows.data.adopted_tokenizer import check_tokenizer, check_tokens_of
from flows.data.sources import check_sources
from flows.evaluation.task_files import check_tasks
from flows.export.shipped.encryption import read_key
from flows.launcher.check import check_launcher
from flows.serving.installation import check_server_available
from flows.training.deepspeed_config import deepspeed_config
from flows.training.trackers import check_trackers


def check(config: Config) -> None:
    """Raises `ConfigError` for missing files, hardware and software that this run would need."""
    _check_writable("artifacts_dir", config.artifacts_dir)
    for name, corpus in config.data.corpora.items():
        try:
            check_sources(corpus)
        except ConfigError as refusal:
            raise spoken_at(refusal, corpus_section(name)) from None
    if config.data.tokenizer.directory is not None:
        check_tokenizer(config.data.tokenizer.directory, config.model.family)
    check_trackers(config.tracking)
    if config.evaluate.tasks.directory is not None:
        check_tasks(config.evaluate.tasks.directory)
    for run in config.training_runs().values():
        deepspeed_config(run)
        _check_weights(run)
        if run.model.initial_weights is not None and config.data.tokenizer.directory is not None:
            check_tokens_of(run.model.initial_weights, config.data.tokenizer.directory, run.model_section)
        _check_device(run)
    check_launcher(config.launcher)
    if config.publish.candidate != NO_CANDIDATE:
        _check_writable("publish.model_repo", config.publish.model_repo)
        check_server_available()
    if config.export.encrypt_weights:
        try:
            read_key()
        except RuntimeError as error:
            raise ConfigError(f"export.encrypt_weights={config.export.encrypt_weights} needs a key: {error}") from error


def _check_writable(field: str, directory: Path) -> None:
    """Asks without making anything: of the directory, or of the nearest one above it that exists."""
    place = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    require(
        place.is_dir() and os.access(place, os.W_OK | os.X_OK),
        field,
        directory,
        f"cannot be written to: {place} is {'read-only for this user' if place.is_dir() else 'not a directory'}",
        f"Set {field} to a directory of your own.",
    )


def _check_weights(run: TrainingRun) -> None:
    theirs = run.model.architecture == Architecture.transformers
    if run.model.initial_weights is not None:
        from flows.model.checkpoint import check_initial_weights  # imports torch, which takes seconds
        from flows.model.transformers_model import check_kind, longest_context

        check_initial_weights(run.model, run.model_section)
        if theirs and (longest := longest_context(check_kind(run.model.initial_weights, run.model.family))):
            require(
                run.sequence_length <= longest,
                "data.sequence_length",
                run.sequence_length,
                f"must not exceed the {longest} positions of model.initial_weights={run.model.initial_weights}",
                f"Set data.sequence_length={longest}.",
            )
    elif theirs:
        require(
            find_spec("transformers") is not None,
            "model.architecture",
            run.model.architecture,
            "needs the transformers library, which is not installed",
            "Run pip install 'millrace[transformers]'.",
        )
    train = run.train
    if train.trainable or train.freeze or train.lora.enabled:
        from flows.model.transformers_model import model_without_weights
        from flows.training.trainable import choose_weights

        choose_weights(model_without_weights(run.model), train, run.seed, run.engine.pipeline_stages)


def _check_device(run: TrainingRun) -> None:
    fp8, nvme_path = run.engine.precision == Precision.fp8, run.engine.nvme_path
    if run.engine.device != Device.cuda and run.model.kernels != Kernels.triton and not (fp8 or nvme_path):
        return
    import torch

    from kernels.dispatch import unavailable_reason
    from kernels.document_attention import MAX_HEAD_WIDTH

    ranks_are_here = run.launcher.kind in (LauncherKind.local, LauncherKind.rendezvous)
    device = "cuda" if run.engine.device != Device.cpu and torch.cuda.is_available() else "cpu"
    if run.engine.device == Device.cuda and ranks_are_here:
        count = torch.cuda.device_count()
        require(
            count >= run.launcher.num_ranks,
            "engine.device",
            run.engine.device,
            f"needs one GPU for each of launcher.num_ranks={run.launcher.num_ranks}, and {count} can be seen here",
            "Set engine.device=cpu, or fewer ranks.",
        )
    if fp8 and ranks_are_here:
        from flows.training.fp8_linear import unavailable_reason as why_no_fp8

        if reason := why_no_fp8(device):
            raise ConfigError(f"engine.precision=fp8 cannot run here: {reason}. Set engine.precision=bf16.")
    if nvme_path is not None and ranks_are_here:
        from flows.training.nvme import unavailable_reason as why_no_nvme

        if reason := why_no_nvme(nvme_path, device):
            raise ConfigError(f"engine.nvme_path={nvme_path} cannot be used: {reason}.")
    reason = unavailable_reason(run.model.kernels, device, run.model.hidden_size)
    if run.document_masks:
        reason = reason or unavailable_reason(run.model.kernels, device, run.model.head_dim, MAX_HEAD_WIDTH)
    if reason:
        field = f"{run.model_section}.kernels"
        raise ConfigError(f"{field}=triton cannot run here: {reason}. Set {field}=auto.")
