"""Fine-tuning in one call, for small data: on a corpus, to the best state by its validation cells.

``experiments/finetune.py`` is the same as a run with a directory of its own, which can be stopped, resumed
and looked into.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scjax.config import from_config
from scjax.finetune.lora import LoRA, merge
from scjax.finetune.model import FinetunedConfig
from scjax.finetune.rates import make_finetune_optimizer
from scjax.finetune.run import (
    SYSTEM,
    Reader,
    Stopping,
    calibrate,
    groups_of,
    prepare,
    put,
    validation_error,
)
from scjax.finetune.tasks import Task
from scjax.loader import Loader, cells
from scjax.models import build
from scjax.nn.context import check_context, tokens_of
from scjax.nn.module import bind, flatten, nest, shapes_of
from scjax.parallel import MeshConfig, layout_for, place
from scjax.train import (
    Meter,
    OptimizerConfig,
    abstract_state,
    count_parameters,
    init_state,
    make_eval_step,
    make_train_step,
    start_from,
)
from scjax.types import CellBatch


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How :func:`fit` trains.

    Attributes:
      train: "head", "lora" or "all", see :class:`scjax.finetune.FinetunedConfig`; ``lora``, ``freeze`` too.
      steps, batch_size, learning_rate, weight_decay: of AdamW with a warm-up of a tenth and a cosine.
      layer_decay, freeze_layers: see :func:`scjax.finetune.layer_rates`.
      weights: of the cells that are drawn, such as ``{"cell_type": 0.0}`` for all classes alike; see
        :class:`scjax.loader.Loader`.
      context: names of the context tokens of the base that the corpus tells it, see
        :class:`scjax.finetune.FinetunedConfig`.
      eval_every, patience: steps between evaluations, and how many without a better one end it; None never
        ends it, and needs no validation cells: without any the last state is taken.
      seed: of the order of the cells.
    """

    train: str = "lora"
    lora: LoRA = LoRA()
    freeze: tuple[str, ...] = ()
    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    layer_decay: float = 1.0
    freeze_layers: int = 0
    weights: dict[str, Any] | None = None
    context: tuple[str, ...] = ()
    eval_every: int = 25
    patience: int | None = 4
    seed: int = 0


@functools.lru_cache(4)
def _steps(model: str, n_genes: int, config: str) -> Any:
    """What is compiled for a model and a config, given as JSON, so that the next fit of the like finds it."""
    how = from_config(FitConfig, json.loads(config))
    abstract_model = build(SYSTEM, json.loads(model), n_genes)
    layout = layout_for(MeshConfig(), count_parameters(abstract_model))
    optimizer = OptimizerConfig(
        how.learning_rate, warmup_steps=max(how.steps // 10, 1), weight_decay=how.weight_decay
    )
    rates = how.layer_decay, how.freeze_layers
    tx, _ = make_finetune_optimizer(optimizer, how.steps, abstract_model, *rates)
    abstract = abstract_state(abstract_model, tx, layout.mesh, layout.rules)
    train_step = make_train_step(abstract_model, tx, abstract, seed=0, layout=layout)
    eval_step = make_eval_step(abstract_model, abstract, seed=0, layout=layout)
    fresh = init_state(abstract_model, tx, abstract)
    return abstract_model, abstract, fresh, train_step, eval_step, Reader(abstract_model, abstract, layout)


def fit(
    model: Any, corpus: Any, tasks: Mapping[str, Task], config: FitConfig | None = None
) -> dict[str, Any]:
    """Fine-tunes a model on the training cells of a corpus; its validation cells choose the step, and half of
    them the temperatures. On one process.

    Args:
      model: the base, what ``scjax.load`` returns.
      corpus: with the labels and values that the tasks read; built with ``validation``, best with
        ``split_by`` so that whole groups are judged.
      tasks: name -> task; sizes are worked out.
      config: see :class:`FitConfig`.

    Returns:
      The fields of a ``scjax.api.Model`` whose ``metrics`` are in "report".

    Raises:
      ConfigError: a task that the corpus cannot serve; names what there is.
      ValueError: no validation cells where some are needed.
    """
    config = config or FitConfig()
    judging = any(part.n_cells for part in corpus.split("validation"))
    if not judging and config.patience is not None:
        raise ValueError(
            f"{corpus.path} has no validation cells to stop by: build it with validation=, or "
            "give patience=None"
        )
    cell_level = [(task.source or name, task) for name, task in tasks.items() if task.level == "cell"]
    told = {n: token["kind"] for n, token in tokens_of(model.config).items() if n in config.context}
    told |= {name: "label" if task.categorical else "value" for name, task in cell_level}
    labels = sorted(name for name, kind in told.items() if kind == "label")
    values = sorted(told.keys() - set(labels))
    wanted: dict[str, Any] = {
        "tasks": {name: dataclasses.asdict(task) for name, task in tasks.items()},
        "train": config.train,
        "lora": dataclasses.asdict(config.lora),
        "freeze": config.freeze,
        "context": config.context,
    }
    corpus, about = prepare(SYSTEM, wanted, (labels, values), config.weights, model, corpus)
    tasks = from_config(FinetunedConfig, about).tasks
    about = {name: value for name, value in about.items() if name in wanted or name == "base"}
    compiled = dataclasses.replace(config, seed=0, weights=None, patience=None, eval_every=1)
    abstract_model, abstract, fresh, train_step, eval_step, reader = _steps(
        json.dumps(about), len(model.vocabulary), json.dumps(dataclasses.asdict(compiled))
    )
    mesh = abstract["step"].sharding.mesh
    options: dict[str, Any] = {"vocabulary": model.vocabulary, "seed": config.seed, "n_buckets": 1}
    options |= {"labels": labels, "values": values}
    loader = Loader(corpus, config.batch_size, weights=config.weights, **options)
    widths = {name: len(panel.features) for name, panel in loader.panels.items()}
    check_context(about, {name: corpus.columns[name] for name in labels}, widths)
    if judging:
        held_out = Loader(corpus, config.batch_size, split="validation", shuffle=False, epochs=1, **options)

    start = start_from(abstract_model, model.params, model.buffers, prefix="base/")
    state = put(jax.tree.map(jnp.copy, fresh), start.values)  # a step takes the memory of its state
    state = put(state, reader.scales(state, loader))
    stopping, best = Stopping(config.patience), None
    with closing(iter(loader)) as batches:
        for step, batch in enumerate(itertools.islice(batches, config.steps), 1):
            state, metrics = train_step(state, place(_padded(batch), mesh))
            if not judging or step % config.eval_every and step < config.steps:
                continue
            meter = Meter()
            with closing(iter(held_out)) as judged:
                for batch in judged:
                    meter.add(step, eval_step(state, place(_padded(batch), mesh)))
            if stopping(step, validation_error(meter.mean("validation"), tasks)):
                best = jax.tree.map(np.asarray, {name: state[name] for name in ("params", "buffers")})
            if stopping.ended:
                break
    report: dict[str, Any] = {}
    if best is not None:
        state = put(state, flatten(best["params"]) | flatten(best["buffers"]))
        temperatures, report = calibrate(tasks, reader.outputs(state, held_out), None, groups_of(corpus))
        state = put(state, temperatures)
    return {
        "system": SYSTEM,
        "config": about,
        "vocabulary": model.vocabulary,
        "params": state["params"],
        "buffers": state["buffers"],
        "step": stopping.step or step,
        "path": model.path,
        "categories": model.categories | {name: list(corpus.columns[name]) for name in labels},
        "report": report,
    }


def _padded(batch: CellBatch) -> CellBatch:
    """With slots for a power of two of genes, so that corpora with other cells need no other code."""
    length = batch.gene_id.shape[1]
    more = ((0, 0), (0, (1 << (length - 1).bit_length()) - length))
    gene_id = np.pad(batch.gene_id, more, constant_values=-1)
    return batch.replace(gene_id=gene_id, count=np.pad(batch.count, more))


def predict(model: Any, adata: Any, *, batch_size: int = 64, **options: Any) -> dict[str, np.ndarray]:
    """What a fine-tuned model says of the cells of an AnnData: of each task at the level of cells float32
    [n_obs, size], calibrated probabilities of the classes or values in the units of the target.

    Args:
      model: what ``scjax.load`` returns of a run of ``experiments/finetune.py``, or a fit.
      adata: raw counts.
      batch_size: cells at a time.
      **options: see :func:`scjax.loader.cells`.
    """

    jitted, pieces = _predictor(model.system, json.dumps(model.config), len(model.vocabulary)), []
    for batch in cells(adata, model.vocabulary, batch_size, **options):
        pieces.append(jax.tree.map(np.asarray, jitted(model.params, model.buffers, batch)))
    if not pieces:
        raise ValueError("no cells to predict: the AnnData has no rows")
    return {
        name: np.concatenate([piece[name] for piece in pieces])[: adata.n_obs].astype(np.float32)
        for name in pieces[0]
    }


@functools.lru_cache(8)
def _predictor(system: str, config: str, n_genes: int) -> Any:
    """Compiled once for all models of one shape."""
    abstract_model = build(system, json.loads(config), n_genes)

    def run(params: Any, buffers: Any, batch: CellBatch) -> dict[str, Any]:
        module = bind(abstract_model, params, buffers)
        module.eval()
        outputs, _ = module.outputs(batch)
        heads = {name: head for name, head in module.heads.items() if head.task.level == "cell"}
        return {name: head.predict(outputs[name]) for name, head in heads.items()}

    return jax.jit(run)


def base_of(model: Any) -> dict[str, Any]:
    """The base of a fine-tuned model by itself, with its adapters worked into the kernels: the fields of a
    ``scjax.api.Model``, to be embedded with or exported like any other. The heads are left out."""
    base, scale = model.config["base"], from_config(LoRA, model.config["lora"]).scale
    whole = flatten(model.params) | flatten(model.buffers)
    flat = merge({path[5:]: x for path, x in whole.items() if path.startswith("base/")}, scale)
    shapes = shapes_of(build(base["system"], base["model"], len(model.vocabulary)))
    kinds = {kind: nest({path: flat[path] for path in flatten(shapes[kind])}) for kind in shapes}
    kept = {name: getattr(model, name) for name in ("vocabulary", "step", "path", "categories")}
    return {"system": base["system"], "config": base["model"], **kinds, **kept}
