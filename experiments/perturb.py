"""Train a model of perturbations on control and perturbed cells. Copy this file to change anything about it.

    python experiments/perturb.py --config=configs/perturb.py:smoke --workdir=runs/perturb-smoke
    python experiments/perturb.py --config=configs/perturb.py --config.data.corpus=CELLS.h5ad \\
        --config.start=runs/scgpt --workdir=runs/perturb

The same command resumes a run that was stopped, exactly where its last checkpoint stands. At the end the run
directory holds predicted cells of what was held out (predictions.h5ad) and their scores beside those of no
change, the training mean, additive and linear predictors (scores.jsonl), by scjax.eval.perturbation.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
from contextlib import closing
from typing import Any

import anndata as ad
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

import scjax
import scjax.eval
from scjax.config import from_config
from scjax.eval.perturbation_data import Keys, perturbation_split, study
from scjax.finetune.perturb import PerturbConfig, conditions_of, divide, features_of, fields_of, predictor
from scjax.launch.capture import capture
from scjax.launch.codes import REQUEUE
from scjax.loader.sets import Asked, PerturbedCells, Sets, predict_cells
from scjax.models import build
from scjax.parallel import (
    Prefetch,
    barrier,
    distributed_start,
    layout_for,
    process_shard,
    together,
)
from scjax.train import (
    Checkpoints,
    Meter,
    MetricsLog,
    Preemption,
    RunProgress,
    Status,
    abstract_state,
    count_parameters,
    describe,
    gene_tables,
    identity,
    init_state,
    keep_compiled,
    make_eval_step,
    make_optimizer,
    make_train_step,
    micro_batches,
    open_run,
    start_from,
)

_CONFIG = config_flags.DEFINE_config_file(
    *("config", None, "The config file, FILE.py or FILE.py:ARG."),
    **{"lock_config": False, "accept_new_attributes": True},
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory: new, or that of a run to resume.")
flags.mark_flags_as_required(["config", "workdir"])


def read_cells(config: PerturbConfig) -> tuple[ad.AnnData, str]:
    """Cells, and the column that says which are for training."""
    told, path = config.told, config.data.corpus
    cells = scjax.datasets.perturbed() if path == "simulated" else ad.read_h5ad(str(path))
    split = told.split
    if split is None:
        split, options = "train", {"context_key": told.context, "fraction": told.fraction, "kind": told.kind}
        marked = perturbation_split(
            cells.obs, told.perturbation, told.control, told.unseen, **options, seed=config.seed
        )
        cells.obs[split] = marked
    elif split not in cells.obs:
        raise KeyError(f"{path}: no obs column {split!r} of the split; there are {list(cells.obs)}")
    return cells, split


def check_scoring(
    config: PerturbConfig, adata: ad.AnnData, split: str, cells: PerturbedCells, asked: list[Asked]
) -> None:
    """Raises ValueError where what is held out could not be scored after the training."""
    told = config.told
    keys = Keys(told.perturbation, told.control, told.context, told.dose, told.kind)
    test = study(adata, keys, cells.names, split, None, 0).test
    if lost := sorted(set(test) - set(keys.conditions(cells.table(asked)))):
        raise ValueError(
            f"{cells.where}: {str(lost[0])!r} is held out ({len(lost)} such) and would be predicted under "
            f"another name; write names in obs[{told.perturbation!r}] without blanks around them"
        )


def perturb(config: PerturbConfig, workdir: str, preemption: Preemption) -> bool:
    """Whether the run is at its end; False where it was told to leave before."""
    process, _ = distributed_start()
    told = config.told

    # ---------------------------------------------------------------------- cells and conditions
    adata, split = read_cells(config)
    features = features_of(told, adata)
    begin = scjax.load(config.start) if config.start else None
    conditions = conditions_of(config, adata, features, begin.vocabulary if begin else None)
    vocabulary = conditions.vocabulary
    columns: Any = {"perturbation_key": told.perturbation, "context_key": told.context, "dose_key": told.dose}
    whole = PerturbedCells(adata, conditions, labels=told.labels, **columns)
    cells, asked, kept = divide(whole, adata.obs[split], told, config.seed)
    check_scoring(config, adata, split, cells, asked)

    # ------------------------------------------------------------------------- model and devices
    base = {"system": begin.system, "model": begin.config} if begin else config.model["base"]
    categories = {**cells.categories, "perturbation": list(cells.conditions.seen)}
    n_features = None if features is None else conditions.features.shape[1]
    fields = fields_of(config, copy.deepcopy(base), len(cells.panel), categories, n_features)
    model = build(config.system, fields, len(vocabulary), config.seed)
    layout = layout_for(config.mesh, count_parameters(model))
    mesh = layout.mesh
    index, count = process_shard(mesh)
    shared: dict[str, Any] = {"wanted": told.wanted, "process_index": index, "process_count": count}
    learned = sorted(set(cells.groups) - set(kept))
    sizes = {"batch_size": config.data.batch_size, "set_size": told.set_size}
    loader = Sets(cells, **sizes, conditions=learned, seed=config.seed, **shared)
    validation = None
    if kept:
        validation = Sets(cells, **sizes, conditions=kept, **shared)
    accumulate = micro_batches(config, model, cells.length, layout)

    # ------------------------------------------------------------------------- the run directory
    tables = gene_tables(config.system, fields, config.tables, model, vocabulary, None) if not begin else None
    values = dict(tables.buffers) if tables else {}
    origin: dict[str, Any] = {"tables": tables.sources} if tables else {}
    if begin is not None:
        params = {} if config.random_start else begin.params
        start = start_from(model, params, begin.buffers, prefix="base/")
        origin["start"] = {"source": config.start, "sha256": start.sha256}
        values |= start.values
    origin["categories"] = categories
    about = describe(config.system, fields, vocabulary, corpus=cells.hash, seed=config.seed, **origin)
    run = open_run(workdir, about, vocabulary)
    keep_compiled(run.path / "compiled" if config.train.compile_cache is None else config.train.compile_cache)

    # ----------------------------------------------------------------------- optimiser and steps
    steps = config.train.steps
    tx, schedule = make_optimizer(config.optimizer, steps, model, None)
    abstract = abstract_state(model, tx, mesh, layout.rules, ema=config.optimizer.ema is not None)
    how = {"guard": config.train.guard, "ema": config.optimizer.ema, "accumulate": accumulate}
    train_step = make_train_step(model, tx, abstract, seed=config.seed, layout=layout, **how)
    eval_step = make_eval_step(model, abstract, seed=config.seed, layout=layout)

    # ------------------------------------------------------------------------------- restore
    data = iter(loader)
    checkpoints = Checkpoints(run.checkpoints, identity(about), keep=config.train.keep)
    restored = checkpoints.restore(abstract)
    if restored is None:
        step, state = 0, init_state(model, tx, abstract, values | {"panel": cells.panel})
    else:
        step, state = restored.step, restored.state
        data.set_state(restored.cursor)
    run.record(dataclasses.asdict(config))
    capture(run.path)

    # ---------------------------------------------------------------------------------- loop
    leaving = False
    status, progress = Status(run.path, step, steps), RunProgress(steps, step)
    log = MetricsLog(run.path, None if restored is None else step, config.train.wandb)
    totals = None if restored is None else restored.totals
    meter = Meter(mesh, began=status.began, productive=log.productive, totals=totals)
    batches = Prefetch(data, mesh)
    with status, closing(checkpoints), closing(log), closing(batches), progress:
        progress.say(f"{layout}; {loader}; {len(asked)} conditions held out, {len(kept)} for validation")
        progress.say(f"{count_parameters(model):,} parameters; steps {step:,} to {steps:,} in {run.path}")
        while step < steps and not leaving:
            with meter.time("input_wait"):
                batch = next(batches)
            state, metrics = train_step(state, batch)
            step += 1
            meter.add(step, metrics)
            progress.advance(step)
            status.at(step)
            leaving = preemption.reached(step) and step < steps
            saving = leaving or config.train.due(config.train.checkpoint_every, step)
            if saving or config.train.due(config.train.log_every, step):
                means = meter.mean("train")  # raises on a non-finite loss, before anything is saved
                means["train/learning_rate"] = float(schedule(step - 1))
                log.write(step, means)
                progress.show(step, means)
                checkpoints.check()
            if validation is not None and config.train.due(config.train.eval_every, step):
                held_out, most = Meter(), config.validation.max_batches or 4
                with meter.time("evaluate"), closing(Prefetch(iter(validation), mesh)) as few:
                    for batch in itertools.islice(few, most):
                        held_out.add(step, eval_step(state, batch))
                log.write(step, held_out.mean("validation"))
            if saving and not meter.skipping:
                checkpoints.save(step, state, batches.get_state())

    # -------------------------------------------------------------- what was held out, predicted
    if not leaving:
        one = predictor(model, abstract, layout, state)
        predicted = predict_cells(one, cells, asked, **sizes, wanted=told.wanted, max_cells=told.max_cells)
        if process == 0:
            predicted.write_h5ad(run.path / "predictions.h5ad")
            described = {} if features is None else {"features": features[np.isfinite(features).all(axis=1)]}
            results = scjax.eval.perturbation(
                *(adata, {"model": predicted}),
                **columns,
                control=told.control,
                train=split,
                kind=told.kind,
                gene_embeddings=described,
                baselines=tuple(described),
                n_boot=200,
                dataset=str(config.data.corpus),
            )
            results.to_jsonl(run.path / "scores.jsonl")
            progress.say(results.to_text())
            progress.say(f"predicted cells and scores are in {run.path}")
        barrier("scjax:perturb:scored")
    return not leaving


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    with Preemption() as preemption, together():
        try:
            config = from_config(PerturbConfig, _CONFIG.value, where="config")
            done = perturb(config, _WORKDIR.value, preemption)
        except (ValueError, KeyError, OSError, FloatingPointError) as error:  # what the user can mend
            raise SystemExit(f"{type(error).__name__}: {error}") from None
    sys.exit(0 if done else REQUEUE)


if __name__ == "__main__":
    app.run(main)
