"""How many tokens' scores exist at once (`kernels.head_chunks`); imports nothing, so that planning needs no torch."""

CPU_TOKENS = 256
"""Tokens of a chunk on a CPU: several passes over their scores stay in a processor's cache."""
CROSS_ENTROPY_SHARE = 1.0
"""Memory of a chunk's scores on a GPU, as a share of the output projection's gradient in float32. 16384 x 248320 x 2048
in bfloat16 takes 4096 tokens at a time: with the gradient 4.1 GB, whose additions read and write 16 GB."""
DISTILLATION_SHARE = 0.375
"""The same of a student's scores. 8192 x 128256 x 4096 in bfloat16 takes 1408 tokens of both models at a time: with the
gradient 2.9 GB."""
_FEWEST, _MOST = 512, 8192  # below, matrix products are slow; above, nothing is won
_TILE = 128  # tokens in a tile of a matrix product


def gpu_tokens(num_tokens: int, width: int, item_bytes: int, share: float) -> int:
    """Tokens of a chunk on a GPU, in chunks of about one size, whole tiles of a matrix product.

    Args:
        num_tokens: Tokens in all.
        width: Hidden size.
        item_bytes: Of a score.
        share: See `CROSS_ENTROPY_SHARE`.
    """
    most = min(max(int(share * 4 * width / item_bytes), _FEWEST), _MOST)
    chunks = max(1, -(-num_tokens // most))
    return max(1, -(-num_tokens // chunks // _TILE) * _TILE)
