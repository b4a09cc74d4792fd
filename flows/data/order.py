"""The order in which an endless stream visits a split's sequences, computed at any position from the seed alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FEISTEL_ROUNDS = 6


def sample_order(num_sequences: int, start: int, count: int, seed: int) -> NDArray[np.int64]:
    """Sequence indices at positions `start` to `start + count` of an endless stream, int64 [count].

    Epoch follows epoch, each a permutation of all sequences that `seed` and the epoch's number decide. Every position
    is computed on its own, in memory for `count` alone: the order does not depend on ranks or on how it is sliced.

    Args:
        num_sequences: Of the split.
        start: First position, from 0 on.
        count: Positions.
        seed: Others give other permutations.
    """
    positions = np.arange(start, start + count, dtype=np.int64)
    order = np.empty(count, np.int64)
    for epoch in range(start // num_sequences, (start + count - 1) // num_sequences + 1):
        inside = positions // num_sequences == epoch
        order[inside] = _permuted(positions[inside] % num_sequences, num_sequences, seed, epoch)
    return order


def _permuted(values: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The values under a permutation of 0..size-1: a Feistel network over the next power of four, walked until inside.

    Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
    """
    keys = np.random.SeedSequence([seed, epoch]).generate_state(FEISTEL_ROUNDS, np.uint64)
    half_bits = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    permuted = values.astype(np.uint64)
    outside = np.arange(len(permuted))
    while len(outside):
        left, right = permuted[outside] >> half_bits, permuted[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        permuted[outside] = (left << half_bits) | right
        outside = outside[permuted[outside] >= size]
    return permuted.astype(np.int64)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of each value: the finalizer of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
