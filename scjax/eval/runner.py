"""The whole evaluation: every representation beside its controls, on the same cells, splits and resamples."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np

from scjax.eval import checks
from scjax.eval.annotation import annotation
from scjax.eval.baselines import find_counts
from scjax.eval.clustering import clustering, umap
from scjax.eval.compare import finish
from scjax.eval.diagnostics import diagnose
from scjax.eval.environment import missing, one_thread
from scjax.eval.few_shot import few_shot
from scjax.eval.integration import integration
from scjax.eval.ontology import Ontology, read_ontology
from scjax.eval.progress import each, shown
from scjax.eval.representations import Representation, controls_of, gather, twin_names
from scjax.eval.results import Results
from scjax.eval.tasks import TASKS
from scjax.eval.unseen import unseen

CELL_TASKS = (
    "annotation",
    "annotation/few-shot",
    "annotation/unseen",
    "clustering",
    "integration",
    "diagnostics",
)


@one_thread
def run(
    adata: ad.AnnData,
    embeddings: Sequence[str],
    tasks: Sequence[str] | None = None,
    *,
    label_key: str = "cell_type",
    batch_key: str | None = None,
    group_key: str | None = None,
    controls: Mapping[str, str | Mapping[str, str]] | None = None,
    counts: str | None = None,
    min_class_size: int = 10,
    max_cells: int = 20_000,
    graph_cells: int = 3_000,
    n_boot: int = 1000,
    seed: int = 0,
    dataset: str = "",
    pretrain_overlap: str = "unknown",
    ontology: Ontology | str | os.PathLike[str] | None = None,
    kbet: bool = False,
    maps: bool = True,
    progress: bool = False,
) -> Results:
    """Evaluate embeddings that lie in ``adata.obsm``, whoever made them, against the controls that they must
    beat.

    Beside the embeddings the runner always scores ``pca`` (50 components of log1p counts-per-10,000 of 2,000
    variable genes), ``hvg`` (those genes), ``depth_only`` (log counts, log genes, mitochondrial share),
    ``noise``, the ``majority`` class, and for integration ``oracle`` and ``collapsed``. Baselines for
    annotation are fitted on the training cells of each fold.

    Args:
        adata: cells with embeddings in obsm and labels in obs.
        embeddings: obsm keys to evaluate.
        tasks: of "annotation", "annotation/few-shot", "annotation/unseen", "clustering", "integration",
            "diagnostics"; None: all that the keys and labels given allow.
        label_key: obs column with the labels. Missing values and words such as "unknown" count as no label.
        batch_key: obs column with the batches to be integrated.
        group_key: obs column with the unit to generalise to (donor, study): annotation never trains and
            tests on cells of one group. Without it, cells are split, and every table says so.
        controls: further obsm keys by name. "random_init" is the same architecture before training, the twin
            of all embeddings (a key) or of each (a mapping from embedding to key). Any other name is a
            further baseline.
        counts: where raw counts are: a layer, "X" or "raw". None: X, layer "counts" or raw, whichever holds
            integers; without counts those baselines are marked as skipped.
        min_class_size: labels with fewer cells are left out and counted.
        max_cells: larger data are sampled by label and group; graph_cells: the same for clustering,
        integration and maps.
        n_boot: bootstrap resamples; with 0 there are neither intervals nor paired differences.
        dataset: what the data are to be called.
        pretrain_overlap: whether pretraining saw these cells: "none", "cell", "study" or "unknown".
        ontology: an OBO file or a table of pairs child, parent, to tell near misses of annotation from gross
            ones (see :func:`scjax.eval.annotation`).
        kbet: also kBET (slow; needs scib-metrics).
        maps: also UMAP coordinates for the report.
        progress: show what is being computed.

    Raises:
        KeyError: a key that adata does not have (those it has are listed). ValueError: input that would give
            a plausible but meaningless number. Both before anything is computed.
    """
    started = time.perf_counter()
    all_tasks = tasks is None
    tasks = _tasks(tasks, batch_key)
    embeddings = [embeddings] if isinstance(embeddings, str) else list(embeddings)
    twins, _ = controls_of(embeddings, controls or {})
    labels = checks.column(adata.obs, label_key, "label")
    groups = None if group_key is None else checks.column(adata.obs, group_key, "group")
    batch = None if batch_key is None else checks.column(adata.obs, batch_key, "batch")
    cells = checks.select(labels, groups, batch, min_class_size)
    if all_tasks and len(cells.label_names) < 3:
        tasks.remove("annotation/unseen")  # one label held out would leave nothing to tell apart
    if "integration" in tasks:
        checks.require_shared_labels(cells)
    n_labelled = len(cells)
    strata = cells.label if cells.group is None else cells.label * len(cells.group_names) + cells.group
    cells = cells.take(checks.stratified(strata, max_cells, seed))
    representations = gather(adata, cells.rows, embeddings, controls, counts, seed)
    representations += _controls(cells, representations[0], tasks, seed)

    depth = None
    if any(r.name == "depth_only" and not r.absent for r in representations):
        depth = np.asarray(find_counts(adata, counts)[0][cells.rows].sum(1), np.float64).ravel()

    tree = None if ontology is None else read_ontology(ontology)
    shared: dict[str, Any] = {"min_class_size": min_class_size, "seed": seed, "n_boot": n_boot}
    names = np.array(cells.label_names)[cells.label]
    group_of = None if cells.group is None else np.array(cells.group_names)[cells.group]
    batch_of = None if cells.batch is None else np.array(cells.batch_names)[cells.batch]
    everything = np.arange(len(cells))
    fixed: dict[str, np.ndarray] = {}  # features fitted on all cells, made once

    def features(r: Representation) -> np.ndarray:
        if r.name not in fixed:
            fixed[r.name] = r.fitted(everything)
        return fixed[r.name]

    def score(task: str, r: Representation) -> Results:
        about: dict[str, Any] = {**shared, "name": r.name, "kind": r.kind, "embedding_key": r.key}
        if r.absent:
            raise ValueError(r.absent)
        if task == "annotation":
            about |= {"heads": r.heads} if r.heads else {}
            return annotation(r.features, names, group_of, ontology=tree, **about)
        if task in ("annotation/few-shot", "annotation/unseen"):
            return (few_shot if task.endswith("few-shot") else unseen)(r.features, names, group_of, **about)
        if task == "clustering":
            return clustering(features(r), names, max_cells=graph_cells, **about)
        if task == "diagnostics":
            del about["min_class_size"]
            return diagnose(features(r), depth, group_of, **about)
        pca = next((p for p in representations if p.name == "pca" and not p.absent), None)
        return integration(
            features(r),
            names,
            batch_of,
            pre=None if pca is None else features(pca),
            kbet=kbet,
            max_cells=graph_cells,
            **about,
        )

    jobs = [(task, r) for task in tasks for r in representations if not r.tasks or task in r.tasks]
    named = twin_names(twins)
    drawn = ("pca", *named.values())
    pictures = [r for r in representations if maps and (r.kind == "model" or r.name in drawn)]
    results = Results()
    wall: dict[str, float] = {}
    with shown(progress):
        for task, r in each(jobs, "evaluating", name=lambda job: f"{job[0]}, {job[1].name}"):
            begun = time.perf_counter()
            try:
                scored = score(task, r)
                results.extend(scored)
                results.facts |= scored.facts
            except ValueError as error:
                if r.key:  # what the user gave is refused; a control that cannot be made is skipped
                    raise
                metric = TASKS[task].headline[0]
                results.skip(str(error), task=task, metric=metric, model_id=r.name, model_kind=r.kind)
            wall[task] = round(wall.get(task, 0) + time.perf_counter() - begun, 2)
        if pictures:
            begun = time.perf_counter()
            results.panels += _maps(
                pictures, features, cells, label_key, batch_key or group_key, graph_cells, seed
            )
            wall["maps"] = round(time.perf_counter() - begun, 2)
    return finish(
        results,
        named,
        started=started,
        dataset=dataset,
        pretrain_overlap=pretrain_overlap,
        wall=wall,
        n_cells_in=adata.n_obs,
        n_cells_labelled=n_labelled,
        n_cells=len(cells),
        dropped=cells.dropped,
        label_key=label_key,
        labels=_sizes(cells.label, cells.label_names),
        group_key=group_key,
        groups=_sizes(cells.group, cells.group_names),
        n_groups=len(cells.group_names),
        batch_key=batch_key,
        batches=_sizes(cells.batch, cells.batch_names),
        tasks=tasks,
        embeddings={r.key: list(features(r).shape) for r in representations if r.key},
        min_class_size=min_class_size,
        graph_cells=graph_cells,
        n_boot=n_boot,
        seed=seed,
    )


def _tasks(tasks: Sequence[str] | None, batch_key: str | None) -> list[str]:
    if tasks is None:
        return [t for t in CELL_TASKS if t != "integration" or batch_key is not None]
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    if unknown := [t for t in tasks if t not in CELL_TASKS]:
        raise ValueError(f"unknown task {unknown[0]!r}; there are: {', '.join(CELL_TASKS)}")
    if "integration" in tasks and batch_key is None:
        raise ValueError("the task 'integration' needs batch_key")
    return [t for t in CELL_TASKS if t in tasks]


def _controls(
    cells: checks.Cells, like: Representation, tasks: Sequence[str], seed: int
) -> list[Representation]:
    """Controls that single tasks have beside those of all."""
    rng = np.random.default_rng([seed, 3])
    out = []
    if "annotation" in tasks:
        out.append(Representation("majority", "control", None, tasks=("annotation",), heads=("majority",)))
    whole = tuple(t for t in ("integration", "diagnostics") if t in tasks)
    if whole:
        jitter = rng.normal(size=like.fitted(np.arange(len(cells))).shape).astype(np.float32)
        out.append(Representation("collapsed", "control", 1 + 1e-3 * jitter, tasks=whole))
    if "integration" in tasks:
        truth = np.eye(len(cells.label_names), dtype=np.float32)[cells.label]
        oracle = truth + 0.01 * rng.normal(size=truth.shape).astype(np.float32)
        out.append(Representation("oracle", "oracle", oracle, tasks=("integration",)))
    return out


def _maps(
    pictures: Sequence[Representation],
    features: Callable[[Representation], np.ndarray],
    cells: checks.Cells,
    label_key: str,
    side_key: str | None,
    n_cells: int,
    seed: int,
) -> list[dict[str, Any]]:
    """UMAP panels of a stratified sample of the cells, with the codes to colour them by."""
    if reason := missing("scanpy", "igraph", "umap"):
        return [{"panel": "map", "status": "skipped", "note": reason}]
    side, side_names = (
        (cells.batch, cells.batch_names) if cells.batch is not None else (cells.group, cells.group_names)
    )
    strata = cells.label if side is None else cells.label * len(side_names) + side
    at = checks.stratified(strata, n_cells, seed)
    colours = {"label": {"key": label_key, "names": cells.label_names, "codes": cells.label[at].tolist()}}
    if side is not None and side_key is not None:
        colours["batch"] = {"key": side_key, "names": side_names, "codes": side[at].tolist()}
    panels: list[dict[str, Any]] = [{"panel": "colours", **colours}]
    for r in each(pictures, "map", name=lambda r: r.name):
        if not r.absent:
            xy = umap(features(r)[at], seed)
            panels.append(
                {"panel": "map", "model_id": r.name, "status": "ok", "xy": np.round(xy, 2).tolist()}
            )
    return panels


def _sizes(codes: np.ndarray | None, names: Sequence[str]) -> dict[str, int]:
    return (
        {}
        if codes is None
        else {n: int(c) for n, c in zip(names, np.bincount(codes, minlength=len(names)), strict=True)}
    )
