"""Vectors of genes from a graph by a masked graph autoencoder, in JAX: imported when it is asked for.

Part of the edges is hidden, a network over the others says of each pair of genes whether an edge was hidden
there (Li et al. 2023, MaskGAE, 2205.10053). A gene's input is a random signature and not learned: what can
be learned is how to read neighbourhoods, though of a small graph also, in part, its edges by heart.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from scjax.genes.graph import GeneGraph, normalised


class Encoder(nnx.Module):
    """Signatures [n, dim] and visible edges to vectors [n, dim]: two layers of mean over neighbours."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        self.own = nnx.List([nnx.Linear(dim, dim, rngs=rngs) for _ in range(2)])
        self.near = nnx.List([nnx.Linear(dim, dim, use_bias=False, rngs=rngs) for _ in range(2)])
        self.norm = nnx.List([nnx.LayerNorm(dim, rngs=rngs) for _ in range(2)])
        self.score = nnx.List([nnx.Linear(dim, dim, rngs=rngs), nnx.Linear(dim, 1, rngs=rngs)])

    def __call__(self, x_ND: Array, sender: Array, receiver: Array, weight: Array) -> Array:
        n = len(x_ND)
        total = jax.ops.segment_sum(weight, receiver, n, indices_are_sorted=True)
        share = weight / jnp.maximum(total, 1e-6)[receiver]
        for i, (own, near, norm) in enumerate(zip(self.own, self.near, self.norm, strict=True)):
            message = near(x_ND)[sender] * share[:, None]
            x_ND = norm(own(x_ND) + jax.ops.segment_sum(message, receiver, n, indices_are_sorted=True))
            x_ND = nnx.gelu(x_ND) if i == 0 else x_ND
        return x_ND

    def edge(self, x_ND: Array, pairs: Array) -> Array:
        """Logits [m] that there is an edge between each of the pairs [m, 2]."""
        first, last = self.score
        return last(nnx.gelu(first(x_ND[pairs[:, 0]] * x_ND[pairs[:, 1]])))[:, 0]


def masked_autoencoder(
    graph: GeneGraph,
    dim: int = 64,
    seed: int = 0,
    *,
    steps: int = 300,
    hidden: float = 0.5,
    learning_rate: float = 3e-3,
) -> tuple[np.ndarray, float]:
    """Vectors of the genes of a graph, and how well hidden edges are told from others.

    Args:
      graph: of genes.
      dim: width of the vectors.
      seed: of signatures, initial parameters and what is hidden.
      steps: each with all edges, another part of them hidden.
      hidden: share of the edges hidden at a step. They are told from pairs drawn among their own ends, so
        that it is not how many edges a gene has, or shows, that tells the two apart; pairs that are an edge
        are passed over.
      learning_rate: of Adam, falling to 0 along a cosine.

    Returns:
      float32 [n, dim] with all edges visible, of root mean square 1; and the mean AUROC of hidden edges
      against drawn pairs over the last tenth of the steps: of training.

    Raises:
      ValueError: fewer than 10 edges or more than 65,000 genes, or settings out of range.
    """
    n, m = len(graph.names), len(graph.edges)
    if m < 10 or n > 65_000:
        raise ValueError(
            f"{graph.summary}: it takes 10 edges or more, to hide some, and 65,000 genes or fewer"
        )
    if not (0 < hidden < 1 and steps > 0 and dim > 0):
        raise ValueError(
            f"hidden = {hidden:g}, steps = {steps}, dim = {dim}: 0 < hidden < 1, others positive"
        )
    both = np.concatenate([graph.edges, graph.edges[:, ::-1]])
    order = np.argsort(both[:, 1], kind="stable")
    sender, receiver = jnp.asarray(both[order].T, jnp.int32)
    edge_of = jnp.asarray(np.tile(np.arange(m), 2)[order], jnp.int32)
    weight, edges = jnp.asarray(graph.weight, jnp.float32), jnp.asarray(graph.edges, jnp.int32)
    code = jnp.asarray(graph.edges @ [n, 1], jnp.uint32)  # of an edge, sorted as they are
    key = jax.random.key(seed)
    signature = jax.random.normal(jax.random.fold_in(key, 0), (n, dim))
    graphdef, params = nnx.split(Encoder(dim, nnx.Rngs(seed)))
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def loss(params: nnx.State, key: Array) -> tuple[Array, Array]:
        model, (which, turn) = nnx.merge(graphdef, params), jax.random.split(key)
        hide = jax.random.bernoulli(which, hidden, (m,))
        x = model(signature, sender, receiver, (weight * ~hide)[edge_of])
        # the ends of hidden edges change places among themselves: hidden ones come first in both orders
        draw = jnp.where(hide, jax.random.uniform(turn, (2, m)), 2.0)
        here, there = jnp.argsort(draw, axis=1)
        other = edges.at[here, 1].set(edges[there, 1])
        drawn = jnp.sort(other, axis=1).astype(jnp.uint32) @ jnp.array([n, 1], jnp.uint32)
        is_edge = code[jnp.minimum(jnp.searchsorted(code, drawn), m - 1)] == drawn
        free = hide & ~is_edge & (other[:, 0] != other[:, 1])
        yes, no = model.edge(x, edges), model.edge(x, other)
        each = jax.nn.softplus(-yes) * hide + jax.nn.softplus(no) * free
        return each.sum() / jnp.maximum(hide.sum(), 1), _auroc(yes, hide, no, free)

    def step(carry: tuple[nnx.State, optax.OptState], i: Array) -> tuple[tuple, Array]:
        params, state = carry
        gradient, score = jax.grad(loss, has_aux=True)(params, jax.random.fold_in(key, i + 1))
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), score

    train = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps)))
    (params, _), score = train(params)
    vectors = nnx.merge(graphdef, params)(signature, sender, receiver, weight[edge_of])
    return normalised(np.asarray(vectors)), float(score[-max(steps // 10, 1) :].mean())


def _auroc(yes: Array, hide: Array, no: Array, free: Array) -> Array:
    """Of the scores ``yes``, where ``hide``, against ``no``, where ``free``: the mean share below."""
    scores, there = jnp.concatenate([yes, no]), jnp.concatenate([hide, free])
    order = jnp.argsort(jnp.where(there, scores, jnp.inf))
    first, there = order < len(yes), there[order]
    below = jnp.cumsum(there & ~first)  # products of two counts would not fit into int32
    share = below / jnp.maximum(free.sum(), 1)
    return jnp.where(there & first, share, 0.0).sum() / jnp.maximum(hide.sum(), 1)
