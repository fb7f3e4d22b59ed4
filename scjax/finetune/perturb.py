"""The pieces of a run that learns perturbations, which ``experiments/perturb.py`` puts together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import anndata as ad
import jax
import numpy as np
import pandas as pd

from scjax.config import ConfigError, from_config
from scjax.genes import Vocabulary
from scjax.loader.conditions import UNPERTURBED, Conditions, Kind
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
      split: obs column, True for the cells to learn from; None to hold out ``fraction`` of what ``unseen``
        says, see :func:`scjax.eval.perturbation_split`.
      validation: share of the training conditions that is kept for the validation loss.
      features: table of what is perturbed, tab-separated with names first, or "uns/KEY" of the cells.
      tokens, shift: what is told to the base, and to the decoder: "targets", "features", "dose",
        "perturbation", or a column of obs, of the control cells.
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
    def labels(self) -> list[str]:
        """Columns of obs that the model is told."""
        return sorted({*self.tokens, *self.shift} - set(READ))


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
