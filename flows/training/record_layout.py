"""The record that a teacher cache keeps of one token: the K likeliest next tokens, and the rest in four numbers.

A record is a run of bytes, little-endian, K of V tokens kept:

| bytes | what |
|---|---|
| ceil(K b / 8) | token ids, likeliest first, b = ceil(log2 V) bits each, end to end, lowest bit first |
| 2 K | their log-probabilities at temperature 1, float16 |
| 8 | logarithm of the sum of p^(1/4), p^(2/4), p^(3/4) and p over all other tokens, float16 |

Rounding: float16 keeps 11 bits, so that each log-probability is off by at most |log p| / 2048. Distributions are
normalized again when they are read.
"""

from __future__ import annotations

from dataclasses import dataclass

POWERS = (0.25, 0.5, 0.75, 1.0)
"""Powers of the other tokens' probabilities whose sums are kept."""


@dataclass(frozen=True)
class RecordLayout:
    """Where what lies in a record."""

    top_k: int
    vocab_size: int

    @property
    def id_bits(self) -> int:
        """Bits of a token id."""
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def id_bytes(self) -> int:
        """Bytes of all ids of a record."""
        return -(-self.top_k * self.id_bits // 8)

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return self.id_bytes + 2 * self.top_k + 2 * len(POWERS)
