"""experiments/perturb.py as a user starts it."""

import anndata as ad
import numpy as np
import pytest
import runs

import scjax
from scjax.datasets import perturbed
from scjax.eval import Results

SCRIPT = runs.ROOT / "experiments" / "perturb.py"
SMOKE = "configs/perturb.py:smoke"
FEW = {"train__steps": 4, "train__checkpoint_every": 2, "told__max_cells": 16}


def perturb(workdir, *, config=SMOKE, **options):
    succeed = options.pop("succeed", True)
    started = runs.start(config, workdir, cache=workdir.parent / "cache", script=SCRIPT, **options)
    return runs.finish(started, workdir=workdir, succeed=succeed)


def test_what_cannot_be_predicted_is_told_before_training(tmp_path):
    """A learned vector for each condition knows nothing of pairs that are held out."""
    learned = {"told__tokens": "('perturbation',)", "told__shift": "()"}
    output = perturb(tmp_path / "run", **learned, **FEW, succeed=False)
    assert "was never seen in training" in output.splitlines()[-1] and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_smoke(tmp_path):
    output = perturb(tmp_path / "run")
    assert "predicted cells and scores are in" in output
    rows = [r for r in Results.read(tmp_path / "run" / "scores.jsonl").rows if not r["label"]]
    score = {(r["metric"], r["model_id"]): r["value"] for r in rows if not r["versus"]}
    assert score["pearson_delta", "model"] > score["pearson_delta", "additive"]
    assert score["pearson_systema", "model"] > 0.8
    predicted = ad.read_h5ad(tmp_path / "run" / "predictions.h5ad")
    assert set(predicted.obs) == {"perturbation", "cell_line"} and predicted.X.min() >= 0
    model = scjax.load(tmp_path / "run")
    assert model.categories["perturbation"] and model.embed(perturbed()[:5].copy()).shape == (5, 32)


@pytest.mark.slow
def test_doses_and_a_base_that_was_trained(tmp_path):
    """Compounds at four doses, told by a table of features, on the run of another experiment as the base."""
    cells = perturbed(n_targets=10, doses=(0.1, 1.0, 10.0), cells=12)
    cells.write_h5ad(tmp_path / "drugs.h5ad")
    runs.build_corpus(tmp_path / "corpus")
    short = {"train__steps": 2, "optimizer__warmup_steps": 1}
    pretrain = {"data__corpus": tmp_path / "corpus", "data__genes": "", "model__d_model": 16, **short}
    runs.pretrain("configs/scgpt.py:smoke", tmp_path / "base", cache=tmp_path / "cache", **pretrain)
    fields = {
        "data__corpus": tmp_path / "drugs.h5ad",
        "told__kind": "chemical",
        "told__dose": "dose",
        "told__features": "uns/features",
        "told__unseen": "perturbation",
        "told__tokens": "('dose',)",
        "told__shift": "('features', 'dose')",
        "train__steps": 40,
        "told__max_cells": 32,
    }
    perturb(tmp_path / "run", **fields)
    scores = Results.read(tmp_path / "run" / "scores.jsonl")
    assert {r["track"] for r in scores.rows if r["track"]} == {"unseen compound"}
    predicted = ad.read_h5ad(tmp_path / "run" / "predictions.h5ad")
    assert set(predicted.obs["dose"]) == {"", "0.1", "1.0", "10.0"}
    line = scjax.load(tmp_path / "base")
    genes = [f"gene{i}" for i in range(60)]
    cells.var_names = [*line.vocabulary.symbols[:30], *genes[30:]]
    cells.write_h5ad(tmp_path / "drugs.h5ad")
    begun = perturb(tmp_path / "begun", **fields | short, start=tmp_path / "base")
    assert "30 genes" in begun
    few = scjax.load(tmp_path / "begun")
    assert np.isfinite(few.embed(cells[:4].copy())).all() and few.config["base"]["system"] == "scgpt"
