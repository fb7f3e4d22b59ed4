"""``scjax corpus``: from files to a corpus, more of it, its account; bad input is one line and status 2."""

import json
import shutil

import anndata as ad
import numpy as np
import pytest
from layouts import write_mtx, write_v3
from scipy import sparse
from synthetic import synthetic_adata

from scjax.cli.corpus import account
from scjax.cli.main import main
from scjax.corpus import Corpus


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    import rich.console

    from scjax.cli import corpus, main

    for module in (corpus, main):
        for name in ("out", "err"):
            console = rich.console.Console(stderr=name == "err", width=200)
            monkeypatch.setattr(module, name, console)


@pytest.fixture
def folder(tmp_path):
    """Two studies in a folder, one of them twice over in its cells; a third that calls things otherwise."""
    folder = tmp_path / "studies"
    folder.mkdir()
    first, second, third = (synthetic_adata(60, 40, seed=i) for i in range(3))
    x = first.X.toarray()
    x[5] = 0  # an empty cell, ...
    x[7] = x[6]  # ... two that are one, ...
    x[8] = 0
    x[8, 0] = 3  # ... and one with a single gene
    first.X = sparse.csr_matrix(x)
    first.write_h5ad(folder / "first.h5ad")
    types = ["Gene Expression"] * 35 + ["Antibody Capture"] * 5
    write_v3(folder / "second.h5", second, types)
    third.obs = third.obs.rename(columns={"cell_type": "CellType", "donor": "patient"})
    third.write_h5ad(folder / "third.h5ad")
    return folder


def run(*words):
    return main([str(word) for word in ("corpus", *words)])


def test_a_folder_to_a_corpus_with_an_account(folder, tmp_path, capsys):
    out = tmp_path / "c"
    options = [
        "--min-genes",
        2,
        "--drop-duplicates",
        "--column",
        "donor=patient",
        "--workers",
        1,
        "--seed",
        3,
    ]
    assert run("build", folder, "--out", out, *options, "--validation", 0.2) == 0
    corpus = Corpus.open(out)
    dropped = {entry["name"]: entry["dropped"] for entry in corpus.manifest["datasets"]}
    assert dropped["first"] == {"empty": 1, "below_min_genes": 1, "duplicates": 1}
    assert corpus.datasets == ["first", "second", "third"] and len(corpus) == 177
    assert set(corpus.columns) == {"dataset", "cell_type", "batch", "donor", "study"}
    assert corpus.manifest["seed"] == 3 and corpus.manifest["totals"]["validation"] > 0
    shown = capsys.readouterr().out
    table = [line for line in shown[shown.index("account of the cells") :].splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in table]
    assert cells[0] == ["first", "60", "1", "1", "1", "57", ""]
    assert cells[1] == ["second", "60", "0", "0", "0", "60", "5 features of type 'Antibody Capture'"]
    assert cells[3] == ["all", "180", "1", "1", "1", "177", ""]

    more = synthetic_adata(30, 40, seed=9)
    write_mtx(tmp_path / "more", more, zipped=False)
    assert run("append", out, tmp_path / "more", "--workers", 1) == 0
    shown = capsys.readouterr().out
    lines = shown[shown.index("account of the cells") :]
    assert "more" in lines and "third" not in lines and "30" in lines
    assert len(Corpus.open(out)) == 207
    assert run("info", out) == 0 and "more" in capsys.readouterr().out
    assert run("verify", out) == 0 and "whole and consistent" in capsys.readouterr().out
    assert run("gc", out, "--drop-old", "--dry-run") == 0
    assert "would be removed" in capsys.readouterr().out
    assert Corpus.open(out, corpus.manifest_id).manifest_id == corpus.manifest_id
    assert run("gc", out, "--drop-old", "--keep", corpus.manifest_id) == 0
    assert f"manifest {corpus.manifest_id} stays: it was asked to stay" in capsys.readouterr().out
    parent = corpus.manifest_id
    del corpus
    assert run("gc", out, "--drop-old") == 0
    with pytest.raises(FileNotFoundError):
        Corpus.open(out, parent)
    assert len(Corpus.open(out)) == 207


def test_shares_of_a_job_array(folder, tmp_path, capsys):
    out = tmp_path / "c"
    for _ in range(3):
        for share in range(2):
            assert run("build", f"{folder}/*.h5ad", "--out", out, "--task", f"{share}/2") == 0
    shown = capsys.readouterr().out
    assert "call it again when the other shares have" in shown and "account of the cells" in shown
    assert len(Corpus.open(out)) == 119
    whole = tmp_path / "whole"
    assert run("build", f"{folder}/*.h5ad", "--out", whole, "--workers", 1) == 0
    assert Corpus.open(whole).manifest_id == Corpus.open(out).manifest_id


def test_no_shuffle_keeps_the_order(folder, tmp_path):
    assert run("build", folder / "third.h5ad", "--out", tmp_path / "c", "--no-shuffle", "--workers", 1) == 0
    assert (Corpus.open(tmp_path / "c").read(slice(None)).obs["scjax_source_row"] == np.arange(60)).all()


def test_orthologs_of_one_study(folder, tmp_path, capsys):
    mouse = synthetic_adata(40, 40, seed=4)
    mouse.var_names = [f"Mouse{i}" for i in range(40)]
    del mouse.var["ensembl_id"]
    mouse.write_h5ad(folder / "mouse.h5ad")
    pairs = [(f"GENE{i}", f"Mouse{i}") for i in range(30)] + [("GENE0", "Mouse30")]
    (tmp_path / "o.tsv").write_text("".join("\t".join(pair) + "\n" for pair in pairs))
    out = tmp_path / "c"
    files = [folder / "third.h5ad", folder / "mouse.h5ad"]
    assert run("build", *files, "--out", out, "--orthologs", f"mouse={tmp_path}/o.tsv", "--workers", 1) == 0
    corpus = Corpus.open(out)
    assert len(corpus.vocabulary) == 40
    entry = corpus.manifest["datasets"][1]
    assert entry["genes_matched"] == 29 and entry["orthologs"]["file"] == "o.tsv"
    many, none = "ortholog shared with other genes (many-to-one)", "no ortholog in the table"
    assert entry["orthologs"]["genes_left_out"] == {many: 2, none: 9}
    assert f"9 genes: {none}" in capsys.readouterr().out
    whole = corpus.read(slice(None))
    rows = np.flatnonzero(whole.obs["scjax_dataset"] == "mouse")
    x = mouse.X[whole.obs["scjax_source_row"].to_numpy()[rows]].toarray()
    ids = [corpus.vocabulary.id_of(f"GENE{i}") for i in range(1, 30)]
    got = whole.X[rows].toarray()
    np.testing.assert_array_equal(got[:, ids], x[:, 1:30])
    assert got.sum() == x[:, 1:30].sum()
    # summed on request: the counts of both genes
    assert run("build", *files, "--out", tmp_path / "d", "--orthologs", f"mouse={tmp_path}/o.tsv",
               "--sum-duplicates", "--workers", 1) == 0  # fmt: skip
    summed = Corpus.open(tmp_path / "d").read(slice(None))
    rows = np.flatnonzero(summed.obs["scjax_dataset"] == "mouse")
    x = mouse.X[summed.obs["scjax_source_row"].to_numpy()[rows]].toarray()
    gene0 = summed.X[rows].toarray()[:, Corpus.open(tmp_path / "d").vocabulary.id_of("GENE0")]
    np.testing.assert_array_equal(gene0, x[:, 0] + x[:, 30])


def test_verify_repairs_from_the_sources(folder, tmp_path, capsys):
    out = tmp_path / "c"
    assert run("build", folder, "--out", out, "--workers", 1) == 0
    victim = next(out.glob("parts/*.zarr/X/data/c/0"))
    content = victim.read_bytes()
    victim.write_bytes(content[:-1])
    assert run("verify", out) == 1
    assert run("verify", out, "--repair") == 0
    assert victim.read_bytes() == content and "repaired: " in capsys.readouterr().out
    victim.unlink()
    shutil.move(folder, tmp_path / "elsewhere")
    assert run("verify", out, "--repair") == 2
    assert "say where they are" in capsys.readouterr().err
    assert run("verify", out, "--sources", tmp_path / "elsewhere") == 0
    assert victim.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--column", "cell_type"], "--column cell_type: give the name to keep and the others"),
        (["--column", "=x"], "--column =x: give the name to keep"),
        (["--task", "4/4"], "--task 4/4: give the share and how many there are, from 0/4 to 3/4 for four"),
        (["--task", "x"], "--task x: give the share"),
        (["--orthologs", "absent.tsv"], "absent.tsv: no such file; orthologs= is a table"),
        (["--orthologs", "a.tsv", "--orthologs", "b.tsv"], "give one table, or a table for each"),
        (["--orthologs", "nobody=OWN"], "not there: nobody; there are: first, second, third"),
        (["--names", "a", "b"], "2 names for 3 sources"),
    ],
)  # fmt: skip
def test_bad_options(folder, tmp_path, capsys, options, problem):
    (tmp_path / "o.tsv").write_text("a\tb\n")
    options = [option.replace("OWN", str(tmp_path / "o.tsv")) for option in options]
    assert run("build", folder, "--out", tmp_path / "c", *options) == 2
    assert problem in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "c" / "HEAD").exists()


def test_bad_sources(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for source, problem in (
        ("empty", "no source in this folder (holds: nothing); a source is an .h5ad file"),
        ("absent.h5ad", "absent.h5ad: no such file"),
        ("*.h5ad", "nothing matches"),
    ):
        assert run("build", tmp_path / source, "--out", tmp_path / "c") == 2
        assert problem in " ".join(capsys.readouterr().err.split())


def test_the_account_of_many_data_sets_adds_up():
    import io

    import rich.console

    entries = [
        {"name": f"s{i}", "n_cells_in": 10, "n_cells": 9, "dropped": {"empty": 1, "duplicates": 0}}
        for i in range(100)
    ]
    console = rich.console.Console(width=100, file=io.StringIO())
    console.print(account(json.loads(json.dumps(entries))))
    shown = [line.split() for line in console.file.getvalue().replace("│", " ").splitlines()]
    assert ["and", "60", "more", "600", "60", "540"] in shown and ["all", "1,000", "100", "900"] in shown
    assert "duplicates" not in console.file.getvalue()


def test_an_h5ad_of_the_corpus_s_cells_is_a_source_again(folder, tmp_path):
    """What ``Corpus.read`` gives builds into the same counts."""
    assert run("build", folder / "third.h5ad", "--out", tmp_path / "c", "--workers", 1) == 0
    cells = Corpus.open(tmp_path / "c").read(slice(None))
    cells.write_h5ad(tmp_path / "again.h5ad")
    assert run("build", tmp_path / "again.h5ad", "--out", tmp_path / "d", "--no-shuffle", "--workers", 1) == 0
    again = Corpus.open(tmp_path / "d").read(slice(None))
    assert (again.X != cells.X).nnz == 0 and isinstance(again, ad.AnnData)


def test_a_corpus_by_its_url(folder, tmp_path, capsys, s3_corpus):
    """What reads takes a URL; what writes says that it needs a folder."""
    assert run("build", folder, "--out", tmp_path / "c", "--workers", 1) == 0
    url = s3_corpus(tmp_path / "c")
    assert url.startswith("s3://")
    capsys.readouterr()
    assert run("info", url) == 0
    shown = capsys.readouterr().out
    assert url in shown and "second" in shown
    assert run("verify", url) == 0 and "whole and consistent" in capsys.readouterr().out
    for place, name in ((tmp_path / "c", "here"), (url, "there")):
        assert run("statistics", place, "--out", tmp_path / f"{name}.tsv") == 0
        assert run("genes", place, "--top", 10, "--out", tmp_path / f"genes-{name}.tsv") == 0
    for kind in ("", "genes-"):
        here, there = (tmp_path / f"{kind}{name}.tsv" for name in ("here", "there"))
        assert here.read_bytes() == there.read_bytes()
    capsys.readouterr()
    for command in (["append", url, folder / "first.h5ad"], ["gc", url], ["verify", url, "--repair"]):
        assert run(*command) == 2
        assert f"{url}: " in "".join(capsys.readouterr().err.split("\n"))
    assert run("build", folder, "--out", url, "--workers", 1) == 2
    assert not (tmp_path / "s3:").exists()


def test_a_repair_maps_orthologs_again(folder, tmp_path, capsys):
    table = tmp_path / "o.tsv"
    table.write_text("".join(f"Mouse{i}\tGENE{i}\n" for i in range(30)))
    mouse = synthetic_adata(40, 40, seed=4)
    mouse.var_names = [f"Mouse{i}" for i in range(40)]
    del mouse.var["ensembl_id"]
    mouse.write_h5ad(folder / "mouse.h5ad")
    out = tmp_path / "c"
    assert run("build", folder, "--out", out, "--orthologs", table, "--workers", 1) == 0
    assert Corpus.open(out).manifest["datasets"][1]["genes_matched"] == 30
    (victim,) = out.glob("parts/*.zarr/X/indices/c/0")
    content = victim.read_bytes()
    victim.write_bytes(content[1:])
    assert run("verify", out, "--repair") == 0
    assert victim.read_bytes() == content
    victim.unlink()
    before = table.read_text()
    table.write_text(before + "Mouse31\tGENE31\n")
    assert run("verify", out, "--repair") == 2
    assert "o.tsv: the table of orthologs has changed since" in " ".join(capsys.readouterr().err.split())
    table.unlink()
    assert run("verify", out, "--repair") == 2
    assert "o.tsv: no such file; orthologs= is a table" in " ".join(capsys.readouterr().err.split())
    table.write_text(before)
    assert run("verify", out, "--repair") == 0 and victim.read_bytes() == content
