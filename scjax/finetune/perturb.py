"""The pieces of a run that learns perturbations, which ``experiments/perturb.py`` puts together."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import anndata as ad
import jax
import numpy as np
import pandas as pd

from scjax.config import ConfigError, from_config
from scjax.genes import Vocabulary
from scjax.loader.conditions import UNPERTURBED, Conditions, Kind
from scjax.loader.order import permutation
from scjax.loader.sets import Asked, PerturbedCells
from scjax.models.perturbation import Perturbation, PerturbationConfig
from scjax.nn import bind
from scjax.nn.context import ContextToken
from scjax.parallel import batch_sharding, place, process_shard, replicated
from scjax.parallel.layout import automatic
from scjax.train import RunConfig
from scjax.train.state import judged_params, shardings_of
from scjax.types import CellBatch

READ = ("targets", "features", "dose", "perturbation")  # of a condition; other names are columns of obs


@dataclasses.dataclass(frozen=True)
class Told:
    """The cells' columns, what is held out, and what the model is told of a condition.

    Attributes:
      perturbation, control, context, dose: columns of obs, and the name of unperturbed cells; None for no
        such column. Effects are within contexts (cell line, cell type, donor).
      kind: see :class:`scjax.loader.conditions.Conditions`.
      split: obs column, True for the cells to learn from and False for those held out; None to hold out
        ``fraction`` of what ``unseen`` says, see :func:`scjax.eval.perturbation_split`.
      validation: share of the training conditions that is kept for the validation loss. Where the model is
        told learned vectors, only conditions whose vectors are trained on others are kept.
      features: table of what is perturbed, tab-separated with names first, or "uns/KEY" of the cells.
      tokens, shift: what is told to the base, and to the decoder: "targets", "features", "dose",
        "perturbation", or a column of obs, of the control cells. The last two have a learned vector for each
        of their values in training; a condition with another value is refused, as it has none.
      targets: perturbed genes of a condition, at most.
      set_size: cells of a set.
      max_cells: predicted cells of a condition, at most.
    """

    perturbation: str = "perturbation"
    control: str = "control"
    context: str | None = None
    dose: str | None = None
    kind: Kind = "genetic"
    split: str | None = None
    unseen: Literal["perturbation", "combination", "context"] = "perturbation"
    fraction: float = 0.25
    validation: float = 0.0
    features: str | None = None
    tokens: tuple[str, ...] = ("targets",)
    shift: tuple[str, ...] = ("targets",)
    targets: int = 2
    set_size: int = 16
    max_cells: int = 256

    @property
    def wanted(self) -> tuple[str, ...]:
        """All that the model is told."""
        return tuple(dict.fromkeys((*self.tokens, *self.shift)))

    @property
    def labels(self) -> list[str]:
        """Columns of obs that the model is told."""
        return sorted(set(self.wanted) - set(READ))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerturbConfig(RunConfig):
    """A run: as of pretraining, but that ``data.corpus`` is an .h5ad of raw counts or "simulated"
    (:func:`scjax.datasets.perturbed`), ``start`` the run of the base or None for one from scratch, as
    ``model.base`` says, and ``random_start`` takes only its architecture and tables: the control."""

    told: Told
    random_start: bool = False


def conditions_of(
    config: PerturbConfig, cells: ad.AnnData, features: pd.DataFrame | None, vocabulary: Vocabulary | None
) -> Conditions:
    """How conditions are told; a model from scratch has the perturbed genes in its vocabulary, measured or
    not."""
    told = config.told
    if vocabulary is None:
        studies: list[Any] = [cells]
        if told.kind == "genetic" and told.perturbation in cells.obs:
            names = [str(name) for name in cells.obs[told.perturbation].dropna().unique()]
            genes = {part.strip() for name in names for part in name.split("+")}
            studies.append(sorted(genes - {told.control, *UNPERTURBED}))
        vocabulary = Vocabulary.from_anndata(studies)
    return Conditions(
        *(vocabulary, told.control, told.kind, (), told.targets, features), dosed=told.dose is not None
    )


def features_of(told: Told, cells: ad.AnnData) -> pd.DataFrame | None:
    """The table that ``told.features`` names, its rows under their names as text.

    Raises:
      KeyError: nothing of that name in ``uns``; says what there is.
    """
    if not told.features:
        return None
    key = told.features.removeprefix("uns/")
    if key == told.features:
        table = pd.read_csv(told.features, sep="\t", index_col=0)
    elif key in cells.uns:
        table = pd.DataFrame(cells.uns[key])
    else:
        raise KeyError(f"config.told.features is {told.features!r}; uns of the cells has {list(cells.uns)}")
    return table.set_axis(table.index.astype(str))


def divide(
    whole: PerturbedCells, marked: pd.Series, told: Told, seed: int
) -> tuple[PerturbedCells, list[Asked], list[Asked]]:
    """What is learned from, and what is not.

    Args:
      whole: all cells.
      marked: of them, True for those to learn from; the column that ``told.split`` names.
      told: of the run.
      seed: of what is kept for validation.

    Returns:
      Cells of training; conditions held out, of which the model can be told; training conditions kept for
      validation.

    Raises:
      ValueError: ``marked`` is not True and False, or leaves nothing to learn from or nothing held out; no
        condition can be kept.
      KeyError: the model cannot be told what is held out.
    """
    there = f"{whole.where}: obs[{marked.name!r}]"
    values = set(marked.astype(object))
    if marked.isna().any() or not values <= {0, 1}:
        some = ", ".join(sorted(repr(value) for value in values)[:4])
        raise ValueError(
            f"{there} holds {some}; it must be True for cells to learn from and False for those held out, as "
            f"(obs[{marked.name!r}] == 'train') would be"
        )
    keep = marked.astype(bool).to_numpy()
    cells = whole.training(keep)
    asked = sorted(set(whole.groups) - set(cells.groups))
    if not asked or not cells.groups:
        side = "held out (False)" if cells.groups else "to learn from (True)"
        raise ValueError(f"{there} leaves none of {len(whole.groups)} conditions {side}")
    learned = sorted(cells.groups)
    wish, kept = round(told.validation * len(learned)), list[Asked]()
    left = [Counter(one[field] for one in learned) for field in range(3)]
    # a learned vector of a condition, or of what its control cells are, has to be trained on another
    fields = [0] * ("perturbation" in told.wanted) + [2] * bool(told.labels)
    for i in permutation("validation", seed, n=len(learned)):
        one = learned[i]
        if len(kept) < wish and all(left[field][one[field]] > 1 for field in fields):
            kept.append(one)
            for field in fields:
                left[field][one[field]] -= 1
    if wish and not kept:
        raise ValueError(
            f"config.told.validation = {told.validation:g} can keep none of {len(learned)} conditions: the "
            "model is told a learned vector of each that no other condition trains; set it to 0"
        )
    cells = whole.training(keep, kept)
    for one in asked:
        cells.check(one, told.wanted)
    return cells, asked, kept


def fields_of(
    config: PerturbConfig,
    base: dict[str, Any],
    panel: int,
    categories: Mapping[str, Sequence[str]],
    n_features: int | None = None,
) -> dict[str, Any]:
    """The fields of the model, with the sizes that cells and conditions have.

    Args:
      config: of the run.
      base: ``{"system", "model"}``.
      panel: number of measured genes.
      categories: "perturbation", and columns of obs that ``told`` names -> what occurs.
      n_features: columns of the table of features, if there is one.

    Raises:
      ConfigError: ``told`` names what there is not; says what there is.
    """
    told = config.told
    known = {"targets": ContextToken("genes", told.targets), "dose": ContextToken("value", 1)}
    known |= {name: ContextToken("label", max(len(names), 1)) for name, names in categories.items()}
    if n_features is not None:
        known["features"] = ContextToken("value", n_features)
    for name in (*told.tokens, *told.shift):
        if name not in known:
            raise ConfigError(f"config.told names {name!r}; there are {sorted(known)}, given data for them")
    fields = {"base": base, "panel": panel}
    fields |= {side: {n: known[n] for n in getattr(told, side)} for side in ("tokens", "shift")}
    return dataclasses.asdict(from_config(PerturbationConfig, {**config.model, **fields}, "config.model"))


def predictor(model: Any, abstract: Any, layout: Any, state: Any) -> Any:
    """Whole batch of numpy arrays -> predicted cells, the same on all processes."""
    mesh = layout.mesh
    index, count = process_shard(mesh)

    def run(state: Any, batch: CellBatch) -> jax.Array:
        with layout.active():
            module: Perturbation = bind(model, judged_params(state), state["buffers"])
            module.eval()
            return module.predict(batch)

    given = (shardings_of(abstract), batch_sharding(mesh))
    step = jax.jit(automatic(run, mesh, replicated(mesh)), in_shardings=given, out_shardings=replicated(mesh))

    def predict(batch: CellBatch) -> np.ndarray:
        n = len(batch.weight) // count
        local = jax.tree.map(lambda x: x[index * n : (index + 1) * n], batch)
        return np.asarray(step(state, place(local, mesh)))

    return predict
