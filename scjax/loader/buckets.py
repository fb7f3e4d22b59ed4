"""Padded lengths: a few widths for all batches, so that padding stays small and compilations few."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scjax.loader.order import Order, random_bits

MULTIPLE = 64


def round_up(length: int) -> int:
    """The next multiple of 64, at least 64."""
    return max(1, -(-length // MULTIPLE)) * MULTIPLE


def batch_lengths(sample: np.ndarray, order: Order) -> np.ndarray:
    """Longest row of each of K batches drawn from a sample of lengths as the order would draw them.

    Cells of a corpus are shuffled on disk, so rows of a window are independent draws.
    """
    V, K, r = order.lanes, order.steps_per_window, order.rows_per_lane
    draws = sample[random_bits("lengths", n=V * K * r) % np.uint64(len(sample))].reshape(V, K * r)
    if order.group_lengths:
        draws = np.sort(draws, axis=1)
    return draws.reshape(V, K, r).max(axis=(0, 2))


def choose_lengths(longest_rows: np.ndarray, top: int, n_buckets: int) -> tuple[int, ...]:
    """The bucket lengths that make the mean padded length of a batch smallest.

    Args:
      longest_rows: the longest row of each of many batches, int[n].
      top: the last bucket; every row fits into it.
      n_buckets: at most this many lengths.

    Returns:
      Increasing lengths, multiples of 64 but for ``top``.
    """
    if n_buckets < 1:
        raise ValueError(f"n_buckets must be at least 1, not {n_buckets}")
    lengths = np.array([*range(MULTIPLE, top, MULTIPLE), top])
    share = np.searchsorted(np.sort(longest_rows), lengths, side="right") / max(1, len(longest_rows))
    share[-1] = 1.0
    # cost[j]: mean length over the batches that fit into lengths[j], with the buckets so far, j the last
    cost, back = share * lengths, []
    for _ in range(min(n_buckets, len(lengths)) - 1):
        step = cost[:, None] + (share[None, :] - share[:, None]) * lengths[None, :]
        step[np.tril_indices(len(lengths))] = np.inf
        best = step.argmin(axis=0)
        better = step[best, np.arange(len(lengths))] < cost
        back.append(np.where(better, best, -1))
        cost = np.where(better, step[best, np.arange(len(lengths))], cost)
    chosen, j = [], len(lengths) - 1
    chosen.append(j)
    for previous in reversed(back):
        if previous[j] >= 0:
            j = int(previous[j])
            chosen.append(j)
    return tuple(int(lengths[j]) for j in reversed(chosen))


def bucket_of(longest_row: int, lengths: Sequence[int]) -> int:
    """The smallest bucket that holds a row of this length; the last where none does."""
    return next((length for length in lengths if longest_row <= length), lengths[-1])
