"""Domain adaptation by backpropagation: an embedding from which a classifier cannot tell the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_vjp
def reverse_gradient(x: Array) -> Array:
    """The identity, whose gradient has the opposite sign: what lies before it is trained to make worse what
    lies behind it is trained to do.

    Source: Ganin and Lempitsky, ICML 2015; strength 1, as in scGPT's "DAR" objective.
    """
    return x


reverse_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (-gradient,))


def label_cross_entropy(logits_BC: Array, label_B: Array, weight_B: Array) -> tuple[Array, Array]:
    """-log softmax(logits)[label] summed over the cells whose label is known.

    Args:
      logits_BC: [B, C].
      label_B: int32 [B]; -1 where unknown.
      weight_B: float32 [B], 0 for rows that only fill the batch.

    Returns:
      ``(sum, weight)`` float32 scalars. A label of C or more gives NaN.
    """
    weight_B = weight_B * (label_B >= 0)
    log_p_BC = jax.nn.log_softmax(logits_BC.astype(jnp.float32))
    chosen = jnp.maximum(label_B, 0)[:, None]
    own_B = jnp.take_along_axis(log_p_BC, chosen, axis=1, mode="fill", fill_value=jnp.nan)[:, 0]
    return -(weight_B * own_B).sum(), weight_B.sum()
