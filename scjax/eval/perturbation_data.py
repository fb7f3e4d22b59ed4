"""Cells of a perturbation experiment: what is compared, on which scale, and what is held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scjax.eval.baselines import find_counts
from scjax.eval.checks import UNLABELLED, column

Kind = Literal["genetic", "chemical", "environmental"]
UNSEEN = {"genetic": "unseen gene", "chemical": "unseen compound", "environmental": "unseen stimulus"}
MIN_CELLS = 10  # of a condition, and of the controls of a context
MANY = 50  # with more perturbations than this they are not held out one by one


@dataclass(frozen=True, order=True)
class Condition:
    """One perturbation (at one dose) in one context (cell line, cell type, donor)."""

    perturbation: str
    dose: str = ""
    context: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """The genes or compounds of a combination."""
        return tuple(self.perturbation.split("+"))

    def __str__(self) -> str:
        dosed = f"{self.perturbation} at {self.dose}" if self.dose else self.perturbation
        return f"{dosed} | {self.context}" if self.context else dosed


@dataclass(frozen=True)
class Keys:
    """Where perturbation, dose and context are written, and how the control is called."""

    perturbation: str
    control: str
    context: str | None = None
    dose: str | None = None
    kind: Kind = "genetic"

    @property
    def all(self) -> list[str]:
        return [k for k in (self.perturbation, self.dose, self.context) if k is not None]

    def canonical(self, name: str) -> str:
        """One name for one perturbation: the genes of a combination sorted, "KLF1+ctrl" the same as "KLF1".

        Only for genes; the name of a compound may hold a plus sign of its own.
        """
        if self.kind != "genetic" or name == self.control:
            return name
        parts = {p.strip() for p in name.split("+")} - {self.control, "ctrl", ""}
        return "+".join(sorted(parts)) or self.control

    def conditions(self, obs: pd.DataFrame) -> list[Condition | None]:
        """The condition of every row; None where a field is missing."""
        text = {}
        for k in self.all:
            values = obs[k].astype(object).map(lambda v: "" if pd.isna(v) else str(v))
            text[k] = values.where(~values.str.strip().str.lower().isin(UNLABELLED), "").to_numpy(object)
        names = {n: self.canonical(n) for n in set(text[self.perturbation])}
        blank = np.full(len(obs), "", object)
        rows = zip(
            text[self.perturbation], text.get(self.dose or "", blank), text.get(self.context or "", blank),
            strict=True,
        )  # fmt: skip
        out: list[Condition | None] = []
        for name, dose, context in rows:
            if not name or (self.context and not context):
                out.append(None)
            else:
                dosed = "" if names[name] == self.control else dose
                out.append(Condition(names[name], dosed, context))
        return out


@dataclass(frozen=True)
class Fold:
    """What predictors may learn from, and what is asked of them."""

    train: list[Condition]
    test: list[Condition]


@dataclass
class Study:
    """The real cells on one scale, log1p of counts per ten thousand, and what is held out."""

    keys: Keys
    genes: list[str]
    log: sp.csr_matrix  # float32[cells, genes]
    rows: dict[Condition, np.ndarray]
    control: dict[str, tuple[np.ndarray, np.ndarray]]  # context → rows of both halves
    folds: list[Fold]
    controls_held_out: bool
    dropped: dict[str, int] = field(default_factory=dict)
    _means: dict[Any, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def test(self) -> list[Condition]:
        return [c for fold in self.folds for c in fold.test]

    def mean(self, rows: np.ndarray) -> np.ndarray:
        """Mean profile of these cells, float64[genes]."""
        return np.asarray(self.log[rows].mean(0), np.float64).ravel()

    def cells(self, rows: np.ndarray) -> np.ndarray:
        """These cells, float32[cells, genes]."""
        return self.log[rows].toarray()

    def centroid(self, condition: Condition) -> np.ndarray:
        """Mean profile of a condition, float64[genes]."""
        if condition not in self._means:
            self._means[condition] = self.mean(self.rows[condition])
        return self._means[condition]

    def base(self, context: str) -> np.ndarray:
        """Mean of the control cells that predictions start from: the other half than the truth is held
        against.
        """
        if context not in self._means:
            self._means[context] = self.mean(self.control[context][1])
        return self._means[context]

    def targets(self, condition: Condition) -> np.ndarray:
        """Columns of the genes that the condition itself aims at."""
        if self.keys.kind != "genetic":
            return np.zeros(0, int)
        return np.flatnonzero(np.isin(self.genes, condition.parts))

    def track(self, condition: Condition, train: Sequence[Condition]) -> str:
        """What is new about a held-out condition."""
        here = [c for c in train if c.context == condition.context]
        same = [c for c in train if c.perturbation == condition.perturbation]
        if any(c.context == condition.context for c in same):
            return "unseen dose"
        if same:
            return "unseen context"
        parts = condition.parts if self.keys.kind == "genetic" else (condition.perturbation,)
        singles = {c.perturbation for c in train}
        known = sum(p in singles for p in parts)
        name = UNSEEN[self.keys.kind] if len(parts) == 1 else f"{len(parts)} genes, {known} seen"
        return name if here or not condition.context else f"{name} in an unseen context"


def lognormalise(counts: Any) -> sp.csr_matrix:
    """log1p of counts per ten thousand, float32[cells, genes]; cells without counts stay zero."""
    log = sp.csr_matrix(counts).astype(np.float32)
    total = np.asarray(log.sum(1), np.float64).ravel()
    scale = np.repeat(1e4 / np.where(total > 0, total, 1), np.diff(log.indptr))
    log.data = np.log1p(log.data * scale).astype(np.float32)
    return log


def study(
    real: ad.AnnData,
    keys: Keys,
    genes: Iterable[str] | None,
    train: Any,
    counts: str | None,
    seed: int,
) -> Study:
    """Read the real cells: normalise, name the conditions, halve the controls, hold out.

    ``genes``: those that every prediction covers; None: all. See :func:`scjax.eval.perturbation` for
    ``train``. Raises KeyError and ValueError that say what is missing.
    """
    for key, role in zip(
        keys.all, ("perturbation", "dose" if keys.dose else "context", "context"), strict=False
    ):
        column(real.obs, key, role)
    X, names = find_counts(real, counts)
    named = keys.conditions(real.obs)
    total = np.asarray(X.sum(1)).ravel()
    dropped = {
        "no perturbation or context named": sum(c is None for c in named),
        "no counts": int((total == 0).sum()),
    }
    at: dict[Condition, list[int]] = {}
    for i, c in enumerate(named):
        if c is not None and total[i] > 0:
            at.setdefault(c, []).append(i)
    perturbed = {c: np.array(r) for c, r in at.items() if c.perturbation != keys.control}
    for c in [c for c, r in perturbed.items() if len(r) < MIN_CELLS]:
        dropped[f"condition {str(c)!r} has fewer than {MIN_CELLS} cells"] = len(perturbed.pop(c))
    if not any(c.perturbation == keys.control for c in at):
        there = ", ".join(map(str, real.obs[keys.perturbation].value_counts().index[:8]))
        raise ValueError(
            f"obs[{keys.perturbation!r}] has no control cells: none is called {keys.control!r} (there are: "
            f"{there}, …); name the unperturbed cells with control="
        )
    if not perturbed:
        raise ValueError(
            f"no perturbation has {MIN_CELLS} cells; obs[{keys.perturbation!r}] cannot be scored"
        )
    marked = _marked(real.obs, train)
    control: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    held_out = marked is not None
    for context in dict.fromkeys(c.context for c in perturbed):
        cells = np.array(at.get(Condition(keys.control, "", context), []), int)
        where = f" in {keys.context} {context!r}" if context else ""
        if len(cells) < 2 * MIN_CELLS:
            raise ValueError(
                f"{len(cells)} control cells{where}; at least {2 * MIN_CELLS} are needed, since the effects "
                "of truth and prediction are taken from different halves of them: add control cells or leave "
                "these perturbations out"
            )
        ours, theirs = (cells[~marked[cells]], cells[marked[cells]]) if marked is not None else ([], [])
        if min(len(ours), len(theirs)) < MIN_CELLS:
            held_out = False
            mixed = np.random.default_rng([seed, 3, len(control)]).permutation(cells)
            ours, theirs = np.sort(mixed[: len(cells) // 2]), np.sort(mixed[len(cells) // 2 :])
        control[context] = (np.asarray(ours), np.asarray(theirs))
    wanted = set(names) if genes is None else set(genes)
    columns = np.array([i for i, g in enumerate(names) if g in wanted], int)
    if len(columns) < 2:
        raise ValueError(
            f"predictions and real cells have {len(columns)} gene names in common (real: "
            f"{', '.join(names[:4])}, …; predicted: {', '.join(sorted(wanted)[:4])}, …): "
            "use the var_names of the real cells"
        )
    folds = _folds(sorted(perturbed), perturbed, keys, train, marked)
    return Study(
        keys,
        [names[i] for i in columns],
        lognormalise(X)[:, columns],
        perturbed,
        control,
        folds,
        held_out,
        {k: v for k, v in dropped.items() if v},
    )


def _marked(obs: pd.DataFrame, train: Any) -> np.ndarray | None:
    """The training cells, where ``train`` names a column of them."""
    if not isinstance(train, str):
        return None
    values = column(obs, train, "train")
    if values.isna().any() or not set(values.astype(object)) <= {0, 1}:
        raise ValueError(f"obs[{train!r}] must be True for training cells and False for held-out cells")
    return values.astype(bool).to_numpy()


def _folds(
    conditions: list[Condition],
    rows: Mapping[Condition, np.ndarray],
    keys: Keys,
    train: Any,
    marked: np.ndarray | None,
) -> list[Fold]:
    if train is None:
        return _in_turn(conditions, keys)
    if marked is not None:
        both = [c for c in conditions if 0 < marked[rows[c]].sum() < len(rows[c])]
        if both:
            raise ValueError(
                f"obs[{train!r}] has cells of {str(both[0])!r} in training and held out ({len(both)} "
                "conditions in all); a perturbation is learnt from or asked for, not both: split "
                "by perturbation (perturbation_split does)"
            )
        seen = {c for c in conditions if marked[rows[c]].all()}
    elif isinstance(train, Mapping):
        pairs = {(str(context), keys.canonical(str(p))) for context, names in train.items() for p in names}
        _known(pairs, {(c.context, c.perturbation) for c in conditions})
        seen = {c for c in conditions if (c.context, c.perturbation) in pairs}
    else:
        names = {keys.canonical(str(p)) for p in train} - {keys.control}
        _known(names, {c.perturbation for c in conditions})
        seen = {c for c in conditions if c.perturbation in names}
    fold = Fold([c for c in conditions if c in seen], [c for c in conditions if c not in seen])
    if not fold.train or not fold.test:
        side = "held out" if fold.train else "left for training"
        raise ValueError(f"train= leaves no perturbation {side} ({len(conditions)} conditions in all)")
    return [fold]


def _known(asked: set[Any], there: set[Any]) -> None:
    if absent := sorted(asked - there):
        raise KeyError(
            f"train= names {absent[0]!r} ({len(absent)} in all), not among the perturbations with "
            f"{MIN_CELLS} cells: {', '.join(map(str, sorted(there)[:8]))}, …"
        )


def _in_turn(conditions: list[Condition], keys: Keys) -> list[Fold]:
    """Every context held out in turn, or every perturbation where there is one context."""
    contexts = sorted({c.context for c in conditions})
    if len(contexts) > 1:
        return [
            Fold([c for c in conditions if c.context != held], [c for c in conditions if c.context == held])
            for held in contexts
        ]
    names = sorted({c.perturbation for c in conditions})
    if not 2 < len(names) <= MANY:
        raise ValueError(
            f"{len(names)} perturbations in one context: say with train= which of them predictors may learn "
            "from (perturbation_split makes such a choice)"
        )

    def shares(c: Condition, held: str) -> bool:
        single = "+" not in held
        return c.perturbation == held or (keys.kind == "genetic" and single and held in c.parts)

    return [
        Fold(
            [c for c in conditions if not shares(c, held)], [c for c in conditions if c.perturbation == held]
        )
        for held in names
    ]


def perturbation_split(
    obs: pd.DataFrame,
    perturbation_key: str,
    control: str,
    unseen: Literal["perturbation", "combination", "context"] = "perturbation",
    *,
    context_key: str | None = None,
    fraction: float = 0.25,
    families: Mapping[str, str] | None = None,
    kind: Kind = "genetic",
    seed: int = 0,
) -> pd.Series:
    """Choose what predictors may learn from: True for training cells, False for held-out cells.

    Half of the control cells of each context are held out too: the truth is held against them, so that no
    predictor has seen the control cells by which it is judged.

    Args:
        unseen: "perturbation": genes (compounds, stimuli) of which no cell is in training, and every
            combination that contains one; of combinations of seen genes the same ``fraction`` is held out
            (the "simulation" split of GEARS, Roohani et al. 2023). "combination": all single perturbations in
            training, ``fraction`` of the combinations held out. "context": all perturbations of ``fraction``
            of the contexts.
        fraction: share held out, at least one.
        families: perturbation → family (compound → scaffold, gene → paralogue group); families are held out
            whole.
        kind, control, perturbation_key, context_key, seed: as in :func:`scjax.eval.perturbation`.

    Raises:
        KeyError, ValueError: columns or perturbations that such a split needs are not there.
    """
    keys = Keys(perturbation_key, control, context_key, None, kind)
    for key in keys.all:
        column(obs, key, "perturbation" if key == perturbation_key else "context")
    named = keys.conditions(obs)
    perturbed = sorted({c for c in named if c is not None and c.perturbation != control})
    rng = np.random.default_rng([seed, 4])

    def draw(names: Iterable[str]) -> set[str]:
        pool = sorted(set(names))
        if len(pool) < 2:
            raise ValueError(f"unseen={unseen!r} needs at least two of what it holds out; there are {pool}")
        n = min(max(1, round(fraction * len(pool))), len(pool) - 1)
        return set(rng.choice(pool, n, replace=False))

    if unseen == "context":
        held_contexts = draw(c.context for c in perturbed)
        held = {c for c in perturbed if c.context in held_contexts}
    else:
        combinations = {c.perturbation for c in perturbed if kind == "genetic" and len(c.parts) > 1}
        out: set[str] = set()
        if unseen == "perturbation":
            of = {p: str((families or {}).get(p, p)) for c in perturbed for p in _parts(c, kind)}
            drawn = draw(of.values())
            out = {c.perturbation for c in perturbed if any(of[p] in drawn for p in _parts(c, kind))}
            left = sorted(combinations - out)
        else:
            left = sorted(combinations)
        if left and (unseen == "combination" or len(left) > 1):
            out |= draw(left)
        if unseen == "combination" and not combinations:
            raise ValueError("unseen='combination' needs perturbations of several genes, written as 'A+B'")
        held = {c for c in perturbed if c.perturbation in out}
    train = np.array([c is not None and c not in held for c in named])
    for context in {c.context for c in perturbed}:
        cells = [i for i, c in enumerate(named) if c == Condition(control, "", context)]
        train[rng.permutation(cells)[: len(cells) // 2].astype(int)] = False
    return pd.Series(train, obs.index, name="train")


def _parts(c: Condition, kind: Kind) -> tuple[str, ...]:
    return c.parts if kind == "genetic" else (c.perturbation,)
