"""scBERT against a network of performer-pytorch: the same weights and cells give the same numbers.

Without PyTorch from a golden file that ``tools/reference/scbert.py`` wrote; with it (marked "parity") from
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
from scjax.interop import performers
from scjax.interop import scbert as interop
from scjax.interop.mapping import import_tensors
from scjax.nn import bind, shapes_of
from scjax.types import CellBatch

GOLDEN = pathlib.Path(__file__).parent / "golden" / "scbert.npz"
SMALL = {
    "d_model": 16,
    "n_heads": 2,
    "d_head": 8,
    "n_layers": 2,
    "d_ff": 64,
    "gene_table": {"kind": "frozen"},
}
CASES = {"bins": SMALL, "cell": SMALL | {"n_outputs": 3}}
TOLERANCE = 2e-5
PUBLISHED = 8_388_607


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


def ours(case, found, stabiliser):
    """Tokens, normalised hidden states and outputs of our network with their weights."""
    config = CASES[case] | {"stabiliser": stabiliser}
    n_genes = found["token"].shape[1] - 1
    model = models.build("scbert", config, n_genes)
    tensors = performers.split_table(part(found, "weights/"), 1)
    fill = {"buffers/gene/known": 1.0, "buffers/bin_count": 0.0}
    variables, _ = import_tensors(
        interop.rules(config, n_genes), tensors, shapes_of(model), interop.IGNORED, fill
    )

    @jax.jit
    def run(variables, batch):
        module = bind(model, **variables)
        tokens = module.all_genes(batch)
        x = module(tokens)
        out = module.predict_cell(batch) if config.get("n_outputs") else module.predict(x)
        return {"token": tokens.shown, "hidden": module.norm(x), "out": out, "embed": module.embed(batch)}

    return {k: np.asarray(v) for k, v in run(jax.tree.map(jnp.asarray, variables), batch_of(found)).items()}


def compare(case, found, stabiliser):
    mine = ours(case, found, stabiliser)
    np.testing.assert_array_equal(mine["token"], found["token"])
    for name in ("hidden", "out"):
        np.testing.assert_allclose(mine[name], found[f"{stabiliser}/{name}"], atol=TOLERANCE, err_msg=name)
    for i, genes in enumerate(found["gene_id"]):
        mean = found[f"{stabiliser}/hidden"][i, genes[genes >= 0]].mean(0)
        np.testing.assert_allclose(mine["embed"][i], mean, atol=TOLERANCE)


@pytest.mark.parametrize("stabiliser", ["head", "global"])
@pytest.mark.parametrize("case", sorted(CASES))
def test_golden(case, stabiliser):
    found = part(golden(), f"{case}/")
    assert (found["gene_id"] < 0).any()  # with padding
    compare(case, found, stabiliser)


def test_the_stabilisers_differ():
    found = part(golden(), "bins/")
    assert np.abs(found["head/hidden"] - found["global/hidden"]).max() > 100 * TOLERANCE


def test_parameter_count_of_the_published_model():
    model = models.build("scbert", {"gene_table": {"kind": "frozen"}}, 16_906)
    shapes = shapes_of(model)
    trained = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    gene = shapes["buffers"]["gene"]
    assert trained == 5_007_207
    assert trained + gene["table"].size + gene["special"].size == PUBLISHED


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
class TestWithTorch:
    @pytest.mark.parametrize("stabiliser", ["head", "global"])
    @pytest.mark.parametrize("case", sorted(CASES))
    def test_another_network(self, case, stabiliser):
        from reference import scbert as reference

        compare(case, part(reference.golden(seed=11), f"{case}/"), stabiliser)

    def test_golden_file_is_what_the_tool_writes(self):
        from reference import scbert as reference

        fresh = reference.golden()
        assert set(fresh) == set(golden())
        for name, value in golden().items():
            np.testing.assert_allclose(value, fresh[name], atol=1e-5, err_msg=name)

    @pytest.mark.full
    def test_published_size(self):
        from reference import scbert as reference

        report = reference.full()
        print(json.dumps(report))
        assert report["parameters"] == PUBLISHED and report["max_abs"]["tokens"] == 0
        assert max(report["max_abs"].values()) <= report["tolerance"]
