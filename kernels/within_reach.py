"""Tensors that a kernel reaches through a table of addresses, told to the memory guard, which sees arguments only."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from kernels.dispatch import INTERPRETED

tensors: list[Tensor] = []
"""Within reach of the launch at hand; kept only where kernels are interpreted."""


@contextmanager
def reaching(*reached: Iterable[Tensor]) -> Iterator[None]:
    """Launches within it may touch these tensors, of which they get the addresses alone."""
    if INTERPRETED:
        tensors[:] = [tensor for some in reached for tensor in some]
    try:
        yield
    finally:
        tensors.clear()
