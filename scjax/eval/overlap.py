"""Were these cells in the pretraining data? Public benchmark sets mostly are in public corpora.

A corpus publishes the names of its data sets and, better, a hash of every cell (``scjax corpus hashes``).
Hashes find a study under whatever name it was taken in, and one cell among millions.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import scipy.sparse as sp

from scjax.eval.baselines import find_counts

FORMAT = "scjax-cell-hashes-1"
HANDS = 16  # that genes are dealt into; a cell has a hash in each
MIN_GENES = 16  # expressed genes that a hand needs for its hash to mean this cell
MAX_LOST = 40.0  # expressed genes a cell may have lost, on average, for "not found" to mean "not there":
# the chance that one of the 16 hands lost none is 1 - (1 - (15/16)^40)^16 = 0.72
_STEP, _MIX1, _MIX2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Overlap(NamedTuple):
    """What pretraining saw of the cells.

    Attributes:
        verdict: "cell" (some are in the corpus), "study" (their study is, by its name, though no cell was
            found), "none", or "unknown"; what ``pretrain_overlap`` of a result row holds.
        share: of the cells that were found; NaN where cells were not compared.
        note: one sentence for people.
    """

    verdict: str
    share: float
    note: str


def pretrain_overlap(
    adata: ad.AnnData,
    manifest: str | os.PathLike[str],
    *,
    studies: str | Sequence[str] = (),
    counts: str | None = None,
) -> Overlap:
    """Compare cells with the manifest of a pretraining corpus.

    Args:
        adata: the cells to be scored.
        manifest: hashes of cells (``.npz``, written by ``scjax corpus hashes``), or a ``.json`` with a list
            "datasets" of names, or of tables with a "name" or "id" (the manifest of a corpus is one).
        studies: an obs column with the study of each cell, or the names of the studies; compared with the
            data sets of the corpus without regard to case.
        counts: where the raw counts are (see :func:`scjax.eval.run`).

    Returns:
        The verdict. "none" is said only when cells that are there would have been found: when ``adata`` has
        nearly all genes that cells of the corpus express. Genes are dealt into 16 hands with a hash each, and
        one that agrees is enough: a cell that lost some expressed genes on the way is still found.

    Raises:
        FileNotFoundError, ValueError: the manifest is not there, or not one. KeyError: no such obs column or
        layer.
    """
    path = Path(manifest)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; 'scjax corpus hashes DIR --out FILE.npz' writes one")
    file = _read(path)
    if isinstance(studies, str):
        if studies not in adata.obs:
            raise KeyError(f"studies={studies!r} is not a column of obs; there are: {', '.join(adata.obs)}")
        studies = [str(s) for s in adata.obs[studies].dropna().unique()]
    known = {str(name).lower() for name in file["datasets"]}
    shared = sorted({s for s in studies if s.lower() in known})
    named = f"the corpus holds data sets of the same name: {', '.join(shared[:3])}" if shared else ""
    verdict, share, note = "unknown", np.nan, _NAMES_ONLY
    if "hashes" in file:
        verdict, share, note = _cells(adata, file, counts)
    if shared and verdict != "cell":
        return Overlap("study", share, f"{named}; {note}")
    return Overlap(verdict, share, f"{note}; {named}" if named else note)


_NAMES_ONLY = (
    "the manifest has names of data sets but no hashes of cells, so a renamed study would not be seen"
)


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        try:
            entries = json.loads(path.read_text())["datasets"]
            tables = [{"name": e} if isinstance(e, str) else e for e in entries]
            names = [str(table[field]) for table in tables for field in ("name", "id") if field in table]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: a JSON table with a list 'datasets' is needed ({error!r})") from None
        return {"datasets": names}
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a file of hashes ({error})") from None
    if str(content.get("format")) != FORMAT:
        raise ValueError(f"{path}: format {content.get('format')}; {FORMAT} is read here")
    return content


def _cells(adata: ad.AnnData, file: dict[str, Any], counts: str | None) -> tuple[str, float, str]:
    try:
        X, names = find_counts(adata, counts)
    except ValueError as error:
        return "unknown", np.nan, f"cells cannot be compared: {error}"
    var = adata.raw.var if adata.raw is not None and len(names) != adata.n_vars else adata.var
    at = _match(var, names, file)
    genes = np.unique(at[at >= 0])
    lost = float(np.delete(file["detection"], genes).sum())
    shape = (len(names), len(file["gene_id"]))
    into = sp.csr_matrix((np.ones((at >= 0).sum()), (np.flatnonzero(at >= 0), at[at >= 0])), shape=shape)
    hashes = hash_cells(sp.csr_matrix(X) @ into, gene_keys(file["gene_id"], file["symbol"]))
    place = np.searchsorted(file["hashes"], hashes)
    there = np.append(file["hashes"], np.uint64(0))[place] == hashes
    seen = (there & (hashes > 0)).any(1)
    usable = (hashes > 0).any(1)
    share, n = float(seen.mean()), len(seen)
    if seen.any():
        return "cell", share, f"{int(seen.sum()):,} of {n:,} cells are in the pretraining corpus"
    if lost > MAX_LOST or usable.mean() < 0.5:
        why = (
            f"a cell of the corpus expresses {lost:.0f} genes, on average, that these data do not have"
            if lost > MAX_LOST
            else f"{int((~usable).sum()):,} of {n:,} cells express too few genes to be told apart"
        )
        return "unknown", share, f"no cell was found in the pretraining corpus, but {why}"
    return "none", share, f"none of {n:,} cells is in the pretraining corpus ({int(file['n_cells']):,} cells)"


def _match(var: Any, names: Sequence[str], file: dict[str, Any]) -> np.ndarray:
    """Gene of the corpus for each column, −1 for none: by the var column that names most of them."""
    where = {str(s).upper(): i for i, s in reversed(list(enumerate(file["symbol"])))}
    where |= {str(g).upper(): i for i, g in enumerate(file["gene_id"])}
    texts = [c for c in var if var[c].dtype.kind not in "biuf" and len(var) == len(names)]
    candidates = [list(names), *(list(var[c].astype(str)) for c in texts)]

    def look_up(column: Sequence[str]) -> np.ndarray:
        plain = (re.sub(r"^(ENS[A-Z]*G\d{11})\.\d+$", r"\1", str(name).upper()) for name in column)
        return np.array([where.get(name, -1) for name in plain], np.int64)

    return max((look_up(column) for column in candidates), key=lambda at: int((at >= 0).sum()))


def gene_keys(gene_id: Sequence[str], symbol: Sequence[str]) -> np.ndarray:
    """uint64 [n_genes]: key of each gene; the recipe is in ``scjax/corpus/hashes.py``."""
    often = Counter(str(s).upper() for s in symbol)
    pairs = zip(gene_id, symbol, strict=True)
    names = [str(s if s and often[str(s).upper()] == 1 else i) for i, s in pairs]
    digests = (hashlib.blake2b(name.upper().encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def hash_cells(counts: sp.csr_matrix, keys: np.ndarray) -> np.ndarray:
    """uint64 [cells, 16]: hash of each cell in each hand of genes, 0 where it has none."""
    counts = sp.csr_matrix(counts)
    counts.eliminate_zeros()
    gene = keys[counts.indices]
    out = np.zeros((counts.shape[0], HANDS), np.uint64)
    row = np.repeat(np.arange(len(out)), np.diff(counts.indptr))
    hand = (gene % np.uint64(HANDS)).astype(np.int64)
    with np.errstate(over="ignore"):
        x = gene + _STEP * np.rint(counts.data).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * _MIX1
        x = (x ^ (x >> np.uint64(27))) * _MIX2
        np.add.at(out, (row, hand), x ^ (x >> np.uint64(31)))
    n = np.bincount(HANDS * row + hand, minlength=out.size).reshape(out.shape)
    return np.where(n >= MIN_GENES, out, np.uint64(0))
