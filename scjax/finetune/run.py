"""The pieces of a fine-tuning run, which ``experiments/finetune.py`` and :func:`scjax.finetune.fit` put
together."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scjax.config import ConfigError, from_config, nearest
from scjax.finetune.calibration import judge
from scjax.finetune.tasks import Task
from scjax.loader.weights import check_spec
from scjax.models import resolve
from scjax.nn.context import tokens_of
from scjax.nn.module import Abstract, bind, flatten, nest
from scjax.parallel import Layout, batch_sharding, place, replicated
from scjax.train import CheckpointError, Restored, RunConfig, as_begun
from scjax.train.state import State, judged_params, shardings_of
from scjax.types import CellBatch

N_CELLS = 2048  # of training, which the scales of features and targets are taken from
HANDED_OVER = {"handed_over": True}
SYSTEM = "scjax.finetune.model:Finetuned"


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Everything a fine-tuning run is made from. ``start`` is the base, ``model`` that of
    :class:`scjax.finetune.FinetunedConfig`, whose ``base`` is taken from there.

    Attributes:
      random_start: begin with the network of ``start`` and random weights: the control that shows what its
        training was worth. Tables and medians stay.
      layer_decay, freeze_layers: see :func:`scjax.finetune.layer_rates`.
      patience: evaluations without a better validation error after which the run ends; None for never. The
        best state is what the run hands over in any case.
      max_error: of the rule that leaves cells unassigned, see :func:`scjax.finetune.unassigned_rule`.
    """

    random_start: bool = False
    layer_decay: float = 1.0
    freeze_layers: int = 0
    patience: int | None = None
    max_error: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None and self.patience < 1:
            raise ConfigError(f"config.patience is {self.patience}; give a number of evaluations, from 1")
        if (self.layer_decay != 1 or self.freeze_layers) and self.model.get("train") != "all":
            raise ConfigError('layer_decay and freeze_layers go with model.train = "all"')
        if self.train.probe_every is not None:
            raise ConfigError("train.probe_every is for pretraining: here validation cells have targets")

    @property
    def base_run(self) -> str:
        """``start``.

        Raises:
          ConfigError: there is none.
        """
        if self.start is None:
            raise ConfigError("config.start is missing: the run, or imported model, that is fine-tuned")
        return self.start


def complete(
    tasks: Mapping[str, Task],
    columns: Mapping[str, Sequence[str]],
    values: Mapping[str, Sequence[str]],
    frequency: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Task]:
    """Tasks with what the data say of them: sizes, ranks of ordered categories, and class frequencies where
    ``logit_adjustment`` wants them.

    Args:
      tasks: by name.
      columns: label -> names of its codes.
      values: value -> names of its columns.
      frequency: label -> how often each code is drawn.

    Raises:
      ConfigError: a task whose label, value or category does not exist; names those there are.
    """
    out = {}
    for name, task in tasks.items():
        where, source = f"model.tasks.{name}", task.source or name
        changes: dict[str, Any] = {}
        there, kind = (columns, "label") if task.categorical else (values, "value")
        if task.level == "cell":
            if source not in there:
                raise ConfigError(
                    f"{where} reads the {kind} {source!r}, which the data have not;{nearest(source, there)} "
                    f"there are {sorted(there)}"
                )
            size = len(there[source])
            if task.order:
                unknown = [category for category in task.order if category not in there[source]]
                if unknown:
                    raise ConfigError(
                        f"{where}.order has {unknown[0]!r}; {source!r} has {list(there[source])}"
                    )
                place_of = {category: i for i, category in enumerate(task.order)}
                changes["rank"] = tuple(place_of.get(category, -1) for category in there[source])
                size = len(task.order)
            if task.size and task.size != size:
                raise ConfigError(f"{where}.size is {task.size}, and {source!r} of the data has {size}")
            changes["size"] = size
            if task.logit_adjustment and not task.prior:
                drawn = np.asarray((frequency or {}).get(source, ()), float)
                if len(drawn) != size or not drawn.sum():
                    raise ConfigError(
                        f"{where}.logit_adjustment needs prior: {source!r} has not been counted"
                    )
                changes["prior"] = tuple((drawn / drawn.sum()).tolist())
        out[name] = dataclasses.replace(task, **changes)
        out[name].check(name)
    return out


def frequencies(corpus: Any, columns: Sequence[str], weights: Mapping[str, Any] | None) -> dict[str, Any]:
    """How often the categories of label columns are drawn in training, relative to each other: by the cells
    of each, by ``data.weights`` of any columns and by the shares of a mixture (see
    :class:`scjax.loader.Loader`)."""
    check_spec(weights or {})
    shares, parts = getattr(corpus, "shares", None), corpus.split("train")
    per_row: dict[str, np.ndarray] = {}  # weight of a cell of each category; the last is of none
    for column, how in (({"corpus": shares} if shares else {}) | dict(weights or {})).items():
        if column not in corpus.columns:
            raise KeyError(
                f"data.weights: {corpus.path} has no label column {column!r}; it has {list(corpus.columns)}"
            )
        names = [*corpus.columns[column], None]
        n = np.sum([np.bincount(part.codes(column) % len(names), minlength=len(names)) for part in parts], 0)
        of = [how.get(name, 0.0) for name in names] if isinstance(how, Mapping) else n ** float(how)
        per_row[column] = np.where(n > 0, of, 0.0) / np.maximum(n, 1)
    out = {column: np.zeros(len(corpus.columns[column]) + 1) for column in columns}
    for part in parts:
        weight = np.ones(part.n_cells)
        for column, of in per_row.items():
            weight *= of[part.codes(column)]
        for column, drawn in out.items():
            drawn += np.bincount(part.codes(column) % len(drawn), weight, minlength=len(drawn))
    return {column: drawn[:-1].tolist() for column, drawn in out.items()}


def prepare(
    system: str,
    model: Mapping[str, Any],
    carried: tuple[Sequence[str] | None, Sequence[str] | None],
    weights: Mapping[str, Any] | None,
    begin: Any,
    corpus: Any,
) -> tuple[Any, dict[str, Any]]:
    """``(corpus, model)``: the corpus in the numbers of the base (:func:`scjax.train.as_begun`), and all
    fields of the model: its base, its tasks with what the data say of them, and which context it is told.

    Args:
      system, model: of the run's config.
      carried: labels and values that batches carry, None for all.
      weights: of the cells that are drawn.
      begin: the base, what ``scjax.load`` returns.
      corpus: of the run.

    Raises:
      ConfigError: as :func:`complete` and :func:`scjax.train.as_begun`.
    """
    wanted: Any = from_config(resolve(system)[1], model, where="config.model")
    told = wanted.context
    if told is None and not wanted.objective_weight:
        learned = {task.source or name for name, task in wanted.tasks.items() if not task.reverse}
        labels = corpus.columns if carried[0] is None else carried[0]
        values = corpus.panels if carried[1] is None else carried[1]
        there = {n: labels if of["kind"] == "label" else values for n, of in tokens_of(begin.config).items()}
        told = tuple(name for name in sorted(there) if name in there[name] and name not in learned)
    wanted = dataclasses.replace(wanted, base={"system": begin.system, "model": begin.config}, context=told)

    def grows(field: str) -> bool:
        kind, _, name = field.partition(".")
        path = f"{kind}/token/{name}/embedding"
        return (
            wanted.train == "all"
            and not any(fnmatchcase(path, pattern) for pattern in wanted.freeze)
            and (bool(name) or bool(wanted.objective_weight))
        )

    corpus = as_begun(corpus, dataclasses.asdict(wanted), begin.config, begin.categories, grows)
    sources = {task.source or name for name, task in wanted.tasks.items() if task.categorical}
    drawn = frequencies(corpus, sorted(sources & set(corpus.columns)), weights)
    tasks = complete(wanted.tasks, corpus.columns, corpus.values, drawn)
    return corpus, dataclasses.asdict(dataclasses.replace(wanted, tasks=tasks))


def validation_error(means: Mapping[str, float], tasks: Mapping[str, Task]) -> float:
    """What early stopping goes by: the mean error of each task that is to be learned times its weight."""
    of = {"regression": "mse", "multilabel": "bce"}
    errors = [
        task.weight * means.get(f"validation/{name}_{of.get(task.kind, 'ce')}", math.nan)
        for name, task in tasks.items()
        if not task.reverse
    ]
    if not errors or not math.isfinite(sum(errors)):
        missing = "no task is to be learned" if not errors else "no validation cell has a target of some task"
        raise ConfigError(f"nothing to judge the run by: {missing}")
    return sum(errors)


class Stopping:
    """The best validation error so far, and whether there has been no better one for too long.

    Args:
      patience: evaluations without a better one; None for any number.
      errors: (step, error) of the evaluations so far, so that a run that resumes knows what it knew.
    """

    def __init__(self, patience: int | None, errors: Sequence[tuple[int, float]] = ()):
        self.patience, self.best, self.step, self.waited = patience, math.inf, 0, 0
        for step, error in errors:
            self(step, error)

    def __call__(self, step: int, error: float) -> bool:
        """Takes an evaluation; whether it is the best so far."""
        better = error < self.best
        self.best, self.step, self.waited = (
            (error, step, 0) if better else (self.best, self.step, self.waited + 1)
        )
        return better

    @property
    def ended(self) -> bool:
        return self.patience is not None and self.waited >= self.patience


class Reader:
    """What a model says of cells, on all devices: its features, outputs and targets as numpy arrays.

    Args:
      model, abstract, layout: as for :func:`scjax.train.make_eval_step`.
    """

    def __init__(self, model: Abstract, abstract: State, layout: Layout | None = None):
        self._mesh = abstract["step"].sharding.mesh
        layout = layout or Layout(self._mesh)

        def module(state: State) -> Any:
            return bind(model, judged_params(state), state["buffers"])

        def features(state: State, batch: CellBatch) -> dict[str, Any]:
            """Of each task the sums that give mean and spread of its vectors and of its targets."""
            with layout.active():
                network, out = module(state), {}
                levels = {task.level for task in network.config.tasks.values()}
                x_of: dict[str, Any] = {"cell": network.features(batch)} if "cell" in levels else {}
                gene_id, x_of["gene"] = network.states(batch) if "gene" in levels else (None, None)
                for name, head in network.heads.items():
                    target, weight = network.target(name, batch, gene_id)
                    x = x_of[head.task.level]
                    out[name] = {"x": _moments(x, weight)}
                    if head.task.kind == "regression":
                        out[name]["y"] = _moments(target.reshape(*x.shape[:-1], -1), weight)
                return out

        def outputs(state: State, batch: CellBatch) -> dict[str, Any]:
            with layout.active():
                network = module(state)
                network.eval()
                found, gene_id = network.outputs(batch)
                out = {}
                for name, head in network.heads.items():
                    target, weight = network.target(name, batch, gene_id)
                    y = head.predict(found[name]) if head.task.kind == "regression" else found[name]
                    out[name] = {"row": batch.row, "output": y, "target": target, "weight": weight}
                    if head.task.level == "gene":
                        out[name]["gene"] = gene_id
                return out

        given, told = (shardings_of(abstract), batch_sharding(self._mesh)), replicated(self._mesh)
        self._features = jax.jit(features, in_shardings=given, out_shardings=told)
        self._outputs = jax.jit(outputs, in_shardings=given, out_shardings=told)

    def scales(self, state: State, loader: Any) -> dict[str, Any]:
        """Path of a buffer of the heads -> its value: mean and spread of the features of the first training
        cells, so that every feature weighs the same, and of the targets of a regression."""
        sums: Any = None
        with closing(iter(loader)) as batches:
            for batch in itertools.islice(batches, max(N_CELLS // loader.batch_size, 1)):
                found = jax.tree.map(np.asarray, self._features(state, place(batch, self._mesh)))
                sums = found if sums is None else jax.tree.map(np.add, sums, found)
        values = {}
        for name, of in sums.items():
            for what, (mean, spread) in {"x": ("centre", "spread"), "y": ("mean", "scale")}.items():
                if what in of:
                    n, total, squares = of[what]
                    if not n.all():
                        raise ConfigError(
                            f"model.tasks.{name}: none of the first {N_CELLS:,} training cells has a target"
                        )
                    centre = total / n
                    deviation = np.sqrt(np.maximum(squares / n - centre**2, 0))
                    values[f"heads/{name}/{mean}"] = centre
                    # a feature that does not vary says nothing, whatever it is divided by
                    values[f"heads/{name}/{spread}"] = np.where(deviation > 1e-6, deviation, 1.0)
        return values

    def outputs(self, state: State, loader: Any, max_batches: int | None = None) -> dict[str, dict[str, Any]]:
        """Of each task ``{"row", "output", "target"}`` of the cells (of genes: one a gene and cell, and
        "gene") of a loader that ends: outputs before calibration, those of a regression in the units of the
        target."""
        pieces: dict[str, list[dict[str, Any]]] = {}
        with closing(iter(loader)) as batches:
            for batch in itertools.islice(batches, max_batches):
                found = jax.tree.map(np.asarray, self._outputs(state, place(batch, self._mesh)))
                for name, of in found.items():
                    keep = of.pop("weight") > 0
                    of["row"] = np.broadcast_to(of["row"].reshape(-1, *(1,) * (keep.ndim - 1)), keep.shape)
                    pieces.setdefault(name, []).append({field: x[keep] for field, x in of.items()})
        return {
            name: {field: np.concatenate([piece[field] for piece in found]) for field in found[0]}
            for name, found in pieces.items()
        }


def _moments(x: Any, weight: Any) -> tuple[Any, Any, Any]:
    """(number, sum, sum of squares) [D] of vectors [..., D] of weight above 0; NaN does not count."""
    x = x.astype(jnp.float32)
    known = (weight > 0)[..., None] & jnp.isfinite(x)
    x = jnp.where(known, x, 0.0)
    over = tuple(range(x.ndim - 1))
    return known.sum(over).astype(jnp.float32), x.sum(over), (x * x).sum(over)


def put(state: State, values: Mapping[str, Any]) -> State:
    """The state with other values of some parameters and buffers, by path."""
    out = dict(state)
    for kind in ("params", "buffers"):
        flat = flatten(state[kind])
        for path in flat.keys() & values.keys():
            like = flat[path]
            own = np.asarray(values[path], like.dtype).reshape(like.shape)
            flat[path] = jax.make_array_from_callback(own.shape, like.sharding, own.__getitem__)
        out[kind] = nest(flat)
    return out


def check_end(path: pathlib.Path, restored: Restored | None, ended: bool) -> bool:
    """Whether the newest checkpoint of a run is the one that it ends with, its best state and not its last:
    marked in its cursor by :data:`HANDED_OVER`, or the one that its report tells of.

    Args:
      path: of the run.
      restored: the checkpoint.
      ended: whether the run, as configured, is at its end.

    Raises:
      CheckpointError: the run has ended and is to go on, or stands beyond its end.
    """
    if restored is None:
        return False
    over, report = "handed_over" in restored.cursor, path / "report.json"
    if report.exists():
        over = over or json.loads(report.read_text())["steps"] == restored.step
    if over and not ended:
        raise CheckpointError(
            f"{path} is finished: its checkpoint {restored.step} is the best state, not the last, and "
            "training cannot go on from there. For more steps or patience begin a run in another directory"
        )
    if ended and not over:
        raise CheckpointError(
            f"{path} already stands at step {restored.step} of a longer run: give train.steps and patience "
            "as they were, or more"
        )
    return over


def groups_of(corpus: Any) -> np.ndarray | None:
    """int32 [rows]: the group of each cell that the corpus was split by, -1 where unknown; None where that is
    not known."""
    column = corpus.manifest.get("options", {}).get("split_by")
    if column not in corpus.columns:
        return None
    return np.concatenate([part.codes(column) for part in corpus.parts])


def halves(keys: np.ndarray) -> np.ndarray:
    """bool [n]: about half of the cells, those of one key together; which keys a hash of them says."""
    names, codes = np.unique(keys, return_inverse=True)
    order = np.argsort([zlib.crc32(str(name).encode()) for name in names.tolist()], kind="stable")
    first = np.zeros(len(names), bool)
    first[order[::2]] = True
    return first[codes]


def calibrate(
    tasks: Mapping[str, Task],
    found: Mapping[str, Mapping[str, Any]],
    max_error: float | None,
    groups: np.ndarray | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """``(temperatures by path, report by task)`` of :meth:`Reader.outputs` of held-out cells.

    Half of the cells sets temperatures, the others judge them and set the rule. All of them chose the step,
    so that errors of other cells may be a little larger than told.

    Args:
      tasks, found: by name.
      max_error: of the rule, None for none.
      groups: of each row (:func:`groups_of`), so that a group stands in one half; genes always do.
    """
    temperatures, report = {}, {}
    for name, task in tasks.items():
        of, rule = found[name], max_error if task.level == "cell" else None
        keys = of["row"] if groups is None else groups[of["row"]]
        keys = of.get("gene", keys)
        tunes = halves(keys if len(np.unique(keys)) > 1 else of["row"])
        units = len(np.unique(of["gene"][tunes])) if "gene" in of else None
        temperature, report[name] = judge(task.kind, of["output"], of["target"], rule, tunes, units)
        if task.kind != "regression":
            temperatures[f"heads/{name}/temperature"] = temperature
    return temperatures, report
