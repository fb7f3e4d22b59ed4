"""What predictions of features per cell share: reading tables, aligning names, simple rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import sklearn

from scjax.eval import regression, stats
from scjax.eval.baselines import Expression
from scjax.eval.representations import twin_names
from scjax.eval.results import Results
from scjax.eval.schema import MEAN

Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Entry:
    """One line of the tables: how it predicts, or why it is absent."""

    kind: str
    predict: regression.Predictor | None
    key: str = ""  # in obsm
    absent: str = ""


def positions(wanted: Sequence[str], there: Sequence[Any], what: str, where: str) -> np.ndarray:
    """Positions of the wanted names, or a KeyError that counts and shows what is missing."""
    if not len(wanted):
        raise ValueError(f"no {what}s to predict were named")
    index = pd.Index([str(x) for x in there])
    if not index.is_unique:
        raise ValueError(f"{where} hold {what} {index[index.duplicated()][0]!r} twice; make names unique")
    found = index.get_indexer([str(w) for w in wanted])
    lost = [w for w, at in zip(wanted, found, strict=True) if at < 0]
    if lost:
        shown = ", ".join(map(str, lost[:5]))
        raise KeyError(
            f"{len(lost)} of {len(wanted)} {what}s are not among {where}: {shown}, …; there are for instance "
            f"{', '.join(index[:5])}: are both named alike (symbols, Ensembl ids)?"
        )
    return found


def table(
    given: pd.DataFrame | ad.AnnData,
    name: str,
    cells: Sequence[str],
    features: Sequence[str],
    truth: np.ndarray,
    scale: str,
) -> np.ndarray:
    """A prediction as float64[cells, features] in the order of the truth.

    Raises:
        KeyError: cells or features that it lacks. TypeError: neither a data frame nor an AnnData. ValueError:
            values that are not finite, or counts where the truth is on a log scale.
    """
    if isinstance(given, ad.AnnData):
        X = given.X.toarray() if sp.issparse(given.X) else np.asarray(given.X)
        given = pd.DataFrame(X, index=given.obs_names, columns=given.var_names)
    if not isinstance(given, pd.DataFrame):
        raise TypeError(
            f"prediction {name!r} is a {type(given).__name__}; a DataFrame or AnnData with names of cells "
            "and features is needed, so that they can be aligned"
        )
    rows = positions(list(cells), given.index, "cell", f"the rows of prediction {name!r}")
    columns = positions(list(features), given.columns, "feature", f"the columns of prediction {name!r}")
    X = given.to_numpy(np.float64)[np.ix_(rows, columns)]
    if bad := int((~np.isfinite(X)).any(1).sum()):
        raise ValueError(f"prediction {name!r}: {bad} of {len(X)} cells hold NaN or infinite values")
    whole = bool((X == np.rint(X)).all() and X.min() >= 0 and X.max() > 1)
    if whole and not (truth == np.rint(truth)).all():
        raise ValueError(f"prediction {name!r} looks like raw counts; {scale} is needed")
    if X.max() > 5 * max(float(truth.max()), 1):
        raise ValueError(
            f"prediction {name!r} reaches {X.max():.4g} where the truth ends at {truth.max():.4g}: another "
            f"scale; {scale} is needed"
        )
    return X


def given(predictions: Mapping[str, np.ndarray], twins: Mapping[str, str]) -> dict[str, Entry]:
    """Predictions as they are, whatever the fold."""
    return {
        name: Entry("control" if name in twins.values() else "model", regression.as_given(X))
        for name, X in predictions.items()
    }


def rivals(
    expression: Expression | str, truth: np.ndarray, group: np.ndarray | None, seed: int, mean: str
) -> dict[str, Entry]:
    """The baselines and controls that predict from the cell's own expression, or from nothing.

    ``expression``: of the cells, or why there is none. ``mean``: what to call the mean of the training cells.
    """
    out: dict[str, Entry] = {}
    if isinstance(expression, str):
        kinds = {"pca": "baseline", "neighbours": "baseline", "depth_only": "control"}
        out |= {name: Entry(kind, None, absent=expression) for name, kind in kinds.items()}
    else:
        kept: dict[bytes, np.ndarray] = {}

        def pca(train: np.ndarray) -> np.ndarray:
            fold = train.tobytes()
            if fold not in kept:
                kept[fold] = expression.pca(train)
            return kept[fold]

        out["pca"] = Entry("baseline", regression.by_ridge(pca, truth, group, seed))
        out["neighbours"] = Entry("baseline", regression.by_neighbours(pca, truth))
        out["depth_only"] = Entry("control", regression.by_ridge(expression.depth, truth, group, seed))
    out[mean] = Entry("control", regression.by_mean(truth))
    out["noise"] = Entry("control", regression.by_chance(truth, seed))
    return out


def named(ways: Mapping[str, Entry], twins: Mapping[str, str]) -> dict[str, Entry]:
    """The same with twins under the names that tables know them by."""
    known_as = shown(twins)
    return {known_as.get(name, name): way for name, way in ways.items()}


def shown(twins: Mapping[str, str]) -> dict[str, str]:
    """Name of each twin as it was given → "random_init" or "random_init of X"."""
    names = twin_names(twins)
    return {twin: names[model] for model, twin in twins.items()}


def check_twins(twins: Mapping[str, str], ways: Mapping[str, Entry]) -> None:
    """Both sides of every pair must be there."""
    for name in {*twins, *twins.values()}:
        if name not in ways:
            raise KeyError(f"twins names {name!r}, which is not among {', '.join(ways)}")


def spread_note(values: np.ndarray) -> str:
    """The quartiles over features in words."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "no feature varies"
    low, high = np.quantile(known, [0.25, 0.75])
    lost = f", {len(values) - len(known)} without variation left out" if len(known) < len(values) else ""
    return f"Pearson: quartiles over features {low:.3f} and {high:.3f}{lost}"


def listed(values: np.ndarray) -> list[float | None]:
    """Values for a panel, which JSON can hold."""
    return [round(float(v), 4) if np.isfinite(v) else None for v in values]


def implementation() -> str:
    return f"scjax.eval; scikit-learn=={sklearn.__version__}"


class Units:
    """Groups or cells and their resamples, the same for everything that is scored."""

    def __init__(self, group: np.ndarray | None, names: list[str], n: int, n_boot: int, seed: int, task: str):
        self.names = names
        self.parts = {"": np.arange(n)}
        if group is not None:
            self.parts = {name: np.flatnonzero(group == g) for g, name in enumerate(names)}
        self.cells = np.ones((1 + n_boot, n), np.uint8)
        for part, rows in self.parts.items():
            self.cells[:, rows] = stats.resample(len(rows), n_boot, seed, f"{task}/{part}")
        self.groups = None
        self.method = "percentile bootstrap over cells"
        if group is not None:
            self.method += f" of each group (fewer than {stats.FEW_GROUPS} groups)"
        if len(names) >= stats.FEW_GROUPS:
            self.groups = stats.resample(len(names), n_boot, seed, f"{task} groups")
            self.method = "percentile bootstrap over groups"

    def add(self, out: Results, score: Callable[[np.ndarray, np.ndarray], np.ndarray], **fields: Any) -> None:
        """Add the score of (cells, weights) of each group, and its mean where there are several."""
        values = {part: score(rows, self.cells[:, rows]) for part, rows in self.parts.items()}
        for part, value in values.items():
            method = "percentile bootstrap over cells" + (" of the group" if part else "")
            out.add(value, **fields, group=part, n_cells=len(self.parts[part]), ci_method=method)
        if len(values) > 1:
            known = np.array([v for v in values.values() if np.isfinite(v[0])])
            mean = np.array([np.nan])
            if len(known):
                mean = known.mean(0)
                if self.groups is not None and len(known) == len(values):
                    mean = stats.mean(known[:, 0], self.groups)
            out.add(mean, **fields, group=MEAN, n_cells=self.cells.shape[1], ci_method=self.method)

    def over_features(
        self,
        score: Callable[[dict[str, np.ndarray], np.ndarray], Scores],
        parts: dict[str, np.ndarray],
    ) -> Scores:
        """Median over features of scores per feature, under the resamples: {metric: float64[1 + n_boot]}.

        Medians of noisier values lie elsewhere; resamples of cells are moved to have the value as their mean.
        """
        if self.groups is None:
            found = score(parts, self.cells)
            return {metric: stats.centred(_median(values)) for metric, values in found.items()}
        one = np.ones((1, self.cells.shape[1]))
        single = [score({part: rows}, one) for part, rows in parts.items()]
        out = {}
        for metric in single[0]:
            of_group = np.array([s[metric][0] for s in single])
            known, w = np.isfinite(of_group), self.groups.astype(np.float64)
            drawn = w @ known
            out[metric] = _median(w @ np.where(known, of_group, 0) / np.where(drawn > 0, drawn, np.nan))
        return out


def _median(values: np.ndarray) -> np.ndarray:
    """Median over features that vary, per resample."""
    values = values[:, np.isfinite(values[0])]
    return np.nanmedian(values, axis=1) if values.shape[1] else np.full(len(values), np.nan)
