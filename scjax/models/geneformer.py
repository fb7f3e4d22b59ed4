"""Geneformer (Theodoris et al., Nature 2023): a cell is the list of its genes, the most expressed first.

Encode: each count is divided by its gene's median over a corpus, which brings forward what marks the cell out
from others; the genes are sorted by that, and their order is all the network sees. Network: gene embedding +
embedding of the rank, a BERT encoder. Loss: 15 % of the genes are hidden, and which they were is predicted
among all genes of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from scjax.config import INF, within
from scjax.encoding import gene_uniform, rank_genes, row_keys
from scjax.nn.attention import Backend
from scjax.nn.context import Context, ContextToken, Given
from scjax.nn.embedder import GeneEmbedder, GeneTable
from scjax.nn.layers import Block, Remat, Stack, dropout, fold, layer_norm, linear
from scjax.nn.module import Buffer
from scjax.nn.work import dense, softmax_stack
from scjax.objectives.classification import linear_cross_entropy
from scjax.parallel.layout import top_k
from scjax.types import CellBatch

EPSILON = 1e-12  # of BERT's layer norms
INIT = nnx.initializers.normal(0.02)
MASKED, RANDOM = 0.8, 0.1  # what the network sees of a hidden gene: <mask>, another gene, else the gene
SPECIALS = ("<pad>", "<mask>", "<cls>", "<eos>")  # the tokens after the genes, in this order


@dataclasses.dataclass(frozen=True)
class GeneformerConfig:
    """The published V1-10M model; ``configs/geneformer.py`` has the other sizes.

    Attributes:
      d_model, n_heads, n_layers, d_ff, dropout: the encoder. (Upstream drops attention weights at the
        same rate too; here they are not dropped.)
      max_length: tokens a cell, special ones included; of a longer cell the foremost are kept.
      specials: whether a cell is put between ``<cls>`` and ``<eos>``, as in V2.
      mask_fraction: probability with which a gene is hidden.
      maskable_specials, random_specials: restore what upstream's collator does with its special tokens: hide
        ``<cls>`` and ``<eos>`` like genes; show any token of the vocabulary, ``<pad>`` included, where a
        random gene is due.
      embed_layer: layer whose output is the embedding, counted back from the last, which is 0: -1 is the
        second to last.
      pool: "mean" over the genes, or "cls".
      gene_table: where the gene embedding comes from, see :class:`scjax.nn.embedder.GeneTable`; it is
        also the output layer.
      context: further tokens of what is known of a cell, see :class:`scjax.nn.context.ContextToken`.
      n_outputs: with more than 0 the model has a classification head in the place of the objective's.
      head: what that head classifies: "cell" by the first token, or each "gene".
      attention: backend, see :func:`scjax.nn.attention.attention`.
      remat: see :class:`scjax.nn.layers.Stack`.
      dtype: "float32" or "bfloat16", of activations; parameters are float32.
    """

    d_model: int = 256
    n_heads: int = 4
    n_layers: int = 6
    d_ff: int = 512
    dropout: float = 0.02
    max_length: int = 2048
    specials: bool = False
    mask_fraction: float = 0.15
    maskable_specials: bool = False
    random_specials: bool = False
    embed_layer: int = -1
    pool: Literal["mean", "cls"] = "mean"
    gene_table: GeneTable = GeneTable()
    context: dict[str, ContextToken] = dataclasses.field(default_factory=dict, hash=False)
    n_outputs: int = 0
    head: Literal["cell", "gene"] = "cell"
    attention: Backend = "auto"
    remat: Remat = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        within(self, dropout=(0, 0.99), n_outputs=(0, INF))
        if not 0 < self.mask_fraction < 1:
            raise ValueError(f"mask_fraction = {self.mask_fraction} must lie between 0 and 1")
        if not -self.n_layers <= self.embed_layer <= 0:
            raise ValueError(
                f"embed_layer = {self.embed_layer}: 0 is the last of {self.n_layers} layers, "
                f"-1 the one before it, and {-self.n_layers} the embedding of the tokens"
            )
        if self.max_length <= 2 * self.specials:
            raise ValueError(f"max_length = {self.max_length} leaves no room for a gene")
        if self.pool not in ("mean", "cls") or self.head not in ("cell", "gene"):
            raise ValueError(
                f'pool = {self.pool!r} is "mean" or "cls", head = {self.head!r} "cell" or "gene"'
            )
        if self.pool == "cls" and not self.specials:
            raise ValueError('pool = "cls" needs specials = true: without them there is no <cls>')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What the network reads: S tokens a cell, the most expressed gene first; and what it must predict.

    Attributes:
      token: int32 [B, S], as the network sees them; a gene's id or that of a special token.
      real: bool [B, S], False where there is only padding.
      position: int32 [B, M], places of the hidden tokens; M is the most that a cell may have.
      target: int32 [B, M], the tokens that were there.
      hidden: bool [B, M], whether a place is in use; those in use come first.
      context: what is known of the cells beside, see :class:`scjax.nn.context.Context`.
    """

    token: Array
    real: Array
    position: Array
    target: Array
    hidden: Array
    context: Given = dataclasses.field(default_factory=dict)


def places(length: int, fraction: float) -> int:
    """Room for the hidden tokens of a cell of at most ``length``, each hidden with probability ``fraction``.

    It is their mean plus 4 standard deviations: a cell of that length has more once in 30,000 times.
    """
    mean = length * fraction
    return min(math.ceil(mean + 4 * math.sqrt(mean * (1 - fraction))), length)


class Geneformer(nnx.Module):
    """The network, its encoding and its objective.

    Args:
      config: hyper-parameters.
      n_genes: size of the vocabulary. The ids after those of the genes are ``<pad>``, ``<mask>`` and, with
        ``config.specials``, ``<cls>`` and ``<eos>``.
    """

    READOUTS = ("transform_norm/scale", "transform_norm/bias")  # scores with the embedding; scjax.train.width

    def __init__(self, config: GeneformerConfig, n_genes: int, *, rngs: nnx.Rngs):
        c, d = config, config.d_model
        dtype = jnp.dtype(c.dtype)
        self.config, self.n_genes = config, n_genes
        self.n_tokens = n_genes + (4 if c.specials else 2)
        self.pad, self.mask, self.cls, self.eos = range(n_genes, n_genes + 4)
        self.deterministic = False
        how: dict[str, Any] = {"dtype": dtype, "kernel_init": INIT, "rngs": rngs}
        self.gene = GeneEmbedder(n_genes, self.n_tokens - n_genes, d, c.gene_table, init=INIT, rngs=rngs)
        if c.gene_table.kind == "frozen":
            self.gene.special[...] = INIT(rngs.params(), self.gene.special[...].shape)
        self.rank = nnx.Param(INIT(rngs.params(), (c.max_length, d)), axes=(None, "embed"))
        # BERT's two kinds of sentence: here all is of the first kind, and the second row is never read
        self.kind = nnx.Param(INIT(rngs.params(), (2, d)), axes=(None, "embed"))
        self.norm = layer_norm(d, epsilon=EPSILON, rngs=rngs)
        self.transformer = Stack(
            c.n_layers,
            lambda r: Block(
                d,
                c.n_heads,
                c.d_ff,
                dropout=c.dropout,
                inner_dropout=0.0,
                epsilon=EPSILON,
                backend=c.attention,
                dtype=dtype,
                kernel_init=INIT,
                rngs=r,
            ),
            remat=c.remat,
            rngs=rngs,
        )
        self.context = Context(c.context, d, dtype=dtype, rngs=rngs)
        self.median = Buffer(jnp.ones(n_genes), axes=("vocab",))
        if c.n_outputs:
            if c.head == "cell":
                self.pooler = linear(d, d, ("embed", "embed_out"), **how)
            self.head = linear(d, c.n_outputs, ("embed", None), **how)
            return
        self.transform = linear(d, d, ("embed", "embed_out"), **how)
        self.transform_norm = layer_norm(d, epsilon=EPSILON, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(self.n_tokens), axes=("vocab",))
        self.token_count = Buffer(jnp.zeros(self.n_tokens), axes=("vocab",))

    @staticmethod
    def tables(config: GeneformerConfig) -> dict[str, str]:
        """What a run fills from outside: the medians that counts are divided by, and vectors of genes."""
        return {"median": "median"} | config.gene_table.wanted()

    # ---------------------------------------------------------------- encode
    def sequence(self, batch: CellBatch) -> Array:
        """int32 [B, S]: the tokens of each cell, nothing hidden."""
        c = self.config
        genes = rank_genes(batch.gene_id, batch.count, self.median[...], c.max_length - 2 * c.specials)
        token = jnp.where(genes < 0, self.pad, genes)
        if not c.specials:
            return token
        token = jnp.pad(token, ((0, 0), (1, 1)), constant_values=self.pad).at[:, 0].set(self.cls)
        end = (genes >= 0).sum(1, keepdims=True) + 1
        return jnp.where(jnp.arange(token.shape[1]) == end, self.eos, token)

    def encode(self, batch: CellBatch, key: Array) -> Tokens:
        """Training tokens; which are hidden and what stands in their place is drawn by (key, row, gene).

        Of a cell with more hidden tokens than :func:`places`, the surplus stays as it is.
        """
        c = self.config
        choice, change = (row_keys(k, batch.row) for k in jax.random.split(key))
        token = self.sequence(batch)
        free = token != self.pad if c.maskable_specials else token < self.n_genes
        p = c.mask_fraction
        uniform = jnp.where(free, gene_uniform(choice, token), 1.0)
        lowest, position = top_k(-uniform, places(token.shape[1], p))
        hidden = -lowest < p
        target = jnp.take_along_axis(token, position, axis=1)

        draw = gene_uniform(change, token)
        of = self.n_tokens if c.random_specials else self.n_genes
        other = jnp.minimum(((draw - MASKED) * (of / RANDOM)).astype(jnp.int32), of - 1)
        seen = jnp.where(draw < MASKED, self.mask, jnp.where(draw < MASKED + RANDOM, other, token))
        last = jnp.minimum(p, -lowest[:, -1:])  # where a cell has more hidden tokens than there are places
        shown = jnp.where((uniform <= last) & (uniform < p), seen, token)
        context = self.context.read(batch, None if self.deterministic else key, required=True)
        return Tokens(shown, token != self.pad, position, target, hidden, context)

    # --------------------------------------------------------------- network
    def __call__(self, tokens: Tokens, keys: Array | None = None) -> Array:
        """The outputs [B, S, E] of the last layer; ``keys`` [B] are those of dropout, or None."""
        return self.run(tokens.token, tokens.real, keys, context=tokens.context)

    def run(
        self,
        token: Array,
        real: Array | None = None,
        keys: Array | None = None,
        layers: int | None = None,
        context: Given | None = None,
    ) -> Array:
        """[B, S, E]: the outputs after the first ``layers`` layers (None: all); 0 for the embedding. Where
        ``real`` is not given, ``<pad>`` is padding."""
        c = self.config
        x = self.gene(token) + (self.rank[...][: token.shape[1]] + self.kind[...][0])
        x = dropout(self.norm(x), c.dropout, fold(keys, 0)).astype(jnp.dtype(c.dtype))
        real = token != self.pad if real is None else real
        x, valid = self.context.beside(x, real, context or {}, self.gene)
        return self.transformer(x, valid, keys=fold(keys, 1), layers=layers)[:, : real.shape[1]]

    def table(self) -> Array:
        """float32 [V, E]: the embedding of every token, which is also the output layer."""
        return (
            self.gene.embedding[...] if self.gene.kind == "random" else self.gene(jnp.arange(self.n_tokens))
        )

    def transformed(self, x: Array) -> Array:
        """[..., E]: what is compared with the embedding of each token."""
        return self.transform_norm(jax.nn.relu(self.transform(x))).astype(x.dtype)

    def predict(self, x: Array) -> Array:
        """float32 [..., V]: a score for each token of the vocabulary from an output [..., E]. For a whole
        batch this is the largest array there is; the loss does without it."""
        x = self.transformed(x)
        return (
            jnp.matmul(x, self.table().T.astype(x.dtype), preferred_element_type=jnp.float32) + self.bias[...]
        )

    # ------------------------------------------------------------- objective
    def loss(self, batch: CellBatch, key: Array) -> tuple[Array, Array, dict[str, tuple[Array, Array]]]:
        """Cross-entropy of the hidden tokens.

        Also brings up to date how often each token occurs, whose cross-entropy on the same targets
        ("frequency_ce") is the no-information baseline.

        Raises:
          ValueError: the model has a classification head in the place of the objective's.
        """
        if self.config.n_outputs:
            raise ValueError("a Geneformer with n_outputs classifies; only one without it is pretrained")
        encode_key, drop_key = jax.random.split(key)
        tokens = self.encode(batch, encode_key)
        keys = None if self.deterministic else row_keys(drop_key, batch.row)
        mask = tokens.hidden * batch.weight[:, None]
        total, correct = self.cross_entropy(tokens, mask, keys)
        weight = mask.sum()
        frequency = -(mask * self.log_frequency()[tokens.target]).sum()
        self._update_token_count(self.sequence(batch), batch.weight)
        metrics = {"masked_ce": total, "frequency_ce": frequency, "accuracy": correct}
        return total, weight, {name: (value, weight) for name, value in metrics.items()}

    def cross_entropy(self, tokens: Tokens, mask: Array, keys: Array | None = None) -> tuple[Array, Array]:
        """``(sum, correct)``: the cross-entropy of the hidden tokens and how many score highest, each
        weighted by ``mask`` float32 [B, M]. The output head is run at their places only."""
        x = jnp.take_along_axis(self(tokens, keys), tokens.position[..., None], axis=1)
        return linear_cross_entropy(
            self.transformed(x), self.table(), self.bias[...], tokens.target, mask, None
        )

    def work(self, n_genes: Array) -> tuple[Array, Array]:
        """``(tokens, operations)`` [B] of a training step, see :mod:`scjax.nn.work`."""
        c, d, ends = self.config, self.config.d_model, 2 * self.config.specials
        n = jnp.minimum(n_genes, c.max_length - ends)
        head = dense(c.mask_fraction * n, d * d + d * self.n_tokens)
        tokens = n + ends + self.context.n_tokens
        return tokens, softmax_stack(tokens, d, c.d_ff, c.n_layers) + head + self.context.work()

    def log_frequency(self) -> Array:
        """float32 [V]: log of the share of each token in the batches seen so far, each that may
        be hidden once more."""
        may_be = self.n_tokens if self.config.maskable_specials else self.n_genes
        count = self.token_count[...] + (jnp.arange(self.n_tokens) < may_be)
        return jnp.log(jnp.maximum(count, 1e-9) / count.sum())

    def _update_token_count(self, token: Array, weight: Array) -> None:
        may_be = token != self.pad if self.config.maskable_specials else token < self.n_genes
        seen = may_be * weight[:, None]
        count = self.token_count[...].at[token].add(seen)
        # float32 cannot count past 2**24: where a count nears it, all batches so far weigh half as much
        self.token_count[...] = jnp.where(count.max() > 2**23, 0.5, 1.0) * count

    # ----------------------------------------------- embedding and classification
    def embed(self, batch: CellBatch, keys: Array | None = None) -> Array:
        """float32 [B, E]: mean output of ``embed_layer`` over the cell's genes, or that at ``<cls>``;
        ``keys`` [B] of dropout, or None."""
        gene_id, x = self.states(batch, keys)
        x = x.astype(jnp.float32)
        if self.config.pool == "cls":
            return x[:, 0]
        gene = gene_id >= 0
        total = jnp.where(gene[..., None], x, 0).sum(1)
        return total / jnp.maximum(gene.sum(1, keepdims=True), 1)

    def states(self, batch: CellBatch, keys: Array | None = None) -> tuple[Array, Array]:
        """``(gene_id, states)``: int32 [B, S], -1 where there is no gene, and [B, S, E], outputs of
        ``embed_layer``; nothing is hidden."""
        token, layers = self.sequence(batch), self.config.n_layers + self.config.embed_layer
        x = self.run(token, keys=keys, layers=layers, context=self.context.read(batch))
        return jnp.where(token < self.n_genes, token, -1), x

    def predict_cell(self, batch: CellBatch) -> Array:
        """float32 [B, n_outputs]: a score for each class of cell, from the first token."""
        self._needs("cell")
        first = self.run(self.sequence(batch), context=self.context.read(batch))[:, 0]
        return self.head(jnp.tanh(self.pooler(first))).astype(jnp.float32)

    def predict_genes(self, batch: CellBatch) -> tuple[Array, Array]:
        """``(gene_id, scores)``: int32 [B, S], -1 where there is no gene, and float32 [B, S, n_outputs], a
        score for each class of gene."""
        self._needs("gene")
        token = self.sequence(batch)
        scores = self.head(self.run(token, context=self.context.read(batch))).astype(jnp.float32)
        return jnp.where(token < self.n_genes, token, -1), scores

    def _needs(self, head: str) -> None:
        if not self.config.n_outputs or self.config.head != head:
            raise ValueError(f'this Geneformer has no such head: it takes n_outputs > 0 and head = "{head}"')
