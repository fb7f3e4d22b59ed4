"""Fine-tune a trained model on labelled cells. Copy this file to change anything about how a run goes.

    python experiments/finetune.py --config=configs/finetune.py:smoke --workdir=runs/finetune-smoke
    python experiments/finetune.py --config=configs/finetune.py --config.start=runs/scgpt \\
        --config.data.corpus=CORPUS --config.model.train=all --workdir=runs/typed

The same command resumes a run that was stopped, exactly where its last checkpoint stands. Validation cells
of the corpus (build it with split_by, so that they are whole donors or studies) say which state is the best;
that one is what the run hands over, with temperatures that make its probabilities fit, in report.json and
predictions.npz, and to scjax.load. Half of these cells set the temperatures, the other half judges them and
sets the rule; all of them chose the state. A run that has handed over its best state does not go on.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from contextlib import closing

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

import scjax
from scjax.config import from_config
from scjax.finetune import (
    HANDED_OVER,
    FinetuneConfig,
    Reader,
    Stopping,
    calibrate,
    check_end,
    gene_targets,
    groups_of,
    make_finetune_optimizer,
    optimizer_bytes,
    prepare,
    put,
    validation_error,
)
from scjax.launch.capture import capture
from scjax.launch.codes import REQUEUE
from scjax.models import build, resolve
from scjax.parallel import Prefetch, barrier, distributed_start, layout_for, together
from scjax.train import (
    Checkpoints,
    Meter,
    MetricsLog,
    Preemption,
    RunProgress,
    Status,
    abstract_state,
    checkpoint_steps,
    count_parameters,
    describe,
    identity,
    init_state,
    keep_compiled,
    make_eval_step,
    make_loaders,
    make_train_step,
    manifests_of,
    micro_batches,
    open_data,
    open_run,
    read_metrics,
    start_from,
)
from scjax.train.run import write_text
from scjax.train.tables import hash_of

_CONFIG = config_flags.DEFINE_config_file(
    *("config", None, "The config file, FILE.py or FILE.py:ARG."),
    **{"lock_config": False, "accept_new_attributes": True},
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory: new, or that of a run to resume.")
flags.mark_flags_as_required(["config", "workdir"])


def finetune(config: FinetuneConfig, workdir: str, preemption: Preemption) -> bool:
    """Whether the run is at its end; False where it was told to leave before."""
    process, _ = distributed_start()

    # -------------------------------------------------------------------------- cells and model
    begin = scjax.load(config.base_run)
    corpus, carried = open_data(config.data, workdir), (config.data.labels, config.data.values)
    asked = config.system, config.model, carried, config.data.weights
    corpus, about_model = prepare(*asked, begin, corpus)  # in the numbers of the base
    config = dataclasses.replace(config, model=about_model)
    tasks = from_config(resolve(config.system)[1], about_model, where="config.model").tasks
    model = build(config.system, about_model, len(begin.vocabulary), config.seed)
    targets = gene_targets(tasks, config.tables, begin.vocabulary)  # of tasks at the level of genes

    # ------------------------------------------------------------------------- devices and data
    layout = layout_for(config.mesh, count_parameters(model))
    mesh = layout.mesh
    loader, validation = make_loaders(config, corpus, begin.vocabulary, mesh)
    if validation is None:
        raise ValueError(f"{corpus.path} was built without validation cells: there is nothing to stop by")
    accumulate = micro_batches(config, model, loader.bucket_lengths[-1], layout)

    # ------------------------------------------------------------------------- the run directory
    start = start_from(model, {} if config.random_start else begin.params, begin.buffers, prefix="base/")
    origin = {"corpus": corpus.manifest_id, "manifests": manifests_of(corpus)}
    origin["categories"] = begin.categories | {name: corpus.columns[name] for name in loader.labels}
    origin["categories"] |= {name: panel.features for name, panel in loader.panels.items() if panel.named}
    origin["start"] = {"source": config.start, "sha256": start.sha256}
    if targets:
        of = {name: source for name, source in config.tables.items() if source}
        origin["tables"] = {"targets": {"source": str(of), "sha256": hash_of(targets)}}
    about = describe(config.system, about_model, begin.vocabulary, seed=config.seed, **origin)
    run = open_run(workdir, about, begin.vocabulary)
    keep_compiled(run.path / "compiled" if config.train.compile_cache is None else config.train.compile_cache)

    # -------------------------------------------------------------------------- optimiser and steps
    steps = config.train.steps
    rates = config.layer_decay, config.freeze_layers
    tx, schedule = make_finetune_optimizer(config.optimizer, steps, model, *rates)
    abstract = abstract_state(model, tx, mesh, layout.rules, ema=config.optimizer.ema is not None)
    options = {"guard": config.train.guard, "ema": config.optimizer.ema, "accumulate": accumulate}
    train_step = make_train_step(model, tx, abstract, seed=config.seed, layout=layout, **options)
    eval_step = make_eval_step(model, abstract, seed=config.seed, layout=layout)
    reader = Reader(model, abstract, layout)

    # ------------------------------------------------------------------------------- restore
    data = iter(loader)
    checkpoints = Checkpoints(run.checkpoints, identity(about), keep=config.train.keep)
    restored = checkpoints.restore(abstract)
    if restored is None:
        step, state = 0, init_state(model, tx, abstract, start.values | targets)
        state = put(state, reader.scales(state, loader))
    else:
        step, state = restored.step, restored.state
        data.set_state(restored.cursor)
    lines = read_metrics(run.metrics) if run.metrics.exists() else []
    judged = [line for line in lines if line["step"] <= step and "validation/error" in line]
    stopping = Stopping(config.patience, [(line["step"], line["validation/error"]) for line in judged])
    over = check_end(run.path, restored, step >= steps or stopping.ended)
    barrier("scjax:finetune:metrics")
    for later in checkpoint_steps(run.path / "best"):  # of a life that went on from here and was cut short
        if later > step and process == 0:
            shutil.rmtree(run.path / "best" / str(later))
    barrier("scjax:finetune:best")
    best = Checkpoints(run.path / "best", identity(about), keep=1)
    run.record(dataclasses.asdict(config))
    capture(run.path)

    # ---------------------------------------------------------------------------------- loop
    leaving = False
    status, progress = Status(run.path, step, steps), RunProgress(steps, step)
    log = MetricsLog(run.path, None if restored is None else step, config.train.wandb)
    totals = None if restored is None else restored.totals
    meter = Meter(mesh, began=status.began, productive=log.productive, totals=totals)
    batches = Prefetch(data, mesh)
    with status, closing(checkpoints), closing(best), closing(log), closing(batches), progress:
        begun = "random weights of the shape of " if config.random_start else ""
        progress.say(
            f"{layout}, {accumulate} micro-batch(es); begins with {begun}{config.start}: {start.note}"
        )
        whole = build(config.system, about_model | {"train": "all", "freeze": ()}, len(begin.vocabulary))
        own, full = (
            optimizer_bytes(make_finetune_optimizer(config.optimizer, steps, m)[0], m) for m in (model, whole)
        )
        progress.say(
            f"train = {about_model['train']!r}: {count_parameters(model):,} parameters, optimiser state "
            f"{own / 2**20:,.2f} MiB, {own / full:.1%} of that of full fine-tuning ({full / 2**20:,.2f} MiB)"
        )
        progress.say(f"corpus {corpus.manifest_id}: {loader}; steps {step:,} to {steps:,} in {run.path}")
        while step < steps and not stopping.ended and not leaving:
            with meter.time("input_wait"):
                batch = next(batches)
            state, metrics = train_step(state, batch)
            step += 1
            meter.add(step, metrics)
            progress.advance(step)
            status.at(step)
            leaving = preemption.reached(step) and step < steps
            saving = leaving or config.train.due(config.train.checkpoint_every, step)
            validating = config.train.due(config.train.eval_every, step)
            if saving or validating or config.train.due(config.train.log_every, step):
                means = meter.mean("train")  # raises on a non-finite loss, before anything is saved
                means["train/learning_rate"] = float(schedule(step - 1))
                log.write(step, means)
                progress.show(step, means)
                checkpoints.check()
            if validating:
                held_out = Meter()
                with meter.time("evaluate"), closing(Prefetch(iter(validation), mesh)) as cells:
                    for batch in cells:
                        held_out.add(step, eval_step(state, batch))
                    means = held_out.mean("validation")
                means["validation/error"] = validation_error(means, tasks)
                if stopping(step, means["validation/error"]):
                    best.save(step, state, batches.get_state())
                log.write(step, means)
            if saving and step < steps and not stopping.ended and not meter.skipping:
                best.wait()  # a checkpoint that knows of a best state must find it
                checkpoints.save(step, state, batches.get_state())

        # -------------------------------------------------------------------------- the best state
        report = run.path / "report.json"
        if not leaving and not (over and report.exists()):
            best.wait()
            chosen = best.restore(abstract)
            found = reader.outputs(chosen.state, validation)
            temperatures, judged = calibrate(tasks, found, config.max_error, groups_of(corpus))
            state = put(chosen.state, temperatures) | {"step": state["step"]}
            checkpoints.save(step, state, batches.get_state() | HANDED_OVER)
            checkpoints.wait()
            if process == 0:
                arrays = {f"{name}/{field}": x for name, of in found.items() for field, x in of.items()}
                np.savez_compressed(run.path / "predictions.npz", **arrays)
                told = {"step": stopping.step, "steps": step, "stopped": stopping.ended, "tasks": judged}
                write_text(report, json.dumps(told, indent=1) + "\n")

    # -------------------------------------------------------------------------------- finish
    if process == 0 and not leaving:
        told = json.loads(report.read_text())
        progress.say(f"best of {told['steps']:,} steps is {told['step']:,}; on the validation cells:")
        for name, of in told["tasks"].items():
            numbers = "  ".join(f"{k} {v:.4g}" for k, v in of.items() if isinstance(v, int | float))
            progress.say(f"{name}: {numbers}")
        progress.say(f'next: scjax.annotate(adata, "{run.path}", label_key=...), or scjax.load')
    return not leaving


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    with Preemption() as preemption, together():
        try:
            config = from_config(FinetuneConfig, _CONFIG.value, where="config")
            done = finetune(config, _WORKDIR.value, preemption)
        except (ValueError, KeyError, OSError, FloatingPointError) as error:  # what the user can mend
            raise SystemExit(f"{type(error).__name__}: {error}") from None
    sys.exit(0 if done else REQUEUE)


if __name__ == "__main__":
    app.run(main)
