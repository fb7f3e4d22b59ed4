"""Softmax attention over the genes of a cell."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Backend = Literal["auto", "einsum", "cellwise"]


def attention(
    q_BSHD: Array,
    k_BSHD: Array,
    v_BSHD: Array,
    key_mask_BS: Array,
    *,
    unknown: int = 0,
    backend: Backend = "auto",
) -> Array:
    """softmax(q k / sqrt(D)) v within each cell; the softmax is taken in float32.

    Args:
      q_BSHD, k_BSHD, v_BSHD: [B, S, H, D], any float dtype.
      key_mask_BS: bool [B, S], False where a key is padding. A cell needs one True at least, and that
        beyond ``unknown``.
      unknown: number of leading positions that no other position may see: known positions attend to
        the known, each unknown one to the known and to itself (scGPT's generative attention).
      backend: "einsum" computes all cells at once, head-major, and works on any mesh; "cellwise"
        maps over the cells and recomputes each cell's scores in the backward pass, so that the
        S x S scores stay in a core's cache and never exist for a whole batch; "auto" takes
        "cellwise" on a lone CPU device, where it is about twice as fast, else "einsum".

    Returns:
      [B, S, H, D] in the dtype of ``v_BSHD``.
    """
    if backend == "auto":
        # mapping over cells that are spread over devices would gather them on each
        backend = "cellwise" if jax.default_backend() == "cpu" and jax.device_count() == 1 else "einsum"
    if backend == "einsum":
        return _heads(unknown, q_BSHD, k_BSHD, v_BSHD, key_mask_BS)
    if backend == "cellwise":
        one = jax.checkpoint(lambda cell: _heads(unknown, *(x[None] for x in cell))[0])
        return jax.lax.map(one, (q_BSHD, k_BSHD, v_BSHD, key_mask_BS))
    raise ValueError(f'backend is "auto", "einsum" or "cellwise", not {backend!r}')


def _heads(unknown: int, q_BSHD: Array, k_BSHD: Array, v_BSHD: Array, key_mask_BS: Array) -> Array:
    q_BHSD, k_BHSD, v_BHSD = (jnp.moveaxis(x, 2, 1) for x in (q_BSHD, k_BSHD, v_BSHD))
    q_BHSD = q_BHSD * q_BSHD.shape[-1] ** -0.5
    k_BHTD, v_BHTD = k_BHSD[:, :, unknown:], v_BHSD[:, :, unknown:]
    scores_BHST = jnp.einsum("bhsd,bhtd->bhst", q_BHSD, k_BHTD, preferred_element_type=jnp.float32)
    scores_BHST = scores_BHST + jnp.where(key_mask_BS[:, unknown:], 0.0, -1e30)[:, None, None, :]
    top_BHS1 = scores_BHST.max(-1, keepdims=True)
    own_BHS1 = None
    if unknown:  # one more score for each unknown position: its own
        own = jnp.einsum(
            "bhsd,bhsd->bhs",
            q_BHSD[:, :, :unknown],
            k_BHSD[:, :, :unknown],
            preferred_element_type=jnp.float32,
        )
        known = q_BHSD.shape[2] - unknown
        own_BHS1 = jnp.pad(own, ((0, 0), (0, 0), (0, known)), constant_values=-1e30)[..., None]
        top_BHS1 = jnp.maximum(top_BHS1, own_BHS1)
    top_BHS1 = jax.lax.stop_gradient(top_BHS1)
    weights_BHST = jnp.exp(scores_BHST - top_BHS1)
    out_BHSD = jnp.einsum(
        "bhst,bhtd->bhsd", weights_BHST.astype(v_BHTD.dtype), v_BHTD, preferred_element_type=jnp.float32
    )
    # dividing the D outputs instead of the S weights saves a pass over the scores
    total_BHS1 = weights_BHST.sum(-1, keepdims=True)
    if own_BHS1 is not None:
        weight_BHS1 = jnp.exp(own_BHS1 - top_BHS1)
        out_BHSD, total_BHS1 = out_BHSD + weight_BHS1 * v_BHSD, total_BHS1 + weight_BHS1
    return jnp.moveaxis(out_BHSD / total_BHS1, 1, 2).astype(v_BSHD.dtype)
