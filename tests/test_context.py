"""Context tokens: what is absent is as if it were not there, in every system; on any mesh, and resumed."""

import dataclasses
import functools
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_layouts
from flax import nnx
from jax.sharding import AxisType
from synthetic import synthetic_adata
from test_models import GENES, TINY, batch_of

import scjax
from scjax import models
from scjax.api import Model
from scjax.config import ConfigError, from_config
from scjax.genes import Vocabulary
from scjax.nn import abstract, bind, flatten, initialise, shapes_of
from scjax.nn.context import Context, ContextToken, check_context
from scjax.nn.work import late_work
from scjax.parallel import place
from scjax.train import Checkpoints, init_state

CONTEXT = {
    "assay": {"kind": "label", "size": 3, "dropout": 0.5},
    "dose": {"kind": "value", "size": 1},
    "place": {"kind": "coordinates", "size": 2, "scale": 10.0},
    "place again": {"kind": "coordinates", "size": 2, "encoding": "fourier", "frequencies": 4},
    "near": {"kind": "neighbours", "size": 3, "width": 2},
    "protein": {"kind": "features", "size": 4},
    "target": {"kind": "genes", "size": 2},
}
N_TOKENS = 1 + 1 + 1 + 1 + 3 + 4 + 2
SYSTEMS = sorted(models.SYSTEMS)
USUAL = ("scbert", "scgpt")  # a Performer without padding; two passes
# most of the time goes into compiling
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def each(*usual):
    """The systems, those not ``usual`` in the long suite."""
    marked = [name if name in usual else pytest.param(name, marks=pytest.mark.pods) for name in SYSTEMS]
    return pytest.mark.parametrize("name", marked)


def given(batch, seed=0):
    """The batch with everything that ``CONTEXT`` names, and the label of the other tests."""
    rng, n = np.random.default_rng([seed, 7]), batch.row.size
    normal = lambda *shape: rng.standard_normal((n, *shape)).astype(np.float32)  # noqa: E731
    value = {"dose": abs(normal()), "place": 50 * normal(2), "place again": normal(2), "near": normal(6)}
    value |= {"protein": rng.poisson(3.0, (n, 4)).astype(np.float32)}
    value |= {"target": rng.integers(0, GENES, (n, 2)).astype(np.float32)}
    assay = rng.integers(0, 3, n).astype(np.int32)
    return batch.replace(label={"assay": assay, "dataset": (batch.row % 3).astype(np.int32)}, value=value)


def unknown(batch, *names):
    """The same with nothing known of the names, as the loader says it; all of them by default."""
    gone = lambda k, v: np.full_like(v, np.nan) if k in (names or CONTEXT) else v  # noqa: E731
    label = {k: np.full_like(v, -1) if k in (names or CONTEXT) else v for k, v in batch.label.items()}
    return batch.replace(label=label, value={k: gone(k, v) for k, v in batch.value.items()})


def jittered(model, seed=0):
    """Parameters and buffers, every parameter moved, so that no zero hides a dependence."""
    state = jit(lambda: initialise(model))()
    rng = np.random.default_rng(seed)
    move = lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype)  # noqa: E731
    return state | {"params": jax.tree.map(move, state["params"])}


@functools.cache
def system(name):
    """(model, state, jitted embed of (buffers and parameters, batch))."""
    model = models.build(name, TINY[name] | {"context": CONTEXT}, GENES, seed=3)

    @jit
    def embed(state, batch):
        module = bind(model, state["params"], state["buffers"])
        module.eval()
        return module.embed(batch)

    return model, jittered(model), embed


class TestSystems:
    @each(*USUAL)
    def test_absent_is_as_if_there_were_none(self, name):
        """The embedding, and with it the masked tokens, is that of the model without context."""
        model, state, embed = system(name)
        plain = models.build(name, TINY[name], GENES)
        own = {path for path in flatten(shapes_of(model)["params"]) if path.startswith("context/")}
        rest = flatten(state["params"]).keys() - own
        assert own and rest == flatten(shapes_of(plain)["params"]).keys()
        batch = given(batch_of())
        absent = np.asarray(embed(state, unknown(batch)))
        module = bind(plain, state["params"], state["buffers"])
        module.eval()
        np.testing.assert_allclose(absent, jit(module.embed)(batch), atol=5e-6 * np.abs(absent).max())
        assert np.abs(np.asarray(embed(state, batch)) - absent).max() > 1e-3 * np.abs(absent).max()

    @each(*USUAL)
    def test_a_cell_depends_on_itself_alone(self, name):
        """Beside other cells, in any order of genes, it is embedded alike; each name makes a difference."""
        _, state, embed = system(name)
        batch = given(batch_of())
        whole = np.asarray(embed(state, batch))
        close = functools.partial(np.testing.assert_allclose, atol=5e-6 * np.abs(whole).max())
        mixed = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), batch, given(batch_of(seed=9), 5))
        close(embed(state, mixed)[0], whole[0])
        order = np.random.default_rng(1).permutation(batch.shape[1])
        close(
            embed(state, batch.replace(gene_id=batch.gene_id[:, order], count=batch.count[:, order])), whole
        )
        near = batch.value["near"].reshape(-1, 3, 2)[:, ::-1].reshape(-1, 6)  # neighbours have no order
        close(embed(state, batch.replace(value=batch.value | {"near": near})), whole)
        for token in CONTEXT:
            assert np.abs(embed(state, unknown(batch, token)) - whole).max() > 1e-4 * np.abs(whole).max()

    @each(*USUAL)
    def test_states_are_those_of_the_genes(self, name):
        model, state, _ = system(name)
        module = bind(model, state["params"], state["buffers"])
        module.eval()
        batch = given(batch_of())
        gene_id, states = jit(module.states)(batch)
        assert gene_id.shape == states.shape[:2]
        for ids, own in zip(np.asarray(gene_id), batch.gene_id, strict=True):
            assert set(ids[ids >= 0]) <= set(own) and len(set(ids[ids >= 0])) == (ids >= 0).sum() > 0
        assert np.isfinite(states).all()

    @each("scgpt")
    def test_every_parameter_of_the_context_learns(self, name):
        """A gradient reaches each, through the loss, second passes and parts included."""
        more = {"parts": 2} if name == "celllm" else {}
        more = {"mask_fractions": (0.25, 0.5), "second_pass_after": 1} if name == "scgpt" else more
        tokens = {k: v | {"dropout": 0.0} for k, v in CONTEXT.items()}
        model = models.build(name, TINY[name] | {"context": tokens} | more, GENES)
        state, batch = system(name)[1], given(batch_of(8))
        later = {"calls": jnp.asarray(5)} if name == "scgpt" else {}

        @jit
        @jax.grad
        def slope(params):
            total, _, _ = bind(model, params, state["buffers"] | later).loss(batch, jax.random.key(0))
            return sum(total.values()) if isinstance(total, dict) else total

        for path, gradient in flatten(slope(state["params"])["context"]).items():
            assert np.abs(gradient).max() > 0, path

    @each(*USUAL)
    def test_work_counts_the_tokens(self, name):
        few = late_work(models.build(name, TINY[name], GENES), np.array([20.0]))
        more = late_work(system(name)[0], np.array([20.0]))
        assert more[0] == few[0] + N_TOKENS and more[1] > few[1]


# ------------------------------------------------------------------------------------ reading
def context_of(**tokens):
    """The module alone, its parameters filled."""
    made = {name: from_config(ContextToken, token) for name, token in tokens.items()}
    return Context(made, 8, rngs=nnx.Rngs(0))


def test_dropout_follows_the_row():
    """A share of the cells is told nothing, the same cells in any batch, each name by itself."""
    half = {"kind": "label", "size": 3, "dropout": 0.5}
    both, one = context_of(assay=half, dataset=half), context_of(assay=half)
    batch, key = given(batch_of(400)), jax.random.key(3)
    kept = both.read(batch, key)
    dropped = {name: np.asarray(value) < 0 for name, value in kept.items()}
    assert all(0.4 < x.mean() < 0.6 for x in dropped.values())
    assert 0.15 < (dropped["assay"] & dropped["dataset"]).mean() < 0.35
    some = jax.tree.map(lambda x: x[37:90], batch)
    np.testing.assert_array_equal(both.read(some, key)["assay"], kept["assay"][37:90])
    np.testing.assert_array_equal(one.read(batch, key)["assay"], kept["assay"])
    assert (np.asarray(one.read(batch, jax.random.key(4))["assay"] < 0) != dropped["assay"]).any()
    np.testing.assert_array_equal(one.read(batch)["assay"], batch.label["assay"])


def test_a_part_of_a_panel_may_be_missing():
    context = context_of(protein={"kind": "features", "size": 4}, near=CONTEXT["near"])
    batch = given(batch_of(3))
    value = {k: v.copy() for k, v in batch.value.items()}
    value["protein"][0, 1] = value["near"][1, 2] = np.nan
    read = context.read(batch.replace(value=value))
    x, valid = context.beside(jnp.zeros((3, 0, 8)), jnp.zeros((3, 0), bool), read, lambda ids: ids)
    expected = np.ones((3, 7), bool)
    expected[0, 3 + 1] = expected[1, 1] = False  # one protein of a cell, one neighbour of another
    np.testing.assert_array_equal(valid, expected)
    assert (np.asarray(x)[~expected] == 0).all() and np.isfinite(x).all()


def test_bad_input_is_told():
    with pytest.raises(ConfigError, match=r"kind is 'lable'; did you mean 'label'"):
        context_of(assay={"kind": "lable", "size": 3})
    with pytest.raises(ConfigError, match="size = 0"):
        context_of(assay={"kind": "label", "size": 0})
    with pytest.raises(ConfigError, match=r"model.context.assay.siez is unknown; did you mean 'size'"):
        config = {"context": {"assay": {"kind": "label", "siez": 3}}}
        from_config(models.resolve("scgpt")[1], config, where="model")
    with pytest.raises(ConfigError, match="part of a path"):
        context_of(**{"a/b": {"kind": "label", "size": 1}})
    batch = given(batch_of(3))
    wrong = context_of(place={"kind": "coordinates", "size": 3})
    with pytest.raises(
        ValueError, match="'place' has 2 numbers a cell; the coordinates token of size 3 takes 3"
    ):
        wrong.read(batch)
    asked = context_of(asay={"kind": "label", "size": 3})
    with pytest.raises(
        ValueError, match=r"\['assay', 'dataset'\]; did you mean 'assay'\? name it in data.labels"
    ):
        asked.read(batch, required=True)
    assert asked.read(batch) == {}
    module = system("scgpt")[0]
    state = system("scgpt")[1]
    with pytest.raises(ValueError, match="'dose', but batches carry the values .* name it in data.values"):
        value = {k: v for k, v in batch.value.items() if k != "dose"}
        bind(module, state["params"], state["buffers"]).loss(batch.replace(value=value), jax.random.key(0))


def test_a_corpus_that_does_not_fit_is_told_before_any_work():
    """A wrapper's base is asked, too."""
    config = {"base": {"system": "scgpt", "model": {"context": {k: CONTEXT[k] for k in ("assay", "near")}}}}
    check_context(config, {"assay": ["a", "b"]}, {"near": 6})
    with pytest.raises(ConfigError, match=r"data.labels, which are \['asay'\]; did you mean 'asay'"):
        check_context(config, {"asay": ["a"]}, {"near": 6})
    with pytest.raises(ConfigError, match=r"assay.size = 3, but 'assay' has 4 categories"):
        check_context(config, {"assay": list("abcd")}, {"near": 6})
    with pytest.raises(ConfigError, match=r"near takes 6 numbers of a cell; in the corpus 'near' has 5"):
        check_context(config, {"assay": ["a"]}, {"near": 5})


def test_what_else_reads_a_corpus_is_held_against_it():
    """Drugs, the batches of a system's own objectives, and tasks."""
    told = {"drug": {"drug": {"kind": "label", "size": 2}}, "base": {"system": "scgpt", "model": {}}}
    check_context(told, {"drug": ["a", "b"]}, {})
    with pytest.raises(ConfigError, match=r"model.drug.drug.size = 2, but 'drug' has 3 categories"):
        check_context(told, {"drug": list("abc")}, {})
    batches = {"n_batches": 2, "batch_label": "study", "dab_weight": 1.0}
    check_context(batches, {"study": ["a", "b"]}, {})
    with pytest.raises(ConfigError, match=r"model.n_batches = 2, but 'study' has 3 categories"):
        check_context(batches, {"study": list("abc")}, {})
    with pytest.raises(ConfigError, match=r"model.n_batches reads data.labels, which are \['studies'\]; did"):
        check_context(batches, {"studies": ["a"]}, {})
    around = {"base": {"system": "scgpt", "model": batches}, "objective_weight": 0.0}
    check_context(around, {"study": list("abc")}, {})  # its objective is not computed
    with pytest.raises(ConfigError, match="n_batches = 2"):
        check_context(around | {"objective_weight": 1.0}, {"study": list("abc")}, {})
    tasks = {
        "type": {"size": 2},
        "dose": {"kind": "regression", "size": 1},
        "age": {"kind": "ordinal", "size": 2},
    }
    tasks["age"]["rank"] = (1, -1, 0)
    check_context({"tasks": tasks}, {"type": list("ab"), "age": list("abc")}, {"dose": 1})
    with pytest.raises(ConfigError, match=r"model.tasks.type.size = 2, but 'type' has 3 categories"):
        check_context({"tasks": tasks}, {"type": list("abc"), "age": list("abc")}, {"dose": 1})
    with pytest.raises(ConfigError, match=r"model.tasks.dose takes 1 numbers of a cell; .* has 3"):
        check_context({"tasks": tasks}, {"type": ["a"], "age": list("abc")}, {"dose": 3})


def test_a_category_beyond_the_table_stops_a_run():
    context = context_of(assay={"kind": "label", "size": 2})
    batch = batch_of(2).replace(label={"assay": np.array([1, 2], np.int32)})
    x, _ = context.beside(jnp.zeros((2, 0, 8)), jnp.zeros((2, 0), bool), context.read(batch), lambda ids: ids)
    assert np.isfinite(x[0]).all() and np.isnan(x[1]).all()


def test_nothing_is_made_of_no_context():
    made = abstract(lambda: models.resolve("scgpt")[0](models.resolve("scgpt")[1](), 5, rngs=nnx.Rngs(0)))
    assert not [path for path in flatten(shapes_of(made)["params"]) if path.startswith("context")]


# ------------------------------------------------------------------- meshes and resuming
SPREAD = {name: CONTEXT[name] for name in ("assay", "protein", "target")}
trainer = functools.cache(
    lambda name, shape, axis=AxisType.Auto: test_layouts.trainer(name, shape, axis, context=SPREAD)
)


def steps_of(name, shape, first, last, state, axis=AxisType.Auto):
    """(losses, state) of the steps from ``first`` to ``last``."""
    mesh, _, _, _, step = trainer(name, shape, axis)
    losses = []
    for number in range(first, last):
        state, metrics = step(state, place(given(batch_of(16, seed=number), number), mesh))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert step._cache_size() == 1
    return losses, state


ONE = (1, 1, 1)
CASES = [(name, shape) for name in SYSTEMS for shape in ((8, 1, 1), (1, 8, 1), (2, 2, 2))]


@pytest.mark.pods
@pytest.mark.parametrize("name, shape", CASES)
def test_the_layout_changes_nothing(name, shape):
    _, model, tx, start, _ = trainer(name, ONE)
    fresh = jax.device_get(init_state(model, tx, start))
    put = lambda like: jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), fresh, like)  # noqa: E731
    alone, _ = steps_of(name, ONE, 0, 4, put(start))
    spread = trainer(name, shape, AxisType.Explicit)[3]
    found, _ = steps_of(name, shape, 0, 4, put(spread), AxisType.Explicit)
    np.testing.assert_allclose(found, alone, rtol=1e-5)


@each("scgpt")
def test_resumes_exactly(name, tmp_path):
    _, model, tx, start, _ = trainer(name, ONE)
    losses, whole = steps_of(name, ONE, 0, 4, init_state(model, tx, start))
    _, half = steps_of(name, ONE, 0, 2, init_state(model, tx, start))
    with closing(Checkpoints(tmp_path / "checkpoints", {})) as checkpoints:
        checkpoints.save(2, half, {})
        checkpoints.wait()
        restored = checkpoints.restore(start)
    rest, resumed = steps_of(name, ONE, 2, 4, restored.state)
    assert rest == losses[2:]
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


# ------------------------------------------------------------------------- embedding an AnnData
@pytest.fixture(scope="module")
def handle():
    """(model with a token of the batch and one of the place, cells)"""
    cells = synthetic_adata(20, 40)
    cells.obsm["place"] = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    tokens = {"batch": {"kind": "label", "size": 2}, "place": CONTEXT["place"]}
    config, vocabulary = TINY["scgpt"] | {"context": tokens}, Vocabulary.from_anndata([cells])
    state = jittered(models.build("scgpt", config, len(vocabulary)))
    names = {"batch": ["batch1", "batch0"]}  # in another order than the categories of the AnnData
    where = Path("runs/none")
    return Model("scgpt", config, vocabulary, state["params"], state["buffers"], 0, where, names), cells


def test_embed_takes_context_from_obs_and_obsm(handle):
    model, cells = handle
    embed = functools.partial(model.embed, batch_size=10)
    whole, without = embed(cells), embed(cells, context=False)
    bare = cells.copy()
    del bare.obs["batch"], bare.obsm["place"]
    np.testing.assert_array_equal(embed(bare), without)
    assert np.abs(whole - without).max() > 1e-2
    np.testing.assert_array_equal(embed(cells, context=["batch", "place"]), whole)
    bare.obsm["place"] = np.full((20, 2), np.nan, np.float32)  # there, but not known
    np.testing.assert_allclose(embed(bare), without, atol=2e-6)
    swapped = cells.copy()  # a code means the name that it had in training
    swapped.obs["batch"] = swapped.obs["batch"].cat.rename_categories(
        {"batch0": "batch1", "batch1": "batch0"}
    )
    only = functools.partial(embed, context=["batch"])
    assert (np.abs(only(swapped) - only(cells)).max(1) > 1e-4).all()
    order = swapped.obs["batch"].cat.set_categories(["batch1", "batch0"])
    swapped.obs["batch"] = order.cat.rename_categories({"batch0": "batch1", "batch1": "batch0"})
    np.testing.assert_array_equal(only(swapped), only(cells))
    scjax.embed(cells, model, batch_size=10)
    np.testing.assert_array_equal(cells.obsm.pop("X_scjax"), whole)
    assert cells.uns["scjax"]["X_scjax"]["context"] == ["batch", "place"]


def test_embed_tells_what_it_does_not_know(handle):
    model, cells = handle
    strange = cells.copy()
    strange.obs["batch"] = ["batch7", *["batch1"] * 19]
    with pytest.raises(ValueError, match=r"'batch' has 'batch7', not among its 2 categories .* did you mean"):
        scjax.embed(strange, model)
    assert "X_scjax" not in strange.obsm
    with pytest.raises(KeyError, match=r"'dose': .* the model's tokens are \['batch', 'place'\]"):
        model.embed(cells, context=["dose"])
    bare = cells.copy()
    del bare.obsm["place"]
    with pytest.raises(KeyError, match=r"'place': the AnnData has none such; .* has \['batch'\]"):
        model.embed(bare, context=["place"])
    with pytest.raises(ValueError, match="does not say which category is which"):
        dataclasses.replace(model, categories={}).embed(cells)
