"""scFoundation (Hao et al., Nature Methods 2024): a deep look at what is expressed, a cheap one at all genes.

Encode: log-normalised values; the cell may first be thinned to a lower depth. Two tokens tell of depth:
S, how many counts the network is shown, and T, how many the prediction is for. Network: a transformer
reads the expressed genes that are not hidden, T and S; a Performer reads all genes, where the encoder's
outputs stand at the genes it saw. Loss: the values of the hidden genes as they were before thinning.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.config import INF, within
from scjax.encoding import (
    depth_token,
    gene_uniform,
    hidden_capacity,
    hidden_first,
    log1p,
    normalize_total,
    row_keys,
    thin_counts,
    thinning_rate,
    to_all_genes,
)
from scjax.nn.attention import Backend
from scjax.nn.baseline import GeneMean
from scjax.nn.context import Context, ContextToken, Given
from scjax.nn.embedder import GeneEmbedder, GeneTable
from scjax.nn.heads import PooledHead
from scjax.nn.layers import Block, Remat, Stack, layer_norm, linear
from scjax.nn.module import Buffer
from scjax.nn.performer import PerformerBlock, Stabiliser, count_call, n_features
from scjax.nn.soft_bins import SoftBins
from scjax.nn.work import dense, favor_stack, softmax_stack
from scjax.objectives import masked_mse
from scjax.parallel.layout import map_cells, top_k
from scjax.types import CellBatch

Decoding = Literal["auto", "batched", "cellwise"]


@dataclasses.dataclass(frozen=True)
class ScFoundationConfig:
    """The published 100M model; every field may be changed in a config file.

    Attributes:
      d_model, n_heads, n_layers, d_ff, dropout: the encoder, a post-norm transformer.
      encoder_length: genes the encoder reads; of cells with more, the most expressed. The others are
        shown to the decoder alone.
      decoder_d_model, decoder_n_heads, decoder_d_head, decoder_n_layers, decoder_d_ff: the Performer.
      stabiliser: see :func:`scjax.nn.performer.favor`; "global" as published.
      redraw_every: training steps after which the Performer's projections are drawn anew; 0 for never.
      n_bins, bin_alpha: of the value embedding, see :class:`scjax.nn.soft_bins.SoftBins`.
      gene_table: see :class:`scjax.nn.embedder.GeneTable`.
      context: further tokens of what is known of a cell, see :class:`scjax.nn.context.ContextToken`; the
        encoder reads them.
      mask_fraction, zero_mask_fraction: share of the expressed genes, and of the others, to predict.
      replace_fraction, random_fraction: share of the hidden genes that the decoder sees as hidden, and
        with a random value (uniform from 0 to the cell's largest); the rest keep their own. The
        encoder sees none of them.
      thinning: probability that a cell is thinned.
      thinning_beta, thinning_min_depth: see :func:`scjax.encoding.thinning_rate`.
      target: T for an embedding: "same" as S, "t4" for 10**4 counts, "f5" for 5 times those of the
        cell, "a5" for 10**5 times those.
      pool: cell embedding: "all" joins the outputs at S and T with maximum and mean over the genes
        (4 d_model wide), "max" is the maximum over genes, T and S.
      pool_pads: take maximum and mean over the padding too, and leave T and S out of the annotation
        head, as upstream's fine-tuning does.
      n_outputs: classes of the annotation head; 0 for none.
      attention: backend, see :func:`scjax.nn.attention.attention`.
      decoding: "cellwise" maps the decoder over the cells, each of them recomputed in the backward pass: the
        activations of all genes exist for one cell of a device; "batched"; "auto", cellwise on a lone CPU.
      remat: see :class:`scjax.nn.layers.Stack`; of encoder and decoder.
      dtype: "float32" or "bfloat16", of activations; parameters are float32.
    """

    d_model: int = 768
    n_heads: int = 12
    n_layers: int = 12
    d_ff: int = 3072
    dropout: float = 0.1
    encoder_length: int = 15_000
    decoder_d_model: int = 512
    decoder_n_heads: int = 8
    decoder_d_head: int = 64
    decoder_n_layers: int = 6
    decoder_d_ff: int = 2048
    stabiliser: Stabiliser = "head"
    redraw_every: int = 1000
    n_bins: int = 100
    bin_alpha: float = 1.0
    gene_table: GeneTable = GeneTable()
    context: dict[str, ContextToken] = dataclasses.field(default_factory=dict, hash=False)
    mask_fraction: float = 0.3
    zero_mask_fraction: float = 0.03
    replace_fraction: float = 0.8
    random_fraction: float = 0.1
    thinning: float = 0.5
    thinning_beta: tuple[float, float] = (2.0, 2.0)
    thinning_min_depth: float = 1000.0
    target: str = "same"
    pool: Literal["all", "max"] = "all"
    pool_pads: bool = False
    n_outputs: int = 0
    attention: Backend = "auto"
    decoding: Decoding = "auto"
    remat: Remat = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        within(self, dropout=(0, 0.99), redraw_every=(0, INF), n_outputs=(0, INF))
        within(self, thinning=(0, 1), n_bins=(2, INF))
        if min(self.thinning_beta) <= 0:
            raise ValueError(f"thinning_beta = {self.thinning_beta}: both must be positive")
        if not (0 < self.mask_fraction < 1 and 0 <= self.zero_mask_fraction < 1):
            raise ValueError(
                f"mask_fraction = {self.mask_fraction} must lie between 0 and 1, zero_mask_fraction = "
                f"{self.zero_mask_fraction} in [0, 1)"
            )
        shares = (self.replace_fraction, self.random_fraction)
        if min(shares) < 0 or sum(shares) > 1 + 1e-6:
            raise ValueError(f"replace_fraction, random_fraction = {shares} are shares of the hidden genes")
        if self.encoder_length < 1:
            raise ValueError(f"encoder_length = {self.encoder_length}: the encoder needs a gene to read")
        if self.pool not in ("all", "max"):
            raise ValueError(f'pool is "all" or "max", not {self.pool!r}')
        if self.decoding == "cellwise" and self.stabiliser == "global":
            raise ValueError(
                'stabiliser = "global" looks at all cells together; decoding = "cellwise" at one'
            )
        depth_token(jnp.ones(1), self.target)  # complains of one that it does not know


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What the network reads: S genes through the encoder, D by their value in the decoder alone.

    Attributes:
      gene_id: int32 [B, S], genes that the encoder reads; -1 where padded.
      value: float32 [B, S], their log-normalised values.
      depth: float32 [B, 2], T and S: log10 counts.
      direct_id: int32 [B, D], genes that only the decoder is shown, the M hidden ones first; -1 where
        padded. Genes named nowhere are shown to it with the value 0.
      direct_value: float32 [B, D], what it is shown.
      direct_hidden: bool [B, D], True where it is shown the vector for a hidden value instead.
      target: float32 [B, M], true values of the hidden genes ``direct_id[:, :M]``.
      context: what is known of the cells beside, see :class:`scjax.nn.context.Context`.
    """

    gene_id: Array
    value: Array
    depth: Array
    direct_id: Array
    direct_value: Array
    direct_hidden: Array
    target: Array
    context: Given = dataclasses.field(default_factory=dict)


class ScFoundation(nnx.Module):
    """The network, its encoding and its objective.

    Args:
      config: hyper-parameters.
      n_genes: size of the vocabulary; of the gene embedding the three ids after it are T, S and padding.
    """

    WHOLE_CELLS = True  # library size and depths are sums over all genes of the vocabulary
    READOUTS = ()  # see scjax.train.width

    def __init__(self, config: ScFoundationConfig, n_genes: int, *, rngs: nnx.Rngs):
        c, d = config, config.d_model
        dtype = jnp.dtype(c.dtype)
        self.config, self.n_genes = config, n_genes
        self.deterministic = False
        init = nnx.initializers.normal(1.0)
        self.gene = GeneEmbedder(n_genes, 3, d, c.gene_table, init=init, rngs=rngs)
        self.value = SoftBins(c.n_bins, d, alpha=c.bin_alpha, dtype=dtype, rngs=rngs)
        self.encoder = Stack(
            c.n_layers,
            lambda r: Block(
                d, c.n_heads, c.d_ff, dropout=c.dropout, backend=c.attention, dtype=dtype, rngs=r
            ),
            remat=c.remat,
            rngs=rngs,
        )
        self.encoder_norm = layer_norm(d, rngs=rngs)
        width = c.decoder_d_model
        self.to_decoder = linear(d, width, ("embed", "embed_out"), dtype=dtype, rngs=rngs)
        self.decoder = Stack(
            c.decoder_n_layers,
            lambda r: PerformerBlock(
                width,
                c.decoder_n_heads,
                c.decoder_d_head,
                c.decoder_d_ff,
                qkv_bias=True,
                stabiliser=c.stabiliser,
                dtype=dtype,
                rngs=r,
            ),
            remat=c.remat,
            rngs=rngs,
        )
        self.decoder_norm = layer_norm(width, rngs=rngs)
        self.norm = layer_norm(width, rngs=rngs)
        # from zero: a random one would first have to be unlearned, gene by gene
        self.to_value = linear(width, 1, ("embed", None), kernel_init=nnx.initializers.zeros, rngs=rngs)
        if c.n_outputs:
            self.head = PooledHead(d, 256, c.n_outputs, rngs=rngs)
        self.context = Context(c.context, d, dtype=dtype, rngs=rngs)
        self.calls = Buffer(jnp.zeros((), jnp.int32))  # of the training loss: steps done
        self.gene_mean = GeneMean(n_genes)  # of a gene where it was hidden

    # whether a loss depends on which cells are in a micro-batch together
    compares_cells = staticmethod(lambda config: config.stabiliser == "global")

    @staticmethod
    def tables(config: ScFoundationConfig) -> dict[str, str]:
        """Buffers that a run fills from outside: path -> kind."""
        return config.gene_table.wanted()

    # ---------------------------------------------------------------- encode
    def encode(self, batch: CellBatch, key: Array) -> Tokens:
        """Training tokens: thinned cells, hidden genes; all by (key, row, gene)."""
        c = self.config
        share, thin, choice, action, random = (row_keys(k, batch.row) for k in jax.random.split(key, 5))
        count = jnp.where(batch.gene_id >= 0, batch.count, 0.0)
        total = count.sum(-1)
        rate = thinning_rate(
            total, share, probability=c.thinning, beta=c.thinning_beta, min_depth=c.thinning_min_depth
        )
        thinned = jnp.where(rate[:, None] < 1, thin_counts(count, rate, thin, batch.gene_id), count)
        value, truth = self.values(thinned), self.values(count)
        expressed = jnp.where(value > 0, batch.gene_id, -1)
        n = (expressed >= 0).sum(-1, keepdims=True)
        # expressed genes, the hidden ones first, the others closed up for the encoder
        chosen, gene_id, own, target = hidden_first(
            choice, c.mask_fraction, expressed >= 0, expressed, value, truth
        )
        length, capacity = gene_id.shape[1], hidden_capacity(gene_id.shape[1], c.mask_fraction)
        slot = chosen.sum(-1, keepdims=True) + jnp.arange(length - capacity + 1)
        shown_id, shown_value = (
            jnp.take_along_axis(x, jnp.minimum(slot, length - 1), axis=-1) for x in (gene_id, own)
        )
        shown_id = jnp.where(slot < n, shown_id, -1)

        # and some of all other genes, those that lost their last count in thinning among them
        size, zeros = self.n_genes, hidden_capacity(self.n_genes, c.zero_mask_fraction)
        everything = jnp.broadcast_to(jnp.arange(size), (len(n), size))
        drawn = gene_uniform(choice, everything)
        drawn = jnp.where(to_all_genes(expressed, jnp.ones_like(value), size) > 0, -1.0, drawn)
        _, zero_id = top_k(drawn, zeros)
        lost = jnp.take_along_axis(to_all_genes(batch.gene_id, truth, size), zero_id, axis=-1)
        n_zero = jnp.floor((size - n) * c.zero_mask_fraction + 1e-4)

        hidden_id = jnp.where(chosen, gene_id, -1)[:, :capacity]
        zero_id = jnp.where(jnp.arange(zeros) < n_zero, zero_id, -1)
        direct_id = jnp.concatenate([hidden_id, zero_id], axis=-1)
        own = jnp.concatenate([own[:, :capacity], jnp.zeros_like(lost)], axis=-1)
        target = jnp.concatenate([target[:, :capacity], lost], axis=-1)

        which = gene_uniform(action, direct_id) - c.replace_fraction
        another = gene_uniform(random, direct_id) * value.max(-1, keepdims=True)
        shown_as = jnp.where(which < c.random_fraction, another, own), which < 0
        depth = jnp.stack([depth_token(total), depth_token(thinned.sum(-1))], axis=-1)
        tokens = self._tokens(shown_id, shown_value, depth, choice, (direct_id, *shown_as, target))
        context = self.context.read(batch, None if self.deterministic else key, required=True)
        return dataclasses.replace(tokens, context=context)

    def whole(self, batch: CellBatch, target: str | None = None) -> Tokens:
        """Tokens of cells as they are, nothing thinned or hidden; ``target`` as in the config."""
        count = jnp.where(batch.gene_id >= 0, batch.count, 0.0)
        total = count.sum(-1)
        t = depth_token(total, self.config.target if target is None else target)
        depth = jnp.stack([t, depth_token(total)], axis=-1)
        value = self.values(count)
        # ties between genes fall alike in every cell, whatever its number
        keys = row_keys(jax.random.key(0), jnp.zeros_like(batch.row))
        none = jnp.zeros((count.shape[0], 0))
        nothing = (none.astype(jnp.int32), none, none > 0, none)
        tokens = self._tokens(jnp.where(value > 0, batch.gene_id, -1), value, depth, keys, nothing)
        return dataclasses.replace(tokens, context=self.context.read(batch))

    def values(self, count: Array) -> Array:
        """float32 [B, L]: log(1 + counts per 10,000 of the model's genes).

        The total is that of the slots, the model's own genes, as upstream's; ``batch.depth`` would
        count genes that the model does not know.
        """
        return log1p(normalize_total(count, count.sum(-1)))

    def _tokens(
        self, gene_id: Array, value: Array, depth: Array, keys: Array, direct: tuple[Array, ...]
    ) -> Tokens:
        """Adds to ``direct`` the genes beyond the encoder's length."""
        direct_id, direct_value, hidden, target = direct
        length = self.config.encoder_length
        if gene_id.shape[-1] > length:
            ties = gene_uniform(keys, gene_id)
            order = jnp.lexsort((ties, -value, gene_id < 0), axis=-1)
            gene_id, value = (jnp.take_along_axis(x, order, axis=-1) for x in (gene_id, value))
            direct_id = jnp.concatenate([direct_id, gene_id[:, length:]], axis=-1)
            direct_value = jnp.concatenate([direct_value, value[:, length:]], axis=-1)
            hidden = jnp.concatenate([hidden, gene_id[:, length:] < -1], axis=-1)
            gene_id, value = gene_id[:, :length], value[:, :length]
        return Tokens(gene_id, value, depth, direct_id, direct_value, hidden, target)

    # --------------------------------------------------------------- network
    def _with_depth(self, gene_id: Array) -> Array:
        """int32 [B, S + 2]: ``gene_id`` and the ids of T and S."""
        ends = jnp.arange(self.n_genes, self.n_genes + 2)
        return jnp.concatenate([gene_id, jnp.broadcast_to(ends, (len(gene_id), 2))], axis=1)

    def encoder_states(self, tokens: Tokens, keys: Array | None = None, *, depth: bool = True) -> Array:
        """[B, S + 2, E]: the encoder's output at the genes, at T and at S.

        Args:
          tokens: what to read.
          keys: dropout keys [B], or None.
          depth: False hides T and S from the genes.
        """
        gene_id = self._with_depth(tokens.gene_id)
        valid = gene_id >= 0
        value = self.value(jnp.concatenate([tokens.value, tokens.depth], axis=1), padding=~valid)
        x = value + self.gene(jnp.where(valid, gene_id, self.n_genes + 2)).astype(value.dtype)
        if not depth:
            valid = valid & (gene_id < self.n_genes)
        x, valid = self.context.beside(x, valid, tokens.context, self.gene)
        return self.encoder_norm(self.encoder(x, valid, keys=keys)[:, : gene_id.shape[1]]).astype(x.dtype)

    def decode(self, tokens: Tokens, encoded: Array, sites: Array) -> Array:
        """[B, M, D]: the decoder's output, both norms applied, at the genes ``sites`` int32 [B, M]."""
        c = self.config
        places = jnp.concatenate([self._with_depth(tokens.gene_id), tokens.direct_id], axis=1)
        shown = self.value(tokens.direct_value, hidden=tokens.direct_hidden)
        # The gene embedding is added a second time, and all goes through a linear map. Most genes have
        # the value 0, so that their input is the same in all cells: it is worked out once.
        known = jnp.concatenate([encoded, shown.astype(encoded.dtype)], axis=1)
        known = self.to_decoder(known + self.gene(jnp.maximum(places, 0)).astype(known.dtype))
        zero = self.gene(jnp.arange(self.n_genes + 2)) + self.value(jnp.zeros(()))
        zero = self.to_decoder(zero.astype(known.dtype))
        # each padding has a place of its own beyond the last: where none comes twice, no order is kept
        beyond = self.n_genes + 2 + jnp.arange(places.shape[1])
        places = jnp.where(places < 0, beyond, places)
        put = jax.vmap(lambda x, place, y: x.at[place].set(y, mode="drop", unique_indices=True))

        def some(cells: tuple[Array, Array, Array]) -> Array:
            known, places, sites = cells
            x = jnp.broadcast_to(zero, (known.shape[0], *zero.shape))
            x = self.decoder(put(x, places, known), None)
            x = jnp.take_along_axis(x, sites[..., None], axis=1)
            return self.norm(self.decoder_norm(x))

        cells = (known, places, jnp.maximum(sites, 0))
        cellwise = c.decoding == "cellwise"
        if c.decoding == "auto":
            lone = jax.default_backend() == "cpu" and jax.device_count() == 1
            cellwise = lone and c.stabiliser != "global"
        return map_cells(jax.checkpoint(some), cells) if cellwise else some(cells)

    def __call__(self, tokens: Tokens, keys: Array | None = None) -> tuple[Array, Array]:
        """Runs encoder and decoder.

        Args:
          tokens: from :meth:`encode`.
          keys: dropout keys [B], or None.

        Returns:
          ``(encoded, prediction)``: [B, S + 2, E], and float32 [B, M], the values of the hidden genes.
        """
        encoded = self.encoder_states(tokens, keys)
        sites = tokens.direct_id[:, : tokens.target.shape[1]]
        return encoded, self.predict(self.decode(tokens, encoded, sites))

    def predict(self, genes: Array) -> Array:
        """float32 [B, M]: the values of genes from the decoder's output at them."""
        return self.to_value(genes)[..., 0]

    # ------------------------------------------------------------- objective
    def loss(self, batch: CellBatch, key: Array) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
        """Squared error of the hidden genes' values, as they are without thinning.

        Also brings up to date the running mean of each gene's value where it was hidden, whose own
        error ("gene_mean_mse") is the no-information baseline, and the Performer's projections.
        """
        encode_key, drop_key, draw_key = jax.random.split(key, 3)
        tokens = self.encode(batch, encode_key)
        if not self.deterministic:
            count_call(self.decoder, self.calls, draw_key, self.config.redraw_every)
        keys = None if self.deterministic else row_keys(drop_key, batch.row)
        _, prediction = self(tokens, keys)
        hidden_id = tokens.direct_id[:, : tokens.target.shape[1]]
        mask = (hidden_id >= 0) * batch.weight[:, None]
        total, weight = masked_mse(prediction, tokens.target, mask)
        baseline = masked_mse(self.gene_mean(hidden_id), tokens.target, mask)
        if not self.deterministic:
            self.gene_mean.update(hidden_id, tokens.target, batch.weight)
        return total, weight, {"masked_mse": (total, weight), "gene_mean_mse": baseline}

    def work(self, n_genes: Array) -> tuple[Array, Array]:
        """``(tokens, operations)`` [B] of a training step, see :mod:`scjax.nn.work`. Every gene is a token, T
        and S are two more. A thinned cell is taken to lose genes as it loses counts; it loses fewer."""
        c, more = self.config, self.context.n_tokens
        every = jnp.full_like(n_genes, self.n_genes + 2)
        a, b = c.thinning_beta
        kept = n_genes * (1 - c.thinning * b / (a + b)) * (1 - c.mask_fraction)
        read = jnp.minimum(kept, c.encoder_length) + 2
        decoder = (c.decoder_d_model, c.decoder_n_heads, c.decoder_d_head, c.decoder_d_ff, c.decoder_n_layers)
        both = softmax_stack(read + more, c.d_model, c.d_ff, c.n_layers) + self.context.work()
        both += dense(read, c.d_model * c.decoder_d_model)
        return every + more, both + favor_stack(every, *decoder, n_features(c.decoder_d_head))

    # ------------------------------------------------------------- embedding
    def embed(self, batch: CellBatch, keys: Array | None = None, *, target: str | None = None) -> Array:
        """float32 [B, 4 E]: outputs at S and T, maximum and mean over the genes; [B, E] for pool "max".

        A cell without genes has maximum and mean 0. ``keys`` [B] of dropout, or None; ``target`` as in the
        config, whose own by default.
        """
        tokens = self.whole(batch, target)
        encoded = self.encoder_states(tokens, keys).astype(jnp.float32)
        genes, t, s = encoded[:, :-2], encoded[:, -2], encoded[:, -1]
        pooled = self._pooled(tokens, depth=True)
        if self.config.pool == "max":
            return _maximum(encoded, pooled)
        pooled = pooled[:, :-2]
        mean = jnp.where(pooled, genes, 0).sum(1) / jnp.maximum(pooled.sum(1), 1)
        return jnp.concatenate([s, t, _maximum(genes, pooled), mean], axis=-1)

    def _pooled(self, tokens: Tokens, *, depth: bool) -> Array:
        """bool [B, S + 2, 1]: the rows that pooling takes."""
        genes = jnp.full(tokens.gene_id.shape, True) if self.config.pool_pads else tokens.gene_id >= 0
        return jnp.pad(genes, ((0, 0), (0, 2)), constant_values=depth)[..., None]

    def states(self, batch: CellBatch, keys: Array | None = None) -> tuple[Array, Array]:
        """``(gene_id, states)``: int32 [B, S], -1 where padded, and [B, S, E], the encoder's outputs at the
        genes that it reads; nothing is hidden. :meth:`gene_states` are the decoder's, at all genes."""
        tokens = self.whole(batch)
        return tokens.gene_id, self.encoder_states(tokens, keys)[:, :-2]

    def gene_states(self, batch: CellBatch, target: str | None = None) -> Array:
        """float32 [B, n_genes, D]: each gene in the context of the cell; see :meth:`decode`."""
        tokens = self.whole(batch, target)
        everything = jnp.broadcast_to(jnp.arange(self.n_genes), (batch.gene_id.shape[0], self.n_genes))
        return self.decode(tokens, self.encoder_states(tokens), everything)

    def predict_expression(self, batch: CellBatch, target: str | None = None) -> Array:
        """float32 [B, n_genes]: log(1 + counts per 10,000) expected at the depth ``target``."""
        return self.predict(self.gene_states(batch, target))

    def predict_cell(self, batch: CellBatch, keys: Array | None = None) -> Array:
        """float32 [B, n_outputs]: logits of the annotation head; ``keys`` for dropout [B], or None."""
        tokens, depth = self.whole(batch), not self.config.pool_pads
        encoded = self.encoder_states(tokens, keys, depth=depth).astype(jnp.float32)
        top = _maximum(encoded, self._pooled(tokens, depth=depth))
        return self.head(top, batch.weight, train=not self.deterministic)


def _maximum(rows: Array, pooled: Array) -> Array:
    """float32 [B, E]: maximum of the rows [B, S, E] where ``pooled`` [B, S, 1]; 0 where there is none."""
    return jnp.where(pooled.any(1), jnp.where(pooled, rows, -jnp.inf).max(1), 0.0)
