"""Labels of cells from labelled ones: by probe and by fine-tuning, with cells left unassigned by a rule."""

import numpy as np
import pytest
from finetuning import base_handle, planted

import scjax
from scjax.config import ConfigError
from scjax.finetune import FitConfig, Task, fit
from scjax.finetune.annotate import head_of, hold_out


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


def test_groups_are_held_out_as_a_whole(reference):
    known = np.ones(reference.n_obs, bool)
    held = hold_out(reference, known, "donor", 0)
    donors = reference.obs["donor"].astype(str)
    assert not set(donors[held]) & set(donors[~held]) and 0.2 < held.mean() < 0.6
    assert hold_out(reference, known, None, 0).sum() == 100
