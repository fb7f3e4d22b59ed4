"""Labels of cells from labelled ones: by a probe of the frozen embedding, or by fine-tuning, with a rule that
leaves cells unassigned."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scjax.config import ConfigError
from scjax.finetune.calibration import Rule, unassigned_rule

UNASSIGNED = "unassigned"
HELD_OUT = 0.25  # of the reference, for the rule
METHODS = ("probe", "head", "lora", "all")
RATES = {"head": 2e-2, "lora": 5e-3, "all": 5e-4}  # a head alone has far to go from where it begins


def check(
    reference: Any,
    label_key: str,
    group_key: str | None,
    names: Any,
    max_error: float | None,
    certainty: float,
) -> None:
    """Raises ValueError where obs has no column of the groups (lists those it has), where cells that are left
    without a label could not be told from those of a label ``names`` holds, or for shares that are none."""
    if group_key is not None and group_key not in reference.obs:
        raise ValueError(
            f"the reference has no obs column {group_key!r}; there are {sorted(reference.obs.columns)}"
        )
    if max_error is None:
        return
    unassigned_rule(np.ones(0), np.ones(0, bool), max_error, certainty)
    if UNASSIGNED in names:
        raise ValueError(
            f"obs[{label_key!r}] of the reference has the label {UNASSIGNED!r}, which is what cells get that "
            f"max_error leaves without one: rename it, or give unlabelled={UNASSIGNED!r}"
        )


def context_of(
    model: Any, adata: Any, reference: Any, label_key: str, wanted: bool | Sequence[str]
) -> list[str]:
    """Names of the context tokens that query and reference, if there is one, are told: with ``wanted`` True
    those that both have, but for the label itself.

    Raises:
      KeyError, ValueError: as ``Model.context_in``; or the label is to be told.
    """
    told = model.context_in(adata, wanted)
    names = [*told["labels"], *told["values"]]
    if isinstance(wanted, bool):
        names = [name for name in names if name != label_key]
    if label_key in names:
        raise ValueError(f"context names {label_key!r}, which is what cells are to be annotated with")
    if reference is not None:
        if isinstance(wanted, bool):
            names = [name for name in names if name in reference.obs or name in reference.obsm]
        model.context_in(reference, names)
    return names


def labelled(reference: Any, label_key: str, unlabelled: str) -> tuple[np.ndarray, np.ndarray]:
    """``(names, known)`` [n_obs]: labels as text, and whether a cell has one that two cells or more have.

    Raises:
      ValueError: no such column (lists those there are), or fewer than two labels with 2 cells.
    """
    import pandas as pd

    if label_key not in reference.obs:
        raise ValueError(
            f"the reference has no obs column {label_key!r}; there are {sorted(reference.obs.columns)}"
        )
    labels = reference.obs[label_key]
    known = (labels.notna() & (labels.astype(str) != unlabelled)).to_numpy()
    names = labels.astype(str).to_numpy()
    counted = pd.Series(names[known]).value_counts()
    known = known & np.isin(names, counted.index[counted >= 2])
    if len(set(names[known])) < 2:
        raise ValueError(
            f"obs[{label_key!r}] of the reference holds fewer than two labels with 2 cells or more: "
            f"{counted.to_dict()}"
        )
    return names, known


def hold_out(reference: Any, known: np.ndarray, group_key: str | None, seed: int) -> np.ndarray:
    """bool [n_obs]: labelled cells that set the rule, a quarter of them; whole groups where there is a key.

    Raises:
      ValueError: fewer than two groups.
    """
    rng, rows = np.random.default_rng(seed), np.flatnonzero(known)
    held = np.zeros(len(known), bool)
    if group_key is None:
        held[rng.permutation(rows)[: max(round(HELD_OUT * len(rows)), 1)]] = True
        return held
    groups = reference.obs[group_key].astype(str).to_numpy()
    names = np.unique(groups[rows])
    if len(names) < 2:
        raise ValueError(f"obs[{group_key!r}] of the reference has one value: no group can be held out")
    for name in rng.permutation(names)[:-1]:
        held |= known & (groups == name)
        if held.sum() >= HELD_OUT * len(rows):
            break
    return held


def probe(reference: np.ndarray, names: np.ndarray) -> Any:
    """A logistic regression on a standardised embedding, its strength chosen by cross-validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = int(min(5, np.unique(names, return_counts=True)[1].min()))
    regression = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))
    strengths = {"logisticregression__C": [0.01, 0.1, 1.0]}
    if folds < 2:
        return regression.set_params(logisticregression__C=0.1).fit(reference, names)
    return GridSearchCV(regression, strengths, cv=folds, scoring="f1_macro").fit(reference, names)


def tune(
    model: Any,
    reference: Any,
    label_key: str,
    names: np.ndarray,
    method: str,
    group_key: str | None,
    context: Sequence[str] = (),
    **how: Any,
) -> Any:
    """A copy of ``model`` with a head for the labels of ``reference``, fine-tuned on it. Classes are drawn
    alike; a fifth of the cells, or of the groups, says when to stop. ``context`` names the tokens of the
    model that it is told, see :func:`context_of`."""
    import jax

    from scjax.corpus import build_corpus
    from scjax.corpus.obs import categorise
    from scjax.finetune.fit import FitConfig, fit
    from scjax.finetune.tasks import Task

    reference = reference.copy()
    reference.obs[label_key] = names
    split_by = group_key if group_key and reference.obs[group_key].nunique() > 1 else None
    n = reference.n_obs
    devices = jax.device_count()
    batch = max(min(32, n // 4) // devices, 1) * devices  # which they share evenly
    config = FitConfig(
        train=method,
        steps=int(np.clip(10 * n // batch, 100, 2000)),
        batch_size=batch,
        learning_rate=RATES[method],
        weights={label_key: 0.0},
        context=tuple(context),
        **how,
    )
    told = model.context_in(reference, context)
    studies = {"unknown": reference}
    if "dataset" in told["labels"]:  # in a corpus the name of a study
        codes, texts = categorise(reference.obs["dataset"])
        names_of = {code: texts[code] if code >= 0 else "unknown" for code in np.unique(codes)}
        studies = {name: reference[codes == code] for code, name in names_of.items()}
    columns = dict.fromkeys([label_key, *([split_by] if split_by else []), *told["labels"]])
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"validation": 0.2, "duplicates": "sum", "values": list(told["values"])}
        options["labels"] = [column for column in columns if column != "dataset"]
        corpus = build_corpus(
            list(studies.values()), Path(folder) / "corpus", names=list(studies), split_by=split_by,
            progress=False, workers=1, **options,
        )  # fmt: skip
        found = fit(model, corpus, {label_key: Task()}, config)
    found.pop("report")
    return dataclasses.replace(model, **found)


def set_rule(
    probability: np.ndarray, classes: np.ndarray, truth: np.ndarray, max_error: float, certainty: float
) -> Rule:
    """The rule of cells that were held out; a label that the classes lack is always wrong."""
    right = classes[probability.argmax(1)] == truth
    return unassigned_rule(probability.max(1), right, max_error, certainty)


def head_of(model: Any, label_key: str) -> str:
    """The task of a fine-tuned model that reads a label.

    Raises:
      ConfigError: the model has no heads, or none for this label; names those it has.
    """
    tasks = model.config.get("tasks", {}) if "base" in model.config else {}
    found = [
        name
        for name, task in tasks.items()
        if (task["source"] or name) == label_key and task["kind"] == "classes" and task["level"] == "cell"
    ]
    if not found:
        has = f"has heads for {sorted(tasks)}" if tasks else "has no heads"
        raise ConfigError(
            f"{model.path} {has}, and none for {label_key!r}: give a labelled reference, or a run of "
            "experiments/finetune.py with such a task"
        )
    return found[0]
