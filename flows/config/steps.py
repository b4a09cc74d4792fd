"""The steps from the trained base model to the other candidates: what each is made from, and how."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import ConfigDict

from flows.config.checks import require

BASE = "base"
"""The model that is trained on the data; every other candidate comes from it."""


class StepKind(StrEnum):
    """What is done; the section of the configuration with its settings has the same name."""

    distill = "distill"
    prune = "prune"
    quantize = "quantize"


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How one candidate is made from one before it, e.g. {distill: base}."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # entries have names of the user's: OmegaConf cannot check them
    distill: str | None = None
    """Candidate that teaches it."""
    start: str | None = None
    """With `distill`: candidate whose shape and weights it starts from; null = a model drawn as `student` says."""
    prune: str | None = None
    """Candidate of which it keeps what matters most."""
    quantize: str | None = None
    """Candidate whose weights it has, in fewer bits."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What differs from the section of that name, e.g. {temperature: 3, train: {max_steps: 200}}."""

    @property
    def kind(self) -> StepKind:
        """What is done."""
        return next(kind for kind in StepKind if getattr(self, kind) is not None)

    @property
    def source(self) -> str:
        """The candidate that it is made from."""
        return str(getattr(self, self.kind))


def check_steps(steps: Mapping[str, StepConfig]) -> None:
    """Raises `ConfigError` unless every step makes one new candidate from one that is there by then."""
    for name, step in steps.items():
        place = f"steps.{name}"
        require(
            name != BASE and re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None,
            "steps",
            name,
            f"must be small letters, digits and '_', and not {BASE}: it names a candidate",
            "Set steps.student={distill: base}.",
        )
        verbs = [kind.value for kind in StepKind if getattr(step, kind) is not None]
        require(
            len(verbs) == 1,
            place,
            verbs,
            f"must say one of {[kind.value for kind in StepKind]}",
            f"Set {place}={{distill: {BASE}}}.",
        )
        before = dict(_before(steps, name))
        require(
            step.source in before,
            f"{place}.{step.kind}",
            step.source,
            f"is not made before it; before it are {list(before)}",
            f"Set {place}.{step.kind}={BASE}, or leave the step out: ~{place}.",
        )
        require(
            before[step.source] != StepKind.quantize,
            f"{place}.{step.kind}",
            step.source,
            "is quantized, and what is quantized is final",
            f"Set {place}.{step.kind}={steps[step.source].source}." if step.source in steps else "",
        )
        _check_start(step, place, before)


def _check_start(step: StepConfig, place: str, before: Mapping[str, StepKind | None]) -> None:
    if step.start is None:
        return
    require(
        step.kind == StepKind.distill,
        f"{place}.start",
        step.start,
        f"is where training starts, and {step.kind} trains nothing",
        f"Leave {place}.start out.",
    )
    require(
        before.get(step.start, StepKind.quantize) != StepKind.quantize,
        f"{place}.start",
        step.start,
        "is not a floating-point model made before it; before it are "
        f"{[name for name, kind in before.items() if kind != StepKind.quantize]}",
        f"Set {place}.start={BASE}, or leave it out.",
    )


def _before(steps: Mapping[str, StepConfig], name: str) -> Iterator[tuple[str, StepKind | None]]:
    yield BASE, None
    for other, step in steps.items():
        if other == name:
            return
        yield other, step.kind
