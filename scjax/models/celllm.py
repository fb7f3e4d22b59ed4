"""CellLM (Zhao et al., 2023): the expressed genes of a cell under one CLS token, in a long Performer.

Encode: each expressed gene's count becomes floor(log2(1 + counts per 10,000)), at most 5; some of those that
are not 0 are hidden. Network: token embedding + gene embedding (from a graph of protein interactions, not
trained), Performer layers. Loss: the bins of the hidden genes; whether the cell is of a tumour, from
CLS; and which of all cells of the batch is the same under another dropout, from CLS.

The authors released the network, not the pretraining: what their paper does not say is marked "inferred".
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
    hidden_capacity,
    hidden_first,
    log2_bins,
    replace_hidden,
    row_keys,
    select_genes,
    to_all_genes,
)
from scjax.nn.context import Context, ContextToken, Given
from scjax.nn.embedder import GeneEmbedder, GeneTable
from scjax.nn.heads import GeneMapHead
from scjax.nn.layers import Remat, Stack, layer_norm, linear
from scjax.nn.module import Buffer
from scjax.nn.performer import PadMask, PerformerBlock, Stabiliser, count_call, n_features
from scjax.nn.work import favor_stack
from scjax.objectives import (
    count_bins,
    divide_and_conquer,
    frequency_cross_entropy,
    info_nce,
    masked_cross_entropy,
)
from scjax.types import CellBatch

N_BINS = 6  # tokens 0 .. 5
CLS = 6
PAD = 7  # also what a hidden token is shown as (inferred: no other token of the released table is free)
N_TOKENS = 8

Sums = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class CellLMConfig:
    """The published model but for the gene table; every field may be changed in a config file.

    Attributes:
      d_model, n_heads, d_head, n_layers, d_ff: the Performer; its inner width is n_heads * d_head.
      dropout: in training; the contrast is between two draws of it. The released configuration has 0, with
        which two views of a cell would be one; 0.1 is SimCSE's (inferred).
      gene_table: see :class:`scjax.nn.embedder.GeneTable`; "frozen" as published, where CLS has the vector of
        ones and padding that of zeros.
      context: further tokens of what is known of a cell, see :class:`scjax.nn.context.ContextToken`.
      max_length: tokens a cell, CLS included.
      truncate: which genes of a longer cell stay: the most expressed ones ("top"), or those that come
        first in the vocabulary ("index"), as published.
      stabiliser, pad_mask: see :func:`scjax.nn.performer.favor`; "global" and "values" as published. With
        "values" padding counts, so that cells are padded to ``max_length``, as published.
      redraw_every: training steps after which the random projections are drawn anew; 0 for
        never.
      mask_fraction: share of a cell's tokens that are not 0 to hide, rounded up (inferred: scBERT's).
      replace_fraction: share of the hidden tokens that are shown as PAD; the others as they are (inferred:
        scBERT's).
      label: column of labels that tell tumour from normal tissue; "" leaves this objective out. A cell with
        an unknown label has no part in it. ``data.labels`` must name the column too.
      tumour_codes: codes of ``label`` that mean a tumour; the others mean normal tissue.
      contrast_weight: weight of the contrast; 0 leaves it out. The weights of the others are 1 (inferred).
      temperature: of the contrast (inferred: SimCSE's).
      parts: how many parts of a batch are encoded one after the other, at the memory of one; the gradient
        is that of the whole batch. See :func:`scjax.objectives.divide_and_conquer`. ``train.accumulate`` is
        no substitute: it would contrast the cells of each micro-batch among themselves.
      n_outputs: outputs of the published annotation head, which takes the place of the bins'; 0 for none.
      remat: see :class:`scjax.nn.layers.Stack`.
      dtype: "float32" or "bfloat16", of activations; parameters are float32.
    """

    d_model: int = 512
    n_heads: int = 16
    d_head: int = 64
    n_layers: int = 10
    d_ff: int = 2048
    dropout: float = 0.1
    gene_table: GeneTable = GeneTable()
    context: dict[str, ContextToken] = dataclasses.field(default_factory=dict, hash=False)
    max_length: int = 6000
    truncate: Literal["top", "index"] = "top"
    stabiliser: Stabiliser = "head"
    pad_mask: PadMask = "keys"
    redraw_every: int = 1000
    mask_fraction: float = 0.15
    replace_fraction: float = 0.9
    label: str = ""
    tumour_codes: tuple[int, ...] = ()
    contrast_weight: float = 1.0
    temperature: float = 0.05
    parts: int = 1
    n_outputs: int = 0
    remat: Remat = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        within(self, dropout=(0, 0.99), redraw_every=(0, INF), n_outputs=(0, INF))
        within(self, contrast_weight=(0, INF))
        if not (0 < self.mask_fraction < 1 and 0 <= self.replace_fraction <= 1):
            raise ValueError(
                f"mask_fraction = {self.mask_fraction} must lie between 0 and 1, replace_fraction = "
                f"{self.replace_fraction} in [0, 1]"
            )
        if self.max_length < 2:
            raise ValueError(f"max_length = {self.max_length} leaves no room for a gene beside CLS")
        if self.truncate not in ("top", "index"):
            raise ValueError(f'truncate is "top" or "index", not {self.truncate!r}')
        if self.contrast_weight and not self.dropout:
            raise ValueError("without dropout two views of a cell are one: set contrast_weight = 0")
        if self.temperature <= 0 or self.parts < 1:
            raise ValueError(
                f"temperature = {self.temperature} must be positive and parts = {self.parts} at least 1"
            )
        if min(self.tumour_codes, default=0) < 0:
            raise ValueError(
                f"tumour_codes = {self.tumour_codes}: codes count from 0; -1 is an unknown label"
            )
        if bool(self.label) != bool(self.tumour_codes):
            raise ValueError(
                f"label = {self.label!r} and tumour_codes = {self.tumour_codes}: a column of labels goes "
                "with its codes that mean a tumour"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What the network reads: S gene slots a cell, the hidden ones first.

    Attributes:
      gene_id: int32 [B, S]; -1 where padded.
      shown: int32 [B, S], what the network is shown: the bin, or PAD.
      target: int32 [B, S], the bin.
      hidden: bool [B, S].
      context: what is known of the cells beside, see :class:`scjax.nn.context.Context`.
    """

    gene_id: Array
    shown: Array
    target: Array
    hidden: Array
    context: Given = dataclasses.field(default_factory=dict)


class CellLM(nnx.Module):
    """The network, its encoding and its objectives.

    Args:
      config: hyper-parameters.
      n_genes: size of the vocabulary. Ids n_genes and n_genes + 1 of the gene embedding are CLS and padding.
    """

    WHOLE_CELLS = True  # library size and depths are sums over all genes of the vocabulary
    READOUTS = ()  # see scjax.train.width

    def __init__(self, config: CellLMConfig, n_genes: int, *, rngs: nnx.Rngs):
        c, d = config, config.d_model
        dtype = jnp.dtype(c.dtype)
        self.config, self.n_genes = config, n_genes
        self.deterministic = False
        init = nnx.initializers.normal(1.0)  # torch's, of the original's tables
        self.token = nnx.Param(init(rngs.params(), (N_TOKENS, d), jnp.float32), axes=(None, "embed"))
        self.gene = GeneEmbedder(n_genes, 2, d, c.gene_table, init=init, rngs=rngs)
        if c.gene_table.kind == "frozen":
            self.gene.special[...] = jnp.stack([jnp.ones(d), jnp.zeros(d)])
        self.performer = Stack(
            c.n_layers,
            lambda r: PerformerBlock(
                d,
                c.n_heads,
                c.d_head,
                c.d_ff,
                dropout=c.dropout,
                stabiliser=c.stabiliser,
                mask=c.pad_mask,
                dtype=dtype,
                rngs=r,
            ),
            remat=c.remat,
            rngs=rngs,
        )
        self.norm = layer_norm(d, rngs=rngs)
        if c.n_outputs:
            self.head = GeneMapHead(d, n_genes + 1, c.n_outputs, rngs=rngs)
        else:
            self.bins = linear(d, N_TOKENS, ("embed", None), rngs=rngs)
            if c.label:
                self.tumour = linear(d, 1, ("embed", None), rngs=rngs)
        self.context = Context(c.context, d, dtype=dtype, rngs=rngs)
        self.bin_count = Buffer(jnp.zeros((n_genes, N_BINS)), axes=("vocab", None))
        self.calls = Buffer(jnp.zeros((), jnp.int32))

    @staticmethod
    def compares_cells(config: CellLMConfig) -> bool:
        """Whether a loss depends on which cells are in a micro-batch together."""
        return config.contrast_weight > 0 or config.stabiliser == "global"

    @staticmethod
    def tables(config: CellLMConfig) -> dict[str, str]:
        """Values of genes from outside, see :mod:`scjax.train.tables`."""
        return config.gene_table.wanted()

    # ---------------------------------------------------------------- encode
    def encode(self, batch: CellBatch, key: Array) -> Tokens:
        """Training tokens; which genes are kept and hidden is drawn by (key, row, gene)."""
        c = self.config
        ties, choice, shown = (row_keys(k, batch.row) for k in jax.random.split(key, 3))
        gene_id, token = self.bins_of(batch, ties)
        hidden, gene_id, token = hidden_first(choice, c.mask_fraction, token > 0, gene_id, token)
        visible = replace_hidden(shown, hidden, gene_id, token, PAD, c.replace_fraction)
        context = self.context.read(batch, None if self.deterministic else key, required=True)
        return Tokens(gene_id, visible, token, hidden, context)

    def whole(self, batch: CellBatch) -> Tokens:
        """Tokens of which none is hidden."""
        same = jnp.zeros_like(batch.row)  # ties between genes fall alike in every cell, whatever its number
        gene_id, token = self.bins_of(batch, row_keys(jax.random.key(0), same))
        return Tokens(gene_id, token, token, gene_id < -1, self.context.read(batch))

    def bins_of(self, batch: CellBatch, ties: Array) -> tuple[Array, Array]:
        """``(gene_id, token)`` int32 [B, S] of the genes that fit into ``max_length``."""
        c, room = self.config, self.config.max_length - 1
        gene_id, count = batch.gene_id, batch.count
        if gene_id.shape[1] > room and c.truncate == "index":
            slot = jnp.argsort(jnp.where(gene_id < 0, self.n_genes, gene_id), axis=1)[:, :room]
            gene_id, count = (jnp.take_along_axis(x, slot, axis=1) for x in (gene_id, count))
        else:
            gene_id, count = select_genes(gene_id, count, room, ties, method="top")
        token = log2_bins(count, batch.count.sum(-1), n_bins=N_BINS)
        if c.pad_mask == "values":
            padding = ((0, 0), (0, room - gene_id.shape[1]))
            gene_id, token = jnp.pad(gene_id, padding, constant_values=-1), jnp.pad(token, padding)
        return gene_id, token

    # --------------------------------------------------------------- network
    def __call__(self, tokens: Tokens, keys: Array | None = None) -> tuple[Array, Array]:
        """Runs the Performer.

        Args:
          tokens: from :meth:`encode`.
          keys: dropout keys [B], or None.

        Returns:
          ``(cell, genes)``: [B, E], the output at CLS, and [B, S, E]; not yet normalised.
        """
        n = self.n_genes
        valid = tokens.gene_id >= 0
        first = ((0, 0), (1, 0))
        gene_id = jnp.pad(jnp.where(valid, tokens.gene_id, n + 1), first, constant_values=n)
        token = jnp.pad(jnp.where(valid, tokens.shown, PAD), first, constant_values=CLS)
        # a product instead of a look-up: its gradient adds up without a scatter
        x = jnp.einsum("bsk,ke->bse", jax.nn.one_hot(token, N_TOKENS), self.token[...], precision="highest")
        x = (x + self.gene(gene_id)).astype(jnp.dtype(self.config.dtype))
        valid = jnp.pad(valid, first, constant_values=True)
        x, valid = self.context.beside(x, valid, tokens.context, self.gene)
        x = self.performer(x, valid, keys=keys)
        return x[:, 0], x[:, 1 : token.shape[1]]

    def predict(self, genes: Array) -> Array:
        """float32 [..., N_TOKENS]: logits of the bins from the Performer's outputs [..., E]."""
        return self.bins(self.norm(genes))

    def predict_cell(self, batch: CellBatch) -> Array:
        """float32 [B, n_outputs]: the published head over CLS and the expressed genes."""
        if not self.config.n_outputs:
            raise ValueError("this model has no head of a cell: set n_outputs")
        tokens = self.whole(batch)
        cell, genes = self(tokens)
        place = jnp.pad(tokens.gene_id, ((0, 0), (1, 0)), constant_values=self.n_genes)
        return self.head(self.norm(jnp.concatenate([cell[:, None], genes], axis=1)), place)

    # ------------------------------------------------------------- objective
    def loss(self, batch: CellBatch, key: Array) -> tuple[Sums, Sums, dict[str, tuple[Array, Array]]]:
        """Sums and weights of three objectives: "masked", and "tumour" and "contrast" where configured.

        Both views of a cell hide the same genes and are both asked for them, so that the second view costs
        nothing beside the contrast. Without dropout, in evaluation, one view is both.

        Also counts, in training, how often each gene has had each bin; the cross-entropy of these
        frequencies on the same targets ("frequency_ce") is the no-information baseline.
        """
        c = self.config
        if c.n_outputs:
            raise ValueError("with n_outputs the published head took the place of the bins': no pretraining")
        encode_key, drop_key, redraw_key = jax.random.split(key, 3)
        if not self.deterministic:
            count_call(self.performer, self.calls, redraw_key, c.redraw_every)
        tokens = self.encode(batch, encode_key)
        n_views = 2 if c.contrast_weight and not self.deterministic else 1
        n = hidden_capacity(tokens.gene_id.shape[1], c.mask_fraction)

        mask = tokens.hidden[:, :n] * batch.weight[:, None]

        def part(rows: tuple[Tokens, Array, Array]) -> tuple[Array, Array]:
            """``(normalised CLS outputs [b, views, E], cross-entropy of the masked bins)`` of some cells."""
            tokens, row, mask = jax.tree.map(lambda x: jnp.repeat(x, n_views, axis=0), rows)
            keys = None
            if not self.deterministic:
                view = jnp.arange(row.shape[0], dtype=jnp.uint32) % n_views
                keys = jax.vmap(jax.random.fold_in)(row_keys(drop_key, row), view)
            cell, genes = self(tokens, keys)
            masked, _ = masked_cross_entropy(self.predict(genes[:, :n]), tokens.target[:, :n], mask)
            return self.norm(cell).reshape(-1, n_views, c.d_model), masked

        cells, masked = divide_and_conquer(part, (tokens, batch.row, mask), c.parts)
        sums, weights = {"masked": masked}, {"masked": n_views * mask.sum()}
        metrics = {
            "masked_ce": (sums["masked"], weights["masked"]),
            "frequency_ce": frequency_cross_entropy(
                self.bin_count[...], tokens.gene_id[:, :n], tokens.target[:, :n], mask
            ),
        }
        if c.label:
            metrics["tumour_ce"] = self.discriminate(cells, batch)
            sums["tumour"], weights["tumour"] = metrics["tumour_ce"]
        if c.contrast_weight:
            metrics["contrast_ce"] = info_nce(cells[:, 0], cells[:, -1], batch.weight, c.temperature)
            sums["contrast"], weights["contrast"] = metrics["contrast_ce"]
            sums["contrast"] = c.contrast_weight * sums["contrast"]
        if not self.deterministic:
            # only what may be hidden is counted: not the 0
            true = to_all_genes(tokens.gene_id, tokens.target, self.n_genes)
            self.bin_count[...] = count_bins(self.bin_count[...], jnp.where(true > 0, true, -1), batch.weight)
        return sums, weights, metrics

    def discriminate(self, cells_BVE: Array, batch: CellBatch) -> tuple[Array, Array]:
        """Binary cross-entropy of tumour against normal, from each view, over the cells of known label."""
        c = self.config
        if c.label not in batch.label:
            raise ValueError(
                f"model.label is {c.label!r}, but batches carry the labels {sorted(batch.label)}; name it "
                "in data.labels too"
            )
        code = batch.label[c.label]
        weight = ((code >= 0) * batch.weight)[:, None]
        logit = self.tumour(cells_BVE)[..., 0]
        sign = jnp.where(jnp.isin(code, jnp.asarray(c.tumour_codes)), 1.0, -1.0)[:, None]
        weight = jnp.broadcast_to(weight, logit.shape)
        return (weight * jax.nn.softplus(-sign * logit)).sum(), weight.sum()

    def work(self, n_genes: Array) -> tuple[Array, Array]:
        """``(tokens, operations)`` [B] of a training step, see :mod:`scjax.nn.work`: two views of a cell are
        twice the operations and the same tokens."""
        c = self.config
        tokens = jnp.minimum(n_genes, c.max_length - 1) + 1 + self.context.n_tokens
        views = 1 + (c.contrast_weight > 0)
        width = (c.d_model, c.n_heads, c.d_head, c.d_ff, c.n_layers)
        return tokens, favor_stack(views * tokens, *width, n_features(c.d_head)) + views * self.context.work()

    # ------------------------------------------------------------- embedding
    def embed(self, batch: CellBatch, keys: Array | None = None) -> Array:
        """float32 [B, E]: the output at CLS; nothing is hidden. ``keys`` [B] of dropout, or None."""
        cell, _ = self(self.whole(batch), keys)
        return self.norm(cell)

    def states(self, batch: CellBatch, keys: Array | None = None) -> tuple[Array, Array]:
        """``(gene_id, states)``: int32 [B, S], -1 where padded, and float32 [B, S, E]; nothing is hidden."""
        tokens = self.whole(batch)
        return tokens.gene_id, self.norm(self(tokens, keys)[1])
