"""scGPT's network from its own package, with random weights, to compare with.

    python tools/reference/scgpt.py       # writes tests/golden/scgpt.npz anew

``scgpt/model/model.py`` of the package on PyPI is loaded by itself: the package as a whole wants what no
longer installs. The class for pretraining is not in the package; :func:`generative` states its forward pass
anew, with PyTorch's attention under a mask of all pairs of tokens. :func:`full` compares at full size.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import pathlib
import sys
import types
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "scgpt.npz"
SMALL = {"n_genes": 40, "d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24}
PUBLISHED_SIZE = {"n_genes": 60_694, "d_model": 512, "n_heads": 8, "n_layers": 12, "d_ff": 512}
PUBLISHED = 51_856_898
TOLERANCE = 2e-5
MASK, PAD = -1.0, -2.0
N_BATCHES, N_CLASSES, ECS_THRESHOLD = 2, 3, 0.3
FINETUNING = {
    "domain_spec_batchnorm": "dsbn",
    "use_batch_labels": True,
    "do_dab": True,
    "explicit_zero_prob": True,
}
LEARNING_RATE, EPSILON = 1e-2, 1e-4  # the epsilon of scGPT's fine-tuning


def original() -> Any:
    """The module ``scgpt.model.model`` of the installed package."""
    if "scgpt_original.model" in sys.modules:
        return sys.modules["scgpt_original.model"]
    try:
        folder = pathlib.Path(str(importlib.metadata.distribution("scgpt").locate_file("scgpt/model")))
    except importlib.metadata.PackageNotFoundError as error:
        told = "the reference needs the package scgpt: pip install --no-deps scgpt==0.2.4"
        raise ImportError(told) from error
    package = types.ModuleType("scgpt_original")
    package.__path__ = [str(folder)]
    sys.modules["scgpt_original"] = package
    for name in ("dsbn", "grad_reverse", "model"):
        spec = importlib.util.spec_from_file_location(f"scgpt_original.{name}", folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = sys.modules[f"scgpt_original.{name}"] = importlib.util.module_from_spec(spec)
        with warnings.catch_warnings():  # that there is no flash attention
            warnings.simplefilter("ignore")
            spec.loader.exec_module(module)
    return sys.modules["scgpt_original.model"]


def build(*, seed: int = 0, jitter: float = 0.1, pretraining: bool = False, **options: Any) -> nn.Module:
    """A model without dropout, every parameter and running statistic jittered.

    Args:
      seed: of its weights.
      jitter: their standard deviation, around where they start.
      pretraining: the class with a flag embedding and without the head for classes.
      **options: sizes as in :data:`SMALL`, ``n_cls``, and those of the original class.
    """
    sizes = {name: options.pop(name, size) for name, size in SMALL.items()}
    n = sizes["n_genes"]
    torch.manual_seed(seed)
    torch.backends.mha.set_fastpath_enabled(False)  # it would zero what stands at padding
    make = original().TransformerModel
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints which norm it has
        warnings.simplefilter("ignore")
        model = make(
            n + 3,
            sizes["d_model"],
            sizes["n_heads"],
            sizes["d_ff"],
            sizes["n_layers"],
            vocab={"<pad>": n, "<cls>": n + 1, "<eoc>": n + 2},
            dropout=0.0,
            pad_value=int(PAD),
            do_mvc=True,
            num_batch_labels=N_BATCHES,
            ecs_threshold=ECS_THRESHOLD,
            **({"n_cls": N_CLASSES} | options),
        )
    if pretraining:
        model.flag_encoder = nn.Embedding(2, sizes["d_model"])
        del model.cls_decoder
    model.n_genes, model.n_heads = n, sizes["n_heads"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(jitter * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.add_(0.5 * torch.rand_like(buffer) if "var" in name else torch.randn_like(buffer))
    return model


def state(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().clone().numpy() for name, tensor in model.state_dict().items()}


def cells(
    seed: int = 0, n: int = 5, slots: int = 24, n_genes: int = SMALL["n_genes"]
) -> dict[str, np.ndarray]:
    """Tokens of ``n`` cells with unlike numbers of genes; at most half are hidden and those come first.

    ``generative_id``, ``generative_target`` hold the same genes, the hidden ones in the first half of the
    slots and padded there. Values are bins; the first one hidden is 0, a gene that is not expressed.
    """
    rng = np.random.default_rng(seed)
    room = slots // 2
    out = {
        "gene_id": np.full((n, slots), -1, np.int32),
        "target": np.zeros((n, slots), np.float32),
        "hidden": np.zeros((n, slots), bool),
        "generative_id": np.full((n, slots), -1, np.int32),
        "generative_target": np.zeros((n, slots), np.float32),
        "label": (np.arange(n) % N_BATCHES).astype(np.int32)[::-1].copy(),
    }
    for i, k in enumerate([slots, *rng.integers(slots // 3, slots, n - 1)]):
        genes, values = rng.choice(n_genes, k, replace=False), rng.integers(1, 51, k).astype(np.float32)
        hidden = k // 2
        values[0] = 0
        out["gene_id"][i, :k], out["target"][i, :k], out["hidden"][i, :hidden] = genes, values, True
        for name, of in (("generative_id", genes), ("generative_target", values)):
            out[name][i, :hidden], out[name][i, room : room + k - hidden] = of[:hidden], of[hidden:]
    return out


def tensors(batch: dict[str, np.ndarray], n_genes: int, cls: float) -> dict[str, torch.Tensor]:
    """Arguments of the original's forward pass: CLS before the genes, hidden values at -1."""
    gene_id = np.pad(batch["gene_id"], ((0, 0), (1, 0)), constant_values=n_genes + 1)
    value = np.where(batch["hidden"], MASK, np.where(batch["gene_id"] < 0, PAD, batch["target"]))
    value = np.pad(value, ((0, 0), (1, 0)), constant_values=cls).astype(np.float32)
    return {
        "src": torch.from_numpy(np.where(gene_id < 0, n_genes, gene_id).astype(np.int64)),
        "values": torch.from_numpy(value),
        "src_key_padding_mask": torch.from_numpy(gene_id < 0),
    }


def masked(model: nn.Module, batch: dict[str, np.ndarray], cls: float = 0.0) -> dict[str, torch.Tensor]:
    """The original's own forward pass, every head on, and the loss of its fine-tuning."""
    read = tensors(batch, model.n_genes, cls)
    label = torch.from_numpy(batch["label"].astype(np.int64))
    told = {"batch_labels": label} if model.use_batch_labels or model.domain_spec_batchnorm else {}
    out = dict(model(**read, **told, CLS=True, MVC=True, ECS=True))
    out["states"] = model._encode(**read, **told) if not model.training else out["mlm_output"]
    hidden = torch.from_numpy(np.pad(batch["hidden"], ((0, 0), (1, 0))))
    target = torch.from_numpy(np.pad(batch["target"], ((0, 0), (1, 0))))

    def mse(x: torch.Tensor) -> torch.Tensor:
        return ((x - target)[hidden] ** 2).mean()

    def nll(p: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy(p[hidden], (target > 0).float()[hidden])

    loss = mse(out["mlm_output"]) + mse(out["mvc_output"]) + 10 * out["loss_ecs"]
    if model.explicit_zero_prob:
        loss = loss + nll(out["mlm_zero_probs"]) + nll(out["mvc_zero_probs"])
    if model.do_dab:
        loss = loss + F.cross_entropy(out["dab_output"], label)
    return out | {"loss": loss}


def generative(
    model: nn.Module, batch: dict[str, np.ndarray], second: bool = True
) -> dict[str, torch.Tensor]:
    """The forward pass of pretraining: unknown genes in the first half of the slots, CLS behind them."""
    room = batch["generative_id"].shape[1] // 2
    n, size = model.n_genes, len(batch["generative_id"])
    cls = np.full((size, 1), n + 1)
    gene_id = np.concatenate([batch["generative_id"][:, :room], cls, batch["generative_id"][:, room:]], 1)
    padding = torch.from_numpy(gene_id < 0)
    gene = model.encoder(torch.from_numpy(np.where(gene_id < 0, n, gene_id).astype(np.int64)))
    value = np.where(batch["generative_id"] < 0, PAD, batch["generative_target"])[:, room:]
    value = np.concatenate([np.full((size, 1), PAD), value], 1).astype(np.float32)
    known = gene[:, room:] + model.value_encoder(torch.from_numpy(value))
    unknown = gene[:, :room] + model.flag_encoder.weight[1]
    total = room + known.shape[1]

    may = torch.zeros(total, total, dtype=torch.bool)  # row may attend to column
    may[:, room:] = True
    may[:room, :room] = torch.eye(room, dtype=torch.bool)
    may = may & ~padding[:, None, :]
    may |= torch.eye(total, dtype=torch.bool)  # padding sees itself, so that no row is without a key

    def transform(x: torch.Tensor) -> torch.Tensor:
        for layer in model.transformer_encoder.layers:
            q, k, v = F.linear(x, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias).chunk(3, -1)
            q, k, v = (t.unflatten(-1, (model.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=may[:, None]).transpose(1, 2).flatten(2)
            projected = layer.self_attn.out_proj(heads)
            x = layer.norm1(x + torch.cat([heads[:, :room], projected[:, room:]], 1))
            x = layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))
        return x

    x = torch.cat([unknown, known], 1)
    states = transform(x)
    cell = states[:, room]
    out = {
        "states": states,
        "cell_emb": cell,
        "gen_preds": model.decoder(states[:, :room])["pred"],
        "mvc_output": model.mvc_decoder(cell, gene[:, :room])["pred"],
    }
    again = torch.cat([x[:, :room], cell.detach()[:, None], x[:, room + 1 :]], 1)
    out["second_preds"] = model.decoder(transform(again)[:, :room])["pred"]
    wanted = torch.from_numpy(batch["generative_id"][:, :room] >= 0)
    target = torch.from_numpy(batch["generative_target"][:, :room])
    names = ["gen_preds", "mvc_output"] + ["second_preds"] * second
    out["loss"] = sum(((out[name] - target)[wanted] ** 2).mean() for name in names)
    return out


def train(model: nn.Module, forward: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradient of the loss and tensors after one step of Adam, the gradient clipped to length 1."""
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, eps=EPSILON)
    loss = forward(model, batch)["loss"]
    loss.backward()
    out = {"loss": loss.detach().numpy()}
    out |= {
        f"gradient/{k}": p.grad.clone().numpy() for k, p in model.named_parameters() if p.grad is not None
    }
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return out | {f"after/{name}": tensor for name, tensor in state(model).items()}


def arrays(outputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in outputs.items()}


def golden(seed: int = 0) -> dict[str, np.ndarray]:
    """Everything in the golden file: both models, what they give, and a step of training of each.

    "own": one batch of cells at a time, so that each cell is normalised by the statistics of its own batch;
    "first": all at once, by those of the first cell's.
    """
    batch = cells(seed + 1)
    out = dict(batch)
    model = build(seed=seed, **FINETUNING)
    out |= {f"masked/weights/{k}": v for k, v in state(model).items()}
    model.eval()
    with torch.no_grad():
        out |= {f"masked/first/{k}": v for k, v in arrays(masked(model, batch)).items()}
        own: dict[str, np.ndarray] = {}
        for label in range(N_BATCHES):
            rows = np.flatnonzero(batch["label"] == label)
            found = arrays(masked(model, {name: array[rows] for name, array in batch.items()}))
            for name, array in found.items():
                if array.ndim:
                    own.setdefault(name, np.zeros((len(batch["label"]), *array.shape[1:]), np.float32))[
                        rows
                    ] = array
        out |= {f"masked/own/{k}": v for k, v in own.items()}
    out |= {f"masked/step/{k}": v for k, v in train(model, masked, batch).items()}
    model = build(seed=seed + 1, pretraining=True)
    out |= {f"generative/weights/{k}": v for k, v in state(model).items()}
    with torch.no_grad():
        out |= {f"generative/out/{k}": v for k, v in arrays(generative(model, batch)).items()}
    return out | {f"generative/step/{k}": v for k, v in train(model, generative, batch).items()}


def full(slots: int = 256) -> dict[str, Any]:
    """The published size with random weights, two cells: fine-tuning's forward pass and pretraining's."""
    import jax

    from scjax import models
    from scjax.interop import scgpt as interop
    from scjax.interop.mapping import import_tensors
    from scjax.models.scgpt import Tokens
    from scjax.nn import bind, shapes_of

    n_genes, room = PUBLISHED_SIZE["n_genes"], slots // 2
    batch = cells(0, 2, slots, n_genes)
    theirs = build(jitter=0.02, n_cls=1, **PUBLISHED_SIZE).eval()
    parameters = sum(p.numel() for p in theirs.parameters())
    assert parameters == PUBLISHED, parameters
    error = {}
    for case in ("masked", "generative"):
        if case == "generative":
            theirs.flag_encoder = nn.Embedding(2, PUBLISHED_SIZE["d_model"])
        found = state(theirs)
        config, _ = interop.settings({"nheads": PUBLISHED_SIZE["n_heads"]}, found, "the reference")
        assert config["objective"] == case
        model = models.build("scgpt", config | {"mask_fractions": (0.5,)}, n_genes)
        rules, shapes = interop.rules(config, n_genes), shapes_of(model)
        fill = {f"buffers/{name}": 0 for name in ("gene_mean/total", "gene_mean/count", "calls")}
        variables, _ = import_tensors(rules, found, shapes, interop.IGNORED, fill)
        count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
        assert case == "generative" or count == PUBLISHED, count
        module = bind(model, **jax.tree.map(jax.numpy.asarray, variables))
        module.eval()
        with torch.no_grad():
            expected = arrays((generative if case == "generative" else masked)(theirs, batch))
        tokens = tokens_of(batch, case, Tokens)
        with jax.default_matmul_precision("highest"):
            cell, genes = jax.jit(module)(tokens)
            values, _ = jax.jit(module.decoder)(genes)
            told, _ = jax.jit(module.mvc)(module.gene_embedding(tokens.gene_id), cell)
        own = np.asarray(tokens.gene_id) >= 0
        states = np.delete(expected["states"], room if case == "generative" else 0, axis=1)
        pairs = {"cell": (cell, expected["cell_emb"]), "states": (genes[own], states[own])}
        if case == "generative":
            own = own[:, :room]
            pairs["values"] = (values[:, :room][own], expected["gen_preds"][own])
            pairs["mvc"] = (told[:, :room][own], expected["mvc_output"][own])
        else:
            pairs["values"] = (values[own], expected["mlm_output"][:, 1:][own])
            pairs["mvc"] = (told[own], expected["mvc_output"][:, 1:][own])
            pairs["classes"] = (module.head(cell), expected["cls_output"])
        for name, (x, y) in pairs.items():
            error[f"{case}/{name}"] = float(np.abs(np.asarray(x) - y).max())
    return {"system": "scgpt", "parameters": parameters, "max_abs": error, "tolerance": TOLERANCE}


def tokens_of(batch: dict[str, np.ndarray], case: str, kind: Any) -> Any:
    """The batch as scjax's network reads it; ``kind`` is its class of tokens."""
    if case == "masked":
        value = np.where(batch["hidden"], MASK, batch["target"]).astype(np.float32)
        return kind(batch["gene_id"], value, batch["target"], batch["hidden"])
    gene_id, target = batch["generative_id"], batch["generative_target"]
    hidden = (gene_id >= 0) & (np.arange(gene_id.shape[1]) < gene_id.shape[1] // 2)
    return kind(gene_id, np.where(hidden, MASK, target).astype(np.float32), target, hidden, 0)


def main() -> None:
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **golden())
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
