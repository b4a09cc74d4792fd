"""Records of a teacher cache, laid out as in `flows.training.record_layout`, and what they say at any temperature.

Softened by a temperature T, probabilities are in proportion to p^(1/T). Of the kept tokens those follow from the record
at any T. Of the others together, f(s) = log sum p^s at s = 1/T is needed, which is convex in s and known at five
points: f(0) = log(V - K), and the four that are kept. Between them it is the quartic through all five, held within the
bounds that convexity gives, `tail_bounds`. At T = 1, 4/3, 2 and 4 it is exact.

Shape letters: N tokens, K kept, V vocabulary, R bytes of a record.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flows.training.record_layout import POWERS, RecordLayout


def pack_records(layout: RecordLayout, scores_NV: Tensor) -> Tensor:
    """Records of a teacher's scores, uint8 [N, R], on the CPU."""
    wide = torch.promote_types(scores_NV.dtype, torch.float32)
    log_p = torch.log_softmax(scores_NV.to(wide), -1)
    log_probs, ids = log_p.topk(layout.top_k)
    others = log_p.scatter_(1, ids, -torch.inf)
    largest = others.amax(-1)
    root = others.sub_(largest[:, None]).div_(len(POWERS)).exp_()  # one exponential; the powers are its products
    raised, sums = root, []
    for power in POWERS:
        sums.append(raised.sum(-1).log() + power * largest)
        raised = raised * root
    tails = torch.stack(sums, -1)
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
