"""Embeddings of genes: learned, frozen from a table that somebody made, or projected from one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.nn.linear import linear
from scjax.nn.module import Buffer
from scjax.parallel.layout import whole


@dataclasses.dataclass(frozen=True)
class GeneTable:
    """Where the embedding of a gene comes from; the field ``gene_table`` of a system's config.

    Attributes:
      kind: "random", learned from scratch; "frozen", a table of vectors (gene2vec, a graph, text, a protein
        language model) as it is; "projected", such a table under a learned linear map, with a learned
        vector for each gene that the table lacks.
      dim: width of the table's vectors; 0 for that of the model.
    """

    kind: Literal["random", "frozen", "projected"] = "random"
    dim: int = 0

    def __post_init__(self) -> None:
        if self.dim < 0:
            raise ValueError(f"gene_table.dim = {self.dim} is negative")

    def wanted(self) -> dict[str, str]:
        """What a model with a :class:`GeneEmbedder` at ``gene`` must be given, for its ``tables(config)``."""
        return {} if self.kind == "random" else {"gene": "vectors"}


class GeneEmbedder(nnx.Module):
    """ids -> vectors. Ids 0 .. n_genes-1 are genes, the ``n_special`` after them special tokens.

    A table from outside lives in the buffers ``table`` [n_genes, dim] and ``known`` [n_genes] (1 where the
    gene has a vector), which a run fills (see ``scjax.train.gene_tables``). With "frozen", a gene without
    a vector is zero and so are the special tokens, whose buffer ``special`` a system may set.

    Args:
      n_genes: size of the vocabulary.
      n_special: number of special tokens.
      d_model: width of the embedding.
      table: its kind.
      init: initialiser of what is learned.
    """

    def __init__(
        self,
        n_genes: int,
        n_special: int,
        d_model: int,
        table: GeneTable,
        *,
        init: Callable[..., Array],
        rngs: nnx.Rngs,
    ):
        dim = table.dim or d_model
        if table.kind == "frozen" and dim != d_model:
            raise ValueError(
                f"a frozen gene table has the width of the model, {d_model}, not {dim}; "
                'gene_table.kind = "projected" maps one width to another'
            )
        self.kind, self.n_genes = table.kind, n_genes
        learned = (n_genes + n_special, d_model)
        if table.kind == "random":
            self.embedding = nnx.Param(init(rngs.params(), learned, jnp.float32), axes=("vocab", "embed"))
            return
        self.table = Buffer(jnp.zeros((n_genes, dim)), axes=("vocab", "embed"))
        self.known = Buffer(jnp.zeros(n_genes), axes=("vocab",))
        if table.kind == "frozen":
            self.special = Buffer(jnp.zeros((n_special, dim)))
        else:
            self.projection = linear(dim, d_model, ("embed", "embed_out"), rngs=rngs)
            self.fallback = nnx.Param(init(rngs.params(), learned, jnp.float32), axes=("vocab", "embed"))

    def __call__(self, ids: Array) -> Array:
        """float32 [..., d_model] of int32 ids [...], each from 0 to n_genes + n_special - 1."""
        if self.kind == "random":
            return self.embedding[...][ids]
        is_gene, gene = ids < self.n_genes, jnp.minimum(ids, self.n_genes - 1)
        table = whole(self.table[...], ("vocab", "embed"))
        if self.kind == "frozen":
            if not self.special[...].shape[0]:
                return table[gene]
            special = self.special[...][jnp.maximum(ids - self.n_genes, 0)]
            return jnp.where(is_gene[..., None], table[gene], special)
        known = is_gene & (self.known[...][gene] > 0)
        # the linear map and the look-up can change places: the smaller of the two is what is mapped
        vectors = self.projection(table)[gene] if ids.size > self.n_genes else self.projection(table[gene])
        return jnp.where(known[..., None], vectors, self.fallback[...][ids])

    def vectors(self) -> Array:
        """float32 [n_genes, d_model], in the order of the vocabulary."""
        return self(jnp.arange(self.n_genes))
