"""scBERT's network, built from performer-pytorch with random weights.

    PYTHONPATH=tools python -m reference.scbert       # writes tests/golden/scbert.npz anew

Written from the equations: the original's code is under another licence than this project and is not used.
Tensors carry the names that they have in the published file. Every parameter is moved away from where it
starts, so that no term is zero or one by chance. performer-pytorch takes the maximum over each cell and head
(stabiliser "head"); with :func:`one_maximum` the one over everything, as the published model ("global").
:func:`full` compares at the published size.
"""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from typing import Any

import numpy as np
import torch
from reference.performers import Performer, Table, one_maximum, shaken, state
from torch import nn

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "scbert.npz"
SMALL = {"n_genes": 50, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8}
PUBLISHED_SIZE = {"n_genes": 16_906, "d_model": 200, "n_layers": 6, "n_heads": 10, "d_head": 64}
PUBLISHED = 8_388_607  # the frozen gene table included
TOLERANCE = 2e-5


class Convolution(nn.Module):
    """The annotation head: a number a token, then dense layers over all tokens."""

    def __init__(self, n: int, d: int, n_outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 1, (1, d))
        self.fc1, self.fc2, self.fc3 = nn.Linear(n, 512), nn.Linear(512, 128), nn.Linear(128, n_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv1(x[:, None])).flatten(1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class ScBERT(nn.Module):
    """Token + gene embedding, Performer, norm; then the bins of every token, or the annotation head."""

    def __init__(
        self, *, n_genes: int, d_model: int, n_layers: int, n_heads: int, d_head: int, n_outputs: int
    ):
        super().__init__()
        self.token_emb = nn.Embedding(7, d_model)
        self.pos_emb = Table(n_genes + 1, d_model)
        self.performer = Performer(
            dim=d_model, depth=n_layers, heads=n_heads, dim_head=d_head, qkv_bias=False, attn_out_bias=True
        )
        self.norm = nn.LayerNorm(d_model)
        self.to_out = Convolution(n_genes + 1, d_model, n_outputs) if n_outputs else nn.Linear(d_model, 7)

    def hidden(self, token: torch.Tensor) -> torch.Tensor:
        """[B, n_genes + 1, E]: normalised."""
        return self.norm(self.performer((self.token_emb(token) + self.pos_emb.emb.weight).float()))


def build(
    *, seed: int = 0, jitter: float = 0.1, sharp: float = 3.0, n_outputs: int = 0, **changes: Any
) -> ScBERT:
    """A small model; ``changes`` of :data:`SMALL`. The last row of the gene table is 0."""
    torch.manual_seed(seed)
    model = shaken(ScBERT(n_outputs=n_outputs, **(SMALL | changes)), jitter, sharp, ".fc")
    with torch.no_grad():
        model.pos_emb.emb.weight[-1] = 0
    return model


def cells(n: int, n_genes: int, expressed: tuple[int, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Raw counts of ``n`` cells with unlike numbers of genes, the slots of a cell in random order."""
    rng = np.random.default_rng(seed)
    sizes = [expressed[1], *rng.integers(expressed[0], expressed[1], n - 1)]
    gene_id = np.full((n, expressed[1]), -1, np.int32)
    count = np.zeros((n, expressed[1]), np.float32)
    for i, k in enumerate(sizes):
        gene_id[i, :k] = rng.choice(n_genes, k, replace=False)
        count[i, :k] = rng.poisson(rng.lognormal(0.5, 1.0, k)) + 1
        count[i, 0] = 3000.0 * k / 20  # so that some counts are below one in 10,000
    return {"gene_id": gene_id, "count": count}


def bins(count: np.ndarray) -> np.ndarray:
    """floor(min(log2(1 + counts per 10,000), 5)) of a cell's counts, in float64."""
    return np.floor(np.minimum(np.log2(1 + count / count.sum() * 1e4), 5)).astype(np.int64)


def tokenise(batch: dict[str, np.ndarray], n_genes: int) -> np.ndarray:
    """int64 [B, n_genes + 1]: the bin of every gene, and a 0 at the end."""
    out = np.zeros((len(batch["count"]), n_genes + 1), np.int64)
    for row, gene, count in zip(out, batch["gene_id"], batch["count"], strict=True):
        row[gene[gene >= 0]] = bins(count[gene >= 0].astype(np.float64))
    return out


def run(model: ScBERT, token: np.ndarray) -> dict[str, np.ndarray]:
    """Hidden states and outputs under both stabilisers: "head/hidden", ..., "global/out"."""
    found = {}
    with torch.no_grad():
        for stabiliser in ("head", "global"):
            with one_maximum() if stabiliser == "global" else contextlib.nullcontext():
                hidden = model.hidden(torch.from_numpy(token))
            found |= {
                f"{stabiliser}/hidden": hidden.numpy(),
                f"{stabiliser}/out": model.to_out(hidden).numpy(),
            }
    return found


def golden(seed: int = 0) -> dict[str, np.ndarray]:
    """Everything in the golden file, flat: "<case>/<what>"."""
    out: dict[str, np.ndarray] = {}
    for number, (case, n_outputs) in enumerate({"bins": 0, "cell": 3}.items()):
        model = build(seed=seed + number, n_outputs=n_outputs)
        batch = cells(4, SMALL["n_genes"], (12, 40), seed + number)
        token = tokenise(batch, SMALL["n_genes"])
        found = {f"weights/{k}": v for k, v in state(model).items()} | batch | {"token": token}
        out |= {f"{case}/{name}": value for name, value in (found | run(model, token)).items()}
    return out


def full() -> dict[str, Any]:
    """The published size, two cells, from a ``.pth`` file on; one table of numbers."""
    import jax

    from scjax.genes import Vocabulary
    from scjax.interop import import_pretrained
    from scjax.models import build as build_ours
    from scjax.nn import bind
    from scjax.types import CellBatch

    theirs = build(jitter=0.02, sharp=1.0, **PUBLISHED_SIZE)
    n_genes = PUBLISHED_SIZE["n_genes"]
    batch = cells(2, n_genes, (800, 1500))
    token = tokenise(batch, n_genes)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "panglao_pretrain.pth"
        tensors = {k: torch.from_numpy(np.asarray(v)) for k, v in state(theirs).items()}
        torch.save({"epoch": 1, "model_state_dict": tensors}, file)
        genes = Vocabulary([f"GENE{i}" for i in range(n_genes)])
        imported = import_pretrained("scbert", file, genes=genes).model
    gene = imported["buffers"]["gene"]
    count = sum(leaf.size for leaf in jax.tree.leaves(imported["params"]))
    count += gene["table"].size + gene["special"].size
    assert count == PUBLISHED == sum(p.numel() for p in theirs.parameters()), count
    with torch.no_grad(), one_maximum():
        expected = theirs.hidden(torch.from_numpy(token))
        expected_bins = theirs.to_out(expected).numpy()
    model = build_ours("scbert", imported["config"] | {"stabiliser": "global"}, n_genes)
    ours = CellBatch(
        **batch,
        depth=batch["count"].sum(1),
        n_genes=(batch["gene_id"] >= 0).sum(1).astype(np.int32),
        row=np.arange(2, dtype=np.uint32),
        label={},
        value={},
        weight=np.ones(2, np.float32),
    )

    @jax.jit
    def run_ours(params: Any, buffers: Any, batch: CellBatch) -> Any:
        module = bind(model, params, buffers)
        tokens = module.all_genes(batch)
        x = module(tokens)
        return tokens.shown, module.norm(x), module.predict(x)

    shown, hidden, logits = (np.asarray(x) for x in run_ours(imported["params"], imported["buffers"], ours))
    return {
        "system": "scbert",
        "parameters": count,
        "max_abs": {
            "tokens": float(np.abs(shown - token).max()),
            "hidden states": float(np.abs(hidden - expected.numpy()).max()),
            "logits of bins": float(np.abs(logits - expected_bins).max()),
        },
        "tolerance": TOLERANCE,
    }


def main() -> None:
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **golden())
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
