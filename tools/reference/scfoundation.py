"""scFoundation's network, built from PyTorch's encoder layer and performer-pytorch, with random weights.

    PYTHONPATH=tools python -m reference.scfoundation       # writes tests/golden/scfoundation.npz anew

The value embedding, the scatter into all genes and the annotation head are written here from the equations;
tensors carry the names that they have in ``models.ckpt``. Every parameter is moved away from where it starts,
so that no term is zero or one by chance. :func:`full` compares at the published size.
"""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import numpy as np
import torch
from reference.performers import Performer, one_maximum, state
from torch import nn

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "scfoundation.npz"
SMALL = {
    "n_genes": 50,
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 2,
    "decoder_d_model": 16,
    "decoder_n_heads": 2,
    "decoder_d_head": 8,
    "decoder_n_layers": 2,
    "n_bins": 20,
}
PUBLISHED_SIZE = {
    "n_genes": 19_264,
    "d_model": 768,
    "n_heads": 12,
    "n_layers": 12,
    "decoder_d_model": 512,
    "decoder_n_heads": 8,
    "decoder_d_head": 64,
    "decoder_n_layers": 6,
    "n_bins": 100,
}
PUBLISHED = 119_252_285
TOLERANCE = 2e-5
MASK, PAD = 102.0, 103.0  # values that stand for "hidden" and "padding"


class AutoBin(nn.Module):
    """A number -> softmax over bins -> mixture of their vectors; two numbers have vectors of their own."""

    def __init__(self, n_bins: int, d: int, alpha: float):
        super().__init__()
        self.mlp, self.mlp2 = nn.Linear(1, n_bins), nn.Linear(n_bins, n_bins)
        self.emb, self.emb_mask, self.emb_pad = (nn.Embedding(n, d) for n in (n_bins, 1, 1))
        self.alpha = alpha

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        a = nn.functional.leaky_relu(self.mlp(value[..., None]), 0.1)
        out = torch.softmax(self.alpha * a + self.mlp2(a), -1) @ self.emb.weight
        out = torch.where((value == MASK)[..., None], self.emb_mask.weight[0], out)
        return torch.where((value == PAD)[..., None], self.emb_pad.weight[0], out)


class Encoder(nn.Module):
    def __init__(self, d: int, heads: int, layers: int):
        super().__init__()
        make = lambda: nn.TransformerEncoderLayer(d, heads, 4 * d, batch_first=True)  # noqa: E731
        self.transformer_encoder = nn.ModuleList([make() for _ in range(layers)])
        self.norm = nn.LayerNorm(d)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        for layer in self.transformer_encoder:
            x = layer(x, src_key_padding_mask=padding)
        return self.norm(x)


class Decoder(nn.Module):
    def __init__(self, d: int, heads: int, d_head: int, layers: int):
        super().__init__()
        self.performer = Performer(dim=d, depth=layers, heads=heads, dim_head=d_head, qkv_bias=True)
        self.norm = nn.LayerNorm(d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.performer(x))


class ScFoundation(nn.Module):
    """The network without its heads for tasks."""

    def __init__(
        self,
        *,
        n_genes: int,
        d_model: int,
        n_heads: int,
        n_layers: int,
        decoder_d_model: int,
        decoder_n_heads: int,
        decoder_d_head: int,
        decoder_n_layers: int,
        n_bins: int,
        bin_alpha: float = 1.0,
    ):
        super().__init__()
        self.n_genes = n_genes
        self.token_emb = AutoBin(n_bins, d_model, bin_alpha)
        self.pos_emb = nn.Embedding(n_genes + 3, d_model)
        self.encoder = Encoder(d_model, n_heads, n_layers)
        self.decoder_embed = nn.Linear(d_model, decoder_d_model)
        self.decoder = Decoder(decoder_d_model, decoder_n_heads, decoder_d_head, decoder_n_layers)
        self.norm = nn.LayerNorm(decoder_d_model)
        self.to_final = nn.Linear(decoder_d_model, 1)

    def encode(self, value: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """[B, S, E]; ``place`` [B, S] is the gene's number, n_genes + 2 where padded."""
        return self.encoder(self.token_emb(value) + self.pos_emb(place), place == self.n_genes + 2)

    def decode(self, value: torch.Tensor, place: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        """[B, n_genes + 2, D]: ``value`` [B, n_genes + 2] is what is shown at every place."""
        x = self.token_emb(value)
        for cell in range(len(x)):
            on = place[cell] < self.n_genes + 2
            x[cell, place[cell][on]] = encoded[cell][on]
        return self.norm(self.decoder(self.decoder_embed(x + self.pos_emb.weight[: self.n_genes + 2])))


def build(*, seed: int = 0, jitter: float = 0.1, **changes: Any) -> ScFoundation:
    """A small model in evaluation mode, every parameter jittered; ``changes`` of :data:`SMALL`."""
    torch.manual_seed(seed)
    model = ScFoundation(**(SMALL | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(jitter * torch.randn_like(parameter))
    return model


def build_head(d_model: int, n_outputs: int = 3, seed: int = 0) -> nn.ModuleDict:
    """The annotation head, with statistics as after training."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(d_model, affine=False, eps=1e-6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    fc1 = nn.Sequential(nn.Linear(d_model, 256), nn.ReLU(), nn.Linear(256, n_outputs))
    return nn.ModuleDict({"norm": norm, "fc1": fc1}).eval()


def cells(n: int, n_genes: int, expressed: tuple[int, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Raw counts of ``n`` cells with unlike numbers of genes, the slots of a cell in random order."""
    rng = np.random.default_rng(seed)
    sizes = [expressed[1], *rng.integers(expressed[0], expressed[1], n - 1)]
    gene_id = np.full((n, expressed[1]), -1, np.int32)
    count = np.zeros((n, expressed[1]), np.float32)
    for i, k in enumerate(sizes):
        gene_id[i, :k] = rng.choice(n_genes, k, replace=False)
        count[i, :k] = rng.poisson(rng.lognormal(0.5, 1.0, k)) + 1
    return {"gene_id": gene_id, "count": count}


def values(batch: dict[str, np.ndarray], n_genes: int, fold: float = 1.0) -> np.ndarray:
    """float32 [B, n_genes + 2]: log-normalised counts of all genes, then T and S; T for ``fold`` times S."""
    dense = np.zeros((len(batch["count"]), n_genes))
    for row, gene, count in zip(dense, batch["gene_id"], batch["count"], strict=True):
        row[gene[gene >= 0]] = count[gene >= 0]
    total = dense.sum(1, keepdims=True)
    ends = np.log10(np.concatenate([total * fold, total], 1))
    return np.concatenate([np.log1p(dense / total * 1e4), ends], 1).astype(np.float32)


def pack(value: np.ndarray, hidden: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What the encoder reads: (value, place) of all that is above 0 and not hidden, padded on the right."""
    places = [np.flatnonzero((v > 0) & ~h) for v, h in zip(value, hidden, strict=True)]
    place = np.full((len(value), max(map(len, places))), value.shape[1])
    packed = np.full(place.shape, PAD, np.float32)
    for i, p in enumerate(places):
        place[i, : len(p)], packed[i, : len(p)] = p, value[i, p]
    return torch.from_numpy(packed), torch.from_numpy(place)


def at_places(place: torch.Tensor, rows: torch.Tensor, n: int) -> np.ndarray:
    """[B, n, E]: rows of the packed sequence where their genes are, 0 elsewhere and for padding."""
    out = np.zeros((len(rows), n + 1, rows.shape[-1]), np.float32)
    for o, p, r in zip(out, place.numpy(), rows.numpy(), strict=True):
        o[p] = r
    return out[:, :n]


@torch.no_grad()
def run(
    model: ScFoundation,
    value: np.ndarray,
    hidden: np.ndarray | None = None,
    shown: np.ndarray | None = None,
    *,
    stabiliser: str = "global",
) -> dict[str, np.ndarray]:
    """Everything the network gives for ``value`` [B, n_genes + 2].

    Args:
      model: from :func:`build`.
      value: see :func:`values`.
      hidden: bool [B, n_genes + 2], genes that the encoder does not read.
      shown: float32 [B, n_genes + 2], what the decoder is shown where nothing is encoded; by default the
        value itself.
      stabiliser: "global" as published, "head" as performer-pytorch has it.

    Returns:
      ``encoded`` [B, n_genes + 2, E] at the genes read, T and S (0 elsewhere), ``cell`` [B, 4 E] and
      ``cell_max`` [B, E] from one cell at a time, ``genes`` [B, n_genes, D], ``expression`` [B, n_genes].
    """
    n = model.n_genes
    hidden = np.zeros(value.shape, bool) if hidden is None else hidden
    packed, place = pack(value, hidden)
    encoded = model.encode(packed, place)
    cell, cell_max = [], []
    for i in range(len(value)):
        alone = model.encode(*pack(value[i : i + 1], hidden[i : i + 1]))[0]  # genes, T, S
        cell.append(torch.cat([alone[-1], alone[-2], alone[:-2].amax(0), alone[:-2].mean(0)]))
        cell_max.append(alone.amax(0))
    with one_maximum() if stabiliser == "global" else contextlib.nullcontext():
        genes = model.decode(torch.from_numpy(value if shown is None else shown), place, encoded)
    return {
        "encoded": at_places(place, encoded, n + 2),
        "cell": torch.stack(cell).numpy(),
        "cell_max": torch.stack(cell_max).numpy(),
        "genes": genes[:, :n].numpy(),
        "expression": model.to_final(genes)[:, :n, 0].numpy(),
    }


@torch.no_grad()
def run_head(model: ScFoundation, head: nn.ModuleDict, value: np.ndarray) -> dict[str, np.ndarray]:
    """Logits from the maximum over a cell's tokens, and over its genes and the padding of the batch."""
    alone = torch.from_numpy(run(model, value)["cell_max"])
    genes = value.copy()
    genes[:, -2:] = 0  # no T and S
    padded = model.encode(*pack(genes, np.zeros(value.shape, bool))).amax(1)
    return {name: head["fc1"](head["norm"](x)).numpy() for name, x in (("own", alone), ("pads", padded))}


def hide(value: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(hidden, shown): a third of the expressed genes and some others; most as hidden, some as they are."""
    rng = np.random.default_rng(seed)
    hidden = rng.random(value.shape) < np.where(value > 0, 0.35, 0.2)
    hidden[:, -2:] = False
    how = rng.random(value.shape)
    random = rng.random(value.shape).astype(np.float32) * 5
    shown = np.where(how < 0.7, np.float32(MASK), np.where(how < 0.85, random, value))
    return hidden, np.where(hidden, shown, value)


def golden(seed: int = 0) -> dict[str, np.ndarray]:
    """Everything in the golden file, flat."""
    model, head = build(seed=seed), build_head(SMALL["d_model"], seed=seed)
    batch = cells(4, SMALL["n_genes"], (12, 30), seed + 1)
    value = values(batch, SMALL["n_genes"], fold=5)
    hidden, shown = hide(value, seed + 2)
    out = {f"weights/{k}": v for k, v in (state(model) | state(head)).items()}
    out |= batch | {"value": value, "hidden": hidden, "shown": shown}
    for name, more, stabiliser in (
        ("global", (), "global"),
        ("head", (), "head"),
        ("masked", (hidden, shown), "head"),
    ):
        out |= {f"{name}/{k}": v for k, v in run(model, value, *more, stabiliser=stabiliser).items()}
    return out | {f"logits/{k}": v for k, v in run_head(model, head, value).items()}


def checkpoint(models: dict[str, ScFoundation], **changes: Any) -> dict[str, Any]:
    """The content of a file like ``models.ckpt``; ``changes`` of the models' settings."""

    def one(model: ScFoundation) -> dict[str, Any]:
        layers = model.encoder.transformer_encoder
        first = model.decoder.performer.net.layers[0][0].fn
        settings = {
            "model": "mae_autobin",
            "seq_len": model.n_genes + 2,
            "bin_num": model.token_emb.emb.num_embeddings,
            "bin_alpha": model.token_emb.alpha,
            "bin_type": "auto_bin",
            "pad_token_id": 103,
            "mask_token_id": 102,
            "mae_encoder_max_seq_len": 15_000,
            "encoder": {
                "module_type": "transformer",
                "hidden_dim": model.pos_emb.embedding_dim,
                "depth": len(layers),
                "heads": layers[0].self_attn.num_heads,
                "dim_head": 64,
                "norm_first": False,
            },
            "decoder": {
                "module_type": "performer",
                "hidden_dim": model.norm.normalized_shape[0],
                "depth": len(model.decoder.performer.net.layers),
                "heads": first.heads,
                "dim_head": first.fast_attention.dim_heads,
            },
        }
        data = {"value_mask_prob": 0.3, "zero_mask_prob": 0.03, "replace_prob": 0.8, "random_token_prob": 0.1}
        config = {
            "model": "mae_autobin",
            "model_config": {"mae_autobin": settings | changes},
            "dataset_config": {"rnaseq": data},
        }
        tensors = {f"model.{k}": torch.from_numpy(v) for k, v in state(model).items()}
        return {"config": config, "state_dict": tensors}

    return {name: one(model) for name, model in models.items()}


def full() -> dict[str, Any]:
    """The published size, two cells, against scjax."""
    import jax

    from scjax.interop import scfoundation as interop
    from scjax.interop.mapping import import_tensors
    from scjax.models import build as build_ours
    from scjax.nn import bind, shapes_of
    from scjax.types import CellBatch

    size = PUBLISHED_SIZE
    theirs = build(jitter=0.02, **size)
    batch = cells(2, size["n_genes"], (450, 700), seed=1)
    value = values(batch, size["n_genes"])
    expected = run(theirs, value)
    tensors = state(theirs)
    assert len(tensors) == 265, len(tensors)
    del theirs
    config = {"stabiliser": "global"}
    model = build_ours("scfoundation", config, size["n_genes"])
    nothing = dict.fromkeys(("buffers/gene_mean/total", "buffers/gene_mean/count"), np.zeros(size["n_genes"]))
    rules = interop.rules(config, size["n_genes"])
    variables, _ = import_tensors(rules, tensors, shapes_of(model), interop.IGNORED, nothing)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert parameters == PUBLISHED, parameters
    n, total = len(value), batch["count"].sum(1)
    ours = CellBatch(
        **batch,
        depth=total,
        n_genes=(batch["count"] > 0).sum(1).astype(np.int32),
        row=np.arange(n, dtype=np.uint32),
        label={},
        value={},
        weight=np.ones(n, np.float32),
    )
    module = bind(model, **jax.tree.map(jax.numpy.asarray, variables))
    with jax.default_matmul_precision("highest"):
        found = {"cell": jax.jit(module.embed)(ours), "genes": jax.jit(module.gene_states)(ours)}
        found["expression"] = jax.jit(module.predict)(found["genes"])
        tokens = jax.jit(module.whole)(ours)
        encoded = np.asarray(jax.jit(module.encoder_states)(tokens))
    on = np.asarray(tokens.gene_id)
    theirs_at = [expected["encoded"][i][np.r_[p[p >= 0], -2, -1]] for i, p in enumerate(on)]
    ours_at = [encoded[i][np.r_[p >= 0, True, True]] for i, p in enumerate(on)]
    error = {name: float(np.abs(np.asarray(x) - expected[name]).max()) for name, x in found.items()}
    error["encoder"] = max(float(np.abs(a - b).max()) for a, b in zip(ours_at, theirs_at, strict=True))
    return {"system": "scfoundation", "parameters": parameters, "max_abs": error, "tolerance": TOLERANCE}


def main() -> None:
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **golden())
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
