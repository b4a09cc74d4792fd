"""What it takes a teacher to leave its students a cache or a text: size and time, before any of it is made."""

from __future__ import annotations

from dataclasses import dataclass

from flows.config.distillation import TextRun
from flows.config.engine import Precision
from flows.config.model import ModelConfig
from flows.model.arithmetic import forward_flops_per_token, parameter_count
from flows.training.hardware import Hardware
from flows.training.record_layout import RecordLayout

AT_ONCE = 64
"""Texts that are written together."""
FP32_BYTES = 4
PASSES = 24
"""Over a token's scores, to normalize them, find the likeliest and add up the others' powers: counted, one for each
array that is read or written."""


@dataclass(frozen=True)
class LessonPlan:
    """Of one cache or text."""

    tokens: int
    num_bytes: int
    """On the disk."""
    seconds: float | None
    """None where the hardware's peak is not known."""

    def in_words(self) -> str:
        """For a log or a terminal."""
        time = "time is not known on this GPU" if self.seconds is None else f"about {self.seconds:.0f} s"
        return f"{self.tokens:,} tokens, {self.num_bytes / 1e6:.1f} MB, {time}"


def plan_cache(
    teacher: ModelConfig, layout: RecordLayout, tokens: int, sequence_length: int, hardware: Hardware | None
) -> LessonPlan:
    """The plan of a cache: a forward pass of each token through the teacher, and a record of it.

    Args:
        teacher: Its shape.
        layout: Of a record.
        tokens: Training tokens that are kept.
        sequence_length: Of the sequences that they are in.
        hardware: What computes; None where its peak is not known.
    """
    flops = tokens * forward_flops_per_token(teacher, layout.vocab_size, sequence_length)
    seconds = _seconds(flops, hardware)
    if seconds is not None and hardware is not None:
        seconds += tokens * PASSES * FP32_BYTES * layout.vocab_size / hardware.bytes_per_s
    return LessonPlan(tokens, tokens * layout.record_bytes, seconds)


def plan_text(teacher: ModelConfig, vocab_size: int, config: TextRun, hardware: Hardware | None) -> LessonPlan:
    """The plan of a text: every token but those given reads all weights anew, for `AT_ONCE` texts together.

    Args:
        teacher: Its shape.
        vocab_size: Number of tokens.
        config: How many texts of which length.
        hardware: As in `plan_cache`.
    """
    length = config.generation.prompt_tokens + config.generation.new_tokens
    tokens = config.sequences * length
    seconds = _seconds(tokens * forward_flops_per_token(teacher, vocab_size, length), hardware)
    if seconds is not None and hardware is not None:
        rounds = -(-config.sequences // AT_ONCE) * config.generation.new_tokens
        seconds += rounds * FP32_BYTES * parameter_count(teacher, vocab_size) / hardware.bytes_per_s
    token_bytes = (2 if vocab_size <= 2**16 else 4) + 1  # its id, and whether it counts
    return LessonPlan(tokens, tokens * token_bytes, seconds)


def _seconds(flops: float, hardware: Hardware | None) -> float | None:
    if hardware is None:
        return None
    return flops / (hardware.peak_flops(Precision.fp32) * hardware.typical_mfu)
