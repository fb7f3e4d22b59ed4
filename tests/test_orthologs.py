"""A table of orthologs maps the genes of a study, and says what it could not map."""

import gzip
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest

from scjax.genes import (
    Orthologs,
    Vocabulary,
    assign_orthologs,
    match_with_orthologs,
    union_with_orthologs,
)

DATA = Path(__file__).parent.parent.parent / "shared" / "data"

PAIRS = [
    ("Actb", "ACTB"),
    ("Cd4", "CD4"),
    ("Lyz1", "LYZ"),  # many-to-one
    ("Lyz2", "LYZ"),
    ("Hba", "HBA1"),  # one-to-many
    ("Hba", "HBA2"),
    ("Xist", "XIST"),
    ("Alone", ""),
]
HUMAN = Vocabulary(
    [f"ENSG{i:011d}" for i in range(6)],
    symbol=["ACTB", "CD4", "LYZ", "HBA1", "HBA2", "GAPDH"],
    aliases=[("PS1TP5BP1",), (), (), (), (), ()],
)


def write(path, pairs, mark="\t", header=None):
    lines = [mark.join(pair) for pair in ([header] if header else []) + list(pairs)]
    text = "".join(f"{line}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "mark", "header"),
    [("o.tsv", "\t", None), ("o.csv", ",", ("mouse", "human")), ("o.tsv.gz", "\t", ("mouse", "human"))],
)
def test_every_kind_of_table_maps_alike(tmp_path, name, mark, header):
    table = Orthologs.read(write(tmp_path / name, PAIRS, mark, header))
    match = match_with_orthologs(HUMAN, ["Gapdh", "Cd4", "Actb", "Lyz1", "Hba", "Xist", "Alone"], table)
    assert match.ids.tolist() == [-1, 1, 0, -1, -1, -1, -1]
    assert match.matched_by == {"ortholog": 2} and match.n_matched == 2 and match.duplicates == {}
    assert match.left_out == {
        "no ortholog in the table": 2,
        "ortholog shared with other genes (many-to-one)": 1,  # though the study measured one of the two
        "several orthologs (one-to-many)": 1,
        "ortholog not in the vocabulary": 1,
    }


def test_many_to_one_is_summed_on_request(tmp_path):
    table = Orthologs.read(write(tmp_path / "o.tsv", PAIRS))
    match = match_with_orthologs(HUMAN, ["Lyz2", "Actb", "Lyz1", "Hba"], table, sum_duplicates=True)
    assert match.ids.tolist() == [2, 0, 2, -1]
    assert match.duplicates == {"ENSG00000000002": ["Lyz2", "Lyz1"]}
    assert match.left_out == {"several orthologs (one-to-many)": 1}


def test_ids_and_symbols_on_either_side(tmp_path):
    mouse = pd.DataFrame(
        {"gene_ids": ["ENSMUSG00000000001.4", "ENSMUSG00000000002", ""]}, index=["a", "b", "Cd4"]
    )
    pairs = [("ENSMUSG00000000001", "ENSG00000000000.12"), ("b", "PS1TP5BP1"), ("Cd4", "ENSG00000000001")]
    table = Orthologs.read(write(tmp_path / "o.tsv", pairs))
    match = match_with_orthologs(HUMAN, mouse, table)
    # ACTB by id and by alias is one gene with two orthologs, as the vocabulary knows
    assert match.ids.tolist() == [-1, -1, 1] and match.species == ("mouse",)
    assert match.left_out == {"ortholog shared with other genes (many-to-one)": 2}
    match = match_with_orthologs(HUMAN, mouse, Orthologs(table.source[::2], table.target[::2], "o"))
    assert match.ids.tolist() == [0, -1, 1]


def test_two_columns_of_one_name_are_left_out_or_summed(tmp_path):
    table = Orthologs.read(write(tmp_path / "o.tsv", PAIRS))
    var = pd.DataFrame({"gene_symbol": ["Actb", "Actb", "Cd4"]}, index=["Actb", "Actb-1", "Cd4"])
    match = match_with_orthologs(HUMAN, var, table)
    assert match.ids.tolist() == [-1, -1, 1] and match.duplicates == {}
    match = match_with_orthologs(HUMAN, var, table, sum_duplicates=True)
    assert match.ids.tolist() == [0, 0, 1] and match.duplicates == {"ENSG00000000000": ["Actb", "Actb-1"]}


STUDIES = {"man": ["ACTB", "CD4", "GAPDH"], "mouse": ["Actb", "Cd4", "Lyz1", "Gapdh"]}


def test_one_table_maps_the_studies_that_it_is_about(tmp_path):
    path = write(tmp_path / "o.tsv", PAIRS)
    assert list(assign_orthologs(path, STUDIES)) == ["mouse"]
    turned = write(tmp_path / "t.tsv", [(t, s) for s, t in PAIRS])
    # without a vocabulary the first column is the source; with one, it says where to go
    assert list(assign_orthologs(turned, STUDIES)) == ["man"]
    tables = assign_orthologs(turned, STUDIES, HUMAN)
    assert list(tables) == ["mouse"] and tables["mouse"].targets["Actb"] == ["ACTB"]
    # for a study that is named, the direction is that of its genes
    assert assign_orthologs({"mouse": turned}, STUDIES)["mouse"].targets["Cd4"] == ["CD4"]
    union = union_with_orthologs(STUDIES, tables)
    assert union.ids == ["ACTB", "CD4", "GAPDH"]
    assert union_with_orthologs({"mouse": STUDIES["mouse"]}, tables).ids == ["ACTB", "CD4"]


def test_tables_that_map_nothing_are_errors(tmp_path):
    path = write(tmp_path / "o.tsv", PAIRS)
    with pytest.raises(
        ValueError, match="no study has more genes in its source column .* exchange the columns"
    ):
        assign_orthologs(path, {"man": STUDIES["man"]})
    with pytest.raises(ValueError, match="o.tsv: knows none of the genes of yeast"):
        assign_orthologs({"yeast": path}, {"yeast": ["YAL001C"]})
    with pytest.raises(KeyError, match="not there: mause; there are: man, mouse"):
        assign_orthologs({"mause": path}, STUDIES)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"Actb\tACTB\nCd4\tCD4\t1\n", "line 2: 3 fields; a table of orthologs has two columns"),
        (b"Actb ACTB\n", "line 1: 1 fields"),
        (b"", "holds no pair of genes"),
        (b"Actb\t\n", "holds no pair of genes"),
        (b"\xff\xfe\x00a", "not a table of text"),
        (gzip.compress(b"Actb\tACTB\n" * 99, mtime=0)[:30], "not a table of text"),
    ],
    ids=["three fields", "one field", "empty", "no target", "UTF-16", "cut gzip"],
)
def test_broken_tables(tmp_path, content, problem):
    path = tmp_path / "o.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"o.tsv.*{problem}"):
        Orthologs.read(path)
    with pytest.raises(FileNotFoundError, match=r"absent.tsv: no such file; orthologs are a table"):
        Orthologs.read(tmp_path / "absent.tsv")


@pytest.mark.skipif(not DATA.exists(), reason=f"NO DEVELOPMENT DATA: {DATA} is absent")
def test_the_ensembl_table_maps_most_of_a_mouse_transcriptome():
    names = ("pbmc4k_10xv2", "pancreas_baron_mouse_indrop")
    studies = {name: ad.read_h5ad(DATA / f"{name}.h5ad", backed="r").var for name in names}
    human = Vocabulary.from_anndata([studies["pbmc4k_10xv2"]])
    given = DATA / "genes" / "orthologs_human_mouse_ensembl105.tsv.gz"
    (name,), (table,) = zip(*assign_orthologs(given, studies, human).items(), strict=True)
    match = match_with_orthologs(human, studies[name], table)
    assert name == "pancreas_baron_mouse_indrop" and match.n_matched > 0.75 * len(match.names)
    assert match.n_matched + sum(match.left_out.values()) == len(match.names)
    column = dict(zip(match.names, match.ids, strict=True))
    for mouse, man in (("Ins2", "INS"), ("Gcg", "GCG"), ("Pecam1", "PECAM1")):
        assert column[mouse] in (-1, human.id_of(man)), mouse
    assert column["Gcg"] >= 0
