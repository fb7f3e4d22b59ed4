"""Pretrain a model on a corpus of cells. Copy this file to change anything about how a run goes.

    python experiments/pretrain.py --config=configs/scgpt.py:smoke --workdir=runs/smoke
    python experiments/pretrain.py --config=configs/scgpt.py --workdir=runs/scgpt --config.model.n_layers=6

The same command resumes a run that was stopped, exactly where its last checkpoint stands, on as many devices
and processes as there are now. ``scjax launch`` starts it on several processes of this machine, on Slurm, on
Kubernetes or on a TPU pod; by hand, start it once per process with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
and JAX_PROCESS_ID set. Told to leave (SIGTERM), it saves and exits with 75: whoever started it is to start it
again.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from contextlib import closing

from absl import app, flags, logging
from ml_collections import config_flags

import scjax
from scjax.config import from_config
from scjax.genes import Vocabulary
from scjax.launch.capture import capture
from scjax.launch.codes import REQUEUE
from scjax.parallel import Prefetch, distributed_start, layout_for, together
from scjax.train import (
    Checkpoints,
    GeneTables,
    Meter,
    MetricsLog,
    Preemption,
    Probe,
    Profile,
    RunConfig,
    RunProgress,
    Status,
    abstract_state,
    as_begun,
    checkpoint_steps,
    compile_ahead,
    count_parameters,
    describe,
    gene_tables,
    identity,
    init_state,
    keep_compiled,
    make_eval_step,
    make_loaders,
    make_optimizer,
    make_train_step,
    manifests_of,
    masked_gap,
    micro_batches,
    model_of,
    open_data,
    open_run,
    read_metrics,
    results,
    start_from,
)

_CONFIG = config_flags.DEFINE_config_file(
    *("config", None, "The config file, FILE.py or FILE.py:ARG."),
    # fields that the file leaves at their defaults can be given too; what is none is told by from_config
    **{"lock_config": False, "accept_new_attributes": True},
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory: new, or that of a run to resume.")
flags.mark_flags_as_required(["config", "workdir"])


def pretrain(config: RunConfig, workdir: str, preemption: Preemption) -> bool:
    """Whether the run is at its end; False where it was told to leave before."""
    process, _ = distributed_start()

    # -------------------------------------------------------------------------- cells and model
    corpus = open_data(config.data, workdir)  # a run that resumes reads what it began with
    begin = scjax.load(config.start) if config.start else None
    if begin is not None:
        vocabulary = begin.vocabulary
        corpus = as_begun(corpus, config.model, begin.config, begin.categories)
    else:
        vocabulary = Vocabulary.from_tsv(config.data.genes) if config.data.genes else corpus.vocabulary
    model, base = model_of(config, len(vocabulary))  # a base where its learning rate comes from one

    # ------------------------------------------------------------------------- devices and data
    layout = layout_for(config.mesh, count_parameters(model))  # the hardware says what the config leaves open
    mesh = layout.mesh
    loader, validation = make_loaders(config, corpus, vocabulary, mesh)
    accumulate = micro_batches(config, model, loader.bucket_lengths[-1], layout)

    # ------------------------------------------------------------------------- the run directory
    tables = GeneTables()  # those of the run that this one begins with
    if begin is None:
        tables = gene_tables(config.system, config.model, config.tables, model, vocabulary, corpus)
    base_of = {"prefix": "base/" if begin and begin.system != config.system else ""}  # a wrapper's base
    start = None if begin is None else start_from(model, begin.params, begin.buffers, **base_of)
    origin = {"corpus": corpus.manifest_id, "manifests": manifests_of(corpus), "tables": tables.sources}
    origin["categories"] = dict(begin.categories) if begin else {}
    origin["categories"] |= {name: corpus.columns[name] for name in loader.labels}
    origin["categories"] |= {name: panel.features for name, panel in loader.panels.items() if panel.named}
    if start is not None:
        origin["start"] = {"source": config.start, "sha256": start.sha256}
    about = describe(config.system, config.model, vocabulary, seed=config.seed, **origin)
    run = open_run(workdir, about, vocabulary)
    keep_compiled(run.path / "compiled" if config.train.compile_cache is None else config.train.compile_cache)

    # -------------------------------------------------------------------------- optimiser and steps
    tx, schedule = make_optimizer(config.optimizer, config.train.steps, model, base)
    abstract = abstract_state(model, tx, mesh, layout.rules, ema=config.optimizer.ema is not None)
    options = {"guard": config.train.guard, "ema": config.optimizer.ema, "accumulate": accumulate}
    train_step = make_train_step(model, tx, abstract, seed=config.seed, layout=layout, **options)
    eval_step = make_eval_step(model, abstract, seed=config.seed, layout=layout)
    probe = None
    if config.train.probe_every is not None:
        if validation is None:
            raise ValueError(f"train.probe_every needs validation cells; {corpus.path} was built without")
        probe = Probe(model, abstract, corpus, validation, config.validation, layout)

    # ------------------------------------------------------------------------------- restore
    data = iter(loader)
    kept = {"keep": config.train.keep, "keep_every": config.train.keep_every}
    checkpoints = Checkpoints(run.checkpoints, identity(about), **kept)
    restored = checkpoints.restore(abstract)
    if restored is None:
        values = tables.buffers | (start.values if start else {})
        step, state = 0, init_state(model, tx, abstract, values)
    else:
        step, state = restored.step, restored.state
        data.set_state(restored.cursor)
    run.record(dataclasses.asdict(config))
    capture(run.path)

    # ---------------------------------------------------------------------------------- loop
    steps, leaving, overdue = config.train.steps, False, False
    status, progress = Status(run.path, step, steps), RunProgress(steps, step)
    log = MetricsLog(run.path, None if restored is None else step, config.train.wandb)
    profile = Profile(run.path, config.train.profile, step)
    totals = None if restored is None else restored.totals
    meter = Meter(mesh, began=status.began, productive=log.productive, totals=totals)
    batches = Prefetch(data, mesh)
    with status, closing(checkpoints), closing(log), closing(profile), closing(batches), progress:
        progress.say(f"{layout}, {accumulate} micro-batch(es)")
        cells = f"corpus {corpus.manifest_id}: {len(corpus):,} cells, {len(vocabulary):,} genes"
        progress.say(f"{cells}; {loader}")
        for note in tables.notes:
            progress.say(f"table {note}")
        if start is not None:
            progress.say(f"begins with {config.start}: {start.note}")
        about_steps = f"steps {step:,} to {steps:,} in {run.path}"
        progress.say(f"{config.system}: {count_parameters(model):,} parameters; {about_steps}")
        if step < steps:  # every length of batch, before the first
            train_step = compile_ahead(train_step, abstract, loader)
            eval_step = compile_ahead(eval_step, abstract, validation) if validation else eval_step
            progress.say(f"training step: {train_step}")
            schedule(step)  # compiles, too
        if probe is not None and step == 0:
            progress.say(probe.about)
            log.write(step, probe(state))  # where the curves start: what the architecture alone can do
        while step < steps and not leaving:
            with meter.time("input_wait"):
                batch = next(batches)
            state, metrics = train_step(state, batch)
            step += 1
            profile.after(step, metrics)
            meter.add(step, metrics)  # reads the step before, while the device is at this one
            progress.advance(step)
            status.at(step)
            leaving = preemption.reached(step)
            saving = overdue or config.train.due(config.train.checkpoint_every, step)
            validating = validation is not None and config.train.due(config.train.eval_every, step)
            probing = probe is not None and config.train.due(config.train.probe_every, step)

            if saving or validating or probing or config.train.due(config.train.log_every, step):
                means = meter.mean("train")  # raises on a non-finite loss, before anything is saved
                taken = step - int(means.get("train/skipped_total", 0))
                means["train/learning_rate"] = float(schedule(taken - 1))
                log.write(step, means)
                progress.show(step, means)
                checkpoints.check()

            if leaving:  # before all else: there may be little time
                totals = meter.totals()
                if not meter.skipping:
                    checkpoints.save(step, state, batches.get_state(), totals)
                    progress.say(f"told to leave: saving step {step:,}")

            if validating:
                held_out = Meter()
                with meter.time("evaluate"), closing(Prefetch(iter(validation), mesh)) as cells:
                    for batch in itertools.islice(cells, config.validation.max_batches):
                        held_out.add(step, eval_step(state, batch))
                    means = held_out.mean("validation")
                log.write(step, means | masked_gap(means))

            if probing:
                with meter.time("evaluate"):
                    log.write(step, probe(state))

            # a step that wrecked the model shows in those after it, which are skipped: not before a good one
            overdue = saving and meter.skipping and step < steps
            if saving and not overdue:
                with meter.time("checkpoint"):
                    checkpoints.save(step, state, batches.get_state())

    # -------------------------------------------------------------------------------- finish
    if process == 0 and not leaving:
        for line in results(read_metrics(run.metrics), "validation" if validation else "train"):
            progress.say(line)
        progress.say(f"model and metrics are in {run.path}; checkpoints {checkpoint_steps(run.checkpoints)}")
        progress.say(
            f'next: scjax.load("{run.path}"), or scjax embed IN.h5ad --model {run.path} --out OUT.h5ad'
        )
    return not leaving


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # JAX would tell of every kind of device that is not here
    with Preemption() as preemption, together():
        try:
            config = from_config(RunConfig, _CONFIG.value, where="config")
            done = pretrain(config, _WORKDIR.value, preemption)
        except (ValueError, KeyError, OSError, FloatingPointError) as error:  # what the user can mend
            raise SystemExit(f"{type(error).__name__}: {error}") from None
    sys.exit(0 if done else REQUEUE)


if __name__ == "__main__":
    app.run(main)
