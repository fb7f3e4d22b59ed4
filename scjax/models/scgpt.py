"""scGPT (Cui et al., Nature Methods 2024): a cell is a bag of (gene, value) tokens under one CLS token.

Encode: each expressed gene's count becomes the quantile bin it has in its cell; at most
``max_length - 1`` genes are kept; some values are hidden. Network: gene embedding + value embedding,
a post-norm transformer without positions. Loss: the hidden values, predicted twice: from the
gene's own output (masked-value regression) and from the cell embedding and the gene's name alone
(gene-prompt prediction, "MVC").
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.encoding import bin_quantiles, log1p, mask_genes, normalize_total, row_keys, select_genes
from scjax.encoding.values import Tie
from scjax.nn.attention import Backend
from scjax.nn.layers import MLP, Block, Remat, Stack, dropout, fold, layer_norm, linear
from scjax.nn.module import Buffer
from scjax.objectives import masked_mse
from scjax.types import CellBatch

MASK_VALUE = -1.0
CLS_VALUE = -2.0  # upstream gives CLS the value of padding
MAX_VALUE = 512.0


@dataclasses.dataclass(frozen=True)
class ScGPTConfig:
    """The published 51M model; every field may be changed in a config file.

    Attributes:
      d_model, n_heads, n_layers, d_ff, dropout: the transformer.
      norm: "post" as published, or "pre".
      max_length: tokens a cell, CLS included; cells with more genes are sampled down in training
        and cut to their most expressed genes for an embedding.
      values: "binned" (quantile bins 1 .. n_bins - 1) or "log1p" (log of counts per 10,000).
      n_bins: bins, the zero bin included.
      tie: bin of a count that fills several quantiles: "random" among them as published, "left" or
        "mid"; see :func:`scjax.encoding.bin_quantiles`. An embedding always takes "mid" for "random".
      value_scale: number that bins or log values are multiplied by before the network reads them
        and before they are targets. 1 as published; 1 / n_bins suits training from scratch.
      mask_fractions: share of a cell's genes that are hidden, drawn anew for each cell.
      mvc_weight: weight of the gene-prompt objective; 0 leaves it out.
      attention: backend, see :func:`scjax.nn.attention.attention`.
      remat: see :class:`scjax.nn.layers.Stack`.
      dtype: "float32" or "bfloat16", of activations; parameters are float32.
    """

    d_model: int = 512
    n_heads: int = 8
    n_layers: int = 12
    d_ff: int = 512
    dropout: float = 0.2
    norm: Literal["post", "pre"] = "post"
    max_length: int = 1200
    values: Literal["binned", "log1p"] = "binned"
    n_bins: int = 51
    tie: Tie = "random"
    value_scale: float = 1.0
    mask_fractions: tuple[float, ...] = (0.25, 0.5, 0.75)
    mvc_weight: float = 1.0
    attention: Backend = "auto"
    remat: Remat = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if not self.mask_fractions or not all(0 < f < 1 for f in self.mask_fractions):
            raise ValueError(f"mask_fractions = {self.mask_fractions}: each must lie between 0 and 1")
        if self.values not in ("binned", "log1p"):
            raise ValueError(f'values is "binned" or "log1p", not {self.values!r}')
        if self.max_length < 2:
            raise ValueError(f"max_length = {self.max_length} leaves no room for a gene beside CLS")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What the network reads. S gene slots a cell; the hidden ones come first.

    Attributes:
      gene_id: int32 [B, S]; -1 where padded.
      value: float32 [B, S], what the network is shown: the value, or MASK_VALUE.
      target: float32 [B, S], the true value.
      hidden: bool [B, S].
    """

    gene_id: Array
    value: Array
    target: Array
    hidden: Array


class ScGPT(nnx.Module):
    """The network, its encoding and its objective.

    Args:
      config: hyper-parameters.
      n_genes: size of the vocabulary. Ids n_genes, n_genes + 1 and n_genes + 2 of the embedding table
        are ``<pad>``, ``<cls>`` and ``<eoc>``, as upstream appends them.
    """

    def __init__(self, config: ScGPTConfig, n_genes: int, *, rngs: nnx.Rngs):
        c, d = config, config.d_model
        dtype = jnp.dtype(c.dtype)
        self.config, self.n_genes = config, n_genes
        self.deterministic = False
        uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -0.1, 0.1)  # noqa: E731
        self.gene = nnx.Embed(
            n_genes + 3, d, embedding_init=uniform, rngs=rngs, embedding_metadata={"axes": ("vocab", "embed")}
        )
        self.gene_norm = layer_norm(d, rngs=rngs)
        self.value = MLP((1, d, d), activation="relu", dtype=dtype, rngs=rngs)
        self.value_norm = layer_norm(d, rngs=rngs)
        self.transformer = Stack(
            c.n_layers,
            lambda r: Block(
                d, c.n_heads, c.d_ff, norm=c.norm, dropout=c.dropout, backend=c.attention, dtype=dtype, rngs=r
            ),
            remat=c.remat,
            rngs=rngs,
        )
        if c.norm == "pre":
            self.final_norm = layer_norm(d, rngs=rngs)
        self.decoder = MLP((d, d, d, 1), dtype=dtype, rngs=rngs)
        if c.mvc_weight:
            self.mvc_query = linear(d, d, ("embed", "embed_out"), dtype=dtype, rngs=rngs)
            # from zero: the product of two random vectors would start far outside the range of values
            self.mvc_product = linear(
                d,
                d,
                ("embed", "embed_out"),
                use_bias=False,
                dtype=dtype,
                rngs=rngs,
                kernel_init=nnx.initializers.zeros,
            )
        self.target_sum = Buffer(jnp.zeros(n_genes), axes=("vocab",))
        self.target_count = Buffer(jnp.zeros(n_genes), axes=("vocab",))

    # ---------------------------------------------------------------- encode
    def values(self, batch: CellBatch, keys: Array | None) -> Array:
        """float32 [B, L]: what a count is to this model; ties at random where ``keys`` are given."""
        c = self.config
        if c.values == "log1p":
            return c.value_scale * log1p(normalize_total(batch.count, batch.depth))
        tie: Tie = "mid" if c.tie == "random" and keys is None else c.tie
        return c.value_scale * bin_quantiles(batch.count, c.n_bins, tie=tie, keys=keys, gene_id=batch.gene_id)

    def encode(self, batch: CellBatch, key: Array) -> Tokens:
        """Training tokens: bins, a random choice of genes, hidden values; all by (key, row, gene)."""
        c = self.config
        bins, choice, fraction, mask = (row_keys(k, batch.row) for k in jax.random.split(key, 4))
        # values come before the choice of genes: a gene's bin is its rank in the whole cell
        target = self.values(batch, bins)
        gene_id, target = select_genes(batch.gene_id, target, c.max_length - 1, choice)
        fractions = jnp.asarray(c.mask_fractions, jnp.float32)
        drawn = jax.vmap(lambda k: jax.random.choice(k, fractions))(fraction)
        hidden = mask_genes(gene_id, drawn, mask)
        # slots have no order of their own: with the hidden genes first, the heads can skip the rest
        slot = jnp.argsort(~hidden, axis=-1)
        gene_id, target, hidden = (jnp.take_along_axis(x, slot, axis=-1) for x in (gene_id, target, hidden))
        return Tokens(gene_id, jnp.where(hidden, MASK_VALUE, target), target, hidden)

    # --------------------------------------------------------------- network
    def gene_embedding(self, gene_id: Array) -> Array:
        """float [..., E]: LayerNorm of the table's row; id -1 is padding."""
        return self.gene_norm(self.gene(jnp.where(gene_id < 0, self.n_genes, gene_id)))

    def __call__(self, tokens: Tokens, keys: Array | None = None) -> tuple[Array, Array]:
        """Runs the transformer.

        Args:
          tokens: from :meth:`encode`.
          keys: dropout keys [B], or None.

        Returns:
          ``(cell, genes)``: [B, E], the output at CLS, and [B, S, E].
        """
        dtype = jnp.dtype(self.config.dtype)
        batch = tokens.gene_id.shape[0]
        gene_id = jnp.concatenate([jnp.full((batch, 1), self.n_genes + 1), tokens.gene_id], axis=1)
        value = jnp.concatenate([jnp.full((batch, 1), CLS_VALUE), tokens.value], axis=1)
        embedded = self.value_norm(self.value(jnp.minimum(value, MAX_VALUE)[..., None]))
        x = self.gene_embedding(gene_id) + dropout(embedded, self.config.dropout, fold(keys, 0))
        x = self.transformer(x.astype(dtype), gene_id >= 0, keys=fold(keys, 1))
        if self.config.norm == "pre":
            x = self.final_norm(x)
        return x[:, 0], x[:, 1:]

    def predict(self, genes: Array) -> Array:
        """[B, S]: the value of each gene from its own output (masked-value regression)."""
        return self.decoder(genes)[..., 0]

    def predict_from_cell(self, cell: Array, gene_id: Array) -> Array:
        """[B, S]: the value of each gene from the cell embedding and the gene's name (MVC)."""
        query = jax.nn.sigmoid(self.mvc_query(self.gene_embedding(gene_id).astype(cell.dtype)))
        return jnp.einsum("bse,be->bs", self.mvc_product(query), cell)

    # ------------------------------------------------------------- objective
    def loss(self, batch: CellBatch, key: Array) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
        """Squared error of the hidden values, from the gene outputs plus from the cell embedding.

        Also brings up to date the running mean of each gene's value, whose own error on the same
        targets ("gene_mean_mse") is the no-information baseline.
        """
        encode_key, drop_key = jax.random.split(key)
        tokens = self.encode(batch, encode_key)
        cell, genes = self(tokens, None if self.deterministic else row_keys(drop_key, batch.row))
        n = max(int(tokens.gene_id.shape[1] * max(self.config.mask_fractions) + 1e-4), 1)
        gene_id, target = tokens.gene_id[:, :n], tokens.target[:, :n]
        mask = tokens.hidden[:, :n] * batch.weight[:, None]
        masked, weight = masked_mse(self.predict(genes[:, :n]), target, mask)
        metrics = {"masked_mse": (masked, weight)}
        total = masked
        if self.config.mvc_weight:
            mvc, _ = masked_mse(self.predict_from_cell(cell, gene_id), target, mask)
            metrics["mvc_mse"] = (mvc, weight)
            total = total + self.config.mvc_weight * mvc
        metrics["gene_mean_mse"] = masked_mse(self.gene_mean(gene_id), target, mask)
        self._update_gene_mean(tokens, batch.weight)
        return total, weight, metrics

    def gene_mean(self, gene_id: Array) -> Array:
        """float32, shape of ``gene_id``: mean value of each gene in the batches seen so far."""
        overall = self.target_sum[...].sum() / jnp.maximum(self.target_count[...].sum(), 1.0)
        mean = jnp.where(
            self.target_count[...] > 0,
            self.target_sum[...] / jnp.maximum(self.target_count[...], 1.0),
            overall,
        )
        return mean[jnp.maximum(gene_id, 0)]

    def _update_gene_mean(self, tokens: Tokens, weight: Array) -> None:
        seen = (tokens.gene_id >= 0) * weight[:, None]
        slot = jnp.maximum(tokens.gene_id, 0)
        # float32 cannot count past 2**24: from 2**20 on, older batches weigh half as much
        keep = jnp.where(self.target_count[...] > 2**20, 0.5, 1.0)
        for buffer, new in ((self.target_sum, seen * tokens.target), (self.target_count, seen)):
            buffer[...] = buffer[...] * keep + jnp.zeros(self.n_genes).at[slot].add(new)

    # ------------------------------------------------------------- embedding
    def embed(self, batch: CellBatch) -> Array:
        """float32 [B, E]: the output at CLS, scaled to length 1, of the most expressed genes, none hidden."""
        value = self.values(batch, None)
        same = jnp.zeros_like(batch.row)  # ties between genes fall alike in every cell, whatever its number
        keys = row_keys(jax.random.key(0), same)
        gene_id, value = select_genes(batch.gene_id, value, self.config.max_length - 1, keys, method="top")
        cell, _ = self(Tokens(gene_id, value, value, gene_id < -1))
        cell = cell.astype(jnp.float32)
        return cell / jnp.linalg.norm(cell, axis=-1, keepdims=True)
