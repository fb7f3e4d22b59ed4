"""Ontologies of cell types: reading, matching labels, distances, and scores of annotation made of them."""

from __future__ import annotations

import numpy as np
import pytest
from planted import planted, score

import scjax.eval
from scjax.eval import ontology
from scjax.eval.schema import MEAN

OBO = """format-version: 1.2

[Term]
id: CL:0
name: cell

[Term]
id: CL:1
name: T cell
synonym: "T lymphocyte" EXACT []
synonym: "T-ish" RELATED []
synonym: "lymphocyte" EXACT []
is_a: CL:0 ! cell

[Term]
id: CL:2
name: CD4-positive T cell
alt_id: CL:22
is_a: CL:1 ! T cell

[Term]
id: CL:3
name: CD8-positive T cell
is_a: CL:1 {source="x"} ! T cell

[Term]
id: CL:4
name: B cell
synonym: "lymphocyte" EXACT []
is_a: CL:0

[Term]
id: CL:5
name: old cell
is_obsolete: true

[Typedef]
id: part_of
name: part of
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "cl.obo").write_text(OBO)
    return ontology.read_ontology(tmp_path / "cl.obo")


def test_labels_are_matched_by_identifier_name_and_exact_synonym(tree):
    labels = ["CL:0000", "CL:1", "cl_2", "CL:22", "t_CELL", "T lymphocyte"]
    assert tree.match(labels) == [None, "CL:1", "CL:2", "CL:2", "CL:1", "CL:1"]
    none = ["T-ish", "old cell", "part of", "lymphocyte"]  # the last means two terms
    assert tree.match(none) == [None] * 4
    assert len(tree) == 5


def test_distance_and_similarity_of_terms(tree):
    assert tree.related("CL:2", "CL:1") and tree.related("CL:1", "CL:2") and tree.related("CL:4", "CL:4")
    assert not tree.related("CL:2", "CL:3")
    steps = {("CL:2", "CL:2"): 0, ("CL:2", "CL:1"): 1, ("CL:2", "CL:3"): 2, ("CL:2", "CL:4"): 3}
    assert {pair: tree.distance(*pair) for pair in steps} == steps
    # five terms and the root above them: a leaf tells everything, the T cell log 6 / 3, the cell log 6 / 5
    t_cell, cell = (1 - np.log(n) / np.log(6) for n in (3, 5))
    assert tree.similarity("CL:2", "CL:3") == pytest.approx(t_cell)
    assert tree.similarity("CL:2", "CL:1") == pytest.approx(2 * t_cell / (1 + t_cell))
    assert tree.similarity("CL:2", "CL:4") == pytest.approx(cell) and tree.similarity("CL:2", "CL:2") == 1


def test_tables_of_pairs_are_ontologies_too(tmp_path):
    path = tmp_path / "edges.tsv"
    path.write_text("child\tparent\n# a comment\nT cell\tcell\nCD4 T\tT cell\nCD8 T\tT cell\nB cell\tcell\n")
    tree = ontology.read_ontology(path)
    assert len(tree) == 5 and tree.match(["cd4 t", "Cell"]) == ["CD4 T", "cell"]
    assert tree.distance("CD4 T", "B cell") == 3
    for content, message in (
        ("T cell\n", "line 1.*not a pair"),
        ("", "no is_a relations"),
        ("a\tb\nb\ta\n", "cycle"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            ontology.read_ontology(path).distance("a", "b")


def test_near_misses_cost_less_than_gross_ones_by_the_ontology(tree):
    names = np.array(["CD4-positive T cell", "CD8-positive T cell", "B cell", "T cell", "debris"])
    rng = np.random.default_rng(0)
    code, group = rng.integers(5, size=500), rng.integers(3, size=500).astype(str)
    found = {}
    for name, partner in (("near", {0: 3}), ("gross", {0: 2})):
        shown = code.copy()
        swapped = rng.random(500) < 0.5  # half of the CD4 cells look like another type
        for a, b in partner.items():
            shown[(code == a) & swapped] = b
        X = np.eye(5, 8)[shown] * 5 + 0.3 * rng.normal(size=(500, 8))
        found[name] = scjax.eval.annotation(X, names[code], group, heads=("knn",), ontology=tree, n_boot=20)
        assert found[name].facts["labels_not_in_ontology"] == ["debris"]
    value = {n: {m: score(r, f"ontology_{m}", group=MEAN) for m in ("exact", "tolerant", "lin", "distance")}
             for n, r in found.items()}  # fmt: skip
    assert value["near"]["exact"] == pytest.approx(value["gross"]["exact"], abs=0.1)
    assert value["near"]["tolerant"] > 0.99 > value["gross"]["tolerant"] + 0.05
    assert (
        value["near"]["lin"] > value["gross"]["lin"]
        and value["near"]["distance"] < value["gross"]["distance"]
    )
    row = next(r for r in found["near"].rows if r["metric"] == "ontology_distance")
    assert row["direction"] == "min"


def test_labels_that_are_no_terms_are_named(tree):
    X, label, group, _ = planted(n=120)
    with pytest.raises(ValueError, match="only 0 of 4 labels are terms.*'t0', 't1'"):
        scjax.eval.annotation(X["good"], label, group, ontology=tree)
