"""Adapting a trained model to tasks: heads, frozen layers, LoRA, task training."""

from scjax.finetune.lora import LoRA, merge
from scjax.finetune.model import Finetuned, FinetunedConfig
from scjax.finetune.tasks import Head, Task

__all__ = ["Finetuned", "FinetunedConfig", "Head", "LoRA", "Task", "merge"]
