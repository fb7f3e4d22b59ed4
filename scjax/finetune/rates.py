"""Learning rates by layer: how far down a base is trained, and how fast."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scjax.config import ConfigError
from scjax.nn.module import Abstract, axes_of, flatten, nest, shapes_of
from scjax.train import OptimizerConfig, make_optimizer
from scjax.train.optimizer import Schedule


def layer_rates(model: Abstract, decay: float = 1.0, freeze_layers: int = 0) -> dict[str, Any]:
    """Learning rate of each parameter as a multiple of that of the heads, in the structure of the parameters.

    The heads have 1. Of a stack of n layers in the base the last has ``decay``, the one before it
    ``decay**2`` and so on; all that is in no stack, the embeddings above all, counts as one more layer below
    the first (Howard and Ruder, ULMFiT, ACL 2018). The first ``freeze_layers`` layers, and then what is in no
    stack too, have 0 and do not move.

    Raises:
      ConfigError: ``decay`` not in (0, 1], or more frozen layers than a stack has.
    """
    if not 0 < decay <= 1:
        raise ConfigError(f"layer_decay is {decay}; it must be in (0, 1]")
    axes, shapes = flatten(axes_of(model)["params"]), flatten(shapes_of(model)["params"])
    stacked = [path for path, names in axes.items() if names[:1] == ("layers",)]
    depth = max((shapes[path].shape[0] for path in stacked), default=0)
    if not 0 <= freeze_layers <= depth:
        raise ConfigError(f"freeze_layers is {freeze_layers}; the base has {depth} trained layers")
    rates: dict[str, Any] = {}
    for path, names in axes.items():
        if not path.startswith("base/"):
            rates[path] = np.float32(1)
        elif names[:1] == ("layers",):
            shape = shapes[path].shape
            each = decay ** np.arange(shape[0], 0, -1.0) * (np.arange(shape[0]) >= freeze_layers)
            rates[path] = each.astype(np.float32).reshape(-1, *(1,) * (len(shape) - 1))
        else:
            rates[path] = np.float32(0 if freeze_layers else decay ** (depth + 1))
    return nest(rates)


def make_finetune_optimizer(
    config: OptimizerConfig, steps: int, model: Abstract, decay: float = 1.0, freeze_layers: int = 0
) -> tuple[optax.GradientTransformation, Schedule]:
    """:func:`scjax.train.make_optimizer` whose updates are multiplied by :func:`layer_rates`; what does not
    move takes no part in the clipping either."""
    tx, schedule = make_optimizer(config, steps, model)
    if decay == 1 and not freeze_layers:
        return tx, schedule
    rates = layer_rates(model, decay, freeze_layers)

    def times(factors: Any) -> optax.GradientTransformation:
        return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))

    moves = jax.tree.map(lambda r: (r > 0).astype(np.float32), rates)
    return optax.chain(times(moves), tx, times(rates)), schedule


def optimizer_bytes(tx: optax.GradientTransformation, model: Abstract) -> int:
    """Bytes of the state of an optimiser, over all devices together."""
    state = jax.eval_shape(tx.init, shapes_of(model)["params"])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
