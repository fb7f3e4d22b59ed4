"""Softmax attention over the genes of a cell."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from scjax.nn.flash import chunked, cudnn, cudnn_can, splash
from scjax.parallel import BATCH_AXES, current, device_of

Backend = Literal["auto", "einsum", "cellwise", "chunked", "cudnn", "splash"]
LONG = 2**27  # scores of a head beyond which half a gigabyte is too much of a processor's memory
CACHED = 2**20  # scores of a cell that "cellwise" computes at once, in all heads: benchmarks/attention_cpu.md


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
      backend: how it is computed; the results are equal but for rounding.

        - "einsum": all cells at once, head-major; the scores of the batch exist, twice.
        - "cellwise": maps over the cells, over the heads too where rows are long, and recomputes the scores
          in the backward pass, so that they stay in a core's cache: for CPUs.
        - "chunked": some keys at a time, recomputed in the backward pass: any device, any length.
        - "cudnn": NVIDIA's fused kernels, 16 bits only.
        - "splash": Pallas kernels for TPUs; interpreted, and slow, where there is no TPU.
        - "auto": what the active :class:`scjax.parallel.Layout` says, else the table of hardware for this
          process's device. "chunked" where that backend cannot do it: cuDNN in float32, a batch that the
          mesh does not divide, arrays that may lie on several devices without a layout that says how; and for
          rows of more than 11,000 positions in the place of "cellwise".

    On a mesh all but "einsum" run on each device with the cells and heads that lie there.

    Returns:
      [B, S, H, D] in the dtype of ``v_BSHD``.

    Raises:
      ValueError: no such backend, or the batch cannot be split as the backend must have it.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend is one of {', '.join(get_args(Backend))}, not {backend!r}")
    layout, n_cells = current(), len(q_BSHD)
    spread = layout is not None and layout.mesh.size > 1
    slices = layout.slices if layout is not None else 1
    if backend == "auto":
        backend = layout.attention if layout is not None else device_of().attention  # type: ignore[assignment]
        unplaced = layout is None and jax.device_count() > 1 and backend in ("cellwise", "splash")
        long = backend == "cellwise" and q_BSHD.shape[1] ** 2 > LONG
        if unplaced or long or n_cells % slices or (backend == "cudnn" and not cudnn_can(q_BSHD)):
            backend = "chunked"
    compute = partial(_BACKENDS[backend], unknown=unknown)
    if backend == "einsum" or not spread or (backend == "chunked" and n_cells % slices):
        return compute(q_BSHD, k_BSHD, v_BSHD, key_mask_BS)
    if n_cells % slices:
        raise ValueError(
            f"attention {backend!r} of {n_cells} cells, which the mesh cuts into {slices} slices"
        )
    return on_each_device(compute, q_BSHD, k_BSHD, v_BSHD, key_mask_BS)


def on_each_device(compute: Callable[..., Array], *arrays: Array, shared: tuple[Array, ...] = ()) -> Array:
    """``compute`` of the cells that lie on each device of the active layout, and of their heads where
    ``tensor`` divides them.

    Args:
      compute: (q, k, v [B, S, H, D], key mask [B, S], *shared) -> [B, S, H, D].
      arrays: its first four arguments; the layout's slices divide B.
      shared: arrays that every device gets whole.
    """
    layout = current()
    assert layout is not None
    heads = "tensor" if arrays[0].shape[2] % layout.mesh.shape["tensor"] == 0 else None
    rows, full = PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES, None, heads)
    specs = (full, full, full, rows, *(PartitionSpec() for _ in shared))
    mesh: Any = layout.sharding().mesh
    # unchecked, since Pallas does not tell what its results vary over
    return jax.shard_map(compute, mesh=mesh, in_specs=specs, out_specs=full, check_vma=False)(
        *arrays, *shared
    )


def _cellwise(q_BSHD: Array, k_BSHD: Array, v_BSHD: Array, key_mask_BS: Array, unknown: int = 0) -> Array:
    @jax.checkpoint
    def heads(q: Array, k: Array, v: Array, key_mask: Array) -> Array:
        return einsum(q[None], k[None], v[None], key_mask[None], unknown=unknown)[0]

    def cell(arrays: tuple[Array, ...]) -> Array:
        *qkv, key_mask = arrays
        length, n_heads, _ = qkv[0].shape
        if n_heads * length * length <= CACHED:
            return heads(*qkv, key_mask)
        each = tuple(jnp.moveaxis(x, 1, 0)[:, :, None] for x in qkv)
        return jnp.moveaxis(jax.lax.map(lambda head: heads(*head, key_mask), each)[:, :, 0], 0, 1)

    return jax.lax.map(cell, (q_BSHD, k_BSHD, v_BSHD, key_mask_BS))


def einsum(q_BSHD: Array, k_BSHD: Array, v_BSHD: Array, key_mask_BS: Array, unknown: int = 0) -> Array:
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


_BACKENDS: dict[str, Callable[..., Array]] = {
    "einsum": einsum,
    "cellwise": _cellwise,
    "chunked": chunked,
    "cudnn": cudnn,
    "splash": splash,
}
