"""What is scored beside each other: the embeddings under test, their untrained twins, simple baselines,
controls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np

from scjax.eval import checks
from scjax.eval.baselines import Expression, find_counts
from scjax.eval.tables import RANDOM_INIT

SIMPLE = ("pca", "hvg", "depth_only")
"""Made from raw counts: principal components, highly variable genes, and a control, depth alone."""

RESERVED = (*SIMPLE, "noise", "majority", "oracle", "collapsed")

Features = np.ndarray | Callable[[np.ndarray], np.ndarray] | None
"""Features [cells, dimensions], or a function that fits itself on the rows named and returns them for all."""


@dataclass(frozen=True)
class Representation:
    """One line of the tables: fixed features, or a function that fits them on training rows; or why there
    are none.

    Rows are positions among the cells that are scored.
    """

    name: str
    kind: str
    features: Features
    key: str = ""  # in obsm, where the user gave it
    tasks: tuple[str, ...] = ()  # empty: all
    heads: tuple[str, ...] = ()  # empty: those of the task
    absent: str = ""

    def fitted(self, train: np.ndarray) -> np.ndarray:
        """Features of all cells, fitted on these rows where there is anything to fit."""
        assert self.features is not None
        return self.features(train) if callable(self.features) else self.features


def controls_of(
    embeddings: Sequence[str], controls: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Random-initialised twins by embedding, and the other obsm keys by name, from ``controls`` as users give
    them: {"random_init": key or {embedding: key}, name: key, …}.
    """
    twin = controls.get(RANDOM_INIT, {})
    twins = dict.fromkeys(embeddings, twin) if isinstance(twin, str) else dict(twin)
    if unknown := [e for e in twins if e not in embeddings]:
        raise KeyError(
            f"controls['random_init'] names {unknown[0]!r}, not one of the embeddings {list(embeddings)}"
        )
    further = {name: key for name, key in controls.items() if name != RANDOM_INIT}
    if clash := {*RESERVED, *embeddings} & set(further):
        raise ValueError(f"controls: the name {sorted(clash)[0]!r} is taken")
    return twins, further


def twin_names(twins: Mapping[str, str]) -> dict[str, str]:
    """What the twin of each embedding is called in the tables."""
    if len(set(twins.values())) <= 1:
        return dict.fromkeys(twins, RANDOM_INIT)
    return {model: f"{RANDOM_INIT} of {model}" for model in twins}


def obsm(adata: ad.AnnData, key: str) -> np.ndarray:
    """The embedding under this key, checked (see :func:`scjax.eval.checks.matrix`)."""
    if key not in adata.obsm:
        raise KeyError(f"obsm has no {key!r}; it holds: {', '.join(adata.obsm) or 'nothing'}")
    return checks.matrix(adata.obsm[key], key, adata.n_obs, list(adata.obs_names))


def gather(
    adata: ad.AnnData,
    rows: np.ndarray,
    embeddings: Sequence[str],
    controls: Mapping[str, Any] | None = None,
    counts: str | None = None,
    seed: int = 0,
) -> list[Representation]:
    """The representations of these rows that every task scores, models first.

    Args:
        rows: positions of the cells that will be scored.
        embeddings: obsm keys under test. controls: see :func:`controls_of`.
        counts: where raw counts are (see :func:`scjax.eval.baselines.find_counts`). Where none are found
            though none were named, the baselines made of them are there with the reason why they are absent.
    """
    if not len(embeddings):
        raise ValueError(f"no embeddings to evaluate; obsm holds: {', '.join(adata.obsm) or 'nothing'}")
    twins, further = controls_of(embeddings, controls or {})
    table = {k: obsm(adata, k) for k in dict.fromkeys([*embeddings, *twins.values(), *further.values()])}
    out = [Representation(key, "model", table[key][rows], key) for key in embeddings]
    named = {name: twins[model] for model, name in twin_names(twins).items()}
    out += [Representation(name, "control", table[key][rows], key) for name, key in named.items()]
    out += [Representation(name, "baseline", table[key][rows], key) for name, key in further.items()]
    made: dict[str, Features] = dict.fromkeys(SIMPLE)
    absent = ""
    try:
        X, genes = find_counts(adata, counts)
        expression = Expression(X[rows], genes, seed)
        made = {"pca": expression.pca, "hvg": expression.hvg, "depth_only": expression.depth}
    except (KeyError, ValueError) as error:
        if counts is not None:
            raise
        absent = f"{error.args[0]}; say where they are with counts="
    out += [
        Representation(name, "control" if name == "depth_only" else "baseline", X, absent=absent)
        for name, X in made.items()
    ]
    width = table[embeddings[0]].shape[1]
    noise = np.random.default_rng([seed, 2]).normal(size=(len(rows), width)).astype(np.float32)
    return [*out, Representation("noise", "control", noise)]
