"""CellLM against a network of performer-pytorch: the same weights and cells give the same numbers.

Without PyTorch from a golden file that ``tools/reference/celllm.py`` wrote; with it (marked "parity") from
networks built on the spot.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax import models
from scjax.interop import celllm as interop
from scjax.interop import performers
from scjax.interop.mapping import import_tensors
from scjax.nn import bind, shapes_of
from scjax.types import CellBatch

GOLDEN = pathlib.Path(__file__).parent / "golden" / "celllm.npz"
SMALL = {
    "d_model": 16,
    "n_heads": 2,
    "d_head": 8,
    "n_layers": 2,
    "d_ff": 64,
    "max_length": 31,
    "gene_table": {"kind": "frozen"},
}
CASES = {"bins": SMALL | {"truncate": "index"}, "cell": SMALL | {"n_outputs": 3}}
VARIANTS = {
    "head": {"stabiliser": "head", "pad_mask": "values"},  # performer-pytorch as it is
    "global": {"stabiliser": "global", "pad_mask": "values"},  # CellLM as published
    "alone": {"stabiliser": "head", "pad_mask": "keys"},  # ours: padding is not there
}
TOLERANCE = 2e-5
PUBLISHED = 51_926_536


def part(found, prefix):
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


@functools.cache
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def batch_of(found):
    n = len(found["count"])
    return CellBatch(
        found["gene_id"],
        found["count"],
        found["count"].sum(1),
        (found["gene_id"] >= 0).sum(1).astype(np.int32),
        np.arange(n, dtype=np.uint32),
        {},
        {},
        np.ones(n, np.float32),
    )


def ours(case, found, variant):
    """Gene ids, tokens, normalised hidden states and outputs of our network with their weights."""
    config = CASES[case] | VARIANTS[variant]
    prefix = "weights/encoder." if config.get("n_outputs") else "weights/"
    n_genes = len(found[f"{prefix}pos_emb.emb.weight"]) - 2
    model = models.build("celllm", config, n_genes)
    tensors = performers.split_table(part(found, "weights/"), 2)
    fill = {"buffers/gene/known": 1.0, "buffers/bin_count": 0.0}
    variables, _ = import_tensors(
        interop.rules(config, n_genes), tensors, shapes_of(model), interop.IGNORED, fill
    )

    @jax.jit
    def run(variables, batch):
        module = bind(model, **variables)
        tokens = module.whole(batch)
        cell, genes = module(tokens)
        x = jnp.concatenate([cell[:, None], genes], 1)
        out = module.predict_cell(batch) if config.get("n_outputs") else module.predict(x)
        return {
            "gene_id": tokens.gene_id,
            "token": tokens.shown,
            "hidden": module.norm(x),
            "out": out,
            "embed": module.embed(batch),
        }

    return {k: np.asarray(v) for k, v in run(jax.tree.map(jnp.asarray, variables), batch_of(found)).items()}


def compare(case, found, variant):
    mine = ours(case, found, variant)
    if CASES[case].get("n_outputs"):
        np.testing.assert_allclose(mine["out"], found[f"{variant}/out"], atol=TOLERANCE)
    for i, place in enumerate(found["place"]):
        n = int((found["token"][i] != 7).sum())
        slots = mine["gene_id"][i]
        order = np.argsort(np.where(slots < 0, 999, slots), kind="stable")[: n - 1]
        np.testing.assert_array_equal(slots[order], place[1:n])
        np.testing.assert_array_equal(mine["token"][i, order], found["token"][i, 1:n])
        order = np.r_[0, 1 + order]
        hidden = found[f"{variant}/hidden"][i]
        np.testing.assert_allclose(mine["hidden"][i, order], hidden[:n], atol=TOLERANCE)
        np.testing.assert_allclose(mine["embed"][i], hidden[0], atol=TOLERANCE)
        if not CASES[case].get("n_outputs"):
            np.testing.assert_allclose(mine["out"][i, order], found[f"{variant}/out"][i, :n], atol=TOLERANCE)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("case", sorted(CASES))
def test_golden(case, variant):
    found = part(golden(), f"{case}/")
    n = (found["token"] != 7).sum(1)
    assert n.min() < 31 == n.max() < (found["gene_id"] >= 0).sum(1).max()  # padded ones and cut ones
    compare(case, found, variant)


def test_the_variants_differ():
    found = part(golden(), "bins/")
    padded = np.flatnonzero((found["token"] == 7).any(1))
    for a, b in (("head", "global"), ("head", "alone")):
        difference = found[f"{a}/hidden"][padded, :5] - found[f"{b}/hidden"][padded, :5]
        assert np.abs(difference).max() > 100 * TOLERANCE


def test_parameter_count_of_the_published_model():
    model = models.build("celllm", {"gene_table": {"kind": "frozen"}}, 19_379)
    shapes = shapes_of(model)
    gene = shapes["buffers"]["gene"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert count + gene["table"].size + gene["special"].size == PUBLISHED


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
class TestWithTorch:
    @pytest.mark.parametrize("variant", sorted(VARIANTS))
    @pytest.mark.parametrize("case", sorted(CASES))
    def test_another_network(self, case, variant):
        from reference import celllm as reference

        compare(case, part(reference.golden(seed=11), f"{case}/"), variant)

    def test_golden_file_is_what_the_tool_writes(self):
        from reference import celllm as reference

        fresh = reference.golden()
        assert set(fresh) == set(golden())
        for name, value in golden().items():
            np.testing.assert_allclose(value, fresh[name], atol=1e-5, err_msg=name)

    @pytest.mark.full
    def test_published_size(self):
        from reference import celllm as reference

        report = reference.full()
        print(json.dumps(report))
        assert report["parameters"] == PUBLISHED
        assert max(report["max_abs"].values()) <= report["tolerance"]
