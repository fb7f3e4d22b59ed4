"""Losses as pure functions that return a sum and a weight.

The training step adds up sums and weights over micro-batches and devices and divides once, so a
cell with many hidden genes counts for more than one with few, whichever batch it is in.
"""

from scjax.objectives.regression import masked_mse

__all__ = ["masked_mse"]
