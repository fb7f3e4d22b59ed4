"""Does the embedding of a cell depend on that cell alone?

Published embedders have given other vectors for another batch size, another order of genes, another storage
format. Anything here that fails makes every other score a property of the call, not of the model.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scjax.eval import checks
from scjax.eval.doors import Embedder
from scjax.eval.environment import provenance
from scjax.eval.results import Results

Embed = Embedder | Callable[[ad.AnnData], Any]

TOLERANCE = {"repeat": 1e-5, "alone": 1e-3, "order": 1e-3, "genes": 1e-3, "zero genes": 1e-3, "storage": 1e-3}
"""Variation → how far a cell may move at most, in units of the spread of the cells."""
PRECISION = 0.05  # the same for another precision of arithmetic: bfloat16 keeps 8 bits
VARIATIONS = {
    "repeat": "the same call twice",
    "alone": "eight cells one by one",
    "order": "cells in another order",
    "genes": "genes in another order",
    "zero genes": "a hundred unknown genes added that no cell expresses",
    "storage": "dense, CSC and float64 matrices",
}
ALONE, ADDED = 8, 100
FAILURES = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)


def invariance(
    embed: Embed,
    adata: ad.AnnData,
    *,
    name: str = "model",
    precision: Mapping[str, Embed] | None = None,
    n_cells: int = 64,
    seed: int = 0,
    dataset: str = "",
) -> Results:
    """Embed the same cells in several ways and see how far they move.

    The deviation is the largest distance that a cell moves, divided by the spread of the cells (root mean
    square of their distance to their mean): at 1e-3, a cell has moved by a thousandth of what tells cells
    apart. Each variation has its tolerance (``TOLERANCE``: the same call twice 1e-5, all others 1e-3, another
    precision 0.05), and a gate fails where it is exceeded.

    Scored beside the embedder: an ``oracle`` that depends on the cell alone (log counts per 10,000, projected
    by the names of genes) and the control ``batch_centred``, the same minus the mean of the cells embedded
    with it, which is broken on purpose.

    Args:
        embed: an :class:`scjax.eval.Embedder`, or a function of an AnnData: float [n_obs, dimensions].
        adata: cells as the embedder wants them, at least 16. It is never changed.
        name: of the embedder in tables.
        precision: further versions of the embedder by name ("bfloat16"), compared with ``embed``.
        n_cells: cells that are drawn.
        seed: of that.

    Returns:
        Rows of the task "invariance": "deviation" for each variation (in ``setting``) and "excess", the
        largest deviation in units of its tolerance. What cannot be embedded at all in some variation is a
        finding too.

    Raises:
        ValueError: fewer than 16 cells, or an embedding that is not finite, constant or of a wrong shape.
    """
    started = time.perf_counter()
    if adata.n_obs < 16:
        raise ValueError(f"{adata.n_obs} cells; at least 16 are needed to see how far cells move")
    rows = np.sort(np.random.default_rng([seed, 8]).permutation(adata.n_obs)[:n_cells])
    cells = adata[rows].copy()
    results = Results()
    findings: list[list[str]] = []
    shown: list[tuple[str, str, Embed, Mapping[str, Embed]]] = [
        (name, "model", embed, precision or {}),
        ("batch_centred", "control", lambda a: (z := project(a)) - z.mean(0), {}),
        ("oracle", "oracle", project, {}),
    ]
    for label, kind, function, others in shown:
        about = {"task": "invariance", "model_id": label, "model_kind": kind, "dataset": dataset}
        excess: dict[str, float] = {}
        for setting, tolerance, found in _deviations(function, cells, others, seed, label):
            note = f"tolerance {tolerance:g}"
            if isinstance(found, str):
                results.skip(f"{note}; {found}", **about, metric="deviation", setting=setting)
                excess[setting] = np.inf
                text = f"cannot be embedded ({VARIATIONS.get(setting, setting)}): {found}"
            else:
                results.add(
                    [found], **about, metric="deviation", setting=setting, n_cells=len(cells), note=note
                )
                excess[setting] = found / tolerance
                text = (
                    f"a cell moves by {found:.2g} of the spread of the cells, more than {tolerance:g} "
                    f"({VARIATIONS.get(setting, setting)})"
                )
            if kind == "model" and excess[setting] > 1:
                findings.append(["fail", f"Invariance: with {label}, {text}."])
        worst = max(excess, key=lambda setting: excess[setting])
        score = [excess[worst]] if np.isfinite(excess[worst]) else [np.nan]
        results.add(score, **about, metric="excess", n_cells=len(cells), note=f"worst: {worst}")
    if not findings:
        tried = ", ".join([*TOLERANCE, *(precision or {})])
        findings.append(["pass", f"Invariance: {name} stays within tolerance in every variation ({tried})."])
    results.facts = provenance() | {
        "dataset": dataset,
        "n_cells_in": adata.n_obs,
        "n_cells": len(cells),
        "dropped": {},
        "tolerance": {**TOLERANCE, **dict.fromkeys(precision or {}, PRECISION)},
        "split_scheme": "the same cells, embedded in several ways",
        "findings": findings,
        "n_boot": 0,
        "seed": seed,
        "wall_s": {"all": round(time.perf_counter() - started, 2)},
    }
    return results


def project(adata: ad.AnnData, width: int = 32) -> np.ndarray:
    """log1p counts per 10,000, times a random vector for each gene that its name decides: [n_obs, width]."""
    counts = adata.X if adata.X is not None else next(iter(adata.layers.values()))
    X = sp.csr_matrix(counts, dtype=np.float64)
    total = np.asarray(X.sum(1)).ravel()
    X = sp.diags(1e4 / np.where(total > 0, total, 1)) @ X
    genes = [np.random.default_rng(zlib.crc32(g.encode())).normal(size=width) for g in adata.var_names]
    return np.asarray(X.log1p() @ np.array(genes))


def _deviations(
    embed: Embed, cells: ad.AnnData, others: Mapping[str, Embed], seed: int, name: str
) -> list[tuple[str, float, float | str]]:
    """(variation, its tolerance, deviation or why there is none)."""
    reference = _vectors(embed, cells, name)
    spread = float(np.sqrt(((reference - reference.mean(0)) ** 2).sum(1).mean()))
    rng = np.random.default_rng([seed, 9])
    shuffled, genes = rng.permutation(len(cells)), rng.permutation(cells.n_vars)

    def moved(found: np.ndarray, which: Any = slice(None)) -> float:
        if found.shape != reference[which].shape:
            raise ValueError(f"shape {found.shape} instead of {reference[which].shape}")
        return float(np.sqrt(((found - reference[which]) ** 2).sum(1).max())) / spread

    def alone() -> float:
        vectors = [_vectors(embed, cells[[i]].copy(), name) for i in range(ALONE)]
        return moved(np.concatenate(vectors), slice(ALONE))

    def storage() -> float:
        return max(moved(_vectors(embed, c, name)) for c in _stored_otherwise(cells))

    def other(function: Embed) -> Callable[[], float]:
        return lambda: moved(_vectors(function, cells, name))

    tried: dict[str, Callable[[], float]] = {
        "repeat": lambda: moved(_vectors(embed, cells.copy(), name)),
        "alone": alone,
        "order": lambda: moved(_vectors(embed, cells[shuffled].copy(), name), shuffled),
        "genes": lambda: moved(_vectors(embed, cells[:, genes].copy(), name)),
        "zero genes": lambda: moved(_vectors(embed, _with_zeros(cells), name)),
        "storage": storage,
    }
    tried |= {label: other(function) for label, function in others.items()}
    out: list[tuple[str, float, float | str]] = []
    for setting, function in tried.items():
        try:
            found: float | str = function()
        except FAILURES as error:
            found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        out.append((setting, TOLERANCE.get(setting, PRECISION), found))
    return out


def _vectors(embed: Embed, cells: ad.AnnData, name: str) -> np.ndarray:
    """The embedding as float64; refused where it is not finite (constant: where there are several cells)."""
    found = embed.embed(cells) if isinstance(embed, Embedder) else embed(cells)
    found = np.asarray(found)
    if len(cells) > 1:
        checks.matrix(found, name, len(cells), list(cells.obs_names), zero_rows=True)
    elif found.ndim != 2 or not np.isfinite(found).all():
        raise ValueError(f"embedding {name!r} of one cell has shape {found.shape} or holds NaN")
    return found.astype(np.float64)


def _stored_otherwise(cells: ad.AnnData) -> list[ad.AnnData]:
    """The same counts as a dense, a CSC and a float64 matrix; layers likewise."""
    changes: tuple[Callable[[Any], Any], ...] = (
        lambda X: X.toarray() if sp.issparse(X) else np.array(X),
        lambda X: sp.csc_matrix(X),
        lambda X: sp.csr_matrix(X, dtype=np.float64),
    )
    out = []
    for change in changes:
        other = cells.copy()
        if other.X is not None:
            other.X = change(other.X)
        for layer in list(other.layers):
            other.layers[layer] = change(other.layers[layer])
        out.append(other)
    return out


def _with_zeros(cells: ad.AnnData) -> ad.AnnData:
    """The cells with further genes, before and after the others, that none expresses."""
    names = pd.Index([f"NOT-A-GENE-{i}" for i in range(ADDED)])
    X = sp.csr_matrix((len(cells), ADDED), dtype=np.float32)
    zeros = ad.AnnData(X, obs=pd.DataFrame(index=cells.obs_names), var=pd.DataFrame(index=names))
    for layer in cells.layers:
        zeros.layers[layer] = X.copy()
    half = ADDED // 2
    out = ad.concat([zeros[:, :half], cells, zeros[:, half:]], axis="var", join="outer")
    out.obs = cells.obs.copy()
    out.raw = cells.raw
    return out
