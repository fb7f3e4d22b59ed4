"""Every system on every layout: the same losses, and no communication but that which there must be."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_models import GENES, TINY, batch_of

from scjax import models
from scjax.nn.linear import product
from scjax.nn.module import axes_of, shapes_of
from scjax.parallel import Layout, MeshConfig, batch_sharding, make_mesh, partition, place
from scjax.train import (
    OptimizerConfig,
    abstract_state,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
)

SYSTEMS = sorted(models.SYSTEMS)
# what only happens after many calls, so that it happens here: redrawn projections, scGPT's second pass
SOON = {"redraw_every": 2, "second_pass_after": 2}
STEPS = 20
# the tensor axis over two devices, as many as there are heads, and over more than there are
SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 2), (1, 1, 8), (2, 4, 1), (2, 2, 2)]
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
USUAL = [(system, (2, 2, 2), EXPLICIT) for system in SYSTEMS]
USUAL += [("scgpt", (1, 8, 1), AUTO)]
CASES = [
    pytest.param(*case, marks=[] if case in USUAL else pytest.mark.pods, id="-".join(map(str, case)))
    for case in [(s, shape, axis) for s in SYSTEMS for shape in SHAPES for axis in (AUTO, EXPLICIT)]
]
WARNING = "Involuntary full rematerialization"


def trainer(system: str, shape: tuple[int, int, int], axis: AxisType = AUTO, accumulate: int = 1, **changes):
    """(mesh, model, optimiser, abstract state, step)"""
    mesh = make_mesh(MeshConfig(*shape), devices=jax.devices()[: math.prod(shape)], axis_type=axis)
    fields = {field.name for field in dataclasses.fields(models.resolve(system)[1])}
    config = TINY[system] | {k: v for k, v in SOON.items() if k in fields} | changes
    model = models.build(system, config, GENES)
    tx, _ = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1), STEPS, model)
    abstract = abstract_state(model, tx, mesh)
    step = make_train_step(model, tx, abstract, seed=0, accumulate=accumulate)
    return mesh, model, tx, abstract, step


def train(system: str, shape: tuple[int, int, int], axis: AxisType = AUTO, fresh=None, **changes):
    """(state before the first step, on the host; losses of the steps). Cells are of three data sets."""
    mesh, model, tx, abstract, step = trainer(system, shape, axis, **changes)
    fresh = jax.device_get(init_state(model, tx, abstract)) if fresh is None else fresh
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), fresh, abstract)
    losses = []
    for number in range(STEPS):
        batch = batch_of(16, seed=number)
        batch = batch.replace(label={"dataset": (batch.row % 3).astype(np.int32)})
        state, metrics = step(state, place(batch, mesh))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert step._cache_size() == 1
    return fresh, losses


on_one_device = functools.cache(lambda system: train(system, (1, 1, 1)))


@pytest.mark.parametrize("system, shape, axis", CASES)
def test_the_layout_changes_nothing(system, shape, axis, capfd):
    """Dropout, redraws, second passes and all; and no array is gathered on every device to be cut anew."""
    fresh, alone = on_one_device(system)
    capfd.readouterr()
    np.testing.assert_allclose(train(system, shape, axis, fresh)[1], alone, rtol=1e-5)
    assert WARNING not in capfd.readouterr().err


VARIANTS = {
    "celllm in parts": ("celllm", {"parts": 2, "label": "dataset", "tumour_codes": (1,)}),
    "geneformer frozen": ("geneformer", {"gene_table": {"kind": "frozen"}, "dtype": "bfloat16"}),
    "scbert projected": ("scbert", {"gene_table": {"kind": "projected", "dim": 8}, "stabiliser": "global"}),
    "scfoundation by cell": ("scfoundation", {"decoding": "cellwise", "remat": "dots"}),
    "scgpt integration": (
        "scgpt",
        {"objective": "masked", "n_batches": 3, "batch_decoder": True, "batch_norm": "domain"}
        | {"dab_weight": 1.0, "ecs_weight": 10.0, "zeros": True, "zero_probability": True, "max_length": 61},
    ),
    "scgpt drawn fraction": ("scgpt", {"mask_fractions": (0.25, 0.5, 0.75), "norm": "pre", "pool": "mean"}),
}


@pytest.mark.pods
@pytest.mark.parametrize("name", VARIANTS)
def test_the_layout_changes_nothing_of_other_settings(name, capfd):
    """Objectives between cells, gene tables from outside, parts and branches."""
    system, changes = VARIANTS[name]
    fresh, alone = train(system, (1, 1, 1), **changes)
    capfd.readouterr()
    # in bfloat16 activations are rounded anew wherever sums are cut
    rtol = 1e-2 if changes.get("dtype") else 1e-5
    spread = train(system, (2, 2, 2), EXPLICIT, fresh, **changes)[1]
    np.testing.assert_allclose(spread, alone, rtol=rtol)
    assert WARNING not in capfd.readouterr().err


def test_the_warning_would_be_seen(capfd):
    """The compiler warns on the file descriptor that is read above, in the words that are looked for."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    there = jax.device_put(np.ones((8, 8), np.float32), NamedSharding(mesh, P(("data", "fsdp"))))

    def elsewhere(x):
        x = jax.lax.with_sharding_constraint(x * 2, NamedSharding(mesh, P(("data", "fsdp"))))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, "fsdp"))) * 2

    jax.jit(elsewhere)(there).block_until_ready()
    assert WARNING in capfd.readouterr().err


def test_micro_batches_evaluation_and_lengths():
    """Of a layout too, what they give is that of one device; a compile for each length, and none beside."""
    losses = []
    for shape, axis in (((1, 1, 1), AUTO), ((2, 2, 2), EXPLICIT)):
        mesh, model, tx, abstract, step = trainer("geneformer", shape, axis, accumulate=2, remat="full")
        evaluate = make_eval_step(model, abstract, seed=0)
        state, found = init_state(model, tx, abstract), []
        for number, slots in enumerate((48, 56, 48, 56)):
            state, metrics = step(state, place(batch_of(16, seed=number, slots=slots), mesh))
            found.append(metrics["loss"][0] / metrics["loss"][1])
        metrics = evaluate(state, place(batch_of(16), mesh))
        losses.append(np.array([*found, metrics["loss"][0] / metrics["loss"][1]]))
        assert step._cache_size() == 2
    np.testing.assert_allclose(*losses, rtol=1e-5)


# ------------------------------------------------------------------------------------ communication
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


def collectives(text: str) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    """Computation -> (kind, dtype, shape) of what each device gets by communication, of compiled HLO."""
    found: dict[str, list] = {}
    where = ""
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            where = start[1]
        if made := re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line):
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", made[1]):
                shape = tuple(int(n) for n in sizes.split(",") if n)
                found.setdefault(where, []).append((made[2], dtype, shape))
    return found


def loops(text: str) -> set[str]:
    return set(re.findall(r"body=%?([\w.-]+)", text))


def without_ones(shapes) -> list[tuple[int, ...]]:
    return sorted(tuple(n for n in shape if n != 1) for shape in shapes)


def shaped(batch, mesh):
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_fsdp_communicates_parameters_only(remat):
    """In the compiled FSDP step each kernel of a layer is gathered when the layer runs, forward and backward,
    and the gradients of its parameters are summed over devices there; each table is gathered once. No
    activation is moved. What is expected follows from the list of parameters and their layout."""
    mesh, model, _, abstract, step = trainer("geneformer", (1, 8, 1), n_layers=3, remat=remat)
    text = step.lower(abstract, shaped(batch_of(16), mesh)).compile().as_text()
    found, bodies = collectives(text), loops(text)
    assert {kind for made in found.values() for kind, *_ in made} == {"all-gather", "all-reduce"}

    axes = jax.tree.leaves(axes_of(model)["params"], is_leaf=lambda x: isinstance(x, tuple))
    leaves = jax.tree.leaves(shapes_of(model)["params"])
    split = ["fsdp" in partition(leaf.shape, names, mesh) for leaf, names in zip(leaves, axes, strict=True)]
    every = list(zip(leaves, axes, split, strict=True))
    in_layers = [(leaf.shape[1:], cut) for leaf, names, cut in every if names[:1] == ("layers",)]
    outside = [(leaf.shape, cut) for leaf, names, cut in every if names[:1] != ("layers",)]
    assert sum(cut for _, cut in in_layers) == 4 and sum(cut for _, cut in outside) == 4

    gathered = {
        where: [shape for kind, _, shape in made if kind == "all-gather"] for where, made in found.items()
    }
    kernels = without_ones(shape for shape, cut in in_layers if cut)
    layer_loops = [where for where in gathered if where in bodies and gathered[where]]
    assert [without_ones(gathered[where]) for where in layer_loops] == [kernels, kernels]
    elsewhere = [shape for where in gathered if where not in layer_loops for shape in gathered[where]]
    assert without_ones(elsewhere) == without_ones(shape for shape, cut in outside if cut)

    reduced = [[shape for kind, _, shape in found[where] if kind == "all-reduce"] for where in layer_loops]
    assert sorted(map(without_ones, reduced)) == [[], without_ones(shape for shape, _ in in_layers)]
    # beside gradients there are the buffers and numbers (sums, weights, metrics, the norm of the gradient)
    others = [
        shape
        for where in found
        if where not in layer_loops
        for kind, _, shape in found[where]
        if kind == "all-reduce"
    ]
    buffers = jax.tree.leaves(shapes_of(model)["buffers"])
    room = sum(math.prod(shape) for shape, _ in outside) + sum(leaf.size for leaf in buffers)
    room += (GENES + 2) * 16  # the table of genes is the output layer too, and has a gradient of each
    assert sum(math.prod(shape) for shape in others if shape) <= room


def test_layers_are_never_gathered_together():
    """What a deeper stack adds to the memory of a step is its gradients and updates, a quarter of its kernels
    when split over eight devices: neither gathered kernels nor whole gradients pile up."""

    def temporary(n_layers: int) -> int:
        size = {"d_model": 128, "d_ff": 512, "n_layers": n_layers, "max_length": 8, "remat": "full"}
        mesh, _, _, abstract, step = trainer("geneformer", (1, 8, 1), **size)
        compiled = step.lower(abstract, shaped(batch_of(8), mesh)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    layer = 4 * (4 * 128 * 128 + 2 * 128 * 512)  # bytes of one layer's kernels
    shallow, deep = temporary(4), temporary(12)
    assert deep - shallow < 8 * layer / 3


# ----------------------------------------------------------------------------------------- numbers


def test_gradients_of_weights_are_summed_in_float32():
    """With activations in bfloat16, a sum over 4,096 rows is that of float32, not of 8 bits of mantissa."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(1, 2, (4096, 2, 8)), jnp.bfloat16)
    kernel, bias = jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32), jnp.zeros(16)

    def total(kernel, bias, axes=None):
        return product(x, kernel, bias, axes, n_in=2).sum(dtype=jnp.float32)

    expected = np.broadcast_to(np.asarray(x, np.float64).sum(0)[..., None], kernel.shape)
    gradients = [jax.jit(jax.grad(total, (0, 1)))(kernel, bias)]
    with Layout(make_mesh(MeshConfig(2, 4, 1))).active():
        spread = jax.grad(lambda *leaves: total(*leaves, ("heads", None, "embed")), (0, 1))
        gradients.append(jax.jit(spread)(kernel, bias))
    assert gradients[1][0].sharding.spec == P(None, None, "fsdp")
    for of_kernel, of_bias in gradients:
        np.testing.assert_allclose(of_kernel, expected, rtol=1e-6)
        np.testing.assert_array_equal(of_bias, np.full(16, 4096.0))


OPTIMISERS = {
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "lion": optax.lion(1e-3),
    "muon": optax.contrib.muon(1e-2),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_state_of_any_optimiser_is_split_like_its_parameters(name):
    """Down to Adafactor's rows and columns; and what it does is the same on any layout."""
    tx, model, losses = OPTIMISERS[name], tiny_model.tiny(), []
    for shape, axis in (((1, 1, 1), AUTO), ((2, 2, 2), EXPLICIT)):
        mesh = make_mesh(MeshConfig(*shape), devices=jax.devices()[: math.prod(shape)], axis_type=axis)
        abstract = abstract_state(model, tx, mesh)
        step, state = make_train_step(model, tx, abstract, seed=0), init_state(model, tx, abstract)
        for number in range(3):
            state, metrics = step(state, place(tiny_model.cells(number), mesh))
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    np.testing.assert_allclose(losses[3:], losses[:3], rtol=1e-5)

    kept = {
        "/".join(p.key for p in path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract["opt"])
    }
    ups = {path: spec for path, spec in kept.items() if path.endswith("blocks/up/kernel")}
    if name == "adafactor":  # of (layers, embed, mlp) the rows lack the longest, mlp, the columns embed
        assert P(None, "fsdp") in ups.values() and P(None, "tensor") in ups.values()
    else:
        assert set(ups.values()) == {P(None, "fsdp", "tensor")}


@pytest.mark.parametrize(
    "system, changes, between",
    [
        ("celllm", {}, True),
        ("celllm", {"contrast_weight": 0.0}, False),
        ("scbert", {}, False),
        ("scbert", {"stabiliser": "global"}, True),
        ("scfoundation", {}, False),
        ("scgpt", {}, False),
        ("scgpt", {"objective": "masked", "ecs_weight": 10.0}, True),
        ("scgpt", {"objective": "masked", "n_batches": 2, "batch_norm": "domain"}, True),
        ("scgpt", {"objective": "masked", "n_batches": 2, "dab_weight": 1.0}, False),
    ],
    ids=str,
)
def test_models_say_whether_they_compare_cells(system, changes, between):
    model, config = models.resolve(system)
    assert model.compares_cells(config(**changes)) is between
