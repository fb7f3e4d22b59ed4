"""Drug response: profiles of samples (cell lines, tumours), and drugs, to what drugs do (IC50, AUC, class).

A row of the data is a pair, the profile of a sample and a drug: :func:`pair_cells` makes them from a table of
responses, as cells of which a corpus is built. The drug is a value (a fingerprint, by a small network) or a
label (a learned vector), and stands beside the embedding of the profile, so that every base can be used,
frozen too; so did scFoundation (Hao et al., Nature Methods 2024) in DeepCDR (Liu et al., 2020).
Most of a table of responses is which drug it is: :func:`baselines` says what that alone explains, and
:func:`split_pairs` holds out samples, drugs, or both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import anndata as ad
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx
from jax import Array
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.model_selection import GroupKFold

from scjax.config import ConfigError, nearest
from scjax.finetune.model import Finetuned, FinetunedConfig
from scjax.finetune.tasks import Head
from scjax.nn.context import Context, ContextToken
from scjax.nn.layers import MLP, linear
from scjax.types import CellBatch

Unseen = Literal["sample", "drug", "both"]
KINDS = ("label", "value")
COMPONENTS = 10  # of profiles, in the baselines
PENALTIES = 10.0 ** np.arange(-1, 6)


# ------------------------------------------------------------------------------------------- model
@dataclasses.dataclass(frozen=True)
class DrugResponseConfig(FinetunedConfig):
    """A base, tasks on pairs, and what is told of the drug.

    Attributes:
      drug: name -> :class:`scjax.nn.context.ContextToken` of kind "label" (a learned vector for each drug) or
        "value" (fingerprint, dose, by a network), read from the label or value of that name.
      width: E, of the vector of each.
    """

    drug: dict[str, ContextToken] = dataclasses.field(default_factory=dict, hash=False)
    width: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.drug:
            raise ConfigError(
                'model.drug is empty: name the label ("drug") or value that says which drug it is'
            )
        for name, token in self.drug.items():
            if token.kind not in KINDS:
                raise ConfigError(f"model.drug.{name}.kind is {token.kind!r}; a drug is one of {KINDS}")


class DrugResponse(Finetuned):
    """Heads on a profile's embedding and the drug beside it.

    Args:
      config: see :class:`DrugResponseConfig`.
      n_genes: size of the vocabulary.
    """

    def __init__(self, config: DrugResponseConfig, n_genes: int, *, rngs: nnx.Rngs):
        self.n_told = config.width * len(config.drug)
        self.drug = Context(config.drug, config.width, rngs=rngs)
        super().__init__(config, n_genes, rngs=rngs)

    def _head(self, name: str, rngs: nnx.Rngs) -> Head:
        head = super()._head(name, rngs)
        if head.task.level == "cell":
            layers: Any = Pair(len(head.centre[...]), self.n_told, head.task, rngs=rngs)
            head.layers = layers
        return head

    def told(self, batch: CellBatch, *, required: bool = False) -> Array:
        """float32 [B, n x width]: vectors of what is told of the drug; zero where it is unknown.

        Raises:
          ValueError: ``required``, and the batch has no such label or value at all.
        """
        given, n = self.drug.read(batch, required=required), len(batch.row)
        x, there = jnp.zeros((n, 0, self.n_told // len(self.drug.tokens))), jnp.zeros((n, 0), bool)
        parts = [self.drug.beside(x, there, {name: given[name]}, lambda ids: ids)[0] if name in given
                 else jnp.zeros((n, 1, x.shape[-1])) for name, _ in self.drug.tokens]  # fmt: skip
        return jnp.concatenate(parts, axis=1).reshape(n, -1)

    def features(self, batch: CellBatch, keys: Array | None = None) -> Array:
        """float32 [B, D + n x width]: the embedding of the profile, and the drug."""
        return jnp.concatenate([super().features(batch, keys).astype(jnp.float32), self.told(batch)], axis=-1)

    def outputs(self, batch: CellBatch, keys: Array | None = None) -> tuple[dict[str, Array], Array | None]:
        """See :class:`Finetuned`.

        Raises:
          ValueError: the batch does not say which drugs they are.
        """
        self.drug.read(batch, required=True)
        return super().outputs(batch, keys)


class Pair(nnx.Module):
    """Dense layers of [profile, drug] and the product of the two, through which a drug may act on what tells
    samples apart.

    Args:
      n_in: length of profile and drug together. n_told: that of the drug.
    """

    def __init__(self, n_in: int, n_told: int, task: Any, *, rngs: nnx.Rngs):
        self.n_told = n_told
        self.project = linear(n_in - n_told, n_told, ("embed", None), rngs=rngs)
        self.layers = MLP((n_in + n_told, *task.hidden, task.size), activation="gelu", rngs=rngs)

    def __call__(self, x: Array) -> Array:
        profile, drug = x[..., : -self.n_told], x[..., -self.n_told :]
        return self.layers(jnp.concatenate([x, self.project(profile) * drug], axis=-1))


# ------------------------------------------------------------------------------------------- data
def pair_cells(
    profiles: ad.AnnData,
    pairs: pd.DataFrame,
    fingerprints: pd.DataFrame | None = None,
    *,
    sample_key: str | None = None,
) -> ad.AnnData:
    """A cell for each pair: the counts of the sample, which drug, and the response.

    Args:
      profiles: raw counts. Several rows may be of one sample (single cells of a line): each is paired.
      pairs: columns "sample", "drug", "response"; the response numbers (IC50, AUC) or names of classes.
      fingerprints: one row of numbers for each drug, by name.
      sample_key: obs column of ``profiles`` with the names of samples; None for the names of the rows.

    Returns:
      obs "sample", "drug", "response", and obsm "fingerprint" float32 [n, bits] where they are given; in the
      order of ``pairs``.

    Raises:
      ValueError: columns that are missing, pairs that are there twice, a sample, drug or response that is
        missing, a response that is not finite, samples without a profile, drugs without a fingerprint; names
        the first and how many.
    """
    if missing := {"sample", "drug", "response"} - set(pairs.columns):
        raise ValueError(f"the table of pairs has no columns {sorted(missing)}; it has {list(pairs.columns)}")
    if sample_key is not None and sample_key not in profiles.obs:
        raise ValueError(f"profiles: obs has no column {sample_key!r}; it has {list(profiles.obs)}")
    pairs = pairs.reset_index(drop=True)
    if (unnamed := pairs[["sample", "drug"]].isna().any(axis=1)).any():
        row = int(np.flatnonzero(unnamed)[0])
        raise ValueError(
            f"row {row} of the pairs names no sample or no drug; {int(unnamed.sum())} such: drop them"
        )
    names = pairs[["sample", "drug"]].astype(str)
    if (twice := names.duplicated()).any():
        row = int(np.flatnonzero(twice)[0])
        raise ValueError(
            f"row {row} of the pairs is {tuple(names.iloc[row])} again, of {int(twice.sum())} such: average "
            "replicates first"
        )
    bad = pairs["response"].isna().to_numpy()
    if pd.api.types.is_numeric_dtype(pairs["response"]):
        bad = bad | ~np.isfinite(pairs["response"].to_numpy(float))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"row {row} of the pairs, {tuple(names.iloc[row])}, has the response {pairs['response'][row]}; "
            f"{int(bad.sum())} are missing or not finite: drop them"
        )
    own = pd.Series(profiles.obs_names if sample_key is None else profiles.obs[sample_key]).astype(str)
    _known(names["sample"], own, "samples", "a profile")
    rows = own.groupby(own.to_numpy()).indices
    of = [rows[sample] for sample in names["sample"]]
    pair = np.repeat(np.arange(len(pairs)), [len(found) for found in of])
    cell = np.concatenate(of)
    cells = ad.AnnData(
        profiles.X[cell],
        obs=pd.DataFrame(
            {column: pairs[column].to_numpy()[pair] for column in ("sample", "drug", "response")},
            index=[f"{profiles.obs_names[i]}|{names['drug'][j]}" for i, j in zip(cell, pair, strict=True)],
        ),
        var=profiles.var,
    )
    if fingerprints is not None:
        table = fingerprints.set_axis(fingerprints.index.astype(str))
        _known(names["drug"], table.index, "drugs", "a fingerprint")
        if table.index.has_duplicates:
            raise ValueError(f"fingerprints: {table.index[table.index.duplicated()][0]!r} is there twice")
        values = table.loc[names["drug"].to_numpy()[pair]].to_numpy(np.float32)
        if not np.isfinite(values).all():
            raise ValueError("fingerprints: there are values that are missing or not finite")
        cells.obsm["fingerprint"] = values
    return cells


def _known(wanted: pd.Series, there: Any, what: str, lacking: str) -> None:
    unknown = sorted(set(wanted) - set(there))
    if unknown:
        raise ValueError(
            f"{len(unknown)} {what} of the pairs have no {lacking.split()[-1]}, such as {unknown[0]!r};"
            f"{nearest(unknown[0], list(map(str, set(there))))} Drop their pairs, or add {lacking} for each"
        )


def split_pairs(
    pairs: pd.DataFrame, unseen: Unseen, n_folds: int = 5, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(positions to train on, positions to test on) of each fold.

    "sample" and "drug" hold out all pairs of a share of them; each pair is tested once. "both" tests the
    pairs of a held-out sample and a held-out drug, after training on pairs of neither.

    Raises:
      ValueError: fewer samples or drugs than folds.
    """
    rng, part = np.random.default_rng(seed), {}
    for name in ("sample", "drug"):
        codes, names = pd.factorize(pairs[name].astype(str), sort=True)
        if len(names) < n_folds and unseen in (name, "both"):
            raise ValueError(f"{len(names)} {name}s cannot be held out in {n_folds} folds")
        part[name] = (rng.permutation(len(names)) % n_folds)[codes]
    folds = []
    for fold in range(n_folds):
        held = [part[name] == fold for name in ("sample", "drug") if unseen in (name, "both")]
        train, test = ~np.any(held, axis=0), np.all(held, axis=0)
        folds.append((np.flatnonzero(train), np.flatnonzero(test)))
    return folds


# ------------------------------------------------------------------------------------------- baselines
def baselines(
    pairs: pd.DataFrame,
    train: np.ndarray,
    test: np.ndarray,
    profiles: pd.DataFrame,
    fingerprints: pd.DataFrame | None = None,
    *,
    unseen: Unseen = "sample",
) -> dict[str, np.ndarray]:
    """What plain predictors say of the pairs at ``test``, float64 [len(test)] each, learned at ``train``.

    "mean"; "drug mean" and "sample mean" (the mean where there is none); "additive", the two effects
    together, by ridge regression; "ridge", on principal components of profiles and fingerprints; "ridge with
    products" of the two, which can say that a drug acts on a kind of sample. Where drugs were seen, each has
    a level of its own in these, too; without fingerprints that is all there is. Penalties are chosen in folds
    that hold out what ``unseen`` says.

    Args:
      pairs: numeric responses, see :func:`pair_cells`.
      profiles: log expression, one row a sample.
      fingerprints: one row a drug; None for none.
    """
    y = pairs["response"].to_numpy(float)
    sample, drug = (pairs[name].astype(str).to_numpy() for name in ("sample", "drug"))
    one_hot = lambda names: pd.get_dummies(pd.Series(names), dtype=float).to_numpy()  # noqa: E731
    effects = np.column_stack([one_hot(sample), one_hot(drug)])
    effects[:, (effects[train] == 0).all(0)] = 0
    out = {"mean": np.full(len(test), y[train].mean())}
    for name, group in (("drug", drug), ("sample", sample)):
        means = pd.Series(y[train]).groupby(group[train]).mean()
        out[f"{name} mean"] = pd.Series(group[test]).map(means).fillna(y[train].mean()).to_numpy()

    lines = profiles.set_axis(profiles.index.astype(str))
    known = np.unique(sample[train])
    pca = PCA(min(COMPONENTS, len(known) - 1), random_state=0).fit(lines.loc[known].to_numpy())
    P = pd.DataFrame(pca.transform(lines.to_numpy()), index=lines.index).loc[sample].to_numpy()
    of_drug = effects[:, -len(np.unique(drug)) :]
    F = of_drug
    if fingerprints is not None:
        F = fingerprints.set_axis(fingerprints.index.astype(str)).loc[drug].to_numpy(float)
    P, F, of_drug = (_standard(X, train) for X in (P, F, of_drug))
    # a drug that was seen has a level of its own, whatever its fingerprint
    linear = [P, F, of_drug] if unseen == "sample" and fingerprints is not None else [P, F]
    products = (P[:, :, None] * F[:, None, :]).reshape(len(y), -1)
    group = drug if unseen == "drug" else sample
    inner = list(GroupKFold(min(3, len(np.unique(group[train])))).split(train, groups=group[train]))
    for name, X in (
        ("additive", effects),
        ("ridge", np.column_stack(linear)),
        ("ridge with products", np.column_stack([*linear, products])),
    ):
        out[name] = _ridge(X[train], y[train], inner)(X[test])
    return out


def _ridge(X: np.ndarray, y: np.ndarray, folds: list[Any]) -> Callable[[np.ndarray], np.ndarray]:
    """Ridge regression, under the penalty that is best in the folds."""

    def path(X: np.ndarray, y: np.ndarray) -> Callable[[float, np.ndarray], np.ndarray]:
        centre, level = X.mean(0), y.mean()
        values, vectors = np.linalg.eigh((X - centre).T @ (X - centre))
        inside = vectors.T @ ((X - centre).T @ (y - level))
        return lambda alpha, new: (
            (new - centre) @ (vectors @ (inside / (np.maximum(values, 0) + alpha))) + level
        )

    error = np.zeros(len(PENALTIES))
    for fit, check in folds:
        fitted = path(X[fit], y[fit])
        error += [((fitted(alpha, X[check]) - y[check]) ** 2).sum() for alpha in PENALTIES]
    whole, best = path(X, y), float(PENALTIES[error.argmin()])
    return lambda new: whole(best, new)


def _standard(X: np.ndarray, train: np.ndarray) -> np.ndarray:
    spread = X[train].std(0)
    return (X - X[train].mean(0)) / np.where(spread > 1e-9, spread, 1.0)


def scores(pairs: pd.DataFrame, predicted: np.ndarray) -> dict[str, float]:
    """How good predictions [n] of the responses of ``pairs`` are.

    "rmse"; "r", the correlation over all pairs, most of which is which drug it is; "r_within_drug", the mean
    over drugs of the correlation over samples, which knowing the drug does nothing for; "r_within_sample",
    the other way round. Drugs and samples with fewer than three pairs, or without spread, are left out; a
    constant prediction correlates with nothing, 0.
    """
    y, p = pairs["response"].to_numpy(float), np.asarray(predicted, float)

    def within(name: str) -> float:
        rows = pairs.groupby(name, observed=True).indices.values()
        found = [_r(y[i], p[i]) for i in rows if len(i) >= 3 and y[i].std() > 1e-9]
        return float(np.mean(found)) if found else float("nan")

    return {
        "rmse": float(np.sqrt(((y - p) ** 2).mean())),
        "r": _r(y, p),
        "r_within_drug": within("drug"),
        "r_within_sample": within("sample"),
    }


def _r(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 1e-9 and b.std() > 1e-9 else 0.0


def planted_pairs(
    profiles: pd.DataFrame,
    n_drugs: int = 60,
    bits: int = 16,
    *,
    interaction: float = 1.0,
    noise: float = 0.3,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Pairs and fingerprints whose responses are known: drug + sample + interaction + noise.

    The interaction is a sum over three principal components of the profiles, each times a random linear
    function of the fingerprint; each of its terms, and the effects of drugs and samples together, have
    variance 1 / 3 and 1, times ``interaction`` squared for the former. Sample effects are a fourth component.

    Args:
      profiles: log expression [samples, genes].
      bits: length of fingerprints, -1 or 1.
    """
    rng = np.random.default_rng(seed)
    z = PCA(4, random_state=0).fit_transform(profiles.to_numpy())
    z = (z - z.mean(0)) / z.std(0)
    F = rng.choice([-1.0, 1.0], (n_drugs, bits))
    act = F @ rng.normal(size=(bits, 4)) / np.sqrt(bits)
    y = np.sqrt(0.7) * act[None, :, 3] + np.sqrt(0.3) * z[:, None, 3]
    y = y + interaction * np.sqrt(1 / 3) * z[:, :3] @ act[:, :3].T + noise * rng.normal(size=y.shape)
    drugs = [f"drug{i}" for i in range(n_drugs)]
    table = pd.DataFrame(y, index=pd.Index(profiles.index.astype(str), name="sample"), columns=drugs)
    pairs = table.rename_axis(columns="drug").stack().rename("response").reset_index()
    return pairs, pd.DataFrame(F, index=drugs)


def log_profiles(profiles: ad.AnnData, sample_key: str) -> pd.DataFrame:
    """log(1 + counts per 10,000) of the summed counts of each sample, by name."""
    codes, names = pd.factorize(profiles.obs[sample_key].astype(str), sort=True)
    member = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))
    summed = np.asarray((member @ sparse.csr_matrix(profiles.X)).todense(), np.float64)
    values = np.log1p(summed / summed.sum(1, keepdims=True) * 1e4)
    return pd.DataFrame(values, index=names, columns=profiles.var_names)
