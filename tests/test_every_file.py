"""Every file of the development data: all in one corpus, each cell compared with its source; and ``embed``
and ``eval`` on every human one."""

import gzip
import json
from collections import Counter
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from scjax.cli.main import main
from scjax.corpus import Corpus

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
FILES = sorted(DATA.glob("*.h5ad"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILES, reason=f"NO DEVELOPMENT DATA: {DATA} is absent, so no file of it is tried"),
]


def is_human(path: Path) -> bool:
    obs = ad.read_h5ad(path, backed="r").obs
    return str(obs["organism"].iloc[0]) == "human"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Knows the genes of a whole transcriptome, untrained: this test is about paths, not scores."""
    import jax

    from scjax import api, models
    from scjax.genes import Vocabulary
    from scjax.nn import initialise

    genes = Vocabulary.from_anndata([ad.read_h5ad(DATA / "pbmc3k_10xv1.h5ad", backed="r").var])
    config = {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_ff": 16, "max_length": 129}
    state = jax.jit(lambda: initialise(models.build("scgpt", config, len(genes))))()
    return api.Model("scgpt", config, genes, **state, step=0, path=tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file(path, model, tmp_path, monkeypatch, capsys):
    if not is_human(path):
        pytest.skip("not human")
    from scjax import api

    monkeypatch.setattr(api, "load", lambda path: model)
    assert main(["corpus", "build", str(path), "--out", str(tmp_path / "corpus")]) == 0
    corpus = Corpus.open(tmp_path / "corpus")
    source = ad.read_h5ad(path)
    dropped = sum(corpus.manifest["datasets"][0]["dropped"].values())
    assert len(corpus) + dropped == source.n_obs
    assert main(["embed", str(path), "--model", "run", "--out", str(tmp_path / "out.h5ad")]) == 0
    embedded = ad.read_h5ad(tmp_path / "out.h5ad")
    assert np.isfinite(embedded.obsm["X_scjax"]).all()
    labels = [
        c
        for c in ("cell_type", "region", "perturbation", "condition")
        if c in embedded.obs and (embedded.obs[c].value_counts() >= 10).sum() > 1
    ]
    if not labels:
        return
    group = [c for c in ("donor", "section", "batch") if c in embedded.obs and embedded.obs[c].nunique() > 1]
    group = [c for c in group if embedded.obs.groupby(labels[0], observed=True)[c].nunique().min() > 1]
    command = [
        "eval",
        str(tmp_path / "out.h5ad"),
        "--obsm",
        "X_scjax",
        "--label",
        labels[0],
        "--tasks",
        "annotation",
        "--out",
        str(tmp_path / "eval"),
        "--allow",  # an untrained model of a few steps is not above every control
        *(["--group", group[0]] if group else []),
    ]
    assert main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "eval" / "results.jsonl").read_text().splitlines()]
    assert any(row.get("status") == "ok" for row in rows)


# ------------------------------------------------------------------ all of them in one corpus
LEAST = 30  # genes of a cell


def onto(adata, column):
    """The counts by vocabulary gene, sorted; column -> gene is ``column``, -1 for none."""
    x = adata.X.tocoo()
    genes = column[x.col]
    kept = genes >= 0
    shape = adata.n_obs, int(column.max()) + 1
    return sparse.coo_matrix((x.data[kept], (x.row[kept], genes[kept])), shape=shape).tocsr()


def kept_rows(counts, total, seen):
    """(rows that a build keeps, why it drops the others), by going through the cells one by one."""
    kept, why = [], Counter()
    for row in range(counts.shape[0]):
        low, high = counts.indptr[row], counts.indptr[row + 1]
        content = counts.indices[low:high].tobytes() + counts.data[low:high].astype(np.int64).tobytes()
        if not total[row]:
            why["empty"] += 1
        elif high - low < LEAST:
            why["below_min_genes"] += 1
        elif content in seen:
            why["duplicates"] += 1
        else:
            seen.add(content)
            kept.append(row)
    return np.array(kept, int), why


def compare(corpus, sources, columns):
    """Every cell of the corpus, and the account of every cell that is not in it."""
    whole = corpus.read(slice(None))
    assert corpus.datasets == list(sources)
    seen: set[bytes] = set()
    for entry, (name, adata) in zip(corpus.manifest["datasets"], sources.items(), strict=True):
        expected = onto(adata, columns[name])
        kept, why = kept_rows(expected, np.asarray(adata.X.sum(1)).ravel(), seen)
        assert entry["n_cells_in"] == adata.n_obs and entry["n_cells"] == len(kept), name
        assert {reason: n for reason, n in entry["dropped"].items() if n} == dict(why), name
        rows = np.flatnonzero(whole.obs["scjax_dataset"] == name)
        of = whole.obs["scjax_source_row"].to_numpy()[rows]
        assert np.array_equal(np.sort(of), kept), name
        got, expected = whole.X[rows], expected[of]
        for part in ("indptr", "indices", "data"):
            assert np.array_equal(getattr(got, part), getattr(expected, part)), (name, part)
        assert (whole.obs["scjax_cell_id"].to_numpy()[rows] == adata.obs_names[of]).all(), name
        for column in adata.obs.columns:
            given = adata.obs[column].iloc[of]
            stored = whole.obs[column].iloc[rows]
            if given.dtype.kind in "iuf":
                np.testing.assert_allclose(stored.to_numpy(float), given.to_numpy(float))
            else:
                assert (stored.astype(str).to_numpy() == given.astype(str).to_numpy()).all(), (name, column)
    assert len(whole) == len(corpus) == sum(entry["n_cells"] for entry in corpus.manifest["datasets"])
    return whole


def test_all_files_in_one_corpus(tmp_path, capsys):
    out = tmp_path / "corpus"
    command = [
        "corpus",
        "build",
        str(DATA),
        "--out",
        str(out),
        "--min-genes",
        str(LEAST),
        "--drop-duplicates",
    ]
    assert main([*command, "--validation", "0.1"]) == 0
    assert "account of the cells" in capsys.readouterr().out
    corpus = Corpus.open(out)
    sources = {path.stem: ad.read_h5ad(path) for path in FILES}
    columns = {name: corpus.vocabulary.match(adata.var).ids for name, adata in sources.items()}
    for name, column in columns.items():  # every gene of every file is in the vocabulary, each its own
        assert (column >= 0).all() and len(np.unique(column)) == len(column), name
    compare(corpus, sources, columns)
    species = {entry["name"]: entry["species"] for entry in corpus.manifest["datasets"]}
    for name, adata in sources.items():
        assert set(species[name]) - {""} <= {str(adata.obs["organism"].iloc[0])}, (name, species[name])
    assert sum(entry["n_cells_in"] for entry in corpus.manifest["datasets"]) == 97_998
    assert (
        corpus.manifest["datasets"][corpus.datasets.index("pancreas_baron_cross_species_350")]["dropped"][
            "duplicates"
        ]
        == 22
    )  # as its README says
    assert corpus.verify(progress=False) == []


def test_all_files_on_human_genes(tmp_path):
    """Mouse files through the table of orthologs; which gene a column is, is worked out here once more."""
    table = DATA / "genes" / "orthologs_human_mouse_ensembl105.tsv.gz"
    sources = {path.stem: ad.read_h5ad(path) for path in FILES}
    mice = [name for name, adata in sources.items() if adata.obs["organism"].iloc[0] == "mouse"]
    out = tmp_path / "corpus"
    command = [
        "corpus",
        "build",
        str(DATA),
        "--out",
        str(out),
        "--min-genes",
        str(LEAST),
        "--drop-duplicates",
    ]
    assert main([*command, *(word for name in mice for word in ("--orthologs", f"{name}={table}"))]) == 0
    corpus = Corpus.open(out)
    pairs = [line.split("\t") for line in gzip.open(table, "rt").read().splitlines()[1:]]
    n_human, n_mouse = Counter(mouse for _, mouse in set(map(tuple, pairs))), Counter()
    human_of = {}
    for human, mouse in set(map(tuple, pairs)):
        gene = corpus.vocabulary.id_of(human) if human in corpus.vocabulary else human
        n_mouse[gene] += 1
        human_of[mouse] = gene
    columns = {}
    for name, adata in sources.items():
        if name not in mice:
            columns[name] = corpus.vocabulary.match(adata.var).ids
            continue
        symbols = adata.var["gene_symbol"].astype(str)
        once = symbols.map(symbols.value_counts()) == 1
        column = []
        for symbol, single in zip(symbols, once, strict=True):
            gene = human_of.get(symbol, -1) if n_human[symbol] == 1 and single else -1
            column.append(gene if isinstance(gene, int) and gene >= 0 and n_mouse[gene] == 1 else -1)
        columns[name] = np.array(column)
    compare(corpus, sources, columns)
    entries = {entry["name"]: entry for entry in corpus.manifest["datasets"]}
    for name in mice:
        found, left = entries[name]["genes_matched"], entries[name]["orthologs"]["genes_left_out"]
        assert found == (columns[name] >= 0).sum() and found + sum(left.values()) == sources[name].n_vars
        assert set(entries[name]["species"]) <= {"mouse"}
