"""``corpus build``, ``embed`` and ``eval`` on every human file of the development data that holds counts."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from scjax.cli.main import main
from scjax.corpus import Corpus

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
FILES = sorted(DATA.glob("*.h5ad"))

pytestmark = pytest.mark.slow


def is_human(path: Path) -> bool:
    obs = ad.read_h5ad(path, backed="r").obs
    return str(obs["organism"].iloc[0]) == "human"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Knows the genes of a whole transcriptome, untrained: this test is about paths, not scores."""
    import jax

    from scjax import api, models
    from scjax.genes import Vocabulary
    from scjax.nn import initialise

    genes = Vocabulary.from_anndata([ad.read_h5ad(DATA / "pbmc3k_10xv1.h5ad", backed="r").var])
    config = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16, "max_length": 129}
    state = jax.jit(lambda: initialise(models.build("scgpt", config, len(genes))))()
    return api.Model("scgpt", config, genes, **state, step=0, path=tmp_path_factory.mktemp("run"))


@pytest.mark.skipif(not FILES, reason=f"NO DEVELOPMENT DATA: {DATA} is absent, so no file of it is tried")
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file(path, model, tmp_path, monkeypatch, capsys):
    if not is_human(path):
        pytest.skip("not human")
    from scjax import api

    monkeypatch.setattr(api, "load", lambda path: model)
    assert main(["corpus", "build", str(path), "--out", str(tmp_path / "corpus")]) == 0
    corpus = Corpus.open(tmp_path / "corpus")
    source = ad.read_h5ad(path)
    dropped = sum(corpus.manifest["datasets"][0]["dropped"].values())
    assert len(corpus) + dropped == source.n_obs
    assert main(["embed", str(path), "--model", "run", "--out", str(tmp_path / "out.h5ad")]) == 0
    embedded = ad.read_h5ad(tmp_path / "out.h5ad")
    assert np.isfinite(embedded.obsm["X_scjax"]).all()
    labels = [
        c
        for c in ("cell_type", "region", "perturbation", "condition")
        if c in embedded.obs and (embedded.obs[c].value_counts() >= 10).sum() > 1
    ]
    if not labels:
        return
    group = [c for c in ("donor", "section", "batch") if c in embedded.obs and embedded.obs[c].nunique() > 1]
    group = [c for c in group if embedded.obs.groupby(labels[0], observed=True)[c].nunique().min() > 1]
    command = [
        "eval",
        str(tmp_path / "out.h5ad"),
        "--obsm",
        "X_scjax",
        "--label",
        labels[0],
        "--tasks",
        "annotation",
        "--out",
        str(tmp_path / "eval"),
        "--allow",  # an untrained model of a few steps is not above every control
        *(["--group", group[0]] if group else []),
    ]
    assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "eval" / "results.jsonl").read_text().splitlines()]
    assert any(row.get("status") == "ok" for row in rows)
