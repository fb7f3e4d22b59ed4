"""Losses as pure functions that return a sum and a weight.

The training step adds up sums and weights over micro-batches and devices and divides once, so a
cell with many hidden genes counts for more than one with few, whichever batch it is in.
"""

from scjax.objectives.adversarial import label_cross_entropy, reverse_gradient
from scjax.objectives.bins import count_bins, frequency_cross_entropy, masked_cross_entropy
from scjax.objectives.classification import linear_cross_entropy
from scjax.objectives.contrastive import divide_and_conquer, info_nce
from scjax.objectives.regression import masked_mse
from scjax.objectives.similarity import elastic_cell_similarity
from scjax.objectives.zeros import expressed_nll

__all__ = [
    "count_bins",
    "divide_and_conquer",
    "elastic_cell_similarity",
    "expressed_nll",
    "frequency_cross_entropy",
    "info_nce",
    "label_cross_entropy",
    "linear_cross_entropy",
    "masked_cross_entropy",
    "masked_mse",
    "reverse_gradient",
]
