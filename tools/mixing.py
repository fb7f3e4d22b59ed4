"""How well do batches mix a corpus, and how much is read for that?

    python tools/mixing.py CORPUS [CORPUS ...] [--batch-size 256 1024] [--weights '{"dataset": 0.5}']

Goes through the order of an epoch as the loader would with these settings, and reads no counts: only label
codes. For each label column it prints

  variance   the variance of the share of a category in a batch, over that of independent draws of the same
             cells (which is p (1 - p) / B), both summed over categories; 1 is as good as drawing at random,
             less is more even, and a corpus read in its order has B or so
  entropy    bits of the labels of a batch, mean over batches; beside it that of independent draws

and the over-read: cells decoded for each one that is used. Several corpora are looked at one after the other,
or, with --mixture, as one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
import rich.console
import rich.table

from scjax.corpus import Corpus, Mixture, open_corpus
from scjax.loader import Loader


def batches_of(loader: Loader, epoch: int, limit: int) -> np.ndarray:
    """int64 [steps, B]: the rows of the first full batches of an epoch."""
    order = loader.order
    steps = min(limit, order.n_draws // order.batch_size)
    lengths = None
    if order.group_lengths:
        corpus = loader.corpus
        nnz = np.concatenate([part.nnz_per_cell for part in corpus.parts])
        lengths = nnz.__getitem__
    lanes = [order.lane_rows(epoch, lane, lengths, max(steps, 1))[:steps] for lane in range(order.lanes)]
    return np.stack(lanes, axis=1).reshape(steps, order.batch_size)


def mixing(batches: np.ndarray, codes: np.ndarray, p: np.ndarray | None = None) -> dict[str, float]:
    """How the labels of batches vary.

    Args:
      batches: int64 [steps, B], rows.
      codes: int [cells], code of each row, -1 where unknown (a category of its own).
      p: float [categories + 1], the shares to expect, unknown first; by default those of the batches.
    """
    n_labels = int(codes.max()) + 2
    size = batches.shape[1]
    counts = np.stack([np.bincount(codes[rows] + 1, minlength=n_labels) for rows in batches])
    p = counts.sum(0) / counts.sum() if p is None else p
    even = (p * (1 - p)).sum() / size
    variance = ((counts / size - p) ** 2).mean(0).sum()
    drawn = np.random.default_rng(0).multinomial(size, p / p.sum(), len(batches))
    return {
        "variance": float(variance / even) if even else float("nan"),
        "entropy": float(_bits(counts).mean()),
        "entropy_of_draws": float(_bits(drawn).mean()),
    }


def _bits(counts: np.ndarray) -> np.ndarray:
    share = counts / counts.sum(1, keepdims=True)
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(1)


def look(corpus: Corpus | Mixture, options: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry for each batch size and column."""
    found = []
    parts = corpus.split(args.split)
    columns = args.columns or [c for c in ("corpus", "dataset", "donor", "cell_type") if c in corpus.columns]
    for batch_size in args.batch_size:
        began = time.perf_counter()
        loader = Loader(corpus, batch_size, labels=(), split=args.split, **options)
        batches = batches_of(loader, args.epoch, args.batches)
        seconds = time.perf_counter() - began
        order = loader.order
        about = {
            "corpus": str(corpus.path),
            "cells": order.n_rows,
            "draws": order.n_draws,
            "source order": not corpus.manifest.get("shuffled", True),
            "batch": batch_size,
            "lanes": order.lanes,
            "window": order.steps_per_window * order.rows_per_lane,
            "block": order.block,
            "weight_level": order.weights.level if order.weights else None,
            "over_read": round(loader.over_read, 2),
            "batches": len(batches),
            "seconds": round(seconds, 2),
        }
        if not len(batches):
            print(f"{corpus.path}: fewer cells than a batch of {batch_size}", file=sys.stderr)
            continue
        for column in columns:
            codes = np.concatenate([part.codes(column) for part in corpus.parts])
            p = None
            if order.weights is None:
                here = np.concatenate([part.codes(column) for part in parts])
                p = np.bincount(here + 1, minlength=int(codes.max()) + 2) / len(here)
            found.append(about | {"column": column} | mixing(batches, codes, p))
    return found


def show(found: list[dict[str, Any]]) -> rich.table.Table:
    table = rich.table.Table()
    names = ("cells", "source order", "batch", "lanes", "window", "block", "over-read", "label")
    for name in (*names, "variance / iid", "bits", "bits of iid"):
        table.add_column(name, justify="left" if name == "label" else "right")
    for line in found:
        table.add_row(
            f"{line['cells']:,}",
            "yes" if line["source order"] else "no",
            *(str(line[name]) for name in ("batch", "lanes", "window", "block")),
            f"{line['over_read']:.2f}",
            line["column"],
            *(f"{line[name]:.2f}" for name in ("variance", "entropy", "entropy_of_draws")),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("corpus", nargs="+", help="folder or URL; PATH@MANIFEST for an earlier state")
    parser.add_argument("--mixture", action="store_true", help="all corpora as one")
    parser.add_argument("--shares", type=json.loads, help="of a mixture, as JSON: name -> share")
    parser.add_argument("--split", default="train")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--lanes", type=int)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--block", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group-lengths", action="store_true")
    parser.add_argument("--weights", type=json.loads, help="as JSON, such as '{\"dataset\": 0.5}'")
    parser.add_argument("--weight-level", default="auto", choices=["auto", "row", "block"])
    parser.add_argument("--epoch-cells", type=int)
    parser.add_argument("--epoch", type=int, default=0)
    parser.add_argument(
        "--batches", type=int, default=2000, help="look at so many, from the first of the epoch"
    )
    parser.add_argument("--columns", nargs="+", help="labels to look at")
    parser.add_argument("--json", action="store_true", help="a line of JSON each in place of a table")
    args = parser.parse_args()

    names = ("lanes", "window", "block", "seed", "group_lengths", "weights", "weight_level", "epoch_cells")
    options = {name: getattr(args, name) for name in names}
    if args.mixture:
        corpora = [open_corpus(args.corpus, args.shares)]
    else:
        corpora = [open_corpus(path) for path in args.corpus]
    found = [line for corpus in corpora for line in look(corpus, options, args)]
    if args.json:
        for line in found:
            print(json.dumps(line))
    else:
        rich.console.Console(width=140 if not sys.stdout.isatty() else None).print(show(found))


if __name__ == "__main__":
    main()
