"""obs columns of many studies as one: spelled alike, mapped by hand, added to a corpus that is there."""

import numpy as np
import pandas as pd
import pytest
from synthetic import synthetic_adata

from scjax.corpus import Corpus, append_corpus, build_corpus
from scjax.corpus.obs import ObsSchema, alike

TINY = {"part_cells": 64, "inner": 512, "shard": 2048, "progress": False, "workers": 1}
SPELLINGS = ("celltype", "cell_type", "CellType", "cell type", "cell.type", "Cell-Type")


def frame(**columns):
    return pd.DataFrame({name: list(values) for name, values in columns.items()})


def schema_of(*studies, labels=None, columns=None, base=None, unknown=("",)):
    schema = ObsSchema(labels, unknown, columns)
    if base is not None:
        schema.extend(base)
    for i, study in enumerate(studies):
        schema.add(study, f"study{i}")
    schema.finish()
    return schema


def test_names_that_are_alike():
    assert {alike(name) for name in SPELLINGS} == {"celltype"}
    # a separator between digits tells 0.1 from 01
    assert alike("res.0.1") == alike("res_0_1") == alike("RES 0.1") != alike("res.01")
    assert alike("_") == "_" and alike("donor2") == alike("donor_2") != alike("donor")


def test_a_column_that_nothing_can_become_is_an_error():
    study = frame(cell_type=["a", "b"])
    with pytest.raises(
        KeyError,
        match=r"no source has an obs column 'label', or one of \['final'\] to become it; "
        "there are: cell_type",
    ):
        schema_of(study, columns={"label": ["final"]})
    schema = schema_of(study, columns={"label": ["final"]}, base={"label": ["x"]})  # appended to: it is there
    assert schema.labels["label"] == ["x"]


def test_spellings_become_one_label(tmp_path):
    studies = []
    for i, name in enumerate(SPELLINGS):
        study = synthetic_adata(40, 30, seed=i)
        study.obs = study.obs[["cell_type"]].rename(columns={"cell_type": name})
        studies.append(study)
    corpus = build_corpus(studies, tmp_path / "c", **TINY)
    assert set(corpus.columns) == {"dataset", "cell_type"}
    whole = corpus.read(slice(None))
    for i, (study, name) in enumerate(zip(studies, SPELLINGS, strict=True)):
        rows = np.flatnonzero(whole.obs["scjax_dataset"] == f"adata{i}")
        of = whole.obs["scjax_source_row"].to_numpy()[rows]
        expected = study.obs[name].astype(str).to_numpy()[of]
        assert (whole.obs["cell_type"].astype(str).to_numpy()[rows] == expected).all()
    codes = np.concatenate([part.codes("cell_type") for part in corpus.parts])
    assert (np.array(corpus.columns["cell_type"])[codes] == whole.obs["cell_type"].astype(str)).all()
    renamed = [entry.get("obs_renamed") for entry in corpus.manifest["datasets"]]
    assert renamed == [None if name == "cell_type" else {name: "cell_type"} for name in SPELLINGS]


@pytest.mark.parametrize(
    ("spellings", "kept"),
    [
        (("CellType", "cell_type", "CellType"), "cell_type"),  # snake_case, if it occurs
        (("CellType", "celltype"), "celltype"),
        (("Cell.Type", "CellType", "CellType"), "CellType"),  # the most frequent
        (("Cell.Type", "CellType"), "Cell.Type"),  # the first in the alphabet
    ],
)
def test_the_name_that_is_kept(spellings, kept):
    for order in (spellings, spellings[::-1]):
        studies = [frame(**{name: "ab"}) for name in order]
        schema = schema_of(*studies)
        assert list(schema.labels) == [kept]
        assert [schema.renamed(s) for s in studies] == [{} if n == kept else {n: kept} for n in order]
    assert list(schema_of(*studies, labels=["celL_Type"]).labels) == ["celL_Type"]  # as it was asked for


def test_two_in_one_study_are_an_error_that_says_what_to_do():
    study = frame(celltype="ab", cell_type="cd", annotation="ef")
    with pytest.raises(ValueError) as error:
        schema_of(study)
    assert str(error.value).startswith(
        "study0: obs columns 'celltype' and 'cell_type' differ in case and sep"
    )
    assert "columns={'cell_type': ['celltype']} (--column cell_type=celltype)" in str(error.value)
    schema = schema_of(study, columns={"cell_type": ["celltype"]})
    assert schema.categories == {"cell_type": ["a", "b"], "annotation": ["e", "f"]}
    assert schema.renamed(study) == {"celltype": "cell_type", "cell_type": None}


def test_columns_that_are_mapped_by_hand():
    studies = [
        frame(celltype_final="ab", annotation="cd", CellType="ef"),
        frame(annotation="gh"),
        frame(Cell_Type="ij"),
        frame(Celltype_Final="kl"),
    ]
    schema = schema_of(*studies, columns={"label": ["celltype_final", "annotation", "CellType"]})
    assert schema.categories == {"label": list("abghijkl")}
    assert [schema.renamed(s) for s in studies] == [
        {"celltype_final": "label", "annotation": None, "CellType": None},
        {"annotation": "label"},
        {"Cell_Type": "label"},
        {"Celltype_Final": "label"},
    ]
    assert [schema.find(s, "label") for s in studies] == [
        "celltype_final",
        "annotation",
        "Cell_Type",
        "Celltype_Final",
    ]
    assert schema.find(frame(donor="a"), "label") is None
    with pytest.raises(ValueError, match="columns= gives 'c' to two columns"):
        ObsSchema(None, (), {"a": ["c"], "b": ["c"]})
    with pytest.raises(ValueError, match="columns= names 'cell_type' and 'CellType', which are one column"):
        ObsSchema(None, (), {"cell_type": ["a"], "CellType": ["b"]})


def test_numbers_that_int64_does_not_hold_become_text():
    large = pd.DataFrame({"hash": np.array([2**64 - 1, 3], np.uint64), "n": np.array([1, 2], np.uint64)})
    schema = ObsSchema(None, ())
    schema.add(large, "a")
    schema.add(
        pd.DataFrame({"hash": np.array([7], np.int8), "n": [3], "none": pd.array([None], "Int64")}), "b"
    )
    schema.finish()
    assert schema.kinds == {"hash": "text", "n": np.dtype(np.int64), "none": np.dtype(np.float64)}
    encoded = schema.encode(large)
    assert list(encoded["hash"]) == [str(2**64 - 1), "3"] and list(encoded["n"]) == [1, 2]


def test_a_column_called_like_the_data_sets_keeps_out_of_the_labels():
    study = frame(Dataset="ab", donor="cd")
    schema = schema_of(study)
    assert set(schema.kinds) == {"dataset", "donor"} and list(schema.labels) == ["donor"]


def test_extend_keeps_names_and_codes():
    base = {"dataset": ["old"], "CellType": ["z", "b"], "tissue": ["gut"]}
    study = pd.DataFrame({"cell_type": ["a", "b", "", "z"], "donor": [1, 2, 3, 4], "Tissue": pd.NA})
    schema = schema_of(study, base=base)
    assert schema.labels == {"CellType": ["z", "b", "a"], "tissue": ["gut"]}
    encoded = schema.encode(study)
    assert schema.label_codes("CellType", encoded["CellType"]).tolist() == [2, 1, -1, 0]
    assert schema.label_codes("tissue", encoded["tissue"]).tolist() == [-1] * 4
    assert schema.renamed(study) == {"cell_type": "CellType", "Tissue": "tissue"}
    # numbers become text where the corpus has a label, and a label that no study has is unknown everywhere
    schema = schema_of(frame(tissue=(1, 2)), base=base, labels=["CellType", "tissue"])
    assert schema.labels == {"CellType": ["z", "b"], "tissue": ["gut", "1", "2"]}
    assert schema.encode(frame(tissue=(1, 2)))["CellType"].tolist() == [-1, -1]


def test_columns_in_an_append_and_a_split(tmp_path):
    first, second = synthetic_adata(60, 30, seed=1), synthetic_adata(60, 30, seed=2)
    second.obs = second.obs.rename(columns={"cell_type": "annotation", "donor": "Donor"})
    second.obs["annotation"] = second.obs["annotation"].cat.rename_categories(lambda name: f"new {name}")
    out = tmp_path / "c"
    corpus = build_corpus(first, out, names=["one"], validation=0.3, split_by="Donor", **TINY)
    assert corpus.manifest["options"]["split_by"] == "Donor"
    held = corpus.manifest["split_groups"]["validation"]
    corpus = append_corpus(
        out, second, names=["two"], columns={"cell_type": ["annotation"]}, workers=1, progress=False
    )
    types = [f"type{i}" for i in range(4)]
    assert corpus.columns["cell_type"] == types + [f"new {name}" for name in types]
    assert set(corpus.columns) == {"dataset", "cell_type", "batch", "donor", "study"}
    assert corpus.manifest["datasets"][1]["obs_renamed"] == {"annotation": "cell_type", "Donor": "donor"}
    for part in corpus.parts:
        donors = np.array(corpus.columns["donor"])[part.codes("donor")]
        assert (np.isin(donors, held) == (part.split == "validation")).all()
    assert Corpus.open(out).verify(progress=False) == []
