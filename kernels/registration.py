# torch.library has few types:
# mypy: disable-error-code="no-untyped-call"
"""Makes host functions operations of torch, so that torch.compile, fake tensors and export know them."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

_library = torch.library.Library("millrace", "FRAGMENT")


def register(schema: str, module: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The operation `millrace::<name>` that calls the function `<name>` of a module.

    The module, which imports Triton, is imported at the first call, so that a machine without Triton can import and run
    the rest. Gradients go into an autograd.Function around the operation: half the overhead of registering them.

    Args:
        schema: Name, arguments and results, e.g. "rms_norm_fwd(Tensor x, float eps) -> Tensor"; in place: "Tensor(a!)".
        module: Where the host function is, e.g. "kernels.norm_triton".
        fake: Empty results of the right shapes and dtypes, from the same arguments.
    """
    name = schema.partition("(")[0]

    def launch(*arguments: Any) -> Any:
        return getattr(import_module(module), name)(*arguments)

    _library.define(schema)
    for device in ("CUDA", "CPU"):  # CPU: the interpreter
        _library.impl(name, launch, device)
    torch.library.register_fake(f"millrace::{name}", fake, lib=_library)
    return getattr(torch.ops.millrace, name).default  # type: ignore[no-any-return]
