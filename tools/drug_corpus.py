"""Profiles and a table of responses -> a corpus of pairs of a sample and a drug.

    python tools/drug_corpus.py PROFILES.h5ad PAIRS.csv --sample-key line --fingerprints DRUGS.csv \\
        --out runs/drugs/corpus
    python tools/drug_corpus.py --out runs/drugs/corpus      (planted responses, for configs/drugs.py:smoke)

PAIRS.csv has the columns sample, drug and response (numbers, or names of classes); DRUGS.csv one row of
numbers a drug, its name first. Whole samples (or drugs, ``--unseen drug``) become validation pairs. Without
files the samples are 60 sums of 20 cells each of those that ship with the package, and responses are planted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

import scjax
from scjax.finetune.drugs import log_profiles, pair_cells, planted_pairs


def planted() -> tuple[ad.AnnData, pd.DataFrame, pd.DataFrame]:
    """Profiles, pairs, fingerprints."""
    cells, rng = scjax.datasets.pbmc(), np.random.default_rng(0)
    types = cells.obs["cell_type"].value_counts().index[:6]
    chosen = [rng.choice(np.flatnonzero(cells.obs["cell_type"] == t), 20) for t in types for _ in range(10)]
    counts = np.concatenate([np.asarray(cells.X[rows].sum(0)) for rows in chosen])
    names = [f"sample{i}" for i in range(len(chosen))]
    profiles = ad.AnnData(counts, obs=pd.DataFrame({"sample": names}, index=names), var=cells.var)
    return profiles, *planted_pairs(log_profiles(profiles, "sample"), 20, 16)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profiles", type=Path, nargs="?", help="h5ad of raw counts")
    parser.add_argument("pairs", type=Path, nargs="?", help="csv")
    parser.add_argument("--fingerprints", type=Path, help="csv")
    parser.add_argument("--sample-key", help="obs column of samples; the names of the rows if left out")
    parser.add_argument("--unseen", choices=("sample", "drug"), default="sample")
    parser.add_argument("--validation", type=float, default=0.2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.profiles and not args.pairs:
        parser.error("PAIRS.csv is missing: the responses of the profiles")
    if args.profiles:
        profiles, pairs = ad.read_h5ad(args.profiles), pd.read_csv(args.pairs)
        fingerprints = pd.read_csv(args.fingerprints, index_col=0) if args.fingerprints else None
    else:
        profiles, pairs, fingerprints = planted()
    cells = pair_cells(profiles, pairs, fingerprints, sample_key=args.sample_key)
    numbers = pd.api.types.is_numeric_dtype(cells.obs["response"])
    scjax.build_corpus(
        [cells],
        args.out,
        names=[args.profiles.stem if args.profiles else "planted"],
        labels=["sample", "drug", *([] if numbers else ["response"])],
        values=[*(["response"] if numbers else []), *cells.obsm],
        validation=args.validation,
        split_by=args.unseen,
    )


if __name__ == "__main__":
    main()
