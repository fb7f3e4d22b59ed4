"""Cheap probes during training: what can be read off the frozen embedding of some validation cells.

The loss says how well masked genes are filled in, not what the embedding is good for, and it can go on
falling while the embedding collapses. A probe costs one embedding of a few batches and some seconds of
scikit-learn. It draws no random numbers of the run and touches neither state nor data cursor, so that a run
with probes is to the bit the run without. ``scjax.eval`` has the full protocol; these curves are for seeing
that something goes wrong.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import jax
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from scjax.config import ConfigError
from scjax.corpus import Corpus, Mixture
from scjax.loader import Loader
from scjax.nn.module import Abstract, bind
from scjax.parallel import Layout, batch_sharding, place, replicated
from scjax.train.config import ValidationConfig
from scjax.train.state import State, judged_params, shardings_of
from scjax.types import CellBatch

BASELINES = {"masked_mse": "gene_mean_mse", "masked_ce": "frequency_ce"}  # error -> that of knowing nothing
N_CELLS, N_FOLDS, MIN_CELLS = 2000, 3, 10  # embedded; of groups; of a label
C, N_NEIGHBORS, MAX_ITER = 0.1, 15, 200


def masked_gap(means: Mapping[str, float], prefix: str = "validation") -> dict[str, float]:
    """``{"validation/masked_gap": g}``: by how much the masked error is below that of knowing nothing.

    Knowing nothing is to predict gene means or token frequencies. Empty where the model reports neither.
    """
    for metric, baseline in BASELINES.items():
        error, least = means.get(f"{prefix}/{metric}"), means.get(f"{prefix}/{baseline}")
        if error is not None and least is not None:
            return {f"{prefix}/masked_gap": least - error}
    return {}


def results(lines: list[dict[str, Any]], split: str = "validation") -> list[str]:
    """What a run came to, for people: the last value of every metric, and the masked error beside that of
    knowing nothing.

    Args:
      lines: of ``metrics.jsonl``, see :func:`scjax.train.read_metrics`.
      split: "validation", or "train" for a run without.
    """
    last: dict[str, float] = {}
    for line in lines:
        last.update({name: value for name, value in line.items() if value is not None})
    clock = ("step", "time/", "throughput/")
    told = ["  ".join(f"{name} {value:.4g}" for name, value in last.items() if not name.startswith(clock))]
    for metric, baseline in BASELINES.items():
        error, least = last.get(f"{split}/{metric}"), last.get(f"{split}/{baseline}")
        if error is not None and least:
            told.append(
                f"{split}: masked error {error:.4f} ({metric}), that of knowing nothing {least:.4f} "
                f"({baseline}); gap {least - error:+.4f} ({(least - error) / least:+.0%})"
            )
    return told


class Probe:
    """Scores the embedding of the first 2,000 validation cells (their order on disk is random).

    Attributes:
      about: one line for people: what is probed and how it is split.
    """

    def __init__(
        self,
        model: Abstract,
        abstract: State,
        corpus: Corpus | Mixture,
        loader: Loader,
        config: ValidationConfig,
        layout: Layout | None = None,
    ):
        """Args:
        model, abstract, layout: as for :func:`scjax.train.make_eval_step`.
        corpus: has the labels.
        loader: of the validation split, unshuffled, this process's share of each batch.
        config: names the label and group columns.

        Raises:
          ConfigError: a column that the corpus does not have (lists those it has).
        """
        self._mesh = abstract["step"].sharding.mesh
        self._loader = loader
        self._codes: dict[str, np.ndarray] = {}  # by row of the corpus
        for field, column in (("probe_label", config.probe_label), ("probe_group", config.probe_group)):
            if column not in corpus.columns:
                if column == ValidationConfig.__dataclass_fields__[field].default:
                    continue
                raise ConfigError(
                    f"validation.{field} is {column!r}; the corpus has {', '.join(corpus.columns)}"
                )
            self._codes[field] = np.concatenate([part.codes(column) for part in corpus.parts])
        if "probe_label" in self._codes:
            self.about = (
                f"probe: {config.probe_label} of up to {N_CELLS:,} validation cells, folds over "
                f"{config.probe_group} (over cells where it has one value)"
            )
        else:
            self.about = f"probe: the corpus has no column {config.probe_label!r}; effective rank only"

        def embed(state: State, batch: CellBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
            module = bind(model, judged_params(state), state["buffers"])
            module.eval()
            with (layout or Layout(self._mesh)).active():
                return module.embed(batch), batch.row, batch.weight

        shardings = shardings_of(abstract), batch_sharding(self._mesh)
        self._embed = jax.jit(embed, in_shardings=shardings, out_shardings=replicated(self._mesh))

    def __call__(self, state: State) -> dict[str, float]:
        """``probe/…`` of this state. Every process of a run calls it; what the first returns is written.

        ``probe/logistic_macro_f1``, ``probe/knn_macro_f1``: labels read off the embedding in groups that the
        probe has not seen, mean of the folds; left out where no label occurs in two groups.
        ``probe/effective_rank``: see :func:`effective_rank`.
        """
        n_batches = -(-N_CELLS // self._loader.batch_size)
        pieces = []
        with closing(iter(self._loader)) as batches:
            for batch in itertools.islice(batches, n_batches):
                pieces.append(self._embed(state, place(batch, self._mesh)))
        if jax.process_index() != 0:
            return {}
        cells, row, weight = (
            np.concatenate([np.asarray(p) for p in piece]) for piece in zip(*pieces, strict=True)
        )
        cells, row = cells[weight > 0][:N_CELLS].astype(np.float32), row[weight > 0][:N_CELLS]
        if not np.isfinite(cells).all():
            return {"probe/effective_rank": float("nan")}
        codes = {field: of[row] for field, of in self._codes.items()}
        with threadpool_limits(limits=1):  # small matrices: threads would only wait for each other
            scores = {"probe/effective_rank": effective_rank(cells)}
            if "probe_label" in codes:
                scores |= read_labels(cells, codes["probe_label"], codes.get("probe_group"))
        return scores


def effective_rank(cells: np.ndarray) -> float:
    """The number of directions that the embedding uses: exp of the entropy of its singular values as shares.

    Between 1 (collapsed onto one vector) and the width. Roy & Vetterli 2007; as a measure of embeddings
    Garrido et al. 2023 (RankMe).
    """
    singular = np.linalg.svd(np.asarray(cells, np.float64), compute_uv=False)
    share = singular / max(singular.sum(), np.finfo(float).tiny)
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def read_labels(cells: np.ndarray, label: np.ndarray, group: np.ndarray | None) -> dict[str, float]:
    """Macro-F1 over the labels of the test cells, of a logistic regression (C = 0.1, standardised) and of 15
    nearest neighbours (cosine); mean over the folds.

    Args:
      cells: float32 [n, D].
      label: int [n], -1 where unknown; labels of fewer than 10 cells are left out.
      group: int [n], or None: folds never cut through a group where there are two or more.
    """
    size = np.bincount(label[label >= 0], minlength=1)
    keep = (label >= 0) & (size[label] >= MIN_CELLS)
    if group is not None and len(np.unique(group[keep & (group >= 0)])) > 1:
        keep &= group >= 0
        group = group[keep]
    else:
        group = None
    cells, label = cells[keep], label[keep]
    if len(np.unique(label)) < 2:
        return {}
    if group is not None:
        folds = GroupKFold(min(N_FOLDS, len(np.unique(group)))).split(cells, label, group)
    else:
        folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=0).split(cells, label)
    scores = []
    for train, test in folds:
        known = np.unique(label[train])
        if len(known) < 2 or not np.isin(label[test], known).any():
            continue
        scaler = StandardScaler().fit(cells[train])
        regression = LogisticRegression(C=C, class_weight="balanced", max_iter=MAX_ITER)
        neighbours = KNeighborsClassifier(min(N_NEIGHBORS, len(train)), metric="cosine", weights="distance")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            regression.fit(scaler.transform(cells[train]), label[train])
        guesses = (
            regression.predict(scaler.transform(cells[test])),
            neighbours.fit(cells[train], label[train]).predict(cells[test]),
        )
        judged = np.unique(label[test])
        scores.append(
            [f1_score(label[test], g, labels=judged, average="macro", zero_division=0) for g in guesses]
        )
    if not scores:
        return {}
    logistic, knn = np.mean(scores, 0)
    return {"probe/logistic_macro_f1": float(logistic), "probe/knn_macro_f1": float(knn)}
