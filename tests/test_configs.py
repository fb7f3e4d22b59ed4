"""Each published system, from its config file to annotated cells: trains, learns, embeds, annotates."""

import anndata as ad
import numpy as np
import pytest
from smoke import ROOT, smoke, write_cells

import scjax
from scjax.models import SYSTEMS

BASELINES = {"masked_mse": "gene_mean_mse", "masked_ce": "frequency_ce"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    write_cells(folder, every=4)
    return folder


def test_every_system_has_a_config():
    assert set(SYSTEMS) <= {config.stem for config in (ROOT / "configs").glob("*.py")}


@pytest.mark.smokes
@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_smoke(system, files):
    model = scjax.load(smoke(system, files, fast_compile=False))
    assert model.system == system
    last = [line for line in model.metrics() if "validation/loss" in line][-1]
    pairs = {m: b for m, b in BASELINES.items() if f"validation/{b}" in last}
    assert len(pairs) == 1
    for metric, baseline in pairs.items():
        assert 0 < last[f"validation/{metric}"] < last[f"validation/{baseline}"]

    cells = ad.read_h5ad(files / "both.h5ad")
    reference = cells[cells.obs["study"] == "pbmc3k"].copy()
    query = cells[cells.obs["study"] == "pbmc_facs"].copy()
    scjax.annotate(query, model, reference=reference, label_key="cell_type")
    right = query.obs["scjax_cell_type"].astype(str) == query.obs["cell_type"].astype(str)
    assert right.mean() > query.obs["cell_type"].value_counts(normalize=True).iloc[0]
    few = np.array([70, 3, 41])
    alone = model.embed(query[few].copy(), batch_size=2)
    np.testing.assert_allclose(alone, query.obsm["X_scjax"][few], atol=5e-6 * np.abs(alone).max())
