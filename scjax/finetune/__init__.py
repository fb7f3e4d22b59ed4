"""Adapting a trained model to tasks: heads, frozen layers, LoRA, task training, calibration."""

from scjax.finetune.calibration import Rule, fit_temperature, judge, reliability, unassigned_rule
from scjax.finetune.fit import FitConfig, base_of, fit, predict
from scjax.finetune.genes import gene_targets, read_targets
from scjax.finetune.lora import LoRA, merge
from scjax.finetune.model import Finetuned, FinetunedConfig
from scjax.finetune.rates import layer_rates, make_finetune_optimizer, optimizer_bytes
from scjax.finetune.run import (
    HANDED_OVER,
    SYSTEM,
    FinetuneConfig,
    Reader,
    Stopping,
    calibrate,
    check_end,
    complete,
    frequencies,
    groups_of,
    prepare,
    put,
    validation_error,
)
from scjax.finetune.tasks import Head, Task

__all__ = [
    "HANDED_OVER",
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
    "check_end",
    "complete",
    "fit",
    "fit_temperature",
    "frequencies",
    "gene_targets",
    "groups_of",
    "judge",
    "layer_rates",
    "make_finetune_optimizer",
    "merge",
    "optimizer_bytes",
    "predict",
    "prepare",
    "put",
    "read_targets",
    "reliability",
    "unassigned_rule",
    "validation_error",
]
