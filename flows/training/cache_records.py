"""The record that a teacher cache keeps of one token: the K likeliest next tokens, and the rest in four numbers.

A record is a run of bytes, little-endian, K of V tokens kept:

| bytes | what |
|---|---|
| ceil(K b / 8) | token ids, likeliest first, b = ceil(log2 V) bits each, end to end, lowest bit first |
| 2 K | their log-probabilities at temperature 1, float16 |
| 8 | logarithm of the sum of p^(1/4), p^(2/4), p^(3/4) and p over all other tokens, float16 |

A distribution softened by temperature T has probabilities in proportion to p^(1/T). Of the kept tokens those follow
from the record at any T; of the others together, f(s) = log sum p^s at s = 1/T is needed, which is convex in s and
known at five points: f(0) = log(V - K), and the four that are kept. Between them it is the quartic through all five,
held within the bounds that convexity gives, `tail_bounds`. At T = 1, 4/3, 2 and 4 it is exact.

Rounding: float16 keeps 11 bits, so that each log-probability is off by at most |log p| / 2048. Distributions are
normalized again when they are read. Shape letters: N tokens, K kept, V vocabulary, R bytes of a record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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


def pack_records(layout: RecordLayout, scores_NV: Tensor) -> Tensor:
    """Records of a teacher's scores, uint8 [N, R], on the CPU."""
    wide = torch.promote_types(scores_NV.dtype, torch.float32)
    log_p = torch.log_softmax(scores_NV.to(wide), -1)
    log_probs, ids = log_p.topk(layout.top_k)
    others = log_p.scatter(1, ids, -torch.inf)
    tails = torch.stack([torch.logsumexp(power * others, -1) for power in POWERS], -1)
    bits = ids.cpu().numpy()[:, :, None] >> np.arange(layout.id_bits) & 1
    packed = np.packbits(bits.reshape(len(ids), -1).astype(np.uint8), axis=1, bitorder="little")
    halves = torch.cat((log_probs, tails), -1).cpu().numpy().astype("<f2").view(np.uint8)
    return torch.from_numpy(np.concatenate((packed, halves), axis=1))


def unpack_records(layout: RecordLayout, records_NR: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `kernels.linear_distillation.CachedTeacher` takes, where the records are.

    Args:
        layout: Of the records.
        records_NR: uint8 [N, R].
        temperature: T, 1 or more.

    Returns:
        Token ids, int64 [N, K]; log-probabilities of the softened distribution, float32 [N, K]; logarithm of the
        probability of all other tokens together, float32 [N].
    """
    ids = _ids(layout, records_NR)
    log_probs, tails = _halves(layout, records_NR)
    power = 1 / temperature
    tail = softened_tail(tails, layout.vocab_size - layout.top_k, power)
    softened = torch.log_softmax(torch.cat((power * log_probs, tail[:, None]), -1), -1)
    return ids, softened[:, :-1], softened[:, -1]


def softened_tail(tails_NP: Tensor, others: int, power: float) -> Tensor:
    """Logarithm of the sum of p^power over the tokens that were not kept [N]: interpolated between `POWERS`.

    Args:
        tails_NP: Logarithms of the sums of the powers that were kept [N, 4].
        others: How many tokens were not kept.
        power: Above 0, up to 1.
    """
    known = _known(tails_NP, others)
    places = torch.tensor((0.0, *POWERS), dtype=known.dtype, device=known.device)
    weights = [
        float(torch.stack([(power - other) / (place - other) for other in places if other != place]).prod())
        for place in places
    ]  # Lagrange's
    estimate = known @ known.new_tensor(weights)
    lower, upper = tail_bounds(tails_NP, others, power)
    return torch.minimum(torch.maximum(estimate, lower), upper)


def tail_bounds(tails_NP: Tensor, others: int, power: float) -> tuple[Tensor, Tensor]:
    """The least and the most that the sum in `softened_tail` can be [N], because it is convex in the power."""
    known = _known(tails_NP, others)
    places = (0.0, *POWERS)
    after = next(number for number, place in enumerate(places) if place >= power)
    if places[after] == power:
        return known[:, after], known[:, after]

    def line(first: int, second: int) -> Tensor:
        slope = (known[:, second] - known[:, first]) / (places[second] - places[first])
        return known[:, first] + slope * (power - places[first])

    upper = line(after - 1, after)
    below = [line(*pair) for pair in ((after - 2, after - 1), (after, after + 1)) if pair[0] >= 0 and pair[1] <= 4]
    lower = torch.stack(below).amax(0)
    return torch.minimum(lower, upper), upper  # rounding may have turned them round


def _known(tails_NP: Tensor, others: int) -> Tensor:
    """The function at powers 0, 1/4, 1/2, 3/4 and 1 [N, 5]."""
    none = torch.full_like(tails_NP[:, :1], others).log()
    return torch.cat((none, tails_NP), -1)


def _ids(layout: RecordLayout, records_NR: Tensor) -> Tensor:
    """Four bytes hold an id of up to 25 bits wherever it begins; they may reach into what follows the ids."""
    starts = torch.arange(layout.top_k, device=records_NR.device) * layout.id_bits
    first, shift = starts // 8, starts % 8
    words = torch.zeros(len(records_NR), layout.top_k, dtype=torch.int64, device=records_NR.device)
    for byte in range(4):
        words |= records_NR[:, first + byte].long() << 8 * byte
    return words >> shift & (1 << layout.id_bits) - 1


def _halves(layout: RecordLayout, records_NR: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, K] and tails [N, 4], float32."""
    numbers = records_NR[:, layout.id_bytes :].contiguous().view(torch.float16).float()
    return numbers[:, : layout.top_k], numbers[:, layout.top_k :]
