"""The loss of a training run, with the teacher that it needs, if any."""

from __future__ import annotations

import os

import torch
from torch import nn

from flows.config.model import Kernels
from flows.model.checkpoint import load_decoder
from flows.model.decoder import Decoder
from flows.training.features import Features
from flows.training.job import TrainingJob
from flows.training.objectives import CachedDistillation, Distillation, LossModule, cross_entropy
from flows.training.sequence_parallel import share_sequences
from flows.training.teacher_cache import TeacherCache


def with_loss(model: nn.Module, job: TrainingJob, cache: TeacherCache | None) -> LossModule:
    """The model with the loss that the job asks for; a teacher is loaded only where one runs.

    Args:
        model: To be trained.
        job: What is minimized, and where its teacher is.
        cache: What was kept of the teacher's scores, where the run reads it.
    """
    run = job.run
    knobs = run.temperature, run.alpha, run.divergence, run.jsd_beta
    if cache is not None:
        return LossModule(model, CachedDistillation(cache.layout, *knobs))
    if not run.runs_teacher:  # there is none, or alpha is 0 and the data is all there is to learn
        return LossModule(model, cross_entropy)
    teacher = _teacher(job)
    module = LossModule(model, Distillation(teacher, *knobs) if run.alpha > 0 else cross_entropy)
    if run.on_policy_share > 0:
        module.own_loss = Distillation(teacher, run.temperature, 1.0, run.divergence, run.jsd_beta)
    if run.mimics_features:
        assert isinstance(model, Decoder)
        module.features = Features(model, teacher, run)
    return module


def _teacher(job: TrainingJob) -> Decoder:
    if job.teacher_dir is None:
        raise AssertionError("a job that runs its teacher without its directory")
    teacher = load_decoder(job.teacher_dir, Kernels.auto).requires_grad_(False).eval()
    if os.environ["DS_ACCELERATOR"] == "cuda":
        teacher = teacher.to(torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    share_sequences(teacher, job.run)
    return teacher
