"""Keeps PyTorch's compiler out of ranks that compile nothing: importing it takes longer than all else they do to start.

Optimizers and DeepSpeed's hooks import torch._dynamo only to exempt themselves from compilation, and every ZeRO stage
imports DeepSpeed's Muon, which compiles itself when it is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo"


class _IdleRules:
    """Stands for torch._dynamo.trace_rules, whose cache a new process group clears."""

    def clear_lru_cache(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(bring_compiler().trace_rules, name)


class _IdleCompiler(ModuleType):
    """Stands for torch._dynamo until somebody asks it for more than to be left alone, then makes way for it."""

    trace_rules = _IdleRules()

    def disable(self, function: Any = None, *args: Any, **kwargs: Any) -> Any:
        return _unchanged if function is None else function

    def graph_break(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # who looks at modules, not into them
            raise AttributeError(name)
        return getattr(bring_compiler(), name)


def keep_compiler_out() -> None:
    """Imports DeepSpeed without PyTorch's compiler; for ranks that compile nothing.

    Whoever does call it afterwards, e.g. through torch.compile, gets the real one.
    """
    if COMPILER in sys.modules:
        return
    idle = _IdleCompiler(COMPILER)
    sys.modules[COMPILER] = idle
    torch._dynamo = idle
    compile_now, torch.compile = torch.compile, _compile_nothing
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = compile_now


def bring_compiler() -> ModuleType:
    """The real torch._dynamo, imported if it was kept out."""
    if isinstance(sys.modules.get(COMPILER), _IdleCompiler):
        del sys.modules[COMPILER]
        torch._dynamo = importlib.import_module(COMPILER)
    return sys.modules[COMPILER]


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _compile_nothing(model: Any = None, **kwargs: Any) -> Any:
    return _unchanged if model is None else model
