"""From raw counts to tokens, on the device, inside the jitted step.

Each function is pure, works on a whole batch and draws its randomness by (key, row, gene), so that a
cell is encoded alike in any batch, in any order of its genes and under any padding.
"""

from scjax.encoding.bins import hidden_capacity, hidden_first, log2_bins, replace_hidden, to_all_genes
from scjax.encoding.random import gene_uniform, row_keys
from scjax.encoding.ranks import rank_genes
from scjax.encoding.select import mask_genes, select_genes
from scjax.encoding.thinning import depth_token, thin_counts, thinning_rate
from scjax.encoding.values import bin_quantiles, log1p, normalize_total, quantile_ranks
from scjax.types import register_pytree

register_pytree()

__all__ = [
    "bin_quantiles",
    "depth_token",
    "gene_uniform",
    "hidden_capacity",
    "hidden_first",
    "log1p",
    "log2_bins",
    "mask_genes",
    "normalize_total",
    "quantile_ranks",
    "rank_genes",
    "replace_hidden",
    "row_keys",
    "select_genes",
    "thin_counts",
    "thinning_rate",
    "to_all_genes",
]
