"""scBERT (Yang et al., Nature Machine Intelligence 2022): every gene of the vocabulary is a token.

Encode: each gene's count becomes floor(log2(1 + counts per 10,000)), at most 5; a seventh of the tokens
that are not 0 is hidden. Network: token embedding + gene embedding (gene2vec, not trained), Performer layers
over all genes and one token more that stands for the cell. Loss: the bins of the hidden genes, classified.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.config import INF, within
from scjax.encoding import hidden_capacity, hidden_first, log2_bins, replace_hidden, row_keys, to_all_genes
from scjax.nn.context import Context, ContextToken, Given
from scjax.nn.embedder import GeneEmbedder, GeneTable
from scjax.nn.heads import GeneMapHead
from scjax.nn.layers import Remat, Stack, fold, layer_norm, linear
from scjax.nn.module import Buffer
from scjax.nn.performer import PerformerBlock, Stabiliser, count_call, n_features
from scjax.nn.work import favor_stack
from scjax.objectives import count_bins, frequency_cross_entropy, masked_cross_entropy
from scjax.types import CellBatch

N_BINS = 6  # tokens 0 .. 5
MASK = 6
N_TOKENS = 7


@dataclasses.dataclass(frozen=True)
class ScBERTConfig:
    """The published model but for the gene table; every field may be changed in a config file.

    Attributes:
      d_model, n_heads, d_head, n_layers, d_ff, dropout: the Performer; its inner width is n_heads * d_head.
      gene_table: see :class:`scjax.nn.embedder.GeneTable`; "frozen" (gene2vec, 200 wide) as published. The
        token that stands for the cell has the vector 0 there.
      context: further tokens of what is known of a cell, see :class:`scjax.nn.context.ContextToken`.
      stabiliser: see :func:`scjax.nn.performer.favor`; "global" as published.
      redraw_every: training steps after which the random projections are drawn anew; 0 for
        never.
      mask_fraction: share of a cell's tokens that are not 0 to hide, rounded up.
      replace_fraction: share of the hidden tokens that are shown as MASK; the others as they are.
      pool: cell embedding: "mean" of the outputs at the expressed genes, or "cls", that at the last token,
        which the published objective does not train.
      n_outputs: outputs of the published convolutional head, which takes the place of the bins'; 0 for none.
      remat: see :class:`scjax.nn.layers.Stack`.
      dtype: "float32" or "bfloat16", of activations; parameters are float32.
    """

    d_model: int = 200
    n_heads: int = 10
    d_head: int = 64
    n_layers: int = 6
    d_ff: int = 800
    dropout: float = 0.0
    gene_table: GeneTable = GeneTable()
    context: dict[str, ContextToken] = dataclasses.field(default_factory=dict, hash=False)
    stabiliser: Stabiliser = "head"
    redraw_every: int = 1000
    mask_fraction: float = 0.15
    replace_fraction: float = 0.9
    pool: Literal["mean", "cls"] = "mean"
    n_outputs: int = 0
    remat: Remat = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        within(self, dropout=(0, 0.99), redraw_every=(0, INF), n_outputs=(0, INF))
        if not (0 < self.mask_fraction < 1 and 0 <= self.replace_fraction <= 1):
            raise ValueError(
                f"mask_fraction = {self.mask_fraction} must lie between 0 and 1, replace_fraction = "
                f"{self.replace_fraction} in [0, 1]"
            )
        if self.pool not in ("mean", "cls"):
            raise ValueError(f'pool is "mean" or "cls", not {self.pool!r}')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What the network reads, and what it must predict.

    Attributes:
      shown: int32 [B, G + 1]: the token of each gene of the vocabulary, MASK where hidden; the last is the
        token that stands for the cell, 0.
      expressed: bool [B, G + 1]: genes with a count.
      true: int32 [B, G], tokens as they are.
      gene_id: int32 [B, M], the hidden genes, any others after them.
      target: int32 [B, M], their tokens.
      hidden: bool [B, M].
      context: what is known of the cells beside, see :class:`scjax.nn.context.Context`.
    """

    shown: Array
    expressed: Array
    true: Array
    gene_id: Array
    target: Array
    hidden: Array
    context: Given = dataclasses.field(default_factory=dict)


class ScBERT(nnx.Module):
    """The network, its encoding and its objective.

    Args:
      config: hyper-parameters.
      n_genes: size of the vocabulary G.
    """

    WHOLE_CELLS = True  # library size and depths are sums over all genes of the vocabulary
    READOUTS = ()  # see scjax.train.width

    def __init__(self, config: ScBERTConfig, n_genes: int, *, rngs: nnx.Rngs):
        c, d = config, config.d_model
        dtype = jnp.dtype(c.dtype)
        self.config, self.n_genes = config, n_genes
        self.deterministic = False
        init = nnx.initializers.normal(1.0)  # torch's, of the original's tables
        self.token = nnx.Param(init(rngs.params(), (N_TOKENS, d), jnp.float32), axes=(None, "embed"))
        self.gene = GeneEmbedder(n_genes, 1, d, c.gene_table, init=init, rngs=rngs)
        self.performer = Stack(
            c.n_layers,
            lambda r: PerformerBlock(
                d,
                c.n_heads,
                c.d_head,
                c.d_ff,
                dropout=c.dropout,
                stabiliser=c.stabiliser,
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
        self.context = Context(c.context, d, dtype=dtype, rngs=rngs)
        self.bin_count = Buffer(jnp.zeros((n_genes, N_BINS)), axes=("vocab", None))
        self.calls = Buffer(jnp.zeros((), jnp.int32))

    @staticmethod
    def compares_cells(config: ScBERTConfig) -> bool:
        """Whether a loss depends on which cells are in a micro-batch together."""
        return config.stabiliser == "global"

    @staticmethod
    def tables(config: ScBERTConfig) -> dict[str, str]:
        """Values of genes from outside, see :mod:`scjax.train.tables`."""
        return config.gene_table.wanted()

    # ---------------------------------------------------------------- encode
    def encode(self, batch: CellBatch, key: Array) -> Tokens:
        """Training tokens; what is hidden is drawn by (key, row, gene)."""
        c = self.config
        choice, shown = (row_keys(k, batch.row) for k in jax.random.split(key))
        token = log2_bins(batch.count, batch.count.sum(-1), n_bins=N_BINS)
        hidden, gene_id, target = hidden_first(choice, c.mask_fraction, token > 0, batch.gene_id, token)
        visible = replace_hidden(shown, hidden, gene_id, target, MASK, c.replace_fraction)
        n = hidden_capacity(batch.shape[1], c.mask_fraction)
        tokens = self.all_genes(batch, token)
        return dataclasses.replace(
            tokens,
            shown=to_all_genes(gene_id, visible, self.n_genes + 1),
            gene_id=gene_id[:, :n],
            target=target[:, :n],
            hidden=hidden[:, :n],
            context=self.context.read(batch, None if self.deterministic else key, required=True),
        )

    def all_genes(self, batch: CellBatch, token: Array | None = None) -> Tokens:
        """Tokens of which none is hidden."""
        if token is None:
            token = log2_bins(batch.count, batch.count.sum(-1), n_bins=N_BINS)
        true = to_all_genes(batch.gene_id, token, self.n_genes + 1)
        expressed = to_all_genes(batch.gene_id, (batch.count > 0).astype(jnp.int32), self.n_genes + 1) > 0
        none = jnp.zeros((batch.shape[0], 0), jnp.int32)
        return Tokens(true, expressed, true[:, :-1], none, none, none > 0, self.context.read(batch))

    # --------------------------------------------------------------- network
    def __call__(self, tokens: Tokens, keys: Array | None = None) -> Array:
        """float [B, G + 1, E]: the Performer's output at every gene and, last, the cell; not yet normalised.

        Args:
          tokens: from :meth:`encode`.
          keys: dropout keys [B], or None.
        """
        # a product instead of a look-up: its gradient adds up without a scatter
        kind = jax.nn.one_hot(tokens.shown, N_TOKENS)
        x = jnp.einsum("bsk,ke->bse", kind, self.token[...], precision="highest")
        x = x + self.gene(jnp.arange(self.n_genes + 1))
        x, n = x.astype(jnp.dtype(self.config.dtype)), x.shape[1]
        x, valid = self.context.beside(x, jnp.ones(x.shape[:2], bool), tokens.context, self.gene)
        # without a mask where nothing can be absent
        return self.performer(x, valid if tokens.context else None, keys=fold(keys, 0))[:, :n]

    def predict(self, x: Array) -> Array:
        """float32 [..., N_TOKENS]: logits of the bins from the Performer's outputs [..., E]."""
        return self.bins(self.norm(x))

    def predict_cell(self, batch: CellBatch) -> Array:
        """float32 [B, n_outputs]: the published head over all genes and the cell's token."""
        if not self.config.n_outputs:
            raise ValueError("this model has no head of a cell: set n_outputs")
        return self.head(self.norm(self(self.all_genes(batch))))

    # ------------------------------------------------------------- objective
    def loss(self, batch: CellBatch, key: Array) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
        """Cross-entropy of the hidden bins, over seven classes as published.

        Also counts, in training, how often each gene has had each bin; the cross-entropy of these
        frequencies on the same targets ("frequency_ce") is the no-information baseline.
        """
        if self.config.n_outputs:
            raise ValueError("with n_outputs the published head took the place of the bins': no pretraining")
        encode_key, drop_key, redraw_key = jax.random.split(key, 3)
        if not self.deterministic:
            count_call(self.performer, self.calls, redraw_key, self.config.redraw_every)
        tokens = self.encode(batch, encode_key)
        x = self(tokens, None if self.deterministic else row_keys(drop_key, batch.row))
        x = jnp.take_along_axis(x, jnp.maximum(tokens.gene_id, 0)[..., None], axis=1)
        mask = tokens.hidden * batch.weight[:, None]
        masked, weight = masked_cross_entropy(self.predict(x), tokens.target, mask)
        metrics = {
            "masked_ce": (masked, weight),
            "frequency_ce": frequency_cross_entropy(self.bin_count[...], tokens.gene_id, tokens.target, mask),
        }
        if not self.deterministic:
            # only what may be hidden is counted: not the 0
            count = jnp.where(tokens.true > 0, tokens.true, -1)
            self.bin_count[...] = count_bins(self.bin_count[...], count, batch.weight)
        return masked, weight, metrics

    def work(self, n_genes: Array) -> tuple[Array, Array]:
        """``(tokens, operations)`` [B] of a training step, see :mod:`scjax.nn.work`; every gene is read."""
        c, every = self.config, jnp.full_like(n_genes, self.n_genes + 1 + self.context.n_tokens)
        width = (c.d_model, c.n_heads, c.d_head, c.d_ff, c.n_layers)
        return every, favor_stack(every, *width, n_features(c.d_head)) + self.context.work()

    # ------------------------------------------------------------- embedding
    def embed(self, batch: CellBatch, keys: Array | None = None) -> Array:
        """float32 [B, E]: see ``pool``; nothing is hidden. ``keys`` [B] of dropout, or None."""
        tokens = self.all_genes(batch)
        x = self(tokens, keys)
        if self.config.pool == "cls":
            return self.norm(x[:, -1])
        n = jnp.maximum(tokens.expressed.sum(1, keepdims=True), 1)
        return jnp.einsum("bse,bs->be", self.norm(x), tokens.expressed / n)

    def states(self, batch: CellBatch, keys: Array | None = None) -> tuple[Array, Array]:
        """``(gene_id, states)``: int32 [B, G], -1 where a gene is not expressed, and float32 [B, G, E]."""
        tokens = self.all_genes(batch)
        gene_id = jnp.where(tokens.expressed[:, :-1], jnp.arange(self.n_genes), -1)
        return gene_id, self.norm(self(tokens, keys)[:, :-1])
