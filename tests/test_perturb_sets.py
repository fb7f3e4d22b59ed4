"""Conditions by name, and batches of sets of control and perturbed cells."""

import numpy as np
import pandas as pd
import pytest

from scjax.datasets import perturbed
from scjax.eval.perturbation_data import Keys
from scjax.genes import Vocabulary
from scjax.loader.conditions import Conditions
from scjax.loader.sets import PerturbedCells, Sets, predict_cells

CELLS = perturbed(n_genes=20, n_targets=5, n_doubles=4, cells=12)
VOCABULARY = Vocabulary([*CELLS.var_names, *CELLS.uns["features"].index])


def conditions(**changes):
    return Conditions(VOCABULARY, **{"seen": ("T0", "T0+T1"), **changes})


def experiment(cells=CELLS, **changes):
    return PerturbedCells(cells, conditions(**changes), context_key="cell_line")


HOLED = CELLS.uns["features"].copy()
HOLED.iloc[2, 1] = np.nan


# ------------------------------------------------------------------------------------------ names
def test_names_of_conditions():
    c = conditions()
    assert c.canonical(" T1+T0 ") == "T0+T1" and c.canonical("T2+ctrl") == "T2"
    assert c.canonical("control") == c.canonical("ctrl+ctrl") == "control"
    assert c.read("T1+T0")["perturbation"] == 1 and c.read("T3")["perturbation"] == -1
    np.testing.assert_array_equal(c.read("T1+T0")["targets"], [20, 21])  # not measured, and known
    np.testing.assert_array_equal(c.read("control")["targets"], [-1, -1])
    drug = conditions(kind="chemical", dosed=True, seen=("A+B",))
    assert drug.canonical("A+B") == "A+B" and drug.read("A+B", 100.0)["dose"] == 2
    table = conditions(features=CELLS.uns["features"])
    both = CELLS.uns["features"].loc[["T0", "T3"]].sum().to_numpy(np.float32)
    np.testing.assert_allclose(table.read("T3+T0")["features"], both)


@pytest.mark.parametrize(
    "name, options, wanted, error, told",
    [
        ("T9", {}, "targets", KeyError, "condition 'T9': gene 'T9' is not in the vocabulary of 25 genes"),
        ("T0+T2", {}, "perturbation", KeyError, r"never seen in training \(nearest: T0\+T1"),
        ("T0+T1+T2", {}, "targets", ValueError, "perturbs 3 genes; the model was made for 2"),
        ("nan", {}, "targets", ValueError, "names no condition; the control is called 'control'"),
        ("T9", {"features": CELLS.uns["features"]}, "features", KeyError, "5 features has no row 'T9'"),
        ("T0", {"dosed": True}, "dose", ValueError, "has the dose 0.0; a dose above 0"),
        ("T0+T2", {"features": HOLED}, "features", ValueError, "the features of 'T2' hold NaN or infinite"),
    ],
)
def test_conditions_that_cannot_be_told(name, options, wanted, error, told):
    with pytest.raises(error, match=told):
        conditions(**options).read(name, wanted=[wanted])


def test_tables_of_features_that_cannot_be_read():
    table = CELLS.uns["features"]
    np.testing.assert_array_equal(
        conditions(features=HOLED).read("T3")["features"], np.float32(table.loc["T3"])
    )
    with pytest.raises(ValueError, match="several rows of 'T1'; keep one"):
        conditions(features=table.set_axis(["T0", "T1", "T1", "T3", "T4"]))
    with pytest.raises(ValueError, match="holds what is no number: could not convert string to float: 'x'"):
        conditions(features=table.assign(name="x"))


# ------------------------------------------------------------------------------------------ cells
def test_what_an_experiment_lacks_is_told():
    obs = CELLS.obs
    with pytest.raises(ValueError, match="no control cells: none in obs.'perturbation'. is called 'vehicle'"):
        experiment(control="vehicle")
    with pytest.raises(ValueError, match="no control cells where obs.'cell_line'. is 'two'"):
        experiment(CELLS[~((obs["perturbation"] == "control") & (obs["cell_line"] == "two"))].copy())
    with pytest.raises(KeyError, match="no obs column 'line'"):
        PerturbedCells(CELLS, conditions(), context_key="line")
    other = Conditions(Vocabulary(["X"]))
    with pytest.raises(ValueError, match="no gene is in the vocabulary of 1 genes"):
        PerturbedCells(CELLS, other)
    with pytest.raises(ValueError, match="'two', which the model does not know; it knows .'one'"):
        PerturbedCells(CELLS, conditions(), labels=["cell_line"], categories={"cell_line": ["one"]})
    cells = experiment()
    with pytest.raises(ValueError, match="batch_size = 10 must hold whole sets of set_size = 4"):
        Sets(cells, 10, 4)
    with pytest.raises(KeyError, match="no cells of condition"):
        Sets(cells, 8, 4, conditions=[("T0", 0.0, "three")])
    with pytest.raises(KeyError, match="never seen in training"):
        Sets(cells, 8, 4, wanted=["perturbation"])
    with pytest.raises(ValueError, match="no control cells in 'three' to predict 'T0' from"):
        predict_cells(lambda b: None, cells, [("T0", 0.0, "three")], batch_size=8, set_size=4)


def test_a_batch_holds_what_its_cells_hold():
    cells = experiment()
    sets = Sets(cells, 24, 6, seed=3)
    control = CELLS.obs["perturbation"].to_numpy() == "control"
    counts, lines = CELLS.X.toarray(), CELLS.obs["cell_line"].to_numpy()
    for step in (0, 5):
        batch = sets[step]
        assert control[batch.row].all() and (batch.weight == 1).all()
        dense = np.zeros((24, len(VOCABULARY)))
        used = batch.gene_id >= 0
        np.add.at(dense, (np.nonzero(used)[0], batch.gene_id[used]), batch.count[used])
        match = VOCABULARY.match(CELLS.var).ids
        np.testing.assert_array_equal(dense[:, match], counts[batch.row])
        np.testing.assert_array_equal(batch.depth, counts[batch.row].sum(1))
        for s in range(4):
            rows = batch.label["set"] == s
            (line,) = set(lines[batch.row[rows]])
            (targets,) = {tuple(t) for t in batch.value["targets"][rows].astype(int)}
            name = "+".join(VOCABULARY.symbol[t] for t in targets if t >= 0)
            own = (CELLS.obs["perturbation"] == name) & (lines == line)
            real = counts[own.to_numpy()][:, np.argsort(match)]
            assert all((row == real).all(1).any() for row in batch.value["perturbed_count"][rows])


def test_every_condition_comes_once_a_round_and_training_cells_alone():
    train = CELLS.obs["perturbation"].to_numpy() != "T2"
    train[np.flatnonzero(CELLS.obs["perturbation"] == "control")[::2]] = False
    cells = experiment().training(train)
    assert "T2" not in cells.conditions.seen and len(cells.conditions.seen) == 8
    sets = Sets(cells, 16, 4, wanted=["perturbation"])
    n = len(sets.asked)
    assert n == 16  # 4 single and 4 double ones in two lines
    seen = np.concatenate([sets[step].label["perturbation"][::4] for step in range(n // 4)])
    assert sorted(seen) == sorted(list(range(8)) * 2)
    rows = np.concatenate([sets[step].row for step in range(20)])
    assert train[rows].all()


def test_what_is_not_trained_has_no_learned_vector():
    """Neither conditions kept for validation, nor labels of contexts in which all is held out or kept."""
    cells = PerturbedCells(CELLS, conditions(), context_key="cell_line", labels=["cell_line"])
    both = ["cell_line", "perturbation"]
    kept = [("T0", 0.0, "one"), ("T0", 0.0, "two"), ("T1", 0.0, "one")]
    some = cells.training(np.ones(len(CELLS), bool), kept)
    assert "T0" not in some.conditions.seen and "T1" in some.conditions.seen and set(kept) < set(some.groups)
    some.check(("T1", 0.0, "one"), both)
    with pytest.raises(KeyError, match="'T0' was never seen in training"):
        some.check(kept[0], both)
    line = CELLS.obs["cell_line"].to_numpy()
    for given in (
        (line == "two", ()),
        (np.ones(len(CELLS), bool), [k for k in cells.groups if k[2] == "one"]),
    ):
        half = cells.training(*given)
        assert half.categories == {"cell_line": ["two"]}
        np.testing.assert_array_equal(half.labels["cell_line"], np.where(line == "two", 0, -1))
        half.check(("T1", 0.0, "one"), ["perturbation"])
        with pytest.raises(KeyError, match="'T1' in 'one': control cells have a 'cell_line' that was never"):
            half.check(("T1", 0.0, "one"), both)
        with pytest.raises(KeyError, match="knows .'two'.: a learned table has no row"):
            predict_cells(None, half, [("T1", 0.0, "one")], batch_size=8, set_size=4, wanted=both)


DOSED = perturbed(n_genes=6, n_targets=2, doses=(1.0, 10.0), cells=3)


@pytest.mark.parametrize(
    "write",
    [
        lambda dose: dose.astype(int),
        lambda dose: (dose / 10).astype(np.float32),
        lambda dose: dose.map(lambda d: f"{d:g}"),
        lambda dose: dose.map("{:.2f}".format).astype("category"),
        lambda dose: dose.where(dose > 0),
    ],
    ids=["integers", "float32", "text", "categories", "floats and none"],
)
def test_doses_are_written_as_the_cells_have_them(write):
    cells = DOSED.copy()
    cells.obs["dose"] = write(cells.obs["dose"])
    told = Conditions(Vocabulary(list(cells.var_names)), kind="chemical", dosed=True)
    whole = PerturbedCells(cells, told, dose_key="dose")
    sizes = {"batch_size": 8, "set_size": 4, "max_cells": 2}
    out = predict_cells(lambda b: b.value["perturbed_count"], whole, sorted(whole.groups), **sizes)
    keys = Keys("perturbation", "control", None, "dose", "chemical")
    assert set(keys.conditions(out.obs)) == set(keys.conditions(cells.obs))


@pytest.mark.parametrize(
    "doses, message",
    [
        (("10 uM", "10"), "of cells of 'T0' is '10 uM'; doses are numbers above 0"),
        (("-1", "10"), "is '-1'; doses are"),
        (("10.0", "10"), "is '10' and '10.0', which is one dose"),
    ],
)
def test_doses_that_cannot_be_read(doses, message):
    cells = DOSED.copy()
    cells.obs["dose"] = np.resize(doses, len(cells))
    told = Conditions(Vocabulary(list(cells.var_names)), kind="chemical", dosed=True)
    with pytest.raises(ValueError, match=message):
        PerturbedCells(cells, told, dose_key="dose")


def test_batches_follow_from_seed_and_step_on_any_number_of_processes():
    cells = experiment()
    whole = Sets(cells, 16, 4, seed=1)
    halves = [Sets(cells, 16, 4, seed=1, process_index=i, process_count=2) for i in range(2)]
    iterator = iter(whole)
    for step in range(3):
        batch, parts = next(iterator), [half[step] for half in halves]
        for name in ("gene_id", "count", "row"):
            joined = np.concatenate([getattr(p, name) for p in parts])
            np.testing.assert_array_equal(getattr(batch, name), joined)
        for name, value in batch.value.items():
            np.testing.assert_array_equal(value, np.concatenate([p.value[name] for p in parts]))
    again = iter(Sets(experiment(), 16, 4, seed=1))
    again.set_state(iterator.get_state())
    np.testing.assert_array_equal(next(again).row, next(iterator).row)
    assert not np.array_equal(Sets(cells, 16, 4, seed=2)[0].row, whole[0].row)
    with pytest.raises(ValueError, match="seed was 1 and is 2"):
        iter(Sets(cells, 16, 4, seed=2)).set_state(iterator.get_state())


def test_predictions_have_the_form_that_scores_take():
    cells = experiment()
    asked = [("T0+T2", 0.0, "one"), ("T4", 0.0, "two")]
    got = []

    def predict(batch):
        got.append(batch)
        return np.log1p(batch.value["perturbed_count"]) + 1.0

    out = predict_cells(predict, cells, asked, batch_size=8, set_size=4, max_cells=10)
    assert out.obs.groupby(["perturbation", "cell_line"], observed=True).size().to_dict() == {
        ("T0+T2", "one"): 10, ("T4", "two"): 10, ("control", "one"): 10, ("control", "two"): 10,
    }  # fmt: skip
    assert list(out.var_names) == list(cells.names) and np.isfinite(out.X).all()
    assert [int(b.weight.sum()) for b in got] == [8, 2, 8, 2]
    last = out[(out.obs["perturbation"] == "control").to_numpy()]
    np.testing.assert_allclose(np.expm1(last.X).sum(1), 1e4, rtol=1e-3)


def test_missing_names_are_left_out_and_counted():
    cells = CELLS.copy()
    cells.obs["perturbation"] = cells.obs["perturbation"].astype(object)
    cells.obs.iloc[:3, 0] = [np.nan, "unlabelled", ""]
    cells.obs["cell_line"] = cells.obs["cell_line"].astype(object)
    cells.obs.iloc[-2:, 1] = [np.nan, "unknown"]
    assert experiment(cells).dropped == {"no condition or context named, or no counts": 5}
    assert isinstance(cells.obs, pd.DataFrame)
