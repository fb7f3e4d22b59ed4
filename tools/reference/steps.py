"""One training step of each system in PyTorch, to race against: tuned, and by the original's own code.

A contestant is a function without arguments that runs forward and backward pass, clipping and AdamW, and
returns the loss. It is given scjax's own tokens (the same genes, hidden ones, lengths and padding) as
tensors: encoding costs it nothing. "tuned" is :mod:`reference.tuned` with the fused AdamW; "original" takes
the modules of the parity references beside this file, with heads at all positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reference.tuned import Run, Tuned, celllm_inputs, contrast
from torch import nn

Step = Callable[[], float]


class Original:
    """As :class:`Tuned`, from the modules of the parity references."""

    @staticmethod
    def scgpt(c: Any, n: int, t: dict[str, torch.Tensor], device: str) -> tuple[nn.Module, Run]:
        from reference import scgpt as reference

        size = {
            "n_genes": n,
            "d_model": c.d_model,
            "n_heads": c.n_heads,
            "n_layers": c.n_layers,
            "d_ff": c.d_ff,
        }
        model = reference.build(jitter=0.0, n_cls=1, **size).to(device).train()
        _set_dropout(model, c.dropout)
        cls = lambda x, value: F.pad(x, (1, 0), value=value)  # noqa: E731
        gene_id, hidden, target = cls(t["gene_id"], n + 1), cls(t["hidden"], False), cls(t["target"], 0.0)
        read = {
            "src": torch.where(gene_id < 0, n, gene_id),
            "values": cls(t["value"], c.cls_value),
            "src_key_padding_mask": gene_id < 0,
        }

        def loss(model: nn.Module) -> torch.Tensor:
            out = model(**read, MVC=True)
            return sum(
                F.mse_loss(out[k][hidden].float(), target[hidden]) for k in ("mlm_output", "mvc_output")
            )

        return model, loss

    @staticmethod
    def geneformer(c: Any, n: int, t: dict[str, torch.Tensor], device: str) -> tuple[nn.Module, Run]:
        from reference import geneformer as reference

        size = n + (4 if c.specials else 2)
        model = reference.build(
            jitter=0.0,
            vocab_size=size,
            hidden_size=c.d_model,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            intermediate_size=c.d_ff,
            max_position_embeddings=c.max_length,
        )
        model = model.to(device).train()
        _set_dropout(model, c.dropout)
        cell, slot = torch.nonzero(t["hidden"], as_tuple=True)
        labels = torch.full_like(t["token"], -100)
        labels[cell, t["position"][cell, slot]] = t["target"][cell, slot]
        read = {"input_ids": t["token"], "attention_mask": t["real"].long(), "labels": labels}
        return model, lambda model: model(**read).loss

    @staticmethod
    def scbert(c: Any, n: int, t: dict[str, torch.Tensor], device: str) -> tuple[nn.Module, Run]:
        from reference import scbert as reference

        size = {"n_genes": n, "d_model": c.d_model, "n_heads": c.n_heads, "n_layers": c.n_layers}
        model = reference.build(jitter=0.0, sharp=1.0, d_head=c.d_head, **size).to(device).train()
        model.pos_emb.requires_grad_(False)
        cell, slot = torch.nonzero(t["hidden"], as_tuple=True)
        labels = torch.full_like(t["shown"], -100)
        labels[cell, t["gene_id"][cell, slot]] = t["target"][cell, slot]

        def loss(model: Any) -> torch.Tensor:
            return F.cross_entropy(model.to_out(model.hidden(t["shown"])).transpose(1, 2), labels)

        return model, loss

    @staticmethod
    def celllm(c: Any, n: int, t: dict[str, torch.Tensor], device: str) -> tuple[nn.Module, Run]:
        from reference import celllm as reference

        size = {"n_genes": n, "d_model": c.d_model, "n_heads": c.n_heads, "n_layers": c.n_layers}
        model = reference.build(jitter=0.0, sharp=1.0, d_head=c.d_head, **size).to(device).train()
        model.pos_emb.requires_grad_(False)
        for part in model.modules():  # its own places of dropout, all 0 by default
            if isinstance(part, nn.Dropout):
                part.p = c.dropout
        token, place = celllm_inputs(n, t, 2)
        labels = torch.where(t["hidden"], t["target"], -100).repeat_interleave(2, 0)

        def loss(model: Any) -> torch.Tensor:
            x = model.hidden(token, place)
            masked = F.cross_entropy(model.to_out(x)[:, 1:].transpose(1, 2), labels)
            return masked + contrast(x[:, 0], c.temperature)

        return model, loss

    @staticmethod
    def scfoundation(c: Any, n: int, t: dict[str, torch.Tensor], device: str) -> tuple[nn.Module, Run]:
        from reference import scfoundation as reference

        names = ("d_model", "n_heads", "n_layers", "n_bins", "bin_alpha")
        size = {
            name: getattr(c, name) for name in (*names, *(k for k in vars(c) if k.startswith("decoder_")))
        }
        size.pop("decoder_d_ff")
        model = reference.build(jitter=0.0, n_genes=n, **size).to(device).train()
        _set_dropout(model.encoder, c.dropout)
        ends = torch.tensor([n, n + 1], device=device).expand(len(t["gene_id"]), 2)
        place = torch.cat([torch.where(t["gene_id"] < 0, n + 2, t["gene_id"]), ends], 1)
        value = torch.cat([torch.where(t["gene_id"] < 0, reference.PAD, t["value"]), t["depth"]], 1)
        shown = torch.zeros(len(place), n + 2, device=device)
        cell, slot = torch.nonzero(t["direct_id"] >= 0, as_tuple=True)
        what = torch.where(t["direct_hidden"], reference.MASK, t["direct_value"])
        shown[cell, t["direct_id"][cell, slot]] = what[cell, slot]
        asked = slot < t["target"].shape[1]
        hidden = torch.zeros(shown.shape, dtype=torch.bool, device=device)
        target = torch.zeros_like(shown)
        site = cell[asked], t["direct_id"][cell[asked], slot[asked]]
        hidden[site], target[site] = True, t["target"][cell[asked], slot[asked]]

        def loss(model: Any) -> torch.Tensor:
            out = model.to_final(model.decode(shown, place, model.encode(value, place)))[..., 0]
            return F.mse_loss(out[hidden], target[hidden])

        return model, loss


def _set_dropout(model: nn.Module, rate: float) -> None:
    """Everywhere, on attention weights too, as the originals have it."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = rate
        elif isinstance(part, nn.MultiheadAttention):
            part.dropout = rate


# --------------------------------------------------------------------------------------- step
def contestant(
    kind: str,
    system: str,
    config: Any,
    n_genes: int,
    tokens: Any,
    *,
    device: str,
    bfloat16: bool,
    compiled: bool,
) -> Step:
    """The training step of one system.

    Args:
      kind: "tuned", "original", or "flash": tuned, with PyTorch's FlashAttention and without a mask.
      system: its name in :data:`scjax.models.SYSTEMS`.
      config: of scjax's model.
      n_genes: size of the vocabulary.
      tokens: scjax's own, arrays of numpy.
      device: "cpu" or "cuda".
      bfloat16: products in bfloat16 under autocast.
      compiled: by ``torch.compile``.
    """
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for name, array in vars(tokens).items():
        if isinstance(array, np.ndarray) and array.ndim:
            tensor = torch.from_numpy(np.array(array))
            found[name] = (tensor.long() if tensor.dtype == torch.int32 else tensor).to(device)
    found["dtype"] = torch.bfloat16 if bfloat16 else torch.float32
    found["flash"] = kind == "flash"
    module, loss = getattr(Original if kind == "original" else Tuned, system)(config, n_genes, found, device)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=kind != "original" or None)
    run = torch.compile(loss) if compiled else loss
    cast: Any = torch.autocast(device, torch.bfloat16) if bfloat16 else contextlib.nullcontext()

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        with cast:
            value = run(module)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        return value.item()  # waits for the device

    return step
