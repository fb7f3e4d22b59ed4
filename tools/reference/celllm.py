"""CellLM's network, built from performer-pytorch with random weights.

    PYTHONPATH=tools python -m reference.celllm       # writes tests/golden/celllm.npz anew

Tensors carry the names that they have in the published files; a fine-tuned model has "encoder." before those
of the network. Every parameter is moved away from where it starts, so that no term is zero or one by chance.
performer-pytorch takes the maximum over each cell and head (stabiliser "head"); with :func:`one_maximum` the
one over everything, as the published model ("global"). :func:`full` compares at the published size.
"""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

import numpy as np
import torch
from reference.performers import Performer, Table, one_maximum, shaken, state
from torch import nn

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "celllm.npz"
SMALL = {"n_genes": 50, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8}
LENGTH = 31  # tokens a cell of the golden file: shorter than its longest cells, longer than its shortest
PUBLISHED_SIZE = {"n_genes": 19_379, "d_model": 512, "n_layers": 10, "n_heads": 16, "d_head": 64}
PUBLISHED_LENGTH = 6000
PUBLISHED = 51_926_536  # the frozen gene table included
TOLERANCE = 2e-5
CLS, PAD = 6, 7


class CellLM(nn.Module):
    """Token + gene embedding, Performer with a mask, norm, mask."""

    def __init__(self, *, n_genes: int, d_model: int, n_layers: int, n_heads: int, d_head: int):
        super().__init__()
        self.n_genes = n_genes
        self.token_emb = nn.Embedding(8, d_model)
        self.pos_emb = Table(n_genes + 2, d_model)
        self.performer = Performer(
            dim=d_model, depth=n_layers, heads=n_heads, dim_head=d_head, qkv_bias=False, attn_out_bias=True
        )
        self.norm = nn.LayerNorm(d_model)
        self.to_out = nn.Linear(d_model, 8)

    def hidden(self, token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """[B, S, E]: normalised, 0 at padding."""
        mask = token != PAD
        x = (self.token_emb(token) + self.pos_emb.emb(place)).float()
        return self.norm(self.performer(x, mask=mask)) * mask[..., None]


class Annotator(nn.Module):
    """A number a token, laid out by gene, then dense layers."""

    def __init__(self, encoder: CellLM, d_model: int, n_outputs: int):
        super().__init__()
        self.encoder = encoder
        self.conv = nn.Conv2d(1, 1, (1, d_model))
        self.pred_head = nn.Sequential(
            nn.ReLU(),
            nn.Linear(encoder.n_genes + 1, 512),
            nn.ReLU(),
            nn.Dropout(0.0),
            nn.Linear(512, 128),
            nn.ReLU(),
            nn.Dropout(0.0),
            nn.Linear(128, n_outputs),
        )

    def forward(self, token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        number = torch.relu(self.conv(self.encoder.hidden(token, place)[:, None])).flatten(1)
        laid = torch.zeros(len(token), self.encoder.n_genes + 2)
        laid.scatter_(1, place, number)
        return self.pred_head(laid[:, :-1])  # the place of padding goes


def build(
    *, seed: int = 0, jitter: float = 0.1, sharp: float = 3.0, n_outputs: int = 0, **changes: Any
) -> Any:
    """A small model, or one for annotation where ``n_outputs``; ``changes`` of :data:`SMALL`."""
    torch.manual_seed(seed)
    size = SMALL | changes
    encoder = CellLM(**size)
    model = shaken(
        Annotator(encoder, size["d_model"], n_outputs) if n_outputs else encoder, jitter, sharp, "pred_head"
    )
    with torch.no_grad():
        encoder.pos_emb.emb.weight[-2:] = torch.tensor([[1.0], [0.0]])
    return model


def cells(n: int, n_genes: int, expressed: tuple[int, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Raw counts of ``n`` cells with unlike numbers of genes, the slots of a cell in random order."""
    rng = np.random.default_rng(seed)
    sizes = [expressed[1], expressed[0], *rng.integers(*expressed, n - 2)]
    gene_id = np.full((n, expressed[1]), -1, np.int32)
    count = np.zeros((n, expressed[1]), np.float32)
    for i, k in enumerate(sizes):
        gene_id[i, :k] = rng.choice(n_genes, k, replace=False)
        count[i, :k] = rng.permutation(3 * k)[:k] + 1  # no two alike: which are the most expressed is clear
        count[i, 0] = 3000.0 * k / 20  # so that some counts are below one in 10,000
    return {"gene_id": gene_id, "count": count}


def tokenise(
    batch: dict[str, np.ndarray], n_genes: int, length: int, truncate: str
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, places) int64 [B, length]: CLS, then the genes in the order of the table, then padding.

    Bins are floor(min(log2(1 + counts per 10,000), 5)). Of cells that are too long stay the genes that come
    first ("index", as published), or the most expressed ("top").
    """
    token, place = (
        np.full((len(batch["count"]), length), PAD),
        np.full((len(batch["count"]), length), n_genes + 1),
    )
    for i, (gene, count) in enumerate(zip(batch["gene_id"], batch["count"], strict=True)):
        gene, count = gene[gene >= 0], count[gene >= 0].astype(np.float64)
        value = np.floor(np.minimum(np.log2(1 + count / count.sum() * 1e4), 5))
        kept = np.argsort(gene if truncate == "index" else -count)[: length - 1]
        kept = kept[np.argsort(gene[kept])]
        token[i, : 1 + len(kept)], place[i, : 1 + len(kept)] = (
            np.r_[CLS, value[kept]],
            np.r_[n_genes, gene[kept]],
        )
    return token.astype(np.int64), place.astype(np.int64)


def run(model: Any, token: np.ndarray, place: np.ndarray) -> dict[str, np.ndarray]:
    """Hidden states and outputs: padded, under both stabilisers ("head/hidden", ..., "global/out"), and each
    cell by itself without padding ("alone/hidden", ...): what padding gives that counts for nothing."""

    def both(token: np.ndarray, place: np.ndarray) -> dict[str, np.ndarray]:
        inputs = torch.from_numpy(token), torch.from_numpy(place)
        hidden = (model.encoder if isinstance(model, Annotator) else model).hidden(*inputs)
        out = model(*inputs) if isinstance(model, Annotator) else model.to_out(hidden)
        return {"hidden": hidden.numpy(), "out": out.numpy()}

    found = {}
    with torch.no_grad():
        found |= {f"head/{k}": v for k, v in both(token, place).items()}
        with one_maximum():
            found |= {f"global/{k}": v for k, v in both(token, place).items()}
        alone = {k: np.zeros_like(v) for k, v in both(token, place).items()}
        for i, n in enumerate((token != PAD).sum(1)):
            for name, value in both(token[i : i + 1, :n], place[i : i + 1, :n]).items():
                whole = name == "out" and isinstance(model, Annotator)
                alone[name][(i,) if whole else (i, slice(n))] = value[0]
    return found | {f"alone/{k}": v for k, v in alone.items()}


def golden(seed: int = 0) -> dict[str, np.ndarray]:
    """Everything in the golden file, flat: "<case>/<what>". Cells are cut as published, or to the top."""
    out: dict[str, np.ndarray] = {}
    for number, (case, n_outputs, truncate) in enumerate((("bins", 0, "index"), ("cell", 3, "top"))):
        model = build(seed=seed + number, n_outputs=n_outputs)
        batch = cells(4, SMALL["n_genes"], (12, 40), seed + number)
        token, place = tokenise(batch, SMALL["n_genes"], LENGTH, truncate)
        found = (
            {f"weights/{k}": v for k, v in state(model).items()} | batch | {"token": token, "place": place}
        )
        out |= {f"{case}/{name}": value for name, value in (found | run(model, token, place)).items()}
    return out


def full() -> dict[str, Any]:
    """The published size, two cells, one of them padded, from a ``.pth`` file on; one table of numbers."""
    import jax

    from scjax.genes import Vocabulary
    from scjax.interop import import_pretrained
    from scjax.models import build as build_ours
    from scjax.nn import bind
    from scjax.types import CellBatch

    theirs = build(jitter=0.02, sharp=1.0, **PUBLISHED_SIZE)
    n_genes = PUBLISHED_SIZE["n_genes"]
    batch = cells(2, n_genes, (1500, 6500))
    token, place = tokenise(batch, n_genes, PUBLISHED_LENGTH, "index")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "checkpoint4_fixed.pth"
        tensors = {k: torch.from_numpy(np.asarray(v)) for k, v in state(theirs).items()}
        torch.save({"model_state_dict": tensors}, file)
        genes = Vocabulary([f"GENE{i}" for i in range(n_genes)])
        imported = import_pretrained("celllm", file, genes=genes).model
    gene = imported["buffers"]["gene"]
    count = sum(leaf.size for leaf in jax.tree.leaves(imported["params"]))
    count += gene["table"].size + gene["special"].size
    assert count == PUBLISHED == sum(p.numel() for p in theirs.parameters()), count
    with torch.no_grad(), one_maximum():
        expected = theirs.hidden(torch.from_numpy(token), torch.from_numpy(place))
        expected_bins = theirs.to_out(expected).numpy()
    switches = {"stabiliser": "global", "pad_mask": "values", "truncate": "index"}
    model = build_ours("celllm", imported["config"] | switches, n_genes)
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
        tokens = module.whole(batch)
        cell, genes = module(tokens)
        x = jax.numpy.concatenate([cell[:, None], genes], 1)
        return tokens.gene_id, module.norm(x), module.predict(x)

    slots, hidden, logits = (np.asarray(x) for x in run_ours(imported["params"], imported["buffers"], ours))
    errors = {"hidden states": 0.0, "logits of bins": 0.0}
    for i in range(2):
        n = int((token[i] != PAD).sum())
        order = np.r_[0, 1 + np.argsort(np.where(slots[i] < 0, n_genes, slots[i]), kind="stable")][:n]
        assert np.array_equal(np.r_[n_genes, slots[i]][order], place[i, :n])
        for name, mine, other in (
            ("hidden states", hidden, expected.numpy()),
            ("logits of bins", logits, expected_bins),
        ):
            errors[name] = max(errors[name], float(np.abs(mine[i][order] - other[i, :n]).max()))
    return {"system": "celllm", "parameters": count, "max_abs": errors, "tolerance": TOLERANCE}


def main() -> None:
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **golden())
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
