"""Embeddings from files and registered embedders, the check against the pretraining corpus, ways out."""

import importlib.metadata
import json
import sys
import tomllib
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from synthetic import synthetic_adata

import scjax
from scjax.corpus import Corpus, hashes, write_hashes
from scjax.eval import Results
from scjax.eval import overlap as reader
from scjax.eval.adapters import czbenchmarks_task, to_openproblems
from scjax.eval.doors import Embedder, embedder, load_embedding
from scjax.eval.overlap import pretrain_overlap
from scjax.eval.schema import MEAN

CELLS = [f"cell{i}" for i in range(20)]
X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
TABLE = pd.DataFrame(X, index=CELLS)


# ------------------------------------------------------------------ files
def write(path: Path) -> Path:
    suffix = "".join(path.suffixes)
    if suffix == ".npz":
        np.savez(path, X=X, obs_names=np.array(CELLS))
    elif suffix == ".npy":
        np.save(path, X)
        path.with_suffix(".names.txt").write_text("\n".join(CELLS) + "\n")
    elif suffix == ".parquet":
        TABLE.to_parquet(path)
    elif suffix == ".h5ad":
        ad.AnnData(np.ones((20, 2), np.float32), obs=pd.DataFrame(index=CELLS), obsm={"X_a": X}).write_h5ad(
            path
        )
    else:
        TABLE.to_csv(path, sep="\t" if ".tsv" in suffix else ",")
    return path


@pytest.mark.parametrize("name", ["e.npz", "e.npy", "e.parquet", "e.csv", "e.tsv", "e.csv.gz", "e.h5ad"])
def test_every_format_is_matched_by_name(tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    path = write(tmp_path / name)
    wanted = CELLS[::-2]
    table = load_embedding(path, wanted)
    assert list(table.index) == wanted and table.to_numpy().dtype == np.float32
    np.testing.assert_allclose(table, X[::-2], rtol=1e-6)
    np.testing.assert_allclose(load_embedding(path), X, rtol=1e-6)


def test_bytes_as_names_and_a_key(tmp_path):
    path = tmp_path / "e.npz"
    np.savez(path, a=X, b=X + 1, names=np.array(CELLS, "S"))
    np.testing.assert_array_equal(load_embedding(path, CELLS, key="b"), X + 1)
    with pytest.raises(ValueError, match=r"2 arrays .*say which with key="):
        load_embedding(path)
    with pytest.raises(KeyError, match=r"no array 'c'; it holds: a, b"):
        load_embedding(path, key="c")


def test_other_cells_are_refused(tmp_path):
    path = write(tmp_path / "e.npz")
    with pytest.raises(
        ValueError, match=r"1 of 2 cells have no row there; the first is 'other'.*like \['cell0'"
    ):
        load_embedding(path, ["cell3", "other"])
    with pytest.raises(ValueError, match="suffix of the barcode only"):
        load_embedding(path, [f"{c}-1" for c in CELLS])


def test_what_cannot_be_read_says_what_would_be_right(tmp_path):
    def saved(name="e.npz", **arrays):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    with pytest.raises(FileNotFoundError, match="no such file"):
        load_embedding(tmp_path / "absent.npz")
    (tmp_path / "e.txt").write_text("x")
    with pytest.raises(ValueError, match=r"are read from \.npz.*not from \.txt"):
        load_embedding(tmp_path / "e.txt")
    with pytest.raises(ValueError, match="no names of cells"):
        load_embedding(saved(X=X))
    with pytest.raises(ValueError, match="20 names of cells for 19 rows"):
        load_embedding(saved(X=X[1:], obs_names=np.array(CELLS)))
    with pytest.raises(ValueError, match=r"shape \(20,\)"):
        load_embedding(saved(X=X[:, 0], obs_names=np.array(CELLS)), key="X")
    with pytest.raises(ValueError, match="1 names of cells occur more than once, the first is 'cell1'"):
        load_embedding(saved(X=X, obs_names=np.array(["cell0", *CELLS[1:-1], "cell1"])))
    with pytest.raises(ValueError, match="Python objects"):
        load_embedding(saved(X=X, obs_names=np.array(CELLS, object)))
    np.save(tmp_path / "f.npy", X)
    with pytest.raises(FileNotFoundError, match=r"one a line in f\.txt or f\.names\.txt beside it"):
        load_embedding(tmp_path / "f.npy")
    pd.DataFrame({"a": ["x", "y"]}, index=["c", "d"]).to_csv(tmp_path / "e.csv")
    with pytest.raises(ValueError, match="column 'a' is not numeric"):
        load_embedding(tmp_path / "e.csv")
    with pytest.raises(KeyError, match="obsm has no 'X_b'; it holds: X_a"):
        load_embedding(write(tmp_path / "e.h5ad"), key="X_b")


# -------------------------------------------------------------- embedders
class Sums:
    def __init__(self, scale: str = "1"):
        self.scale = float(scale)

    def embed(self, adata):
        return self.scale * np.asarray(adata.X.sum(1)).reshape(-1, 1)


def needy(source):
    return Sums(source)


def number():
    return 3


def test_embedders_are_found_by_their_entry_points(tmp_path, monkeypatch):
    package = tmp_path / "site"
    (package / "sums-1.0.dist-info").mkdir(parents=True)
    (package / "sums-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sums\nVersion: 1.0\n"
    )
    (package / "sums-1.0.dist-info" / "entry_points.txt").write_text(
        f"[scjax.embedders]\nsums = {__name__}:Sums\nwrong = {__name__}:number\nneedy = {__name__}:needy\n"
    )
    monkeypatch.setattr(sys, "path", [str(package), *sys.path])
    adata = synthetic_adata(10, 20)
    plain, scaled = embedder("sums"), embedder("sums:2")
    assert isinstance(plain, Embedder)
    np.testing.assert_allclose(2 * plain.embed(adata), scaled.embed(adata))
    with pytest.raises(
        KeyError, match=r"no embedder 'other' is registered; there are: .*needy, .*sums, wrong"
    ):
        embedder("other")
    with pytest.raises(ValueError, match="'wrong:x' cannot be made so; write plain 'wrong'"):
        embedder("wrong:x")
    with pytest.raises(ValueError, match="write 'needy:SOURCE'"):
        embedder("needy")
    with pytest.raises(TypeError, match=r"'wrong' .* gave a int without embed"):
        embedder("wrong")


def test_scjax_registers_itself():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["scjax.embedders"]["scjax"]
    point = importlib.metadata.EntryPoint("scjax", value, "scjax.embedders")
    assert point.load() is scjax.load and hasattr(scjax.api.Model, "embed")


# ---------------------------------------------------------------- overlap
@pytest.fixture(scope="module")
def hashed(tmp_path_factory):
    """A corpus of two studies, one with a validation part, and its hashes."""
    folder = tmp_path_factory.mktemp("hashed")
    studies = [synthetic_adata(120, 1200, seed=s) for s in (0, 1)]
    for i, study in enumerate(studies):
        study.obs_names = [f"s{i}_{n}" for n in study.obs_names]
    path, file = folder / "corpus", folder / "hashes.npz"
    scjax.build_corpus(studies, path, names=["alpha", "Beta"], validation=0.2, progress=False)
    corpus = Corpus.open(path)
    assert write_hashes(corpus, file, progress=False) == sum(p.n_cells for p in corpus.split("train"))
    return corpus, studies, file


def test_cells_of_the_corpus_are_found_whatever_their_order(hashed):
    corpus, studies, file = hashed
    rows = np.arange(corpus.split("train")[0].n_cells)
    train = corpus.read(rows)
    train.obs_names = [f"renamed{i}" for i in range(len(rows))]
    rng = np.random.default_rng(0)
    shuffled = train[rng.permutation(len(rows)), rng.permutation(train.n_vars)].copy()
    found = pretrain_overlap(shuffled, file)
    assert found.verdict == "cell" and found.share == 1.0
    assert pretrain_overlap(studies[0], file).verdict == "cell"  # symbols instead of ids


def test_validation_cells_and_others_are_not_found(hashed):
    corpus, _, file = hashed
    held_out = corpus.split("validation")
    cells = corpus.read(np.arange(held_out[0].first_row, held_out[0].first_row + held_out[0].n_cells))
    for other in (cells, synthetic_adata(120, 1200, seed=7)):
        found = pretrain_overlap(other, file)
        assert found.verdict == "none" and found.share == 0.0, found


def test_dropping_rare_genes_does_not_hide_a_study(hashed):
    _, studies, file = hashed
    study = studies[0]
    often = np.asarray((study.X > 0).sum(0)).ravel()
    kept = study[:, often > 6].copy()
    assert kept.n_vars < study.n_vars
    found = pretrain_overlap(kept, file)
    assert found.verdict == "cell" and found.share > 0.5
    few = study[:, :150].copy()  # so few genes that nothing can be said
    assert pretrain_overlap(few, file).verdict == "unknown"
    shallow = synthetic_adata(60, 1200, seed=8)
    shallow.X = shallow.X.multiply(np.arange(1200) < 90).tocsr()
    assert "too few genes" in pretrain_overlap(shallow, file).note


def test_names_of_studies(hashed, tmp_path):
    _, _, file = hashed
    other = synthetic_adata(60, 1200, seed=9)
    assert pretrain_overlap(other, file, studies=["beta"]).verdict == "study"
    other.obs["set"] = "ALPHA"
    found = pretrain_overlap(other, file, studies="set")
    assert found.verdict == "study" and "ALPHA" in found.note
    assert pretrain_overlap(other, file, studies=["gamma"]).verdict == "none"
    plain = tmp_path / "m.json"
    plain.write_text(json.dumps({"datasets": ["alpha", {"name": "x", "id": "Gamma"}]}))
    assert pretrain_overlap(other, plain, studies=["gamma"]).verdict == "study"
    assert pretrain_overlap(other, plain, studies=["delta"]).verdict == "unknown"
    with pytest.raises(KeyError, match="not a column of obs; there are: cell_type"):
        pretrain_overlap(other, file, studies="nope")
    normalised = synthetic_adata(20, 1200)
    normalised.X.data = normalised.X.data / 3
    assert pretrain_overlap(normalised, file).verdict == "unknown"


def test_a_file_that_is_no_manifest_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="scjax corpus hashes"):
        pretrain_overlap(synthetic_adata(5, 20), tmp_path / "no.npz")
    np.savez(tmp_path / "x.npz", format=np.array("other"))
    with pytest.raises(ValueError, match="scjax-cell-hashes-1 is read here"):
        pretrain_overlap(synthetic_adata(5, 20), tmp_path / "x.npz")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="a list 'datasets' is needed"):
        pretrain_overlap(synthetic_adata(5, 20), tmp_path / "x.json")


def test_writer_and_reader_follow_one_recipe():
    ids = [f"ENSG{i:011d}" for i in range(1200)]
    symbols = [f"G{i}" for i in range(1198)] + ["", "g0"]
    keys = hashes.gene_keys(ids, symbols)
    np.testing.assert_array_equal(keys, reader.gene_keys(ids, symbols))
    assert len(np.unique(keys)) == 1200
    counts = synthetic_adata(50, 1200).X
    mine = hashes.hash_cells(counts, keys)
    np.testing.assert_array_equal(mine, reader.hash_cells(counts, keys))
    order = np.random.default_rng(1).permutation(1200)
    np.testing.assert_array_equal(mine, hashes.hash_cells(counts[:, order], keys[order]))
    assert (mine > 0).mean() > 0.9 and len(np.unique(mine[mine > 0])) == (mine > 0).sum()
    other = counts.copy()
    other.data[0] += 1  # one count of one gene: one hand of one cell
    assert (hashes.hash_cells(other, keys) != mine).sum() == 1
    # the numbers themselves: files written by one version are read by the next
    assert int(keys[0]) == KEY and int(mine[0, 0]) == HASH


KEY, HASH = 15069010328374381190, 783127935322239483


def test_hashes_from_the_command_line(hashed, tmp_path):
    from scjax.cli.main import main

    corpus, studies, _ = hashed
    file = tmp_path / "h.npz"
    assert main(["corpus", "hashes", str(corpus.path), "--out", str(file)]) == 0
    assert pretrain_overlap(studies[1], file).verdict == "cell"


# --------------------------------------------------------------- ways out
def test_openproblems_score_files(tmp_path):
    results = Results()
    about = {"task": "annotation", "head": "logistic", "metric": "macro_f1", "model_kind": "model"}
    results.add([0.7], **about, model_id="X_a", group=MEAN)
    results.add([0.9], **about, model_id="X_a", group="donor 1")
    results.add([0.6], **about, model_id="pca", group=MEAN)
    results.skip("no counts", **about, model_id="hvg")
    paths = to_openproblems(results, tmp_path, dataset_id="blood", normalization_id="log_cp10k")
    assert [p.name for p in paths] == ["X_a.score.h5ad", "pca.score.h5ad"]
    uns = ad.read_h5ad(paths[0]).uns
    assert (uns["dataset_id"], uns["normalization_id"], uns["method_id"]) == ("blood", "log_cp10k", "X_a")
    assert list(uns["metric_ids"]) == ["annotation_logistic_macro_f1"] and list(uns["metric_values"]) == [0.7]
    with pytest.raises(ValueError, match="no overall score"):
        to_openproblems(Results(), tmp_path, dataset_id="blood")


def test_cz_benchmarks_task():
    """Seen to pass with cz-benchmarks 0.15.1, whose pins are too old for it to be an extra of ours."""
    pytest.importorskip(
        "czbenchmarks.tasks", reason="cz-benchmarks is not installed: its adapter is not tested"
    )
    rng = np.random.default_rng(0)
    label, donor = rng.integers(0, 3, 200), np.array(["a", "b", "c"])[rng.integers(0, 3, 200)]
    Z = np.eye(3)[label] * 3 + rng.normal(size=(200, 3))
    Task = czbenchmarks_task()
    found = Task(random_seed=0).run(Z, Task.input_model(labels=label.astype(str), groups=donor))
    assert {m.params["head"] for m in found} >= {"logistic", "knn"}
    assert all(0.8 < m.value <= 1 for m in found)


def test_without_cz_benchmarks_the_adapter_says_so():
    try:
        import czbenchmarks.tasks  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="a task for cz-benchmarks needs that package; not installed"):
            czbenchmarks_task()
