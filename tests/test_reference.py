"""Cells mapped onto a reference: planted kinds are found, new kinds stand out, rates are what they say."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import jax
import numpy as np
import pandas as pd
import pytest
from synthetic import synthetic_adata

import scjax
from scjax import models
from scjax.api import Model
from scjax.cli.main import main
from scjax.eval.stats import calibration_error
from scjax.nn import initialise
from scjax.reference import mapping

CENTRES = np.random.default_rng(7).normal(size=(5, 12))


def cells(
    n: int, spread: float = 0.3, types: tuple[int, ...] = (0, 1, 2, 3), seed: int = 0, shift: float = 0.0
) -> ad.AnnData:
    """Cells around the centres of their types; each of six donors a little elsewhere (``shift``)."""
    rng = np.random.default_rng(seed)
    kind, donor = rng.choice(types, n), rng.integers(0, 6, n)
    away = shift * np.random.default_rng([seed, 1]).normal(size=(6, 12))
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([f"t{i}" for i in kind]),
            "half": np.where(kind < 2, "low", "high"),
            "donor": [f"d{i}" for i in donor],
        },
        index=[f"s{seed}c{i}" for i in range(n)],
    )
    X = CENTRES[kind] + away[donor] + spread * rng.normal(size=(n, 12))
    return ad.AnnData(np.zeros((n, 1), np.float32), obs=obs, obsm={"X_e": X.astype(np.float32)})


def reference_of(adata: ad.AnnData, **options):
    return scjax.build_reference(
        adata, **{"labels": "cell_type", "obsm": "X_e", "metric": "euclidean"} | options
    )


def mapped(query: ad.AnnData, reference, **options) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        scjax.map_cells(query, reference, **options)
    return query.obs


def covered(obs: pd.DataFrame) -> float:
    pairs = zip(obs["cell_type"], obs["scjax_cell_type_set"], strict=True)
    return float(np.mean([true in allowed.split(" | ") for true, allowed in pairs]))


# ---------------------------------------------------------------- planted truth
def test_labels_are_transferred_and_a_new_kind_stands_out():
    reference = reference_of(cells(800))
    query = cells(500, types=(0, 1, 2, 3, 4), seed=1)
    with pytest.warns(UserWarning, match="where 1% would be expected; ") as told:
        scjax.map_cells(query, reference, batch="donor")
    assert {str(w.message).split(": ")[0] for w in told} == {f"d{i}" for i in range(6)}
    obs, new = query.obs, (query.obs["cell_type"] == "t4").to_numpy()
    assert obs["scjax_outside"][new].mean() > 0.95 and (obs["scjax_cell_type"][new] == "unassigned").all()
    assert obs["scjax_outside"][~new].mean() < 0.04
    assert (obs["scjax_cell_type_best"] == obs["cell_type"].astype(str))[~new].mean() > 0.98
    told = query.uns["scjax"]["scjax_map"]
    assert set(told["by_batch"].index) == {f"d{i}" for i in range(6)}
    assert told["by_batch"]["cells"].sum() == 500 and (told["by_batch"]["outside"] > 0.05).all()
    assert obs["scjax_distance"][new].min() > 1 > obs["scjax_distance"][~new].quantile(0.3)


def test_shuffled_labels_are_at_chance_and_leave_cells_unassigned():
    adata = cells(800)
    adata.obs["cell_type"] = np.random.default_rng(3).permutation(adata.obs["cell_type"])
    reference = reference_of(adata)
    assert abs(reference.card["own accuracy"]["cell_type"] - 0.25) < 0.06
    obs = mapped(cells(400, seed=1), reference)
    right = (obs["scjax_cell_type_best"].astype(str) == obs["cell_type"].astype(str)).mean()
    assert abs(right - 0.25) < 0.1 and (obs["scjax_cell_type"] == "unassigned").mean() > 0.9
    assert abs(obs["scjax_cell_type_confidence"].mean() - 0.25) < 0.06
    assert obs["scjax_cell_type_entropy"].mean() > 0.7


def test_rates_of_error_are_what_was_asked_for():
    reference = reference_of(cells(1500, spread=1.0))
    query = cells(1500, spread=1.0, seed=1)
    for error, tolerance in ((0.05, 0.03), (0.2, 0.15)):  # more are covered where most are right anyway
        obs = mapped(query, reference, error=error, outside=0.1)
        assert -0.03 < covered(obs) - (1 - error) < tolerance
        obs["right"] = obs["scjax_cell_type_best"].astype(str) == obs["cell_type"].astype(str)
        given = obs["scjax_cell_type"] != "unassigned"
        assert (~obs["right"])[given].mean() < error + 0.02 and given.mean() > 0.3
    assert 0.6 < obs["right"].mean() < 0.95  # kinds overlap: a rule that gave all a label would err
    confidence, right = obs["scjax_cell_type_confidence"].to_numpy(float), obs["right"].to_numpy()
    assert calibration_error(confidence, right) < 0.05
    assert abs(obs["scjax_outside"].mean() - 0.1) < 0.03
    assert abs((obs["scjax_typicality"] < 0.5).mean() - 0.5) < 0.05


def test_rules_set_between_donors_hold_for_a_new_donor():
    adata, query = cells(1200, spread=0.6, shift=0.7), cells(1200, spread=0.6, seed=2, shift=0.7)
    alone, between = (covered(mapped(query.copy(), reference_of(adata, group=g))) for g in (None, "donor"))
    assert between > alone + 0.02 and between > 0.93


def test_each_cell_is_mapped_onto_the_others_exactly():
    adata = cells(60)
    adata.obsm["X_e"][1:20] = adata.obsm["X_e"][0]  # more copies of a cell than neighbours
    X = adata.obsm["X_e"].astype(np.float64)
    distance = np.sqrt(((X[:, None] - X[None]) ** 2).sum(2))
    donor = adata.obs["donor"].to_numpy()
    for group in (None, "donor"):
        own = reference_of(adata, group=group, k=5).own
        same = donor[:, None] == donor[None] if group else np.eye(60, dtype=bool)
        expected = np.sort(np.where(same, np.inf, distance), axis=1)[:, :5].mean(1)
        np.testing.assert_allclose(own["distance"], expected, atol=1e-4)


# --------------------------------------------------------- labels, metric, search
def test_cells_without_a_label_do_not_vote():
    adata = cells(400)
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(object)
    adata.obs.loc[adata.obs["cell_type"] == "t0", "cell_type"] = "unlabelled"
    adata.obs.iloc[:40, adata.obs.columns.get_loc("half")] = np.nan
    reference = reference_of(adata, labels=["half", "cell_type"])
    kept = ~((adata.obs["cell_type"] == "unlabelled") & adata.obs["half"].isna())
    assert len(reference) == kept.sum() < 400
    query = cells(100, types=(0, 2), seed=1)
    obs = mapped(query, reference)
    low = (query.obs["cell_type"] == "t0").to_numpy()
    assert (obs["scjax_half"][low] == "low").mean() > 0.95
    # what t0 is called by the other column comes from the few labelled cells near it, or from none
    assert set(obs["scjax_cell_type_best"][~low].astype(str)) == {"t2"}
    assert (obs["scjax_cell_type"][low] == "unassigned").mean() > 0.9
    voteless = obs["scjax_cell_type_best"].isna().to_numpy()
    assert voteless.any() and low[voteless].all()
    assert (obs["scjax_cell_type_set"][voteless] == "t1 | t2 | t3").all()
    assert obs["scjax_cell_type_entropy"][voteless].isna().all()
    assert (obs["scjax_cell_type_confidence"][voteless] == 0).all()


def test_cosine_does_not_see_length_and_the_nearest_are_those_of_brute_force():
    adata, query = cells(200), cells(7, seed=1)
    one = reference_of(adata, metric="cosine")
    longer = adata.copy()
    longer.obsm["X_e"] *= np.random.default_rng(0).uniform(0.1, 9, (200, 1)).astype(np.float32)
    other = reference_of(longer, metric="cosine")
    np.testing.assert_allclose(one.own["distance"], other.own["distance"], rtol=1e-4)
    table = one.nearest(one.embed(query), query.obs_names, k=3)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query.obsm["X_e"], adata.obsm["X_e"])]
    order = np.argsort(-(unit[0] @ unit[1].T), axis=1)[:, :3]
    assert list(table["reference_cell"]) == list(adata.obs_names[order.ravel()])
    assert list(table["rank"]) == [1, 2, 3] * 7 and (table["cell_type"].notna()).all()


def test_copies_of_reference_cells_are_told():
    adata = cells(100)
    with pytest.warns(UserWarning, match="100 cells are copies"):
        scjax.map_cells(adata.copy(), reference_of(adata))


# ------------------------------------------------------------------- directory
def test_a_directory_says_what_it_is_and_maps_as_before(tmp_path):
    reference = reference_of(cells(200), group="donor", labels=["cell_type", "half"])
    reference.save(tmp_path / "index")
    card = json.loads((tmp_path / "index" / "index.json").read_text())
    assert card["embedding"] == {"obsm": "X_e"} and card["dtype"] == "float32" and card["group"] == "donor"
    assert card["labels"]["half"] == reference.obs["half"].value_counts().to_dict() and card["cells"] == 200
    assert ad.read_h5ad(tmp_path / "index" / "cells.h5ad").shape == (200, 12)
    one, other = mapped(cells(50, seed=1), reference), mapped(cells(50, seed=1), tmp_path / "index")
    pd.testing.assert_frame_equal(one, other)
    with pytest.raises(FileExistsError, match="choose another"):
        reference.save(tmp_path / "index")
    half = reference_of(cells(200), dtype="float16")
    half.save(tmp_path / "half")
    found = mapped(cells(50, seed=1), tmp_path / "half")
    assert (found["scjax_cell_type_best"] == one["scjax_cell_type_best"].astype(str)).mean() > 0.95


def test_what_is_not_whole_is_not_there(tmp_path, monkeypatch):
    reference = reference_of(cells(100))

    def full(self, path, **_):
        path.write_bytes(b"some")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(ad.AnnData, "write_h5ad", full)
        reference.save(tmp_path / "index")
    assert list(tmp_path.iterdir()) == []
    reference.save(tmp_path / "index")
    file = tmp_path / "index" / "cells.h5ad"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="cells.h5ad: missing or damaged"):
        scjax.Reference.open(tmp_path / "index")
    with pytest.raises(FileNotFoundError, match="no reference index"):
        scjax.Reference.open(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "kind"}, "no obs column 'kind'; there are \\['cell_type'"),
        ({"labels": []}, "name one obs column"),
        ({"obsm": None}, "either model or obsm"),
        ({"obsm": "X_pca"}, "no obsm matrix 'X_pca'; there are \\['X_e', 'bad'"),
        ({"group": "dish"}, "no obs column 'dish'"),
        ({"group": "one"}, "holds one group"),
        ({"labels": "one"}, "fewer than two labels"),
        ({"labels": "donor", "group": "donor"}, "no label of obs\\['donor'\\] occurs in two groups"),
        ({"k": 60}, "k = 60: the reference has 60"),
        ({"metric": "l1"}, "metric = 'l1'"),
        ({"obsm": "bad"}, "1 cells have embeddings that are not finite, the first is row 3"),
        ({"obsm": "zero", "metric": "cosine"}, "row 5 has an embedding of zeros"),
    ],
)
def test_a_reference_that_cannot_be(options, message):
    adata = cells(60)
    adata.obs["one"] = "x"
    for name, row, value in (("bad", 3, np.nan), ("zero", 5, 0)):
        adata.obsm[name] = adata.obsm["X_e"].copy()
        adata.obsm[name][row] = value
    with pytest.raises(ValueError, match=message):
        reference_of(adata, **options)


def test_queries_that_cannot_be_mapped_are_left_as_they_are():
    reference, query = reference_of(cells(60)), cells(10, seed=1)
    query.obsm["X_wide"] = np.ones((10, 3))
    before = query.copy()
    for options, message in (
        ({"error": 1.5}, "error = 1.5 is a share"),
        ({"batch": "plate"}, "no obs column 'plate'"),
        ({"model": "runs/x"}, "it takes no model"),
    ):
        with pytest.raises(ValueError, match=message):
            scjax.map_cells(query, reference, **options)
    query.obsm["X_e"] = query.obsm.pop("X_wide")
    with pytest.raises(ValueError, match=r"shape \(10, 3\); the reference has 12"):
        scjax.map_cells(query, reference)
    pd.testing.assert_frame_equal(query.obs, before.obs)


# -------------------------------------------------------------- a model, a shell
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained model as a plain export."""
    vocabulary = scjax.Vocabulary.from_anndata([synthetic_adata(20)])
    config = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16, "max_length": 33, "value_scale": 0.02}
    fresh = initialise(models.build("scgpt", config, len(vocabulary), 0))
    folder = tmp_path_factory.mktemp("runs") / "model"
    scjax.export_pretrained(
        Model("scgpt", config, vocabulary, fresh["params"], fresh["buffers"], 0, folder), folder
    )
    return folder


def test_the_shell_builds_and_maps_with_a_model(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synthetic_adata(160).write_h5ad("ref.h5ad")
    few = synthetic_adata(40, seed=1)
    few.write_h5ad("query.h5ad")
    build = ["map", "build", "ref.h5ad", "--model", str(run), "--labels", "cell_type", "--group", "donor"]
    assert main([*build, "--out", "index"]) == 0
    assert (
        "160 cells in 16 dimensions in index; mapped onto cells of another donor" in capsys.readouterr().out
    )
    assert main([*build, "--out", "index"]) == 2 and "--force" in capsys.readouterr().err
    assert main([*build, "--out", "index", "--force"]) == 0
    card = json.loads((tmp_path / "index" / "index.json").read_text())
    assert card["embedding"]["vocabulary"] == scjax.load(run).vocabulary.hash
    assert card["genes"] == {"matched": 100, "in data": 100, "in model": 100}
    command = ["map", "query.h5ad", "--reference", "index", "--batch", "donor", "--nearest", "near.tsv"]
    assert main([*command, "--out", "out.h5ad"]) == 0
    shown = capsys.readouterr().out
    assert "donor0" in shown and "nearest to" in shown and "40 cells mapped" in shown
    out = ad.read_h5ad("out.h5ad")
    assert set(out.obs["scjax_cell_type"].cat.categories) == {*few.obs["cell_type"], "unassigned"}
    assert out.uns["scjax"]["scjax_map"]["genes"]["matched"] == 100
    assert len(pd.read_csv("near.tsv", sep="\t")) == 5 * 40

    genes = few[:, :30].copy()
    genes.write_h5ad("panel.h5ad")
    assert main(["map", "panel.h5ad", "--reference", "index", "--out", "panel_out.h5ad"]) == 0
    assert "has 30 genes of the model, the reference 100" in capsys.readouterr().err


def test_an_index_is_replaced_by_a_whole_one_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells(60).write_h5ad("ref.h5ad")
    build = ["map", "build", "ref.h5ad", "--obsm", "X_e", "--labels", "cell_type", "--out", "index"]
    assert main(build) == 0
    before = (tmp_path / "index" / "index.json").read_text()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(ad.AnnData, "write_h5ad", full)
        assert main([*build, "--k", "7", "--force"]) == 2
    assert (tmp_path / "index" / "index.json").read_text() == before
    assert main([*build, "--k", "7", "--force"]) == 0
    assert json.loads((tmp_path / "index" / "index.json").read_text())["k"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "ref.h5ad"]


def test_cells_are_mapped_with_the_context_of_the_reference(run, tmp_path):
    """Not with what the query happens to have."""
    plain = scjax.load(run)
    config = plain.config | {"context": {"donor": {"kind": "label", "size": 4}}}
    fresh = initialise(models.build("scgpt", config, len(plain.vocabulary), 0))
    params = jax.tree.map(lambda x: x + 0.1, fresh["params"])  # a token that says something
    adata, query = synthetic_adata(60), synthetic_adata(20, seed=1)
    names = {"donor": sorted(adata.obs["donor"].unique())}
    model = Model("scgpt", config, plain.vocabulary, params, fresh["buffers"], 0, tmp_path, categories=names)
    told = scjax.build_reference(adata, model=model, labels="cell_type", k=5)
    assert told.card["embedding"]["context"] == ["donor"]
    with pytest.raises(ValueError, match="no 'donor' in obs or obsm, which the reference was embedded with"):
        told.embed(ad.AnnData(query.X, query.obs[["cell_type"]], query.var), model)
    blind = scjax.build_reference(adata, model=model, labels="cell_type", k=5, context=False)
    query.obs["donor"] = "new"
    vectors = model.embed(query, context=False)
    own = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(blind.embed(query, model), own, atol=1e-5)


def test_another_model_is_refused_and_a_moved_one_found(run, tmp_path, monkeypatch):
    adata, query = synthetic_adata(60), synthetic_adata(20, seed=1)
    reference = scjax.build_reference(adata, model=run, labels="cell_type", k=5)
    with pytest.raises(ValueError, match="is not the model of the reference"):
        scjax.map_cells(query, reference, model=scjax.load(run).random_twin())
    expected = mapped(query.copy(), reference)
    moved = tmp_path / "moved"
    moved.symlink_to(run)
    monkeypatch.setitem(reference.card["embedding"], "model", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="gone, which is not there: say with model="):
        scjax.map_cells(query, reference)
    pd.testing.assert_frame_equal(mapped(query, reference, model=moved), expected)
    assert jax.tree.leaves(query.obsm["X_scjax"])[0].shape == (20, 16)
    assert mapping.UNASSIGNED in query.obs["scjax_cell_type"].cat.categories
