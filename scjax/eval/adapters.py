"""Ways out to other benchmarks: score files of Open Problems, a task for cz-benchmarks.

Neither package is imported here; a score file needs none, and the task is made when it is asked for.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

from scjax.eval.annotation import annotation
from scjax.eval.environment import missing
from scjax.eval.results import Results
from scjax.eval.schema import MEAN


def overall(results: Results, model_id: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, row) of every overall score of a model: not of single groups or labels, not differences.

    The name joins what tells the scores of a model apart: "annotation_logistic_macro_f1".
    """
    for row in results.rows:
        single = row["group"] not in ("", MEAN) or row["label"] or row["versus"]
        if row["model_id"] == model_id and row["status"] == "ok" and not single:
            parts = (row["task"], row["track"], row["head"], row["setting"], row["metric"])
            yield re.sub(r"[^A-Za-z0-9]+", "_", "_".join(p for p in parts if p)).strip("_"), row


def to_openproblems(
    results: Results,
    directory: str | os.PathLike[str],
    *,
    dataset_id: str,
    normalization_id: str = "counts",
) -> list[Path]:
    """Write one score file for every row of the tables, as Open Problems components exchange them.

    A file is an AnnData without cells whose ``uns`` holds ``dataset_id``, ``normalization_id``,
    ``method_id``, ``metric_ids`` and ``metric_values`` (two lists of one length). Format: the specification
    of ``score.h5ad`` in the openproblems-bio task repositories (``file_score.yaml``).

    Args:
        results: of any task.
        directory: made if it is not there; a file is named after its method.
        dataset_id, normalization_id: as Open Problems names the data set and its normalisation.

    Raises:
        ValueError: there is nothing to write.
    """
    methods = list(dict.fromkeys(row["model_id"] for row in results.rows))
    written = []
    for method in methods:
        scores = dict(overall(results, method))
        if not scores:
            continue
        file = ad.AnnData(
            uns={
                "dataset_id": dataset_id,
                "normalization_id": normalization_id,
                "method_id": method,
                "metric_ids": np.array(list(scores), dtype=object),
                "metric_values": np.array([row["value"] for row in scores.values()], float),
            }
        )
        name = re.sub(r"[^A-Za-z0-9.-]+", "_", method)
        path = Path(directory) / f"{name}.score.h5ad"
        path.parent.mkdir(parents=True, exist_ok=True)
        file.write_h5ad(path)
        written.append(path)
    if not written:
        raise ValueError("these results hold no overall score that could be written")
    return written


@functools.cache
def czbenchmarks_task() -> type:
    """A task class for cz-benchmarks: annotation by frozen probes, split over groups, nested selection.

    Its input has ``labels`` and ``groups`` (one per cell; groups may be None, cells are then split); its
    metrics are the mean-fold accuracy and macro-F1 of each probe. Making the class registers it there::

        Task = czbenchmarks_task()
        metrics = Task(random_seed=0).run(embedding, Task.input_model(labels=labels, groups=donors))

    Raises:
        ImportError: cz-benchmarks is not installed.
    """
    if absent := missing("czbenchmarks.tasks"):
        raise ImportError(f"a task for cz-benchmarks needs that package; {absent.split('; pip')[0]}")
    from czbenchmarks.metrics.types import MetricResult, MetricType
    from czbenchmarks.tasks.task import PCABaselineInput, Task, TaskInput, TaskOutput
    from pydantic import Field, create_model

    kinds = {"macro_f1": MetricType.MEAN_FOLD_F1_SCORE, "accuracy": MetricType.MEAN_FOLD_ACCURACY}
    labels = Field(description="The label of each cell.")
    groups = Field(default=None, description="The donor or study of each cell; splits never cut through one.")
    Input = create_model("Input", __base__=TaskInput, labels=(Any, labels), groups=(Any, groups))
    Output = create_model("Output", __base__=TaskOutput, results=(Any, ...))

    class GroupSplitAnnotation(Task):
        """Labels read off a frozen embedding in groups that the probe has not seen."""

        display_name = "scjax annotation"
        input_model = Input
        baseline_model = PCABaselineInput

        def _run_task(self, cell_representation: Any, task_input: Any) -> Any:
            if hasattr(cell_representation, "toarray"):
                cell_representation = cell_representation.toarray()
            scored = annotation(
                np.asarray(cell_representation),
                task_input.labels,
                task_input.groups,
                name="embedding",
                kind="model",
                seed=self.random_seed,
                n_boot=0,
            )
            return Output(results=scored)

        def _compute_metrics(self, task_input: Any, task_output: Any) -> list[Any]:
            return [
                MetricResult(
                    metric_type=kinds[row["metric"]],
                    value=row["value"],
                    params={"head": row["head"], "split": row["split_scheme"]},
                )
                for _, row in overall(task_output.results, "embedding")
                if row["metric"] in kinds
            ]

    return GroupSplitAnnotation
