"""Graphs of genes, from lists of edges or from co-expression, and vectors of genes from a graph.

Edges have no direction, each stands once, none goes from a gene to itself. Names are kept as they are given,
or are those of a vocabulary; whoever reads the vectors matches them again (:func:`scjax.genes.match_values`).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from scjax.genes.vocabulary import Vocabulary

ENDS = (
    ("source", "target"),
    ("a", "b"),
    ("from", "to"),
    ("gene1", "gene2"),
    ("gene_a", "gene_b"),
    ("protein1", "protein2"),
)
WEIGHTS = ("weight", "w", "score")
BLOCK = 1024  # genes whose correlations with all others are held at a time


@dataclasses.dataclass(frozen=True)
class GeneGraph:
    """An undirected graph of genes.

    Attributes:
      names: its genes, each with at least one edge.
      edges: int64 [m, 2], places in ``names``, the lower first, sorted.
      weight: float64 [m], positive.
      summary: what was read and what was left out, for people.
    """

    names: tuple[str, ...]
    edges: np.ndarray
    weight: np.ndarray
    summary: str

    def adjacency(self) -> sparse.csr_matrix:
        """float64 [n, n], symmetric."""
        n, (a, b) = len(self.names), self.edges.T
        half = sparse.coo_matrix((self.weight, (a, b)), (n, n))
        return (half + half.T).tocsr()


# --------------------------------------------------------------------------------------------- edges
def read_graph(
    path: str | pathlib.Path,
    vocabulary: Vocabulary | None = None,
    *,
    columns: Sequence[str] | None = None,
    weight: str | None = None,
    min_matched: float = 0.5,
) -> GeneGraph:
    """The graph of a table of edges, .tsv or .csv (also .gz), with a header.

    Args:
      path: of the table.
      vocabulary: the genes to keep, under their ids in it; None for all, as they are named.
      columns: names of the two columns with genes; None for source and target, a and b, gene1 and gene2, ...
      weight: name of the column with the weights; None for weight, w or score where there is one.
      min_matched: the least share of the table's names that the vocabulary must know.

    Raises:
      FileNotFoundError: no such file.
      ValueError: columns are missing, a name is empty or a number, a weight is not positive (says in which
        line), the same edge has two weights, too few names are known (says how many, which not), or no edge
        is left.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    comma = ".csv" in path.suffixes
    try:
        # "NA" and "nan" can be names: of genes, or of what a spreadsheet made of them
        table = pd.read_csv(path, sep="," if comma else "\t", keep_default_na=False, na_values=[""])
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path} is empty; a table of edges with a header is needed") from None
    except (pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is no table of edges: {error}") from None
    known = next((pair for pair in ENDS if set(pair) <= set(table.columns)), None)
    ends = tuple(columns) if columns else known
    if ends is None or not set(ends) <= set(table.columns):
        wanted = " and ".join(columns) if columns else ", ".join("/".join(pair) for pair in ENDS)
        raise ValueError(
            f"{path} has the columns {', '.join(map(str, table.columns))}; the two genes of an edge are "
            f"looked for in {wanted}. Name them with columns= (--columns A B)"
        )
    column = weight or next((name for name in WEIGHTS if name in table), None)
    if column is not None and column not in table:
        raise ValueError(f"{path} has no column {column!r}; it has {', '.join(map(str, table.columns))}")
    for name in ends:
        if pd.api.types.is_numeric_dtype(table[name]) and len(table):
            raise ValueError(f"{path}: column {name!r} holds numbers; names of genes are needed")
        if table[name].isna().any():
            line = int(np.flatnonzero(table[name].isna())[0]) + 2
            raise ValueError(f"{path}, line {line}: no gene in column {name!r}")
    weights = np.ones(len(table)) if column is None else pd.to_numeric(table[column], errors="coerce")
    bad = np.flatnonzero(~(np.isfinite(weights) & (np.asarray(weights) > 0)))
    if len(bad):
        given = table[column].iloc[bad[0]]
        raise ValueError(
            f"{path}, line {bad[0] + 2}: {column} is {given}; weights are positive numbers "
            f"({len(bad):,} lines have none)"
        )
    pairs = table[list(ends)].astype(str).to_numpy()
    return graph_of(pairs, np.asarray(weights), vocabulary, min_matched=min_matched, source=str(path))


def graph_of(
    pairs: Iterable[Sequence[str]],
    weight: np.ndarray | None = None,
    vocabulary: Vocabulary | None = None,
    *,
    min_matched: float = 0.5,
    source: str = "edges",
) -> GeneGraph:
    """The graph of pairs of names: as :func:`read_graph`, which reads them from a file."""
    pairs = np.asarray(list(pairs), str).reshape(-1, 2)
    weights = np.ones(len(pairs)) if weight is None else np.asarray(weight, float)
    if not len(pairs):
        raise ValueError(f"{source} holds no edge")
    names, place = np.unique(pairs, return_inverse=True)
    place = place.reshape(-1, 2)
    said = [f"{len(pairs):,} edges"]
    if vocabulary is not None:
        ids = vocabulary.match(names.tolist()).ids
        known, unknown = int((ids >= 0).sum()), names[ids < 0]
        some = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        if known < max(min_matched * len(names), 2):
            raise ValueError(
                f"{source}: only {known:,} of its {len(names):,} genes are among the {len(vocabulary):,} of "
                f"the vocabulary, which has {', '.join(vocabulary.symbols[:3])}, ...; not {some}. Give a "
                f"larger vocabulary, or none, or a lower min_matched than {min_matched:g}"
            )
        place = ids[place]
        kept = (place >= 0).all(1)
        if len(unknown):
            said.append(
                f"{len(unknown):,} of {len(names):,} genes are unknown and {int((~kept).sum()):,} edges with "
                f"them left out ({some})"
            )
        place, weights, names = place[kept], weights[kept], np.array(vocabulary.ids)
    loops = place[:, 0] == place[:, 1]
    if loops.any():
        said.append(f"{int(loops.sum()):,} from a gene to itself left out")
    place, weights = place[~loops], weights[~loops]
    if not len(place):
        raise ValueError(f"{source}: no edge is left ({'; '.join(said)})")

    # the same edge twice has one weight; in the other direction it may have its own, and the larger counts
    directed, inverse = np.unique(place, axis=0, return_inverse=True)
    low, high = (np.full(len(directed), start) for start in (np.inf, -np.inf))
    np.minimum.at(low, inverse.ravel(), weights)
    np.maximum.at(high, inverse.ravel(), weights)
    if (low < high).any():
        at = int(np.flatnonzero(low < high)[0])
        a, b = names[directed[at]]
        raise ValueError(
            f"{source}: the edge {a} - {b} stands there with the weights {low[at]:g} and {high[at]:g}, and "
            f"so do {int((low < high).sum()) - 1:,} others; an edge has one"
        )
    edges, inverse = np.unique(np.sort(directed, 1), axis=0, return_inverse=True)
    merged = np.zeros(len(edges))
    np.maximum.at(merged, inverse.ravel(), high)
    if len(place) > len(edges):
        said.append(f"{len(place) - len(edges):,} repeat another")
    used, edges = np.unique(edges, return_inverse=True)
    edges = edges.reshape(-1, 2)
    summary = f"{source}: {len(used):,} genes, {len(edges):,} edges (of {'; '.join(said)})"
    return GeneGraph(tuple(names[used].tolist()), edges, merged, summary)


def coexpression(
    counts: Any,
    names: Sequence[str],
    *,
    neighbours: int = 10,
    min_cells: int = 10,
    depth: np.ndarray | None = None,
    source: str = "counts",
) -> GeneGraph:
    """Each gene and those that its expression goes with most, over cells.

    Expression is log(1 + counts per 10,000). Edges are the ``neighbours`` largest positive correlations of
    every gene, weighted by them.

    Args:
      counts: [cells, genes], raw counts, sparse or dense.
      names: of the genes, unique.
      neighbours: of a gene; it may have more edges by being that of others.
      min_cells: genes found in fewer cells are left out.
      depth: [cells], total counts of each cell; None where ``counts`` holds all genes of the cells.

    Raises:
      ValueError: names do not fit, or fewer than three genes can be compared.
    """
    X = sparse.csr_matrix(counts, dtype=np.float64)
    if X.shape[1] != len(names) or len(set(names)) != len(names):
        raise ValueError(f"{source}: {X.shape[1]:,} genes need as many names, each once; got {len(names):,}")
    total = np.asarray(X.sum(1)).ravel() if depth is None else np.asarray(depth, float)
    X = sparse.csr_matrix(sparse.diags_array(1e4 / np.maximum(total, 1)) @ X)
    X.data = np.log1p(X.data)
    n_cells, found = X.shape[0], X.getnnz(0)
    mean, square = (np.asarray(m.mean(0)).ravel() for m in (X, X.multiply(X)))
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    keep = np.flatnonzero((found >= min_cells) & (spread > 1e-6))
    if len(keep) < 3:
        raise ValueError(
            f"{source}: {len(keep)} of {len(names):,} genes vary and are found in {min_cells} of {n_cells:,} "
            "cells; co-expression needs three"
        )
    X, mean, spread = sparse.csc_matrix(X)[:, keep], mean[keep], spread[keep]
    k, transposed = min(neighbours, len(keep) - 1), sparse.csr_matrix(X.T)
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for start in range(0, len(keep), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(keep)))
        covariance = transposed @ X[:, block].toarray() / n_cells - np.outer(mean, mean[block])
        r = (covariance / spread[:, None] / spread[block]).T
        r[np.arange(len(block)), block] = -np.inf
        best = np.argpartition(-r, k - 1, axis=1)[:, :k]
        rows.append(np.repeat(block, k))
        columns.append(best.ravel())
        values.append(np.take_along_axis(r, best, 1).ravel())
    a, b, r = (np.concatenate(parts) for parts in (rows, columns, values))
    positive = r > 1e-6
    if not positive.any():
        raise ValueError(f"{source}: no two of {len(keep):,} genes are correlated")
    pairs = np.array([names[int(i)] for i in keep])[np.stack([a, b], 1)[positive]]
    graph = graph_of(pairs, r[positive], source=f"co-expression in {source}")
    said = f"{n_cells:,} cells, {len(keep):,} of {len(names):,} genes, {k} neighbours each"
    return dataclasses.replace(graph, summary=f"{graph.summary.split(' (of')[0]} ({said})")


def shuffled(graph: GeneGraph, seed: int = 0, swaps: int = 10) -> GeneGraph:
    """A graph of the same degrees whose edges mean nothing: the control of whatever a graph is good for.

    Two edges a-b and c-d become a-d and c-b, ``swaps`` times the number of edges; what would join a gene to
    itself, or be there twice, is not done (Maslov and Sneppen 2002). Weights stay with the first gene.
    """
    rng, edges = np.random.default_rng([seed, 11]), graph.edges.copy()
    there = {(int(a), int(b)) for a, b in edges}
    drawn = rng.integers(0, len(edges), (swaps * len(edges), 2))
    for (i, j), turn in zip(drawn, rng.random(len(drawn)) < 0.5, strict=True):
        (a, b), (c, d) = edges[i].tolist(), edges[j].tolist()
        c, d = (d, c) if turn else (c, d)
        new = (min(a, d), max(a, d)), (min(c, b), max(c, b))
        if len({a, b, c, d}) < 4 or new[0] in there or new[1] in there:
            continue
        there -= {(min(a, b), max(a, b)), (min(c, d), max(c, d))}
        there |= set(new)
        edges[i], edges[j] = new
    order = np.lexsort(edges.T[::-1])
    return dataclasses.replace(
        graph, edges=edges[order], weight=graph.weight[order], summary=f"{graph.summary}, edges shuffled"
    )


# -------------------------------------------------------------------------------------------- vectors
def spectral(graph: GeneGraph, dim: int = 64, seed: int = 0) -> np.ndarray:
    """float32 [n, dim]: where each gene lies in the graph, by the leading eigenvectors of its adjacency.

    The adjacency is normalised by degrees, after the mean degree has been spread evenly over all pairs:
    without that the first vectors would tell small separate pieces from the rest (Zhang and Rohe 2018,
    1806.01468). Vectors are scaled by their eigenvalues, the trivial first one is left out, the root mean
    square is 1.

    Raises:
      ValueError: the graph has too few genes for so many dimensions.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    n = len(graph.names)
    if dim > n - 2:
        raise ValueError(f"{graph.summary}: a graph of {n:,} genes has vectors of at most {n - 2} dimensions")
    A = graph.adjacency()
    degree = np.asarray(A.sum(1)).ravel()
    tau = degree.mean()
    scale = 1 / np.sqrt(degree + tau)

    def product(x: np.ndarray) -> np.ndarray:
        y = scale * x.ravel()
        return scale * (A @ y + tau / n * y.sum())

    start = np.random.default_rng([seed, 12]).normal(size=n)
    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
    values, vectors = eigsh(operator, dim + 1, which="LA", v0=start, tol=1e-6)
    order = np.argsort(-values)[1:]
    vectors = vectors[:, order] * np.maximum(values[order], 0)
    vectors *= np.sign(vectors[np.abs(vectors).argmax(0), np.arange(dim)])
    return normalised(vectors)


def normalised(vectors: np.ndarray) -> np.ndarray:
    """float32, of root mean square 1: the unit in which the tables of this room are written."""
    return (vectors / np.sqrt(np.square(vectors).mean())).astype(np.float32)
