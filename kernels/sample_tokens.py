"""Drawing the next token of each request: its kernel is in `kernels.sample_tokens_triton`."""

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import runs_kernel
from kernels.registration import register

MAX_VOCABULARY = 2**22
"""Tokens whose integer weights of up to 2^40 add up without overflow."""


def _fwd_fake(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_fwd = register(
    "sample_tokens_fwd(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, Tensor step)"
    " -> Tensor",
    "kernels.sample_tokens_triton",
    _fwd_fake,
)


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    step: Tensor,
    kernels: str = "auto",
) -> Tensor:
    """A token for each request, drawn from softmax(logits / temperature) cut off by top-k, then by top-p; no sort.

    Of the tokens, top-k keeps those that fewer than k score above, and of those top-p (arXiv:1904.09751) keeps those
    that less than the fraction p of the kept probability scores above. So tokens of equal score stand or fall
    together, and the best is always kept. A request gets the same token whatever else is in the batch: what is drawn
    depends on its row, its settings, its seed and its step alone.

    Probabilities are integers, the best token's 2^40, so that their sums are exact in any order; a token 2^40 times
    less likely than the best is never drawn, nor one whose score is NaN. Where top-p cuts, the draw is by rejection: a
    drawn token that is cut off is replaced by a draw among those that score above it, which gives each kept token its
    share (FlashInfer, arXiv:2501.01005) in a few passes over the row and without a search for the threshold.

    Args:
        logits: Scores [S, V].
        temperature: Float32 [S]; 0 takes the best token, of equals the first.
        top_k: Number of tokens kept, int32 or int64 [S]; 0 keeps all.
        top_p: Probability kept, float32 [S]; 1 keeps all.
        seed: Of each request, int64 [S].
        step: Which token of its request is drawn, int64 [S]; another step is another draw.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        Token ids, int64 [S].

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: The shapes do not fit.
    """
    requests, vocabulary = logits.shape
    if not 0 < vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"logits have {vocabulary} columns; there have to be 1 to {MAX_VOCABULARY}")
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "step": step}
    for name, setting in settings.items():
        if setting.shape != (requests,):
            raise ValueError(f"{name} has shape {list(setting.shape)}; {requests} requests need [{requests}]")
    if not runs_kernel(kernels, logits, 1):
        return reference.sample_tokens(logits, **settings)
    return _fwd(logits, temperature, top_k, top_p, seed, step)  # type: ignore[no-any-return]
