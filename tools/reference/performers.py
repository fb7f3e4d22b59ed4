"""What the references of scBERT, CellLM and scFoundation share: performer-pytorch and its names."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

with warnings.catch_warnings():  # of distutils, deprecated since this package was written
    warnings.simplefilter("ignore")
    from performer_pytorch import Performer

__all__ = ["Performer", "Table", "one_maximum", "shaken", "state"]


class Table(nn.Module):
    """Vectors of genes and special tokens; float64, as the published files store them."""

    def __init__(self, n: int, d: int):
        super().__init__()
        self.emb = nn.Embedding(n, d, dtype=torch.float64)


def shaken(model: nn.Module, jitter: float, sharp: float, rounded: str) -> Any:
    """In evaluation mode, every parameter jittered, queries and keys ``sharp`` times as long so that the
    stabilisers differ; layers with ``rounded`` in their names rounded, so that a file of them is small."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(jitter * torch.randn_like(parameter))
            if "to_q" in name or "to_k" in name:
                parameter.mul_(sharp)
            if rounded in name:
                parameter.copy_((parameter * 16).round() / 16)
    return model.eval()


def state(model: nn.Module) -> dict[str, np.ndarray]:
    """Tensors under the names of the published file (performer-pytorch keeps each projection twice)."""
    renamed = {k.replace("proj_updater.calls", "calls"): v for k, v in model.state_dict().items()}
    return {k: v.detach().clone().numpy() for k, v in renamed.items() if ".proj_updater." not in k}


@contextlib.contextmanager
def one_maximum() -> Iterator[None]:
    """The stabiliser of the published models: the maximum over all of a batch, heads and tokens."""
    amax = torch.amax

    def patched(x: torch.Tensor, dim: Any, keepdim: bool = False) -> torch.Tensor:
        return x.max() if isinstance(dim, tuple) else amax(x, dim=dim, keepdim=keepdim)

    with mock.patch.object(torch, "amax", patched):
        yield
