"""experiments/perturb.py as a user starts it."""

import importlib.util

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import runs
from absl import flags
from ml_collections import ConfigDict

import scjax
from scjax.config import from_config
from scjax.datasets import perturbed
from scjax.eval import Results
from scjax.finetune.perturb import PerturbConfig, Told, conditions_of, divide, features_of
from scjax.loader.sets import PerturbedCells

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


# ------------------------------------------------------------------------------------ what is held out
CELLS = perturbed(n_genes=8, n_targets=6, n_doubles=0, cells=10)
HELD = ~CELLS.obs["perturbation"].isin(["T0", "T1"]).rename("split")


@pytest.fixture(scope="module")
def experiment():
    """experiments/perturb.py as a module; its flags are left to others."""
    spec = importlib.util.spec_from_file_location("perturb_experiment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("config", "workdir"):
        delattr(flags.FLAGS, name)
    return module


def divided(told, marked=HELD, cells=CELLS):
    told = Told(**{"context": "cell_line", **told})
    conditions = conditions_of(ConfigDict({"told": told}), cells, None, None)
    whole = PerturbedCells(cells, conditions, context_key="cell_line", labels=told.labels)
    return divide(whole, marked, told, 0)


def test_what_the_split_says_is_held_out():
    for marked in (HELD, HELD.astype(int), HELD.astype("category")):
        cells, asked, kept = divided({}, marked)
        assert {name for name, *_ in asked} == {"T0", "T1"} and len(cells.groups) == 8 and not kept


@pytest.mark.parametrize(
    "marked, message",
    [
        (
            HELD.map({True: "train", False: "test"}),
            "holds 'test', 'train'; it must be True for cells to learn",
        ),
        (HELD.astype(str), "holds 'False', 'True'; it must be True"),
        (HELD.astype(object).where(HELD.index != "cell3"), "holds False, True, nan; it must be True"),
        (HELD | True, "leaves none of 12 conditions held out"),
        (HELD & False, "leaves none of 12 conditions to learn from"),
    ],
)
def test_splits_that_hold_out_nothing_are_refused(marked, message):
    with pytest.raises(ValueError, match=message):
        divided({}, marked)


def test_what_is_kept_for_validation_leaves_no_learned_vector_untrained():
    """Six conditions in two lines, one of the twelve held out."""
    marked = HELD | (CELLS.obs["cell_line"] == "one") | (CELLS.obs["perturbation"] == "T1")
    told = {"validation": 0.5, "tokens": ("perturbation", "cell_line"), "shift": ()}
    cells, asked, kept = divided(told, marked)
    assert asked == [("T0", 0.0, "two")]
    trained = {name for name, *_ in set(cells.groups) - set(kept)}
    assert len(kept) == 5 and trained == set(cells.conditions.seen) == {f"T{i}" for i in range(6)}
    assert len(divided({"validation": 0.9}, marked)[2]) == 10
    one = CELLS[CELLS.obs["cell_line"] == "one"].copy()
    with pytest.raises(ValueError, match="validation = 0.5 can keep none of 4 conditions"):
        divided({"validation": 0.5, "tokens": ("perturbation",)}, HELD[one.obs_names], one)
    line = (CELLS.obs["cell_line"] == "one").rename("split")
    with pytest.raises(KeyError, match="have a 'cell_line' that was never seen in training"):
        divided({"shift": ("cell_line",)}, line)


def test_what_could_not_be_scored_is_told_before_training(experiment):
    config = {"system": "scjax.models.perturbation:Perturbation", "model": {}}
    told = {"split": "split", "context": "cell_line", "kind": "chemical"}
    config |= {"data": {"corpus": "cells.h5ad", "batch_size": 8}, "optimizer": {"learning_rate": 1e-3}}
    config = from_config(PerturbConfig, {**config, "train": {"steps": 1}, "told": told})

    def check(cells):
        whole = PerturbedCells(cells, conditions_of(config, cells, None, None), context_key="cell_line")
        experiment.check_scoring(
            config, cells, "split", *divide(whole, cells.obs["split"], config.told, 0)[:2]
        )

    cells = CELLS.copy()
    cells.obs["split"] = HELD
    check(cells)
    control = np.flatnonzero(cells.obs["perturbation"] == "control")
    with pytest.raises(ValueError, match="19 control cells in cell_line 'one'; at least 20"):
        check(cells[np.delete(np.arange(len(cells)), control[19:80])].copy())
    cells.obs.loc[cells.obs_names[cells.obs["perturbation"] == "T3"][:4], "split"] = False
    with pytest.raises(ValueError, match="cells of 'T3 . one' in training and held out"):
        check(cells)
    cells.obs["split"] = HELD
    cells.obs["perturbation"] = cells.obs["perturbation"].replace("T0", " T0")
    with pytest.raises(
        ValueError, match="' T0 . one' is held out .2 such. and would be predicted under another"
    ):
        check(cells)


def test_features_of_a_run():
    cells = ad.AnnData(uns={"features": pd.DataFrame({"a": [1.0, 2.0]}, index=[7, 8])})
    assert list(features_of(Told(features="uns/features"), cells).index) == ["7", "8"]
    with pytest.raises(KeyError, match="is 'uns/other'; uns of the cells has ..features"):
        features_of(Told(features="uns/other"), cells)


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
    """Compounds at three doses, written as integers, told by a table of features that does not know one of no
    cells; micro-batches as the hardware needs; then on the run of another experiment as the base."""
    cells = perturbed(n_targets=10, doses=(1.0, 10.0, 100.0), cells=12)
    cells.obs["dose"] = cells.obs["dose"].astype(int)
    cells.uns["features"].loc["T99"] = np.nan
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
        "train__accumulate": 0,
        "told__max_cells": 32,
    }
    perturb(tmp_path / "run", **fields)
    scores = Results.read(tmp_path / "run" / "scores.jsonl")
    assert {r["track"] for r in scores.rows if r["track"]} == {"unseen compound"}
    predicted = ad.read_h5ad(tmp_path / "run" / "predictions.h5ad")
    assert set(predicted.obs["dose"]) == {"", "1", "10", "100"}
    line = scjax.load(tmp_path / "base")
    genes = [f"gene{i}" for i in range(60)]
    cells.var_names = [*line.vocabulary.symbols[:30], *genes[30:]]
    cells.write_h5ad(tmp_path / "drugs.h5ad")
    begun = perturb(tmp_path / "begun", **fields | short, start=tmp_path / "base")
    assert "30 genes" in begun
    few = scjax.load(tmp_path / "begun")
    assert np.isfinite(few.embed(cells[:4].copy())).all() and few.config["base"]["system"] == "scgpt"
