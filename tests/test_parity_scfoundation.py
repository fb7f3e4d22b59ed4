"""scFoundation against PyTorch and performer-pytorch: the same weights and cells give the same numbers.

Without PyTorch from a golden file that ``tools/reference/scfoundation.py`` wrote; with it (marked "parity")
from a network built on the spot.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scjax import models
from scjax.interop import scfoundation as interop
from scjax.interop.mapping import export_tensors, import_tensors
from scjax.models.scfoundation import Tokens
from scjax.nn import bind, shapes_of
from scjax.types import CellBatch

GOLDEN = pathlib.Path(__file__).parent / "golden" / "scfoundation.npz"
CONFIG = {
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 2,
    "d_ff": 64,
    "decoder_d_model": 16,
    "decoder_n_heads": 2,
    "decoder_d_head": 8,
    "decoder_n_layers": 2,
    "decoder_d_ff": 64,
    "n_bins": 20,
    "n_outputs": 3,
    "target": "f5",
}
GENES = 50


def part(found, prefix):
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


@functools.cache
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


@functools.cache
def fresh():
    from reference import scfoundation

    return scfoundation.golden(seed=11)


@functools.cache
def imported(source):
    model = models.build("scfoundation", CONFIG, GENES)
    tensors = part(source(), "weights/")
    nothing = dict.fromkeys(("buffers/gene_mean/total", "buffers/gene_mean/count"), np.zeros(GENES))
    ignored = interop.IGNORED | {r"norm\.num_batches_tracked": "a counter of torch"}
    variables, account = import_tensors(
        interop.rules(CONFIG, GENES), tensors, shapes_of(model), ignored, nothing
    )
    assert set(account.ignored) == {"norm.num_batches_tracked"} and not account.missing
    return jax.tree.map(jnp.asarray, variables)


def module_of(source, **changes):
    module = bind(models.build("scfoundation", CONFIG | changes, GENES), **imported(source))
    module.eval()
    return module


def batch_of(found):
    n = len(found["count"])
    return CellBatch(
        found["gene_id"],
        found["count"],
        found["count"].sum(1) + 7,  # genes that the model does not know do not count
        (found["gene_id"] >= 0).sum(1).astype(np.int32),
        np.arange(n, dtype=np.uint32),
        {},
        {},
        np.ones(n, np.float32),
    )


def at_places(gene_id, encoded):
    """[B, GENES + 2, E] from the packed sequence with T and S at its end."""
    out = np.zeros((len(gene_id), GENES + 2, encoded.shape[-1]), np.float32)
    for o, ids, rows in zip(out, np.asarray(gene_id), np.asarray(encoded), strict=True):
        o[np.r_[ids[ids >= 0], GENES, GENES + 1]] = rows[np.r_[ids >= 0, True, True]]
    return out


@pytest.mark.parametrize("source", [golden, pytest.param(fresh, marks=pytest.mark.parity)])
class TestParity:
    def test_values_and_depth_tokens(self, source):
        found = source()
        assert (found["gene_id"] < 0).any()  # padding
        tokens = module_of(source).whole(batch_of(found))
        shown = np.concatenate([tokens.value, tokens.depth], 1)[..., None]
        np.testing.assert_allclose(at_places(tokens.gene_id, shown)[..., 0], found["value"], atol=2e-6)

    def test_encoder(self, source):
        found, module = source(), module_of(source)
        tokens = module.whole(batch_of(found))
        encoded = at_places(tokens.gene_id, jax.jit(module.encoder_states)(tokens))
        np.testing.assert_allclose(encoded, found["global/encoded"], atol=2e-5)

    def test_cell_embedding(self, source):
        found, batch = source(), batch_of(source())
        for pool, name in (("all", "cell"), ("max", "cell_max")):
            cell = jax.jit(module_of(source, pool=pool).embed)(batch)
            np.testing.assert_allclose(cell, found[f"global/{name}"], atol=2e-5)

    @pytest.mark.parametrize(
        "case, changes",
        [
            ("global", {"stabiliser": "global"}),
            ("head", {}),
            ("head", {"decoding": "cellwise"}),
        ],
    )
    def test_genes_and_expression(self, source, case, changes):
        found, module = source(), module_of(source, **changes)
        genes = jax.jit(module.gene_states)(batch_of(found))
        np.testing.assert_allclose(genes, found[f"{case}/genes"], atol=2e-5)
        expression = jax.jit(module.predict_expression)(batch_of(found))
        np.testing.assert_allclose(expression, found[f"{case}/expression"], atol=2e-5)

    def test_the_stabilisers_differ(self, source):
        assert np.abs(source()["global/genes"] - source()["head/genes"]).max() > 1e-3

    def test_hidden_genes(self, source):
        """Some genes hidden, some shown with another value: the prediction at them."""
        found = source()
        value, hidden = found["value"], found["hidden"]
        sites = np.full((len(value), hidden.sum(1).max()), -1)
        seen = np.full((len(value), GENES), -1)
        for i, h in enumerate(hidden):
            sites[i, : h.sum()] = np.flatnonzero(h)
            ids = np.flatnonzero((value[i, :GENES] > 0) & ~h[:GENES])
            seen[i, : len(ids)] = ids[::-1]
        pick = lambda x, ids: np.take_along_axis(x, np.maximum(ids, 0), 1)  # noqa: E731
        shown = pick(found["shown"], sites)
        tokens = Tokens(
            seen,
            pick(value, seen),
            value[:, GENES:],
            sites,
            np.where(shown == 102, 0, shown),
            shown == 102,
            pick(value, sites),
        )
        encoded, prediction = jax.jit(module_of(source))(tokens)
        np.testing.assert_allclose(at_places(seen, encoded), found["masked/encoded"], atol=2e-5)
        expected = pick(found["masked/expression"], sites)
        np.testing.assert_allclose(np.asarray(prediction)[sites >= 0], expected[sites >= 0], atol=2e-5)
        assert np.abs(expected - pick(found["head/expression"], sites))[sites >= 0].max() > 0.01

    def test_annotation_head(self, source):
        found, batch = source(), batch_of(source())
        logits = jax.jit(module_of(source, target="f5").predict_cell)(batch)
        np.testing.assert_allclose(logits, found["logits/own"], atol=2e-5)
        logits = jax.jit(module_of(source, pool_pads=True).predict_cell)(batch)
        np.testing.assert_allclose(logits, found["logits/pads"], atol=2e-5)
        assert np.abs(found["logits/pads"] - found["logits/own"]).max() > 1e-3

    def test_every_tensor_comes_back(self, source):
        back = export_tensors(interop.rules(CONFIG, GENES), imported(source))
        there = part(source(), "weights/")
        del there["norm.num_batches_tracked"]
        assert sorted(back) == sorted(there)
        for key, tensor in there.items():
            np.testing.assert_array_equal(back[key], tensor, err_msg=key)


def test_parameter_count_is_the_published():
    shapes = shapes_of(models.build("scfoundation", {}, 19_264))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == 119_252_285
    names = {name.replace("{i}", str(i)) for rule in interop.rules({}, 19_264) for name in rule.theirs
             for i in range(6 if "performer" in name else 12)}  # fmt: skip
    assert len(names) == 265


# -------------------------------------------------------------------- with PyTorch
@pytest.mark.parity
def test_the_golden_file_is_what_the_reference_writes():
    from reference import scfoundation

    made, kept = scfoundation.golden(), golden()
    assert sorted(made) == sorted(kept)
    for name, value in made.items():
        np.testing.assert_allclose(kept[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parity
def test_a_file_of_three_models(tmp_path):
    """Written by torch.save as the published one is; each model read gives its own numbers."""
    import torch
    from reference import scfoundation

    made = {name: scfoundation.build(seed=seed) for seed, name in enumerate(interop.MODELS)}
    torch.save(scfoundation.checkpoint(made), tmp_path / interop.WEIGHTS)
    lines = ["gene_name\tindex", *(f"GENE{i}\t{i}" for i in range(GENES))]
    (tmp_path / interop.GENES).write_text("\n".join(lines) + "\n")
    for name, theirs in made.items():
        source = interop.read(tmp_path, which=name)
        assert source.vocabulary.symbols == [f"GENE{i}" for i in range(GENES)]
        model = models.build("scfoundation", source.config, GENES)
        fill = {f"buffers/{k}": v for k, v in source.buffers.items()}
        variables, account = import_tensors(
            interop.rules(source.config, GENES), source.tensors, shapes_of(model), interop.IGNORED, fill
        )
        assert not account.ignored and set(account.used) == set(source.tensors)
        cell = bind(model, **variables).embed(batch_of(golden()), target="f5")
        expected = scfoundation.run(theirs, golden()["value"])["cell"]
        np.testing.assert_allclose(cell, expected, atol=2e-5)


@pytest.mark.parity
@pytest.mark.full
def test_full_size():
    from reference import scfoundation

    report = scfoundation.full()
    print(report)
    assert max(report["max_abs"].values()) < report["tolerance"]
