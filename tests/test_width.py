"""A learning rate found on a narrow model holds on a wide one: sizes and rates by hand, and what steps do."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import GENES, TINY, batch_of

from scjax import models
from scjax.config import ConfigError
from scjax.nn import bind, initialise
from scjax.parallel import MeshConfig, make_mesh, place
from scjax.train import (
    OptimizerConfig,
    abstract_state,
    grown,
    init_state,
    make_optimizer,
    make_train_step,
)
from scjax.train.width import growth

BASE, WIDE = 2, 16  # times the width of TINY
WIDTHS = ("d_model", "n_heads", "d_ff", "decoder_d_model", "decoder_n_heads", "decoder_d_ff")


def widths(system, factor):
    """The fields of a system's width, ``factor`` times those of TINY, heads of the same width."""
    return {name: factor * TINY[system][name] for name in WIDTHS if name in TINY[system]}


@functools.cache
def pair(system, **options):
    """The wide model, as it starts by the rules of muP, and its base."""
    config = TINY[system] | options | widths(system, WIDE)
    base = models.build(system, config | widths(system, BASE), GENES)
    return grown(models.build(system, config, GENES), base), base


def by_path(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def sizes(model):
    params = jax.jit(lambda: initialise(model)["params"])()
    return {path: float(jnp.sqrt((x**2).mean())) for path, x in by_path(params).items()}


def test_sizes_and_rates_by_hand():
    """scGPT, eight times as wide."""
    wide, base = pair("scgpt")
    rates = {path: g.rate(muon=False) for path, g in by_path(growth(wide, base)).items()}
    muon = {path: g.rate(muon=True) for path, g in by_path(growth(wide, base)).items()}
    size, narrow = sizes(wide), sizes(base)
    plain = sizes(models.build("scgpt", TINY["scgpt"] | widths("scgpt", WIDE), GENES))
    m, block = WIDE / BASE, "transformer/blocks/"
    table = {  # size of the base's, rate, rate with Muon
        "gene/embedding": (1, 1, 1),
        "value/layers/0/kernel": (1, 1, 1),  # from one number: an input
        "value/layers/1/kernel": (m**-0.5, 1 / m, 1 / m),
        block + "attention/qkv/kernel": (m**-0.5, 1 / m, m**-0.5),
        block + "attention/out/kernel": (m**-0.5, 1 / m, m**-0.5),
        block + "up/kernel": (m**-0.5, 1 / m, m**-0.5),
        block + "norm1/scale": (1, 1, 1),
        "decoder/value/layers/2/kernel": (1 / m, 1 / m, 1 / m),  # to one number: an output
        "mvc/query/kernel": (m**-0.5, 1 / m, 1 / m),
        "mvc/value/kernel": (1, 1 / m**2, 1 / m**2),  # starts at 0; between two vectors of the width
    }
    for path, (of_base, rate, with_muon) in table.items():
        np.testing.assert_allclose(size[path], of_base * narrow[path], rtol=1e-5, err_msg=path)
        assert (rates[path], muon[path]) == pytest.approx((rate, with_muon)), path
    # as Flax has it a table gets smaller as it gets wider, which muP undoes
    table = "flag/embedding"
    assert plain[table] / narrow[table] == pytest.approx(m**-0.5, rel=0.3)
    assert size[table] == pytest.approx(narrow[table], rel=1e-5)


def test_the_base_is_itself():
    model = models.build("geneformer", TINY["geneformer"], GENES)
    same = grown(model, model)
    a, b = (jax.jit(lambda m=m: initialise(m))() for m in (same, model))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)
    assert {g.rate(muon=True) for g in jax.tree.leaves(growth(model, model))} == {1}


def test_weight_decay_is_the_same_for_all_widths():
    wide, base = pair("scgpt")
    config = OptimizerConfig(0.5, schedule="constant", weight_decay=0.2, width_base=widths("scgpt", BASE))
    tx, _ = make_optimizer(config, 10, wide, base)
    params = jax.jit(lambda: initialise(wide)["params"])()

    def updates(fill):
        return jax.jit(
            lambda p: tx.update(jax.tree.map(lambda x: jnp.full_like(x, fill), p), tx.init(p), p)[0]
        )(params)

    still, moved = by_path(updates(0.0)), by_path(updates(1.0))
    kernel = by_path(params)["transformer/blocks/up/kernel"]
    np.testing.assert_allclose(still["transformer/blocks/up/kernel"], -0.5 * 0.2 * kernel, rtol=1e-5)
    step = moved["transformer/blocks/up/kernel"] - still["transformer/blocks/up/kernel"]
    np.testing.assert_allclose(step, -0.5 * BASE / WIDE, rtol=1e-3)


def moved(model, base, name="adamw"):
    """By how much a few steps move the embedding of cells, as a multiple of its size."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = OptimizerConfig(3e-3, name=name, schedule="constant", width_base=None if base is None else {})
    tx, _ = make_optimizer(config, 10, model, base)
    like = abstract_state(model, tx, mesh)
    step, state = make_train_step(model, tx, like, seed=0), init_state(model, tx, like)
    embed = jax.jit(lambda s, batch: bind(model, s["params"], s["buffers"]).embed(batch))
    batch = place(batch_of(16, seed=0), mesh)
    before = embed(state, batch)
    for _ in range(5):
        state, _ = step(state, batch)
    return float(jnp.linalg.norm(embed(state, batch) - before) / jnp.linalg.norm(before))


@pytest.mark.parametrize(
    "system, name",
    [("scgpt", "adamw"), ("geneformer", "adamw")]
    + [pytest.param("scgpt", "muon", marks=pytest.mark.slow)]
    + [pytest.param(s, "adamw", marks=pytest.mark.slow) for s in ("celllm", "scbert", "scfoundation")],
)
def test_steps_move_a_wide_model_as_far_as_its_base(system, name):
    """The coordinate check of muP: at one learning rate, an eight times wider model moves as far as its base;
    without the scaling it moves farther."""
    wide, base = pair(system)
    narrow = moved(base, None, name)
    assert 0.7 < moved(wide, base, name) / narrow < 1.4
    plain = models.build(system, TINY[system] | widths(system, WIDE), GENES)
    assert moved(plain, None, name) / narrow > 1.4


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "system, change, told",
    [
        ("scgpt", {"d_model": 64}, "the width of a head must be the same; let n_heads grow with d_model"),
        ("scgpt", {"n_layers": 3}, "the number of layers, of genes and the width of a head must be the same"),
        ("scgpt", {"zeros": True, "zero_probability": True}, "this base has other parameters"),
        ("test_models:MeanModel", {"d_model": 16}, "MeanModel does not say which .* Set READOUTS"),
    ],
)
def test_what_is_not_a_width_is_refused(system, change, told):
    model = models.build(system, TINY[system], GENES)
    with pytest.raises(ConfigError, match=told):
        growth(model, models.build(system, TINY[system] | change, GENES))


def test_the_base_must_be_given():
    model = models.build("geneformer", TINY["geneformer"], GENES)
    with pytest.raises(ValueError, match="width_base and the model of that width"):
        make_optimizer(OptimizerConfig(1e-3, width_base={"d_model": 8}), 10, model)
