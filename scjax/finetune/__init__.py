"""Adapting a trained model to tasks: heads, frozen layers, LoRA, task training, calibration."""

from scjax.finetune.calibration import Rule, fit_temperature, judge, reliability, unassigned_rule
from scjax.finetune.fit import FitConfig, base_of, fit, predict
from scjax.finetune.genes import gene_targets, read_targets
from scjax.finetune.lora import LoRA, merge
from scjax.finetune.model import Finetuned, FinetunedConfig
from scjax.finetune.rates import layer_rates, make_finetune_optimizer, optimizer_bytes
from scjax.finetune.run import (
    SYSTEM,
    FinetuneConfig,
    Reader,
    Stopping,
    calibrate,
    complete,
    frequencies,
    put,
    validation_error,
)
from scjax.finetune.tasks import Head, Task

__all__ = [
    "SYSTEM",
    "FinetuneConfig",
    "Finetuned",
    "FinetunedConfig",
    "FitConfig",
    "Head",
    "LoRA",
    "Reader",
    "Rule",
    "Stopping",
    "Task",
    "base_of",
    "calibrate",
    "complete",
    "fit",
    "fit_temperature",
    "frequencies",
    "gene_targets",
    "judge",
    "layer_rates",
    "make_finetune_optimizer",
    "merge",
    "optimizer_bytes",
    "predict",
    "put",
    "read_targets",
    "reliability",
    "unassigned_rule",
    "validation_error",
]
