"""The tiny model with values of genes from outside: medians that counts are divided by, and vectors."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from tiny_model import Tiny, TinyConfig

from scjax.nn.embedder import GeneEmbedder, GeneTable
from scjax.nn.module import Buffer


@dataclasses.dataclass(frozen=True)
class TabledConfig(TinyConfig):
    gene_table: GeneTable = GeneTable("projected", 5)


class Tabled(Tiny):
    def __init__(self, config: TabledConfig, n_genes: int, *, rngs: nnx.Rngs):
        super().__init__(config, n_genes, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.gene = GeneEmbedder(n_genes, 1, config.d_model, config.gene_table, init=init, rngs=rngs)
        self.median = Buffer(jnp.ones(n_genes), axes=("vocab",))

    @staticmethod
    def tables(config: TabledConfig) -> dict[str, str]:
        vectors = {} if config.gene_table.kind == "random" else {"gene": "vectors"}
        return {"median": "median", **vectors}

    def encode(self, batch, key):
        median = self.median[...][jnp.maximum(batch.gene_id, 0)]
        count = batch.count / jnp.where(median > 0, median, 1.0)
        return super().encode(batch.replace(count=count), key)
