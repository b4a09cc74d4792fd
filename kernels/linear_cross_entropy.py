"""Cross-entropy fused with the output projection, as a registered operation: see `kernels.head_chunks`.

The kernels are those of `kernels.cross_entropy_triton`; without them a chunk is plain torch.
"""

import torch
from torch import Tensor

from kernels.chunk_sizes import CROSS_ENTROPY_SHARE
from kernels.dispatch import runs_kernel
from kernels.head_chunks import check_projection, chunk_tokens, differentiable, empty_sums, sum_over_chunks
from kernels.loss_rows import cross_entropy_rows
from kernels.registration import register


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    chunk: int,
    wants_dx: bool,
    wants_dweight: bool,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses [] and its gradients for `x` [N, D] and `weight` [W, D], empty where not wanted."""
    knobs = softcap, z_loss, label_smoothing
    with_gradient = wants_dx or wants_dweight
    if kernel:
        from kernels.cross_entropy_triton import cross_entropy_bwd_, cross_entropy_fwd

        one = torch.ones((), device=x.device)

        def rows(scores: Tensor, tokens: slice) -> tuple[Tensor, Tensor | None]:
            losses, lse = cross_entropy_fwd(scores, targets[tokens], vocab_size, *knobs)
            if not with_gradient:
                return losses, None
            cross_entropy_bwd_(scores, targets[tokens], lse, one, vocab_size, *knobs)
            return losses, scores
    else:

        def rows(scores: Tensor, tokens: slice) -> tuple[Tensor, Tensor | None]:
            return cross_entropy_rows(scores, targets[tokens], *knobs, with_gradient)

    return sum_over_chunks(x, weight, vocab_size, chunk, rows, wants_dx, wants_dweight)


_fwd = register(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor targets, int vocab_size, float softcap, float z_loss, "
    "float label_smoothing, int chunk, bool wants_dx, bool wants_dweight, bool kernel) -> (Tensor, Tensor, Tensor)",
    "kernels.linear_cross_entropy",
    empty_sums,
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    tokens_at_once: int | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Sum of the negative log-likelihood of the labels that count under the scores x @ weight.T, in nats [].

    Exact: only the order of additions differs from `kernels.cross_entropy.cross_entropy` of those scores, which never
    exist for all tokens. Gradients are computed on the way forward, where torch records them, and can be had once.

    Args:
        x: Hidden states [..., D].
        weight: Output projection [W, D] in the dtype of `x`.
        targets: Labels [...], int64; -100 where none counts. One outside of the vocabulary is an error, or NaN.
        vocab_size: Leading rows of `weight` that score tokens, the others padding; None = all.
        softcap: Scores become softcap x tanh(score / softcap) (Gemma 2, arXiv:2408.00118); 0 = they stay.
        z_loss: Weight of the squared logarithm of the softmax's denominator (PaLM, arXiv:2204.02311, section 5).
        label_smoothing: Share of the label's probability that goes to all tokens alike (arXiv:1512.00567, section 7).
        tokens_at_once: Tokens whose scores exist together; None = chosen by a bound on memory.
        kernels: `auto`, `triton` or `reference`; see `kernels.dispatch`.

    Returns:
        The loss [] in float32 (float64 for float64 inputs).

    Raises:
        KernelError: `triton` is asked for and impossible.
        ValueError: Shapes or dtypes do not fit.
    """
    vocab_size = len(weight) if vocab_size is None else vocab_size
    check_projection(x, weight, targets, vocab_size)
    kernel = runs_kernel(kernels, x, columns=1)
    rows = x.reshape(-1, x.shape[-1])
    chunk = tokens_at_once or chunk_tokens(len(rows), rows, CROSS_ENTROPY_SHARE)
    knobs = (vocab_size, softcap, z_loss, label_smoothing, chunk)
    return differentiable(_fwd, rows, weight, (targets.reshape(-1), *knobs, kernel))
