"""A base whose embedding is given: where a base is frozen, each sample need be embedded only once."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.types import CellBatch


@dataclasses.dataclass(frozen=True)
class GivenConfig:
    size: int = 1


class Given(nnx.Module):
    """``embed`` is the value "profile" of the batch."""

    def __init__(self, config: GivenConfig, n_genes: int, *, rngs: nnx.Rngs):
        self.config, self.deterministic = config, False

    def embed(self, batch: CellBatch) -> Array:
        nothing = jnp.zeros((len(batch.row), self.config.size))
        return jnp.asarray(batch.value.get("profile", nothing))
