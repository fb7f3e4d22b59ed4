"""Mapping cells onto a reference: labels, what cannot be ruled out, and where a label means little."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scjax.api import Model
from scjax.finetune.calibration import unassigned_rule
from scjax.reference.index import Reference
from scjax.reference.vectors import gene_overlap

if TYPE_CHECKING:
    import anndata

UNASSIGNED = "unassigned"
MIN_OWN = 100  # cells of a label that can tell what is far for it


def map_cells(
    adata: anndata.AnnData,
    reference: Reference | str | Path,
    *,
    model: Model | str | Path | None = None,
    batch: str | None = None,
    error: float = 0.05,
    outside: float = 0.01,
    key_added: str = "scjax",
    **options: Any,
) -> None:
    """Labels the cells of ``adata`` by the nearest cells of a reference, and says where that means little.

    In ``adata.obs``, for each label column of the reference ("cell_type", say):
      ``scjax_cell_type``: the label, or "unassigned" where the cell lies outside the reference or the label's
        share of the votes is below the threshold that keeps errors among labelled cells of the reference
        below ``error`` (:func:`scjax.finetune.calibration.unassigned_rule`, with a certainty of 90 %);
      ``scjax_cell_type_best``: the most voted label in any case; missing where no neighbour has a label;
      ``scjax_cell_type_confidence``: how often the reference's own cells with such a share of the votes had
        been given the right label (isotonic regression of correct on share);
      ``scjax_cell_type_entropy``: of the votes, 0 (one label) to 1 (all alike); NaN without any;
      ``scjax_cell_type_set``: the labels that cannot be ruled out, joined by " | ": for at most ``error`` of
        cells like those of the reference the right one is not among them (split conformal sets; Vovk et al.
        2005, with leave-one-out scores).
    And of the cell as a whole: ``scjax_distance``, the mean distance to its k neighbours over the median of
    that of the reference's own cells of its best label; ``scjax_typicality``, the share of those whose
    distance is as large (a p-value; of all own cells where the label has fewer than 100); ``scjax_outside``,
    typicality below ``outside``; ``scjax_nearest``, the nearest cell. ``adata.obsm["X_scjax"]`` holds the
    vectors that were searched with (see :meth:`Reference.nearest`), ``adata.uns["scjax"]["scjax_map"]`` the
    summary by ``batch`` and by label, gene overlap, and warnings, which are also given as such.
    Nothing is added if it fails.

    Args:
      adata: raw counts, or what has the obsm matrix that the reference was made of.
      reference: what :func:`build_reference` returned, or where it was saved.
      model: None for the run that the index names.
      batch: obs column to summarise by.
      error: of labels, see above. outside: share of the reference's own kind of cells that may be called
        outside by mistake.
      key_added: prefix of the new columns.
      **options: ``batch_size``, ``layer``, ``progress``, see :func:`scjax.embed`.

    Raises:
      ValueError, FileNotFoundError: no such reference, model or column; another model or space.
    """
    for name, rate in (("error", error), ("outside", outside)):
        if not 0 < rate < 1:
            raise ValueError(f"{name} = {rate} is a share: it must lie between 0 and 1")
    if batch is not None and batch not in adata.obs:
        raise ValueError(f"no obs column {batch!r}; there are {sorted(adata.obs.columns)}")
    reference = reference if isinstance(reference, Reference) else Reference.open(reference)
    model = reference.model(model)
    vectors = reference.embed(adata, model, **options)
    distance, cell = reference.search(vectors)
    first = reference.labels[0]
    ratio, typical = _typicality(reference, first, distance.mean(1), reference.votes(distance, cell, first))
    obs = pd.DataFrame(index=adata.obs_names)
    for label in reference.labels:
        share = reference.votes(distance, cell, label)
        for name, column in _transfer(reference, label, share, error, typical < outside).items():
            obs[f"{key_added}_{label}{name}"] = column
    obs[f"{key_added}_distance"], obs[f"{key_added}_typicality"] = ratio, typical
    obs[f"{key_added}_outside"] = typical < outside
    obs[f"{key_added}_nearest"] = reference.obs.index.to_numpy()[cell[:, 0]]

    genes = gene_overlap(model, adata, options.get("layer")) if model else {}
    names = adata.obs[batch].astype(str).to_numpy() if batch else np.full(adata.n_obs, "all cells")
    facts = obs[[f"{key_added}_{name}" for name in (first, f"{first}_best", f"{first}_confidence")]]
    facts = facts.set_axis(["label", "best", "confidence"], axis=1).assign(
        batch=names, distance=ratio, outside=typical < outside
    )
    by_batch, by_label = _summary(facts, "batch"), _summary(facts, "best")
    told = _warnings(reference, genes, by_batch, facts, outside)
    if copies := int((distance[:, 0] < 1e-4 * reference.own["distance"].median()).sum()):
        told.append(f"{copies:,} cells are copies of cells of the reference: their labels are no test")
    for name in obs:
        adata.obs[name] = obs[name]
    adata.obsm[f"X_{key_added}"] = vectors
    adata.uns.setdefault("scjax", {})[f"{key_added}_map"] = {
        "reference": str(reference.path or "in memory"),
        "genes": genes,
        "error": error,
        "outside": outside,
        "by_batch": by_batch,
        "by_label": by_label,
        "warnings": "\n".join(told),
    }
    for line in told:
        warnings.warn(line, stacklevel=2)


def _transfer(
    reference: Reference, label: str, share: np.ndarray, error: float, outside: np.ndarray
) -> dict[str, Any]:
    """The columns of one label by their ending, from the shares of votes [n, labels]."""
    names = reference.obs[label].cat.categories.to_numpy(object)
    best, top = share.argmax(1), share.max(1)
    members = _sets(reference.own[f"{label} true"], share, error)
    judged = reference.own[[f"{label} share", f"{label} correct"]].dropna().to_numpy(np.float64)
    rule = unassigned_rule(judged[:, 0], judged[:, 1] > 0, error)
    known = (top >= rule.threshold - 1e-6) & ~outside & (top > 0)
    plogp = share * np.log(np.where(share > 0, share, 1))
    given = np.where(known, names[best], UNASSIGNED)
    return {
        "": pd.Categorical(given, categories=[*names[names != UNASSIGNED], UNASSIGNED]),
        "_best": pd.Categorical.from_codes(np.where(top > 0, best, -1), categories=names),
        "_confidence": _confidence(judged, top),
        "_entropy": np.where(top > 0, np.abs(plogp.sum(1)) / np.log(len(names)), np.nan),
        "_set": [" | ".join(names[row]) for row in members],
    }


def _typicality(
    reference: Reference, label: str, distance: np.ndarray, share: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Distances over the median of those of the reference's own cells of the same label, and their p-values:
    the share of the own cells, the cell counted among them, that lie as far. A label with fewer than
    ``MIN_OWN`` cells is judged by all of them."""
    own, code = reference.own["distance"].to_numpy(np.float64), reference.obs[label].cat.codes.to_numpy()
    ratio, typical = np.ones(len(share)), np.ones(len(share))
    best = np.where(share.max(1) > 0, share.argmax(1), -2)  # without any vote: among all cells
    for b in np.unique(best):
        among = np.sort(own[(code == b) & np.isfinite(own)])
        if len(among) < MIN_OWN:
            among = np.sort(own[np.isfinite(own)])
        at = best == b
        larger = len(among) - np.searchsorted(among, distance[at], side="left")
        typical[at] = (1 + larger) / (1 + len(among))
        ratio[at] = distance[at] / max(np.median(among), 1e-12)
    return ratio, typical


def _sets(true_share: pd.Series, share: np.ndarray, error: float) -> np.ndarray:
    """bool [n, labels]: the most voted label, and those whose share a right label falls below in at most
    ``error`` of the reference's own cells; all of them where none has a vote."""
    scores = np.sort(1 - true_share.dropna().to_numpy(np.float64))
    rank = int(np.ceil((len(scores) + 1) * (1 - error)))
    limit = scores[rank - 1] if rank <= len(scores) else 1.0
    members = 1 - share <= limit + 1e-6  # shares are stored in single precision
    members[np.arange(len(share)), share.argmax(1)] = True
    members[share.max(1) == 0] = True
    return members


def _confidence(judged: np.ndarray, top: np.ndarray) -> np.ndarray:
    """How often a label with such a share of votes was right; ``judged`` [n, 2]: shares, and 1 for right."""
    from sklearn.isotonic import IsotonicRegression

    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(judged[:, 0], judged[:, 1])
    return np.where(top > 0, fitted.predict(top), 0.0).astype(np.float32)


def _summary(facts: pd.DataFrame, by: str) -> pd.DataFrame:
    """Cells, median distance ratio, shares outside and unassigned, and mean confidence by batch or label."""
    groups = facts.assign(unassigned=facts["label"] == UNASSIGNED).groupby(by, observed=True)
    table = groups[["outside", "unassigned", "confidence"]].mean()
    table.insert(0, "distance", groups["distance"].median())
    table.insert(0, "cells", groups.size())
    return table.set_axis(table.index.astype(str)).rename_axis(None)


def _warnings(
    reference: Reference, genes: dict[str, int], by_batch: pd.DataFrame, facts: pd.DataFrame, rate: float
) -> list[str]:
    told = []
    if genes and genes["matched"] < 0.5 * reference.card["genes"]["matched"]:
        told.append(
            f"the query has {genes['matched']:,} genes of the model, the reference "
            f"{reference.card['genes']['matched']:,}: distances are partly those of missing genes"
        )
    for name, row in by_batch.iterrows():
        if row["outside"] <= 3 * rate + 3 * np.sqrt(rate / row["cells"]):
            continue
        own = facts[facts["batch"] == name]
        most = own["best"][own["outside"]].value_counts(normalize=True).head(1)
        told.append(
            f"{name}: {row['outside']:.0%} of {row['cells']:,.0f} cells lie outside the reference, where "
            f"{rate:.0%} would be expected; {most.iloc[0]:.0%} of them are nearest to {most.index[0]}; the "
            f"other cells lie at {own['distance'][~own['outside']].median():.2f} times the reference's own "
            "distances (far above 1: a batch effect or missing genes; near 1: kinds of cells that the "
            "reference lacks)"
        )
    return told
