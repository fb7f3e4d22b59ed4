"""Training: state, step, optimiser, checkpoints, metrics and the run directory.

An experiment puts these together and owns its loop; see ``experiments/pretrain.py``.
"""

from scjax.train.ahead import AheadStep, abstract_batch, compile_ahead, keep_compiled
from scjax.train.checkpoint import CheckpointError, Checkpoints, Restored, checkpoint_steps, restore_variables
from scjax.train.config import DataConfig, RunConfig, TrainConfig, ValidationConfig
from scjax.train.data import as_begun, make_loaders, manifests_of, micro_batches, open_data
from scjax.train.guard import GuardConfig
from scjax.train.metrics import Meter, MetricsLog, NonFiniteLoss, TooManySkipped, read_metrics
from scjax.train.optimizer import (
    OptimizerConfig,
    decay_mask,
    make_optimizer,
    make_schedule,
    moving_average,
)
from scjax.train.preemption import Preemption
from scjax.train.probe import BASELINES, Probe, effective_rank, masked_gap, read_labels, results
from scjax.train.profile import Profile
from scjax.train.progress import RunProgress
from scjax.train.run import (
    Run,
    describe,
    identity,
    open_run,
    read_model,
    read_run,
)
from scjax.train.start import Start, start_from
from scjax.train.state import State, abstract_state, count_parameters, init_state, judged_params, shardings_of
from scjax.train.status import Status
from scjax.train.step import make_eval_step, make_train_step
from scjax.train.tables import GeneTables, gene_tables
from scjax.train.width import grown, model_of

__all__ = [
    "BASELINES",
    "AheadStep",
    "CheckpointError",
    "Checkpoints",
    "DataConfig",
    "GeneTables",
    "GuardConfig",
    "Meter",
    "MetricsLog",
    "NonFiniteLoss",
    "OptimizerConfig",
    "Preemption",
    "Probe",
    "Profile",
    "Restored",
    "Run",
    "RunConfig",
    "RunProgress",
    "Start",
    "State",
    "Status",
    "TooManySkipped",
    "TrainConfig",
    "ValidationConfig",
    "abstract_batch",
    "abstract_state",
    "as_begun",
    "checkpoint_steps",
    "compile_ahead",
    "count_parameters",
    "decay_mask",
    "describe",
    "effective_rank",
    "gene_tables",
    "grown",
    "identity",
    "init_state",
    "judged_params",
    "keep_compiled",
    "make_eval_step",
    "make_loaders",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "manifests_of",
    "masked_gap",
    "micro_batches",
    "model_of",
    "moving_average",
    "open_data",
    "open_run",
    "read_labels",
    "read_metrics",
    "read_model",
    "read_run",
    "restore_variables",
    "results",
    "shardings_of",
    "start_from",
]
