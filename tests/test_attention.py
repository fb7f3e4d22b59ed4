"""Softmax attention: every backend is the plain one, forward and backward, on one device and on a mesh."""

import json
import types

import bench_attention
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from scjax.nn import attention as module
from scjax.nn import flash
from scjax.nn.attention import attention
from scjax.parallel import BATCH_AXES, Layout, MeshConfig, make_mesh

HERE = ("einsum", "cellwise", "chunked", "splash")  # what runs on a CPU; splash interpreted
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}


def example(n_cells=4, length=21, n_heads=2, width=8, *, unknown=0, dtype="float32", seed=0):
    """q, k, v, a mask with holes and a gradient; every cell has one known key at least."""
    rng = np.random.default_rng(seed)
    q, k, v, gradient = (
        jnp.asarray(rng.standard_normal((n_cells, length, n_heads, width)), dtype) for _ in range(4)
    )
    mask = rng.random((n_cells, length)) < 0.7
    mask[:, unknown + rng.integers(length - unknown)] = True
    mask[0, unknown:], mask[0, -1] = False, True  # a cell that sees one key
    return q, k, v, jnp.asarray(mask), gradient


def plain(q, k, v, key_mask, unknown=0):
    """The definition, in float64, from a mask of who sees whom."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    length = q.shape[1]
    known = np.arange(length) >= unknown
    sees = np.asarray(key_mask)[:, None] & known | (np.eye(length, dtype=bool) & ~known)
    scores = np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(np.where(sees[:, None], scores, -np.inf))
    return np.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdims=True), v)


def results(backend, arrays, unknown=0):
    """Output and the gradients of q, k and v."""
    q, k, v, key_mask, gradient = arrays

    def value(q, k, v):
        out = attention(q, k, v, key_mask, unknown=unknown, backend=backend)
        return (out.astype(jnp.float32) * gradient).sum(), out

    grads, out = jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *grads


def same(found, due, dtype="float32"):
    for a, b in zip(found, due, strict=True):
        assert a.dtype == b.dtype == dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=TOLERANCE[dtype] * np.abs(b).max(), rtol=0)


@pytest.mark.parametrize("unknown", [0, 5])
@pytest.mark.parametrize("backend", HERE)
def test_every_backend_computes_the_definition(backend, unknown):
    q, k, v, mask, _ = example(unknown=unknown)
    found = attention(q, k, v, mask, unknown=unknown, backend=backend)
    np.testing.assert_allclose(found, plain(q, k, v, mask, unknown), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("unknown", [0, 5])
@pytest.mark.parametrize("backend", HERE[1:])
def test_every_backend_has_the_gradients_of_einsum(backend, unknown, dtype, monkeypatch):
    monkeypatch.setattr(flash, "CHUNK", 6)  # neither the keys nor the known keys are a multiple
    arrays = example(unknown=unknown, dtype=dtype)
    due = results("einsum", tuple(x.astype(jnp.float32) if x.dtype != bool else x for x in arrays), unknown)
    same(results(backend, arrays, unknown), [x.astype(dtype) for x in due], dtype)


def test_the_gradient_of_einsum_is_that_of_the_definition():
    q, k, v, mask, gradient = example(2, 9, unknown=3)
    _, *grads = results("einsum", (q, k, v, mask, gradient), 3)
    step = np.random.default_rng(1).standard_normal((3, *q.shape)) * 1e-4
    moved = [
        (np.asarray(x, np.float64) + d, np.asarray(x, np.float64) - d)
        for x, d in zip((q, k, v), step, strict=True)
    ]
    due = (
        sum(
            (np.asarray(gradient, np.float64) * plain(*side, mask, 3)).sum() * sign
            for side, sign in zip(zip(*moved, strict=True), (1, -1), strict=True)
        )
        / 2
    )
    found = sum((np.asarray(g, np.float64) * d).sum() for g, d in zip(grads, step, strict=True))
    np.testing.assert_allclose(found, due, rtol=1e-4)


def test_long_rows_are_mapped_over_heads_too(monkeypatch):
    arrays = example(3, 17, n_heads=3, unknown=4)
    due = results("cellwise", arrays, 4)
    monkeypatch.setattr(module, "CACHED", 17 * 17 * 3 - 1)
    same(results("cellwise", arrays, 4), due)


def test_padding_and_the_rest_of_the_batch_change_nothing():
    q, k, v, mask, _ = example()
    other = jnp.where(mask[:, :, None, None], k, 1e4), jnp.where(mask[:, :, None, None], v, -1e4)
    for backend in HERE:
        whole = attention(q, k, v, mask, backend=backend)
        np.testing.assert_allclose(attention(q, *other, mask, backend=backend), whole, atol=1e-6)
        alone = attention(q[1:2], k[1:2], v[1:2], mask[1:2], backend=backend)
        np.testing.assert_allclose(alone[0], whole[1], atol=1e-6)


MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2), "2x4": (2, 1, 4)}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("backend", ["cellwise", "chunked"])
def test_a_mesh_changes_nothing(backend, sizes, axis_type):
    """Rows over data and fsdp, heads over tensor where it divides them: here four heads, so not on eight."""
    check_mesh(backend, sizes, axis_type)


def test_a_mesh_changes_nothing_for_splash():
    check_mesh("splash", MESHES["mixed"], AxisType.Explicit)


def check_mesh(backend, sizes, axis_type):
    arrays = example(8, 12, n_heads=4, unknown=3)
    due = results("einsum", arrays, 3)
    mesh = make_mesh(MeshConfig(*sizes), axis_type=axis_type)
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES))) for x in arrays]
    layout = Layout(mesh, attention=backend)

    def run(*arrays):
        with layout.active():
            return results("auto", arrays, 3)

    # a step traces its loss with all axes Auto, see scjax.train.step
    inside = (
        run
        if axis_type == AxisType.Auto
        else jax.sharding.auto_axes(run, axes=mesh.axis_names, out_sharding=PartitionSpec(BATCH_AXES))
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(inside).lower(*placed)
        same([np.asarray(x) for x in lowered.compile()(*placed)], due)
    if sizes[2] == 1:  # each device computes its own cells: nothing travels
        text = lowered.compile().as_text()
        assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def scores_in(backend, n_cells=2, length=2048, n_heads=2, width=8):
    """Bytes of intermediates of a backward pass, in terms of one array of scores of the whole batch."""
    shape = jax.ShapeDtypeStruct((n_cells, length, n_heads, width), jnp.float32)
    mask = jax.ShapeDtypeStruct((n_cells, length), bool)
    value = lambda q, k, v, mask: attention(q, k, v, mask, backend=backend).sum()  # noqa: E731
    compiled = jax.jit(jax.grad(value, argnums=(0, 1, 2))).lower(shape, shape, shape, mask).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * n_cells * n_heads * length * length)


def test_only_einsum_holds_the_scores_of_a_batch():
    assert scores_in("einsum") > 1.9
    assert scores_in("chunked") < 1.0  # three arrays of a quarter of the keys
    assert scores_in("chunked", length=8192) < 0.25
    assert scores_in("cellwise", n_cells=8) < 0.5


def test_auto_is_what_the_layout_says_and_chunked_where_that_cannot_be(monkeypatch):
    taken = []
    for name, compute in list(module._BACKENDS.items()):

        def seen(*arrays, name=name, compute=compute, **how):
            taken.append(name)
            return module.einsum(*arrays, **how) if name == "cudnn" else compute(*arrays, **how)

        monkeypatch.setitem(module._BACKENDS, name, seen)
    lone, two = make_mesh(devices=jax.devices()[:1]), make_mesh(devices=jax.devices()[:2])
    half = [x if x.dtype == bool else x.astype(jnp.bfloat16) for x in example()[:4]]
    odd = [x if x.dtype == bool else x.astype(jnp.bfloat16) for x in example(width=12)[:4]]
    three = example(3)[:4]

    def auto(layout, arrays):
        with layout.active():
            attention(*arrays)
        return taken.pop()

    assert auto(Layout(lone), example()[:4]) == "cellwise"
    assert auto(Layout(two), example()[:4]) == "cellwise"
    assert auto(Layout(two), three) == "chunked"
    with monkeypatch.context() as patch:
        patch.setattr(module, "LONG", example()[0].shape[1] ** 2 - 1)
        assert auto(Layout(lone), example()[:4]) == "chunked"
    assert auto(Layout(lone, attention="cudnn"), half) == "cudnn"
    assert auto(Layout(lone, attention="cudnn"), odd) == "chunked"
    assert auto(Layout(lone, attention="cudnn"), example()[:4]) == "chunked"
    attention(*three)  # without a layout, eight devices about
    assert taken.pop() == "chunked"
    with Layout(two).active(), pytest.raises(ValueError, match="3 cells, which the mesh cuts into 2 slices"):
        attention(*three, backend="cellwise")
    with pytest.raises(ValueError, match="einsum, cellwise, chunked, cudnn, splash, not 'flash'"):
        attention(*three, backend="flash")


def test_the_tool_that_races_backends(capsys, tmp_path):
    page = tmp_path / "page.md"
    (line,) = bench_attention.main(["--size", "smoke", "--rounds", "1", "--markdown", str(page)])
    printed = json.loads(capsys.readouterr().out.splitlines()[0])
    assert printed["shape"] == list(line["shape"]) == [2, 16, 2, 8]
    assert line["time"]["einsum"] == 1.0 and all(
        line["time"][name] > 0 for name in ("cells", "heads", "chunked")
    )
    assert "| 2 x 16 x 2 x 8 |" in page.read_text()


# ------------------------------------------------------------------ kernels of accelerators
@pytest.mark.parametrize("unknown", [0, 5])
def test_cudnn_is_given_what_its_kernels_need(unknown, monkeypatch):
    """The same call of XLA's implementation, for any device: padding moved, lengths, masks, even numbers."""
    xla = jax.nn.dot_product_attention

    def call(q, k, v, mask=None, *, key_value_seq_lengths, implementation):
        assert implementation == "cudnn" and (k.shape[1] % 2, q.shape[1] % 2) == (0, 0)
        return xla(q, k, v, mask=mask, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    arrays = example(unknown=unknown)
    same(results("cudnn", arrays, unknown), results("einsum", arrays, unknown))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("unknown", [0, 5])
def test_cudnn_lowers_for_cuda(sizes, unknown, monkeypatch):
    """Lowered here, without a GPU: the forward and the backward kernels are in the program."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    monkeypatch.setattr(kernels, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91200))
    q, k, v, mask, gradient = example(8, 32, 4, 64, unknown=unknown, dtype="bfloat16")
    mesh = make_mesh(MeshConfig(*sizes), devices=jax.devices()[: np.prod(sizes)])

    def run(*arrays):
        with Layout(mesh, attention="cudnn").active():
            return results("auto", arrays, unknown)

    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
        for x in (q, k, v, mask, gradient)
    ]
    text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaSoftmax") + text.count("__cudnn$fmhaScaleBiasSoftmax") >= (
        2 if unknown else 1
    )
    assert "Backward" in text
    if np.prod(sizes) > 1:  # a device's share: four cells by rows, two of four heads
        assert "tensor<2x32x2x64xbf16>" in text


@pytest.mark.parametrize("unknown", [0, 5])
def test_splash_lowers_for_tpus(unknown):
    arrays = example(2, 200, 2, 64, unknown=unknown, dtype="bfloat16")

    def value(q, k, v):
        return flash.splash(q, k, v, arrays[3], unknown).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(value, argnums=(0, 1, 2))).trace(*arrays[:3])
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") >= 3


@pytest.mark.gpu
@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs an NVIDIA GPU of compute capability 8.0 or more"
)
@pytest.mark.parametrize("unknown", [0, 37, 512])
def test_cudnn_on_a_gpu(unknown):
    arrays = example(8, 1025, 8, 64, unknown=unknown, dtype="bfloat16")
    wide = tuple(x if x.dtype == bool else x.astype(jnp.float32) for x in arrays)
    due = [x.astype(jnp.bfloat16) for x in results("chunked", wide, unknown)]
    same(results("cudnn", arrays, unknown), due, "bfloat16")
