"""Pretrain a model on a corpus of cells. Copy this file to change anything about how a run goes.

    python experiments/pretrain.py --config=configs/scgpt.py:smoke --workdir=runs/smoke
    python experiments/pretrain.py --config=configs/scgpt.py --workdir=runs/scgpt --config.model.n_layers=6

The same command resumes a run that was stopped, exactly where its last checkpoint stands. On several
machines start it once per process, under Slurm or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID set.
"""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import closing

from absl import app, flags, logging
from ml_collections import config_flags

from scjax.config import from_config
from scjax.genes import Vocabulary
from scjax.loader import Loader
from scjax.models import build
from scjax.parallel import distributed_start, make_mesh, place, process_shard, summary
from scjax.train import (
    BASELINES,
    Checkpoints,
    Meter,
    MetricsLog,
    Probe,
    RunConfig,
    RunProgress,
    abstract_state,
    checkpoint_steps,
    count_parameters,
    describe,
    gene_tables,
    identity,
    init_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
    manifests_of,
    masked_gap,
    open_data,
    open_run,
    read_metrics,
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, FILE.py or FILE.py:ARG.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory: new, or that of a run to resume.")
flags.mark_flags_as_required(["config", "workdir"])


def pretrain(config: RunConfig, workdir: str) -> None:
    # ------------------------------------------------------------------------------- devices
    process, _ = distributed_start()
    mesh = make_mesh(config.mesh)
    process_index, process_count = process_shard(mesh)  # which rows of each batch are read here

    # ---------------------------------------------------------------------------------- data
    corpus = open_data(config.data, workdir)  # a run that resumes reads what it began with
    vocabulary = Vocabulary.from_tsv(config.data.genes) if config.data.genes else corpus.vocabulary
    processes = {"process_index": process_index, "process_count": process_count}
    loader = Loader(corpus, vocabulary=vocabulary, seed=config.seed, **config.data.loader(), **processes)
    validation = None
    if any(part.n_cells for part in corpus.split("validation")):
        validation = Loader(
            corpus,
            config.validation.batch_size or config.data.batch_size,
            vocabulary=vocabulary,
            seed=config.seed,
            split="validation",
            max_genes=config.data.max_genes,
            labels=config.data.labels,
            shuffle=False,
            epochs=1,
            **processes,
        )

    # --------------------------------------------------------------------------------- model
    model = build(config.system, config.model, len(vocabulary), config.seed)
    tables = gene_tables(config.system, config.model, config.tables, model, vocabulary, corpus)
    origin = {"corpus": corpus.manifest_id, "manifests": manifests_of(corpus), "tables": tables.sources}
    about = describe(config.system, config.model, vocabulary, seed=config.seed, **origin)
    run = open_run(workdir, about, vocabulary)

    # --------------------------------------------------------------------- optimiser and state
    tx, schedule = make_optimizer(config.optimizer, config.train.steps, model)
    abstract = abstract_state(model, tx, mesh)
    train_step = make_train_step(model, tx, abstract, seed=config.seed, accumulate=config.train.accumulate)
    eval_step = make_eval_step(model, abstract, seed=config.seed)
    probe = None
    if config.train.probe_every is not None:
        if validation is None:
            raise ValueError(f"train.probe_every needs validation cells; {corpus.path} was built without")
        probe = Probe(model, abstract, corpus, validation, config.validation)

    # ------------------------------------------------------------------------------- restore
    data = iter(loader)
    checkpoints = Checkpoints(run.checkpoints, identity(about), keep=config.train.keep)
    restored = checkpoints.restore(abstract)
    if restored is None:
        step, state = 0, init_state(model, tx, abstract, tables.buffers)
    else:
        step, state = restored.step, restored.state
        data.set_state(restored.cursor)
    run.record(dataclasses.asdict(config))

    steps = config.train.steps
    log, progress = MetricsLog(run.path, step), RunProgress(steps, step)
    progress.say(summary(mesh))
    progress.say(
        f"corpus {corpus.manifest_id}: {len(corpus):,} cells, {len(vocabulary):,} genes; an epoch is "
        f"{loader.steps_per_epoch:,} batches of {loader.batch_size} cells, padded to {loader.bucket_lengths} "
        f"genes; {loader.over_read:.2f} cells are decoded for each"
    )
    for note in tables.notes:
        progress.say(f"table {note}")
    progress.say(
        f"{config.system}: {count_parameters(state):,} parameters; steps {step:,} to {steps:,} in {run.path}"
    )

    # ---------------------------------------------------------------------------------- loop
    meter = Meter()
    with closing(checkpoints), closing(log), closing(data), progress:
        if probe is not None and step == 0:
            progress.say(probe.about)
            log.write(step, probe(state))  # where the curves start: what the architecture alone can do
        while step < steps:
            state, metrics = train_step(state, place(next(data), mesh))
            step += 1
            meter.add(step, metrics)  # reads the step before, while the device is at this one
            progress.advance(step)
            saving = config.train.due(config.train.checkpoint_every, step)
            validating = validation is not None and config.train.due(config.train.eval_every, step)
            probing = probe is not None and config.train.due(config.train.probe_every, step)

            if saving or validating or probing or config.train.due(config.train.log_every, step):
                means = meter.mean("train")  # raises on a non-finite loss, before anything is saved
                means["train/learning_rate"] = float(schedule(step - 1))
                if meter.cells_per_second:
                    means["throughput/cells_per_second"] = meter.cells_per_second
                log.write(step, means)
                progress.report(step, means["train/loss"], meter.cells_per_second)
                checkpoints.check()

            if validating:
                held_out = Meter()
                with closing(iter(validation)) as batches:
                    for batch in itertools.islice(batches, config.validation.max_batches):
                        held_out.add(step, eval_step(state, place(batch, mesh)))
                means = held_out.mean("validation")
                log.write(step, means | masked_gap(means))

            if probing:
                log.write(step, probe(state))

            if saving:
                checkpoints.save(step, state, data.get_state())
            if validating or probing or saving:
                meter.restart_clock()

    # -------------------------------------------------------------------------------- finish
    if process != 0:
        return
    last: dict[str, float] = {}
    for line in read_metrics(run.metrics):
        last.update({name: value for name, value in line.items() if value is not None})
    progress.say("  ".join(f"{name} {value:.4g}" for name, value in last.items() if name != "step"))
    split = "validation" if validation is not None else "train"
    for metric, baseline in BASELINES.items():
        error, least = last.get(f"{split}/{metric}"), last.get(f"{split}/{baseline}")
        if error is not None and least:
            progress.say(
                f"{split}: masked error {error:.4f} ({metric}), that of knowing nothing {least:.4f} "
                f"({baseline}); gap {least - error:+.4f} ({(least - error) / least:+.0%})"
            )
    progress.say(f"model and metrics are in {run.path}; checkpoints {checkpoint_steps(run.checkpoints)}")
    progress.say(f'next: scjax.load("{run.path}"), or scjax embed IN.h5ad --model {run.path} --out OUT.h5ad')


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # JAX would tell of every kind of device that is not here
    try:
        pretrain(from_config(RunConfig, _CONFIG.value, where="config"), _WORKDIR.value)
    except (ValueError, KeyError, OSError, FloatingPointError) as error:  # what the user can mend
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    app.run(main)
