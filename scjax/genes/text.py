"""Vectors of genes from what is written about them: descriptions from a table, and two readers of text."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from scjax.genes.graph import normalised

NAMES = ("ensembl_id", "gene_id", "symbol", "gene_symbol", "gene")
TEXTS = ("description", "gene_name", "summary", "text")


def read_descriptions(
    path: str | pathlib.Path, gene: str | None = None, text: Sequence[str] | None = None
) -> dict[str, str]:
    """Gene -> what is written about it, from a table, .tsv or .csv (also .gz), with a header.

    Args:
      path: of the table.
      gene: its column with names of genes; None for ensembl_id, gene_id, symbol or gene.
      text: its columns with text, joined by ". "; None for description, gene_name, summary or text.

    Genes without a text are left out. Of several rows of one gene the first with a text counts.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no such columns (says which there are), or no gene has a text.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        sep = "," if ".csv" in path.suffixes else "\t"
        table = pd.read_csv(path, sep=sep, dtype=str, keep_default_na=False, quoting=0 if sep == "," else 3)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is no table with a header: {error}") from None
    named = gene or next((name for name in NAMES if name in table), "a column of genes")
    texts = list(text or [name for name in TEXTS if name in table][:1] or ["a column of text"])
    for name in (named, *texts):
        if name not in table:
            raise ValueError(f"{path} has the columns {', '.join(table.columns)}, and not {name!r}")
    out: dict[str, str] = {}
    for name, *parts in table[[named, *texts]].itertuples(index=False):
        words = ". ".join(part.strip() for part in parts if part.strip())
        if name.strip() and words:
            out.setdefault(name.strip(), words)
    if not out:
        raise ValueError(f"{path}: no gene of column {named!r} has a text in {', '.join(texts)}")
    return out


def lsa(descriptions: Mapping[str, str], dim: int = 128, seed: int = 0) -> np.ndarray:
    """float32 [n, dim]: latent semantic analysis, the plain way: words and pairs of words weighted by how
    rare they are (tf-idf), and their leading singular vectors (Deerwester et al. 1990).

    Raises:
      ValueError: too few descriptions or words for so many dimensions.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    try:
        X = words.fit_transform(descriptions.values())
    except ValueError:
        raise ValueError(f"{len(descriptions):,} descriptions have no word in common") from None
    if dim >= min(X.shape):
        raise ValueError(
            f"{X.shape[0]:,} descriptions with {X.shape[1]:,} words in common have vectors of fewer than "
            f"{min(X.shape)} dimensions, not {dim}"
        )
    return normalised(TruncatedSVD(dim, random_state=seed).fit_transform(X))
