"""Labels of cells from labelled ones: by probe and by fine-tuning, with cells left unassigned by a rule."""

import numpy as np
import pytest
from finetuning import base_handle, planted

import scjax
from scjax.config import ConfigError
from scjax.finetune import FitConfig, Task, base_of, fit, predict
from scjax.finetune.annotate import context_of, head_of, hold_out, tune


@pytest.fixture(scope="module")
def handle(tmp_path_factory):
    return base_handle(tmp_path_factory.mktemp("base"))


@pytest.fixture
def reference():
    return planted(400, seed=1)


def accuracy(query, column="scjax_cell_type"):
    given = query.obs[column].astype(str) != "unassigned"
    return (query.obs[column].astype(str) == query.obs["cell_type"].astype(str))[given].mean(), given.mean()


def test_cells_of_little_confidence_stay_unassigned(handle, reference):
    query = planted(200, seed=2)
    scjax.annotate(query, handle, reference=reference, max_error=0.3)
    rule = query.uns["scjax"]["scjax_cell_type"]
    assert rule["cells"] == 100 and rule["max_error"] == 0.3 and "at most 30%" in rule["promise"]
    right, assigned = accuracy(query)
    assert right > 0.6 and 0.1 < assigned < 1
    confidence = query.obs["scjax_cell_type_confidence"]
    np.testing.assert_array_equal(
        query.obs["scjax_cell_type"] == "unassigned", confidence < np.float32(rule["threshold"])
    )
    # without the rule every cell gets its best label, and the probe learns from the whole reference
    scjax.annotate(query, handle, reference=reference, key_added="all")
    assert accuracy(query, "all_cell_type")[1] == 1 and accuracy(query, "all_cell_type")[0] < right + 0.05


def test_by_fine_tuning(handle, reference):
    query = planted(120, seed=2)
    scjax.annotate(query, handle, reference=reference, method="head", group_key="donor", max_error=0.3)
    right, assigned = accuracy(query)
    assert right > 0.6 and assigned > 0.2
    assert list(query.obs["scjax_cell_type"].cat.categories) == [
        *(f"type{i}" for i in range(4)),
        "unassigned",
    ]


def test_few_cells_are_shared_evenly_by_many_devices(handle):
    query = planted(16, seed=2)
    scjax.annotate(query, handle, reference=planted(80, seed=5), method="head")  # a quarter: 20, of 8 devices
    assert query.obs["scjax_cell_type"].notna().all()


def test_a_fine_tuned_model_needs_no_reference(handle, reference, tmp_path):
    corpus = scjax.build_corpus([reference], tmp_path / "c", names=["r"], progress=False, workers=1)
    found = fit(
        handle,
        corpus,
        {"type": Task(source="cell_type")},
        FitConfig("head", patience=None, steps=80, learning_rate=5e-2),
    )
    found.pop("report")
    tuned = scjax.api.Model(**found)
    query = planted(64, seed=2)
    scjax.annotate(query, tuned)
    assert accuracy(query)[0] > 0.5 and query.obs["scjax_cell_type_confidence"].between(0.25, 1).all()
    with pytest.raises(ConfigError, match=r"has heads for \['type'\], and none for 'disease'"):
        head_of(tuned, "disease")
    with pytest.raises(ValueError, match="max_error needs a reference"):
        scjax.annotate(query, tuned, max_error=0.1)


def test_what_cannot_be_is_told(handle, reference):
    with pytest.raises(ConfigError, match="has no heads, and none for 'cell_type'"):
        scjax.annotate(planted(8), handle)
    with pytest.raises(ValueError, match="there are probe, head, lora, all"):
        scjax.annotate(planted(8), handle, reference=reference, method="full")
    with pytest.raises(ValueError, match="no obs column 'patient'.*donor"):
        scjax.annotate(planted(8), handle, reference=reference, max_error=0.1, group_key="patient")


def test_it_is_told_before_any_work(handle, reference):
    """And the query is then as it was."""
    query = planted(8)
    with pytest.raises(ValueError, match="no obs column 'patient'.*donor"):
        scjax.annotate(query, handle, reference=reference, group_key="patient")
    reference.obs["cell_type"] = reference.obs["cell_type"].cat.rename_categories({"type0": "unassigned"})
    with pytest.raises(ValueError, match="has the label 'unassigned'.*rename it"):
        scjax.annotate(query, handle, reference=reference, max_error=0.3)
    with pytest.raises(ValueError, match="certainty is 90"):
        scjax.annotate(query, handle, reference=reference, max_error=0.3, certainty=90)
    reference.X.data[0] = -1.0  # not counts: found when the reference is embedded, after the query
    with pytest.raises(ValueError, match="counts"):
        scjax.annotate(query, handle, reference=reference)
    assert list(query.obsm) == ["marks"] and not query.uns and list(query.obs) == list(planted(8).obs)


class TestContext:
    """A model that is told of cells is told of query, reference and held-out cells alike."""

    TOLD = {
        "tissue": {"kind": "label", "size": 2},
        "dataset": {"kind": "label", "size": 2},
        "place": {"kind": "coordinates", "size": 2},
    }
    KNOWN = {"tissue": ["lung", "blood"], "dataset": ["s1", "s0"]}

    def cells(self, n, seed):
        cells = planted(n, seed)
        cells.obs["tissue"] = np.array(["blood", "lung"])[np.arange(n) % 2]
        cells.obs["dataset"] = np.array(["s0", "s1", None])[np.arange(n) % 3]
        return cells

    def test_what_both_have_is_told_but_for_the_label(self, tmp_path):
        model = base_handle(tmp_path, {"context": self.TOLD}, self.KNOWN)
        query, reference = self.cells(8, 0), self.cells(8, 1)
        query.obsm["place"] = np.zeros((8, 2), np.float32)
        both = ["dataset", "tissue"]
        assert sorted(context_of(model, query, reference, "cell_type", True)) == both
        assert sorted(context_of(model, query, None, "cell_type", True)) == [*both[:1], "place", *both[1:]]
        assert context_of(model, query, reference, "tissue", True) == ["dataset"]
        assert context_of(model, query, reference, "tissue", False) == []
        with pytest.raises(ValueError, match="'tissue', which is what cells are to be annotated with"):
            context_of(model, query, reference, "tissue", ["tissue"])
        with pytest.raises(KeyError, match="'place'.*the AnnData has none such"):
            context_of(model, query, reference, "cell_type", ["place"])

    def test_a_head_hears_what_it_was_trained_with(self, tmp_path):
        model = base_handle(tmp_path, {"context": self.TOLD}, self.KNOWN)
        reference, query = self.cells(128, 1), self.cells(16, 2)
        names = reference.obs["cell_type"].astype(str).to_numpy()
        tuned = tune(model, reference, "cell_type", names, "head", None, ["tissue", "dataset"], patience=1)
        assert {name: tuned.categories[name] for name in self.KNOWN} == self.KNOWN
        assert base_of(tuned)["categories"]["tissue"] == ["lung", "blood"]
        # the mean of what the head read in training is that of cells with these names
        centre = np.asarray(tuned.buffers["heads"]["cell_type"]["centre"])
        vectors = [tuned.embed(reference, context=how) for how in (["tissue", "dataset"], False)]
        near, far = (np.abs(v.mean(0) - centre).max() for v in vectors)
        assert near < far / 2
        scjax.annotate(query, tuned)
        told = predict(tuned, query, **tuned.context_in(query))["cell_type"]
        np.testing.assert_array_equal(query.obs["scjax_cell_type_confidence"], told.max(1))
        scjax.annotate(query, tuned, key_added="untold", context=False)
        assert (query.obs["untold_cell_type_confidence"] != told.max(1)).all()
        query.obsm["place"] = np.zeros((16, 2), np.float32)
        assert "place" not in tuned.context_in(query)["values"]  # which it was not trained with


def test_groups_are_held_out_as_a_whole(reference):
    known = np.ones(reference.n_obs, bool)
    held = hold_out(reference, known, "donor", 0)
    donors = reference.obs["donor"].astype(str)
    assert not set(donors[held]) & set(donors[~held]) and 0.2 < held.mean() < 0.6
    assert hold_out(reference, known, None, 0).sum() == 100
