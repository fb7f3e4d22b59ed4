"""Adapting a trained model to tasks: heads, frozen layers, LoRA, task training."""
