"""Embeddings of genes: learned, frozen from a table that somebody made, projected from one, or mixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.config import ConfigError, from_config
from scjax.nn.linear import linear
from scjax.nn.module import Buffer
from scjax.parallel.layout import whole


@dataclasses.dataclass(frozen=True)
class GeneTable:
    """Where the embedding of a gene comes from; the field ``gene_table`` of a system's config.

    Attributes:
      kind: "random", learned from scratch; "frozen", a table of vectors (gene2vec, a graph, text, a protein
        language model) as it is; "projected", such a table under a learned linear map, with a learned
        vector for each gene that the table lacks; "mixed", several tables and a learned vector at once.
      dim: width of the table's vectors; 0 for that of the model.
      mix: of "mixed": name -> its table, "frozen" or "projected". ``config.tables`` has the file of each.
    """

    kind: Literal["random", "frozen", "projected", "mixed"] = "random"
    dim: int = 0
    mix: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dim < 0:
            raise ValueError(f"gene_table.dim = {self.dim} is negative")
        if bool(self.mix) != (self.kind == "mixed"):
            raise ConfigError(
                f"gene_table.kind = {self.kind!r} and gene_table.mix names {sorted(self.mix) or 'no table'}; "
                'tables are named for "mixed", and only there'
            )
        mix = {}
        for name, given in self.mix.items():
            where = f"gene_table.mix.{name}"
            table = given if isinstance(given, GeneTable) else from_config(GeneTable, given, where)
            if not name.isidentifier() or name in ("gene", "median"):
                raise ConfigError(f"{where}: a table's name is a word of letters, and not gene or median")
            if table.kind not in ("frozen", "projected"):
                raise ConfigError(f'{where}.kind = {table.kind!r}; "frozen" or "projected" can be mixed')
            mix[name] = table
        object.__setattr__(self, "mix", mix)

    def wanted(self) -> dict[str, str]:
        """What a model with a :class:`GeneEmbedder` at ``gene`` must be given, for its ``tables(config)``."""
        if self.kind == "mixed":
            return {name: f"vectors:gene/mixed/{name}" for name in self.mix}
        return {} if self.kind == "random" else {"gene": "vectors"}


class Prior(nnx.Module):
    """One of the tables of a mixture: ids of genes [...] -> (vectors [..., d_model], bool [...] which are
    known).

    A projected table is first divided by the root mean square of its entries: whoever made it chose the
    units."""

    def __init__(self, n_genes: int, d_model: int, given: GeneTable, *, rngs: nnx.Rngs):
        dim = _width(given, d_model)
        self.table = Buffer(jnp.zeros((n_genes, dim)), axes=("vocab", "embed"))
        self.known = Buffer(jnp.zeros(n_genes), axes=("vocab",))
        projected = given.kind == "projected"
        self.projection = linear(dim, d_model, ("embed", "embed_out"), rngs=rngs) if projected else None

    def __call__(self, gene: Array) -> tuple[Array, Array]:
        table, known = whole(self.table[...], ("vocab", "embed")), self.known[...] > 0
        if self.projection is None:
            return table[gene], known[gene]
        size = jnp.square(table).sum() / jnp.maximum(known.sum() * table.shape[1], 1)
        table = table * jax.lax.rsqrt(jnp.maximum(size, 1e-12))
        return _projected(self.projection, table, gene), known[gene]


def _width(table: GeneTable, d_model: int) -> int:
    """Of the vectors of a table."""
    dim = table.dim or d_model
    if table.kind == "frozen" and dim != d_model:
        raise ValueError(
            f"a frozen gene table has the width of the model, {d_model}, not {dim}; "
            'gene_table.kind = "projected" maps one width to another'
        )
    return dim


def _projected(projection: nnx.Linear, table: Array, gene: Array) -> Array:
    """The linear map and the look-up can change places: the smaller of the two is what is mapped."""
    return projection(table)[gene] if gene.size > table.shape[0] else projection(table[gene])


class GeneEmbedder(nnx.Module):
    """ids -> vectors. Ids 0 .. n_genes-1 are genes, the ``n_special`` after them special tokens.

    A table from outside lives in the buffers ``table`` [n_genes, dim] and ``known`` [n_genes] (1 where the
    gene has a vector), which a run fills (see ``scjax.train.gene_tables``). With "frozen", a gene without
    a vector is zero and so are the special tokens, whose buffer ``special`` a system may set.

    A mixture is sum_s w_s v_s over the tables that know the gene and the learned vector ``fallback``, w the
    softmax of the learned ``weight`` over those: a gene in no table has its learned vector alone, and a
    table that does not help can be put aside. The tables are at ``mixed/<name>``.

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
        dim = _width(table, d_model)
        self.kind, self.n_genes = table.kind, n_genes
        learned = (n_genes + n_special, d_model)
        if table.kind == "random":
            self.embedding = nnx.Param(init(rngs.params(), learned, jnp.float32), axes=("vocab", "embed"))
            return
        if table.kind == "mixed":
            make = {name: Prior(n_genes, d_model, table.mix[name], rngs=rngs) for name in sorted(table.mix)}
            self.mixed = nnx.Dict(make)
            self.weight = nnx.Param(jnp.zeros(1 + len(make)))  # of the learned vector, and of each table
            self.fallback = nnx.Param(init(rngs.params(), learned, jnp.float32), axes=("vocab", "embed"))
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
        if self.kind == "mixed":
            every = self.fallback[...].shape[0]
            return self._mixture(jnp.arange(every))[ids] if ids.size > every else self._mixture(ids)
        is_gene, gene = ids < self.n_genes, jnp.minimum(ids, self.n_genes - 1)
        table = whole(self.table[...], ("vocab", "embed"))
        if self.kind == "frozen":
            if not self.special[...].shape[0]:
                return table[gene]
            special = self.special[...][jnp.maximum(ids - self.n_genes, 0)]
            return jnp.where(is_gene[..., None], table[gene], special)
        known = is_gene & (self.known[...][gene] > 0)
        vectors = _projected(self.projection, table, gene)
        return jnp.where(known[..., None], vectors, self.fallback[...][ids])

    def _mixture(self, ids: Array) -> Array:
        is_gene, gene = ids < self.n_genes, jnp.minimum(ids, self.n_genes - 1)
        vectors, known = zip(*(self.mixed[name](gene) for name in sorted(self.mixed)), strict=True)
        there = jnp.stack([jnp.ones_like(is_gene), *(is_gene & k for k in known)], -1)
        weight = jax.nn.softmax(jnp.where(there, self.weight[...], -jnp.inf), -1)
        return jnp.einsum("...s,...sd->...d", weight, jnp.stack([self.fallback[...][ids], *vectors], -2))

    def vectors(self) -> Array:
        """float32 [n_genes, d_model], in the order of the vocabulary."""
        return self(jnp.arange(self.n_genes))
