"""A field planted in space: found with coordinates, not without, and not with those of other cells."""

import dataclasses

import jax
import numpy as np
import pytest
from fitting import batches, fit

from scjax import models
from scjax.datasets.space import centred_coordinates, neighbour_features, planted_sections, shuffled
from scjax.genes import Vocabulary

GENES, K, WIDTH = 12, 6, 2
CONTEXT = {
    "coordinates": {"kind": "coordinates", "size": 2, "scale": 0.3},
    "neighbours": {"kind": "neighbours", "size": K, "width": WIDTH},
}
MODEL = {
    "d_model": 32,
    "n_heads": 2,
    "n_layers": 1,
    "d_ff": 64,
    "dropout": 0.0,
    "norm": "pre",
    "max_length": GENES + 1,
    "values": "log1p",
    "value_scale": 0.2,
    "zeros": True,
    "objective": "masked",
    "mask_fractions": (0.5,),
    "mvc_weight": 0.0,
}


@pytest.fixture(scope="module")
def sections():
    """Three sections to train on, one held out; components of neighbours from the first three."""
    adata = planted_sections(4, 256, GENES)
    centred_coordinates(adata, section_key="section")
    neighbour_features(adata, K, WIDTH, section_key="section", train=["s0", "s1", "s2"])
    return adata


def recovered(sections, name, mix=()):
    """R² of the hidden values of FIELD in the held-out section, of a model told ``name`` ("" for nothing)."""
    adata = sections.copy()
    for other in mix:
        adata.obsm[other] = shuffled(adata.obsm[other], adata.obs["section"], seed=1)
    told = {n: CONTEXT[n] for n in [name] if n}
    model = models.build("scgpt", MODEL | {"context": told}, GENES)
    vocabulary, test = Vocabulary(list(adata.var_names)), (adata.obs["section"] == "s3").to_numpy()
    read = lambda rows: batches(adata[rows].copy(), vocabulary, 64, values=tuple(told))  # noqa: E731
    module = fit(model, read(~test), 480, 5e-3)
    target, predicted = [], []
    for batch in read(test):
        tokens = module.encode(batch, jax.random.key(3))
        guess, _ = module.decoder(module(tokens, batch=batch)[1], None)
        field = np.asarray(tokens.hidden & (tokens.gene_id == 0))
        target.append(np.asarray(tokens.target)[field])
        predicted.append(np.asarray(guess)[field])
    y, p = np.concatenate(target), np.concatenate(predicted)
    assert len(y) > 80
    return 1 - ((y - p) ** 2).sum() / ((y - y.mean()) ** 2).sum()


def test_a_spatial_field_is_recovered_only_with_coordinates(sections):
    assert recovered(sections, "coordinates") > 0.35
    assert recovered(sections, "") < 0.1
    assert recovered(sections, "coordinates", mix=["coordinates"]) < 0.1


def test_a_spatial_field_is_recovered_from_the_right_neighbours(sections):
    """Their counts of FIELD are samples of the field nearby; those of other cells are not."""
    assert recovered(sections, "neighbours") > 0.25
    assert recovered(sections, "neighbours", mix=["neighbours"]) < 0.1


def test_a_cell_without_coordinates_is_read_as_if_there_were_no_such_token(sections):
    config = MODEL | {"context": {"coordinates": CONTEXT["coordinates"]}}
    vocabulary = Vocabulary(list(sections.var_names))
    batch = batches(sections[:16].copy(), vocabulary, 16, values=("coordinates",))[0]
    module = fit(models.build("scgpt", config, GENES), [batch], 1)
    lost = batch.replace(value={"coordinates": np.full((16, 2), np.nan, np.float32)})
    nothing = dataclasses.replace(batch, value={})
    np.testing.assert_allclose(module.embed(lost), module.embed(nothing), atol=1e-6)
    assert np.abs(np.asarray(module.embed(batch)) - np.asarray(module.embed(nothing))).max() > 1e-3
    with pytest.raises(ValueError, match="'coordinates'.*values"):
        module.loss(nothing, jax.random.key(0))
