"""Heads that fine-tuning puts on a pretrained network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.nn.batchnorm import DomainBatchNorm
from scjax.nn.layers import MLP
from scjax.nn.linear import linear


class PooledHead(nnx.Module):
    """Classes of a cell from one vector: batch normalisation without scale, a hidden layer, ReLU, logits.

    Args:
      d_model: width of the vector.
      d_hidden: of the hidden layer.
      n_outputs: classes.

    Source: Hao et al., Nature Methods 2024, cell type annotation.
    """

    def __init__(self, d_model: int, d_hidden: int, n_outputs: int, *, rngs: nnx.Rngs):
        self.norm = DomainBatchNorm(d_model, 1, affine=False, epsilon=1e-6)
        self.hidden = linear(d_model, d_hidden, ("embed", "mlp"), rngs=rngs)
        self.out = linear(d_hidden, n_outputs, ("mlp", None), rngs=rngs)

    def __call__(self, x_BE: Array, weight_B: Array, *, train: bool) -> Array:
        """float32 [B, n_outputs]; rows of weight 0 are left out of the statistics, see DomainBatchNorm."""
        everyone = jnp.zeros(x_BE.shape[0], jnp.int32)
        x_BE = self.norm(x_BE[:, None], weight_B[:, None], everyone, train=train)[:, 0]
        return self.out(jax.nn.relu(self.hidden(x_BE)))


class GeneMapHead(nnx.Module):
    """Outputs of a cell from all of its tokens: one number a token, laid out by gene, then dense layers.

    As published by scBERT (a convolution over the features of each token) and, with tokens that are only the
    expressed genes, by CellLM, which leaves 0 at the genes that a cell lacks.

    Args:
      d_model: width of a token.
      n_places: places of the map.
      n_outputs: logits of classes, or values for a regression.
      d_hidden: of the layers between map and output.
    """

    def __init__(
        self,
        d_model: int,
        n_places: int,
        n_outputs: int,
        *,
        d_hidden: tuple[int, ...] = (512, 128),
        rngs: nnx.Rngs,
    ):
        self.n_places = n_places
        self.token = linear(d_model, 1, ("embed", None), rngs=rngs)
        self.map = MLP((n_places, *d_hidden, n_outputs), activation="relu", rngs=rngs)

    def __call__(self, x_BSE: Array, place_BS: Array | None = None) -> Array:
        """float32 [B, n_outputs].

        Args:
          x_BSE: outputs of the network.
          place_BS: int32 [B, S], place of each token on the map, -1 for one that has none (padding); each
            place once in a cell. None: the tokens stand in the order of the map.
        """
        number = jax.nn.relu(self.token(x_BSE)[..., 0])
        if place_BS is not None:
            place = jnp.where(place_BS < 0, self.n_places, place_BS)
            empty = jnp.zeros(self.n_places, number.dtype)
            number = jax.vmap(lambda p, n: empty.at[p].set(n, mode="drop"))(place, number)
        return self.map(number)
