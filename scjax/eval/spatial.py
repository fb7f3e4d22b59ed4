"""Spatial mapping: does a representation of single cells or spots know where they come from?

Two questions of one data set: to which region does a cell belong (task "spatial/niche"), and which cells
surround it (task "spatial/composition")? Imputation of genes is in :mod:`scjax.eval.imputation`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from scjax.eval import checks, neighbourhoods, regression, space, stats
from scjax.eval.compare import finish
from scjax.eval.environment import one_thread
from scjax.eval.neighbourhoods import COORDINATES
from scjax.eval.probes import HEADS
from scjax.eval.progress import each
from scjax.eval.representations import Representation, controls_of, gather, twin_names
from scjax.eval.results import Results
from scjax.eval.space import Space, Weights
from scjax.eval.splits import Fold, split

NICHE = "spatial/niche"
PICTURED = 1500  # spots of a section drawn at most


@one_thread
def spatial(
    adata: ad.AnnData,
    embeddings: Sequence[str],
    *,
    region_key: str | None = None,
    label_key: str | None = None,
    section_key: str | None = None,
    group_key: str | None = None,
    coordinates: str = "spatial",
    controls: Mapping[str, str | Mapping[str, str]] | None = None,
    counts: str | None = None,
    heads: Sequence[str] = ("logistic", "knn"),
    n_neighbors: int = 15,
    min_class_size: int = 10,
    max_cells: int = 20_000,
    n_boot: int = 1000,
    seed: int = 0,
    dataset: str = "",
    pretrain_overlap: str = "unknown",
) -> Results:
    """Read regions and neighbourhoods off frozen representations of single cells or spots.

    The representation must be made of the cell itself: one that was made of its neighbours too holds the
    answer. Held out are groups, else sections from three on, else contiguous blocks of a section with a
    margin around them: neighbouring spots are near copies of each other.

    Beside the embeddings stand ``pca`` and ``hvg`` (own expression), ``cell_type_only`` (regions are often
    defined by cell types, and composition follows from the type), ``depth_only``, ``noise``, the ``majority``
    region or ``train_mean`` composition, ``coordinates`` (nearest training cells on the slide: what it scores
    under block splits comes from adjacency, under section splits from slides that lie alike) and an oracle.

    Args:
        adata: cells with coordinates and embeddings in obsm.
        embeddings: obsm keys to evaluate.
        region_key: obs column of regions or niches, for "spatial/niche".
        label_key: obs column of cell types, for "spatial/composition" (shares of the types among the
            ``n_neighbors`` nearest cells of the section, and how densely cells lie) and for cell_type_only.
        section_key: obs column of sections; coordinates of different sections are never compared. None: one.
        group_key: obs column of the unit to generalise to where it is larger than a section (donor).
        coordinates: obsm key [cells, 2 or 3].
        controls: further obsm keys by name, "random_init" the untrained twin, as in :func:`scjax.eval.run`.
        counts: where raw counts are, as in :func:`scjax.eval.run`.
        heads: probes for regions, as in :func:`scjax.eval.annotation`.
        min_class_size: regions and cell types with fewer cells are left out and counted.
        max_cells: larger data are sampled by block after neighbourhoods were computed on all cells.
        n_boot: resamples behind the 95 % intervals: of held-out units from ten on, else of contiguous blocks.

    Raises:
        KeyError, ValueError: keys that are absent, coordinates, labels or embeddings that cannot be used, a
            region that no two held-out units share. All before anything is computed.
    """
    started = time.perf_counter()
    embeddings = [embeddings] if isinstance(embeddings, str) else list(embeddings)
    if region_key is None and label_key is None:
        raise ValueError(
            "nothing to predict: give region_key (regions, niches) or label_key (cell types, for the "
            "composition of neighbourhoods)"
        )
    place = space.locate(adata, coordinates, section_key, group_key)
    labels = None if label_key is None else checks.column(adata.obs, label_key, "label")
    units = np.array(place.unit_names)[place.unit]
    found: dict[str, tuple[checks.Cells, list[Fold], str]] = {}

    def prepare(task: str, cells: checks.Cells, at: np.ndarray) -> None:
        cells = cells.take(at)
        found[task] = (cells, *_split(cells, place.take(cells.rows), seed))

    if region_key is not None:
        regions = checks.select(
            checks.column(adata.obs, region_key, "region"), units, min_class_size=min_class_size
        )
        prepare(NICHE, regions, _sampled(regions, place, max_cells, seed))
    if labels is not None:
        typed = checks.select(labels, units, min_class_size=min_class_size)
        at = _sampled(typed, place, max_cells, seed)
        lying = neighbourhoods.surroundings(place.take(typed.rows), typed, n_neighbors).take(at)
        prepare(neighbourhoods.TASK, typed, at)
    out = Results()
    for task, (cells, folds, scheme) in found.items():
        representations = gather(adata, cells.rows, embeddings, controls, counts, seed)
        job = (out, cells, place.take(cells.rows), folds, scheme, representations)
        if task == NICHE:
            _niche(*job, heads=heads, types=labels, seed=seed, n_boot=n_boot)
        else:
            neighbourhoods.score(*job, lying=lying, seed=seed, n_boot=n_boot)
    first, _, scheme = next(iter(found.values()))
    twins, _ = controls_of(embeddings, controls or {})
    return finish(
        out,
        twin_names(twins),
        started=started,
        dataset=dataset,
        pretrain_overlap=pretrain_overlap,
        n_cells_in=adata.n_obs,
        n_cells=len(first),
        dropped={f"{t}: {why}": n for t, (c, _, _) in found.items() for why, n in c.dropped.items()},
        region_key=region_key,
        label_key=label_key,
        section_key=section_key,
        group_key=group_key,
        sections=dict(zip(place.section_names, np.bincount(place.section).tolist(), strict=True)),
        blocks=int(place.block.max()) + 1,
        split_scheme=scheme,
        embeddings={k: list(np.shape(adata.obsm[k])) for k in embeddings},
        n_neighbors=n_neighbors,
        min_class_size=min_class_size,
        n_boot=n_boot,
        seed=seed,
    )


def _sampled(cells: checks.Cells, place: Space, n: int, seed: int) -> np.ndarray:
    """Positions, among these cells, of at most about n of them, each block in proportion."""
    return checks.stratified(place.block[cells.rows], n, seed)


def _split(cells: checks.Cells, place: Space, seed: int) -> tuple[list[Fold], str]:
    """Folds over held-out units, training cells beside held-out blocks left out, and the scheme in words."""
    folds, scheme = split(cells, seed)
    if place.held_out == "block":
        margin = f", training cells within {space.MARGIN:g} spacings of a held-out one left out"
        scheme = scheme.replace("group", "contiguous block") + margin
    else:
        scheme = scheme.replace("group", place.held_out)
    kept = [Fold(place.away_from(fold.train, fold.test), fold.test) for fold in folds]
    for fold in kept:
        if len(np.unique(cells.label[fold.train])) < 2:
            raise ValueError(
                "holding out blocks with a margin leaves fewer than two labels to train on: the section is "
                "too small; give several sections (section_key) or leave the task out"
            )
    return kept, scheme


def _niche(
    out: Results,
    cells: checks.Cells,
    place: Space,
    folds: Sequence[Fold],
    scheme: str,
    representations: list[Representation],
    *,
    heads: Sequence[str],
    types: Any,
    seed: int,
    n_boot: int,
) -> None:
    """Score every representation on the regions of these cells."""
    if types is not None:
        representations.append(neighbourhoods.cell_type_only(np.asarray(types, dtype=object)[cells.rows]))
    representations += [
        Representation("majority", "control", np.zeros((len(cells), 0), np.float32), heads=("majority",)),
        Representation(COORDINATES, "control", place.scaled, heads=("knn",)),
        Representation(
            "oracle", "oracle", neighbourhoods.jittered(np.eye(len(cells.label_names))[cells.label], seed)
        ),
    ]
    weights = space.resampled(place, n_boot, seed, NICHE)
    guesses: dict[str, np.ndarray] = {}
    for r in each(representations, "spatial/niche", name=lambda r: r.name):
        fields = neighbourhoods.fields(NICHE, r, scheme, place)
        if r.absent:
            out.skip(r.absent, **fields, metric="macro_f1")
            continue
        own = [h for h in heads if not r.heads or h in r.heads] or list(r.heads)
        proba, seen, notes = _read(r, cells, folds, own, seed)
        for head in own:
            guess = proba[head].argmax(1)
            guesses.setdefault(r.name, guess)
            note = notes[head]
            weights.add(out, _classified(cells, guess, seen, weights), **fields, head=head, note=note)
            _per_region(out, cells, guess, weights, fields | {"head": head})
    out.panels += _pictures(cells, place, guesses, [r.name for r in representations if r.kind == "model"])


def _read(
    r: Representation, cells: checks.Cells, folds: Sequence[Fold], heads: Sequence[str], seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, str]]:
    """Probabilities of each region for each held-out cell under each head, which regions its training fold
    knew, and notes.
    """
    shape = (len(cells), len(cells.label_names))
    proba = {head: np.zeros(shape) for head in heads}
    notes: dict[str, list[str]] = {head: [] for head in heads}
    seen = np.zeros(shape, bool)
    for fold in folds:
        Z = r.fitted(fold.train)
        present = np.unique(cells.label[fold.train])
        seen[np.ix_(fold.test, present)] = True
        for head in heads:
            if r.name == COORDINATES:
                k = min(regression.NEIGHBOURS, len(fold.train))
                model = KNeighborsClassifier(k).fit(Z[fold.train], cells.label[fold.train])
                found, note = model.predict_proba(Z[fold.test]), f"k={k}, distance on the slide"
            else:
                found, note = HEADS[head](Z, cells, fold, seed)
            proba[head][np.ix_(fold.test, present)] = found
            notes[head].append(note)
    return proba, seen, {head: "; ".join(dict.fromkeys(filter(None, n))) for head, n in notes.items()}


def _classified(
    cells: checks.Cells, guess: np.ndarray, seen: np.ndarray, weights: Weights
) -> dict[str, dict[str, np.ndarray]]:
    scores: dict[str, dict[str, np.ndarray]] = {}
    for part, rows in weights.parts.items():
        known = seen[rows].any(0)
        found = stats.classification(cells.label[rows], guess[rows], known, weights.cells[:, rows])
        # A rare region lies in few blocks; resamples without it average over fewer, easier regions.
        found |= {metric: stats.centred(found[metric]) for metric in ("macro_f1", "balanced_accuracy")}
        for metric in ("macro_f1", "balanced_accuracy", "accuracy", "out_of_set_rate"):
            scores.setdefault(metric, {})[part] = found[metric]
    return scores


def _per_region(
    out: Results, cells: checks.Cells, guess: np.ndarray, weights: Weights, fields: dict[str, Any]
) -> None:
    """F1 of each region and the confusion counts, in each section."""
    n = len(cells.label_names)
    for part, rows in weights.parts.items():
        table = np.zeros((n, n), np.int64)
        np.add.at(table, (cells.label[rows], guess[rows]), 1)
        for i in np.flatnonzero(table.sum(1)):
            f1 = 2 * table[i, i] / (table[i].sum() + table[:, i].sum())
            size = int(table[i].sum())
            out.add([f1], **fields, metric="f1", group=part, label=cells.label_names[i], n_cells=size)
        named = {k: fields[k] for k in ("task", "model_id", "model_kind", "head")}
        panel = {"panel": "confusion", "group": part, "labels": cells.label_names, "counts": table.tolist()}
        out.panels.append(panel | named)


def _pictures(
    cells: checks.Cells, place: Space, guesses: Mapping[str, np.ndarray], models: Sequence[str]
) -> list[dict[str, Any]]:
    """The regions of up to two sections, true and predicted."""
    size = np.bincount(place.section, minlength=len(place.section_names))
    drawn = [m for m in (*models, "pca", "cell_type_only") if m in guesses]
    panels = []
    for s in np.argsort(-size, kind="stable")[:2]:
        rows = np.flatnonzero(place.section == s)
        if not len(rows):
            continue
        rows = rows[checks.stratified(cells.label[rows], PICTURED, 0)]
        panels.append(
            {
                "panel": "sections",
                "section": place.section_names[s],
                "xy": np.round(place.xy[rows, :2], 2).tolist(),
                "truth": cells.label[rows].tolist(),
                "names": cells.label_names,
                "predicted": {m: guesses[m][rows].tolist() for m in drawn},
            }
        )
    return panels
