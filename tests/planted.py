"""Planted truth: cells of known types in representations of falling quality."""

from __future__ import annotations

import numpy as np

import scjax.eval

QUALITY = {"oracle": 0.05, "good": 0.9, "weak": 3.0}  # spread of cells around the centre of their type


def planted(n: int = 360, n_types: int = 4, n_groups: int = 3, seed: int = 0, **also: float):
    """Labels, groups, batches, and embeddings of falling quality; ``noise`` knows nothing."""
    rng = np.random.default_rng(seed)
    label, group, batch = (
        rng.integers(n_types, size=n),
        rng.integers(n_groups, size=n),
        rng.integers(2, size=n),
    )
    centre = np.eye(n_types, 12) * 3
    X = {name: centre[label] + spread * rng.normal(size=(n, 12)) for name, spread in (QUALITY | also).items()}
    X["noise"] = rng.normal(size=(n, 12))
    names = [
        np.array([f"{kind}{i}" for i in codes]) for kind, codes in (("t", label), ("g", group), ("b", batch))
    ]
    return X, *names


def score(results: scjax.eval.Results, metric: str, **fields: str) -> float:
    """The one value of a metric; of the main tasks, where no task is named."""
    rows = [r for r in results.rows if r["metric"] == metric and r["label"] == "" and not r["versus"]]
    rows = [r for r in rows if "task" in fields or "/" not in r["task"]]
    rows = [r for r in rows if all(r[k] == v for k, v in fields.items())]
    assert len(rows) == 1, rows
    return rows[0]["value"]
