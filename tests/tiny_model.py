"""The smallest model that has all that training must cope with: a permanent test model.

It hides a share of each cell's genes and predicts their log values from a sum over the others. It has
sharded, stacked and replicated parameters, dropout by row, a buffer that the loss updates, and weights
that differ between cells. In a config its system is ``"tiny_model:Tiny"``.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scjax.encoding import gene_uniform, log1p, normalize_total, row_keys
from scjax.nn.layers import dropout, linear
from scjax.nn.module import Abstract, Buffer, abstract
from scjax.objectives import masked_mse
from scjax.types import CellBatch


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    d_model: int = 16
    d_ff: int = 32
    n_layers: int = 2
    dropout: float = 0.1
    mask_fraction: float = 0.4
    explode_at: int = -1  # the loss is NaN for the cell of this row number


class Layer(nnx.Module):
    def __init__(self, config: TinyConfig, rngs: nnx.Rngs):
        self.up = linear(config.d_model, config.d_ff, ("embed", "mlp"), rngs=rngs)
        self.down = linear(config.d_ff, config.d_model, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jax.nn.gelu(self.up(x)))


class Tiny(nnx.Module):
    def __init__(self, config: TinyConfig, n_genes: int, *, rngs: nnx.Rngs):
        self.config, self.n_genes, self.deterministic = config, n_genes, False
        d = config.d_model
        self.gene = nnx.Embed(n_genes + 1, d, rngs=rngs, embedding_metadata={"axes": ("vocab", "embed")})
        self.blocks = nnx.vmap(lambda r: Layer(config, r))(rngs.split(config.n_layers))
        self.query = linear(d, d, ("embed", "embed_out"), rngs=rngs)
        self.temperature = nnx.Param(jnp.ones(()))
        self.value_sum = Buffer(jnp.zeros(n_genes), axes=("vocab",))
        self.value_count = Buffer(jnp.zeros(n_genes), axes=("vocab",))

    def encode(self, batch: CellBatch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        value = log1p(normalize_total(batch.count, batch.depth))
        used = batch.gene_id >= 0
        hidden = used & (gene_uniform(row_keys(key, batch.row), batch.gene_id) < self.config.mask_fraction)
        return jnp.where(used, batch.gene_id, self.n_genes), jnp.where(used, value, 0.0), hidden

    def __call__(self, gene_id: jax.Array, value: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        x = jnp.einsum("bl,ble->be", value, self.gene(gene_id)) / 10
        x = dropout(x, self.config.dropout, keys)
        graphdef, stacked = nnx.split(self.blocks)
        return jax.lax.scan(lambda x, s: (nnx.merge(graphdef, s)(x), None), x, stacked)[0]

    def loss(self, batch: CellBatch, key: jax.Array):
        mask_key, drop_key = jax.random.split(key)
        gene_id, value, hidden = self.encode(batch, mask_key)
        keys = None if self.deterministic else row_keys(drop_key, batch.row)
        cell = self(gene_id, jnp.where(hidden, 0.0, value), keys)
        predicted = jnp.einsum("ble,be->bl", self.gene(gene_id), self.query(cell)) * self.temperature[...]
        # a chosen cell spoils the loss, to see how a run ends
        spoilt = jnp.where((batch.row == self.config.explode_at) & (batch.weight > 0), jnp.nan, 1.0)
        mask = hidden * batch.weight[:, None]
        total, weight = masked_mse(predicted * spoilt[:, None], value, mask)
        slot = jnp.minimum(gene_id, self.n_genes - 1)
        mean = self.value_sum[...] / jnp.maximum(self.value_count[...], 1.0)
        metrics = {"masked_mse": (total, weight), "gene_mean_mse": masked_mse(mean[slot], value, mask)}
        seen = (gene_id < self.n_genes) * batch.weight[:, None]
        self.value_sum[...] = self.value_sum[...].at[slot].add(seen * value)
        self.value_count[...] = self.value_count[...].at[slot].add(seen)
        return total, weight, metrics

    def embed(self, batch: CellBatch) -> jax.Array:
        gene_id, value, _ = self.encode(batch, jax.random.key(0))
        return self(gene_id, value)


N_GENES = 48


def tiny(**changes) -> Abstract:
    """The abstract model over ``N_GENES`` genes."""
    config = TinyConfig(**changes)
    return abstract(lambda: Tiny(config, N_GENES, rngs=nnx.Rngs(0)))


def cells(step: int, batch_size: int = 16, length: int = 24) -> CellBatch:
    """A batch of random cells with unequal numbers of genes; the last row of every batch is filler."""
    rng = np.random.default_rng([7, step])
    n_genes = rng.integers(3, length + 1, batch_size).astype(np.int32)
    weight = np.ones(batch_size, np.float32)
    weight[-1] = 0
    used = (np.arange(length) < n_genes[:, None]) & (weight[:, None] > 0)
    gene_id = np.stack([rng.permutation(N_GENES)[:length] for _ in range(batch_size)])
    count = np.where(used, rng.poisson(3, used.shape) + 1, 0).astype(np.float32)
    return CellBatch(
        gene_id=np.where(used, gene_id, -1).astype(np.int32),
        count=count,
        depth=(count.sum(1) + 5).astype(np.float32),
        n_genes=used.sum(1).astype(np.int32),
        row=np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint32),
        label={"dataset": np.zeros(batch_size, np.int32)},
        value={},
        weight=weight,
    )
