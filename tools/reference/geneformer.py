"""Geneformer's networks, built from transformers alone, with random weights.

    python tools/reference/geneformer.py       # writes tests/golden/geneformer.npz anew

The published models are Hugging Face BERT encoders: this file makes small ones (every parameter moved away
from where it starts, so that no term is zero or one by chance), runs them on cells with padding, and keeps
weights, inputs and outputs for tests that need no PyTorch. :func:`full` does the same at the published sizes.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
)

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden" / "geneformer.npz"
HEADS = {"mlm": BertForMaskedLM, "cell": BertForSequenceClassification, "gene": BertForTokenClassification}
SPECIALS = ("<pad>", "<mask>", "<cls>", "<eos>")
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}
SIZES = {  # layers, width, heads, feed-forward, tokens, vocabulary; and tokens of the cells that are run
    "v1-10m": (6, 256, 4, 512, 2048, 25_426, 2048),
    "v2-104m": (12, 768, 12, 3072, 4096, 20_275, 512),
    "v2-316m": (18, 1152, 18, 4608, 4096, 20_275, 512),
}
PUBLISHED = {"v1-10m": 10_288_722, "v2-104m": 104_386_867, "v2-316m": 316_354_867}
TOLERANCE = 2e-5


def build(head: str = "mlm", *, seed: int = 0, jitter: float = 0.1, n_labels: int = 3, **sizes: int) -> Any:
    """A BERT as Geneformer configures it, in evaluation mode.

    Args:
      head: "mlm", "cell" or "gene".
      seed: of the weights.
      jitter: standard deviation of what is added to every parameter.
      n_labels: classes of the classifiers.
      sizes: of ``BertConfig``.
    """
    torch.manual_seed(seed)
    small = {
        "vocab_size": 54,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
    }
    config = BertConfig(
        **(small | sizes),
        hidden_act="relu",
        layer_norm_eps=1e-12,
        hidden_dropout_prob=0.02,
        attention_probs_dropout_prob=0.02,
        num_labels=n_labels,
    )
    model = HEADS[head](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(jitter * torch.randn_like(parameter))
    return model


def cells(n: int, n_genes: int, slots: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Raw counts of ``n`` cells of unlike sizes, and a median a gene; no two ranks of a cell are equal."""
    rng = np.random.default_rng(seed)
    gene_id, count = np.full((n, slots), -1, np.int32), np.zeros((n, slots), np.float32)
    for i in range(n):
        k = (slots, slots // 2)[i] if i < 2 else int(rng.integers(slots // 2, slots))
        gene_id[i, :k] = rng.choice(n_genes, k, replace=False)
        count[i, :k] = rng.poisson(3.0, k) + 1
    return {
        "gene_id": gene_id,
        "count": count,
        "depth": count.sum(1) + 100,
        "median": rng.lognormal(1.0, 0.5, n_genes).astype(np.float32),
    }


def tokenise(batch: dict[str, np.ndarray], n_special: int, max_length: int) -> np.ndarray:
    """int64 [B, S]: each cell's genes by falling count / depth * 10,000 / median; special tokens come first
    in the vocabulary, padding (0) last in a cell; with four of them a cell stands between <cls> and <eos>."""
    lists = []
    for genes, count, depth in zip(batch["gene_id"], batch["count"], batch["depth"], strict=True):
        genes, count = genes[genes >= 0], count[genes >= 0].astype(np.float64)
        value = count / float(depth) * 1e4 / batch["median"][genes].astype(np.float64)
        ranked = n_special + genes[np.argsort(-value, kind="stable")]
        ends = n_special == 4
        ranked = ranked[: max_length - 2 * ends]
        lists.append(np.r_[2, ranked, 3] if ends else ranked)
    out = np.zeros((len(lists), max(map(len, lists))), np.int64)
    for row, tokens in zip(out, lists, strict=True):
        row[: len(tokens)] = tokens
    return out


def hide(tokens: np.ndarray, n_special: int, vocab_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(shown tokens, labels): some genes hidden as in pretraining; -100 where nothing is asked."""
    rng = np.random.default_rng(seed)
    chosen = (tokens >= n_special) & (rng.random(tokens.shape) < 0.3)
    how = rng.random(tokens.shape)
    other = rng.integers(n_special, vocab_size, tokens.shape)
    shown = np.where(chosen & (how < 0.8), 1, np.where(chosen & (how < 0.9), other, tokens))
    return shown, np.where(chosen, tokens, -100)


def run(model: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Hidden states [layers + 1, B, S, E] and logits; the attention mask leaves out the padding."""
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=(ids != 0).long(), output_hidden_states=True)
    return {"hidden": torch.stack(out.hidden_states).numpy(), "logits": out.logits.numpy()}


def train(model: Any, shown: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Loss, gradients, and the parameters after one step of AdamW; no dropout. Changes the model."""
    ids = torch.from_numpy(shown)
    loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=torch.from_numpy(labels)).loss
    loss.backward()
    names = [name for name, _ in model.named_parameters()]
    gradients = {
        n: p.grad.detach().clone().numpy() for n, p in model.named_parameters() if p.grad is not None
    }
    gradients |= {
        n: np.zeros(tuple(model.get_parameter(n).shape), np.float32) for n in names if n not in gradients
    }
    torch.optim.AdamW(model.parameters(), **ADAMW).step()
    return {"loss": np.float32(loss.item()), "gradients": gradients, "after": state(model)}


def state(model: Any) -> dict[str, np.ndarray]:
    """The tensors that ``save_pretrained`` stores: each tied one once."""
    tied = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    return {k: v.detach().clone().numpy() for k, v in model.state_dict().items() if k not in tied}


def dictionaries(n_genes: int, n_special: int, median: np.ndarray) -> dict[str, dict[str, Any]]:
    """Token dictionary, medians and symbols of made-up genes, in the order of Geneformer's."""
    genes = [f"ENSG{i:011d}" for i in range(n_genes)]
    return {
        "token_dictionary": {name: i for i, name in enumerate((*SPECIALS[:n_special], *genes))},
        "gene_median_dictionary": {gene: float(m) for gene, m in zip(genes, median, strict=True)},
        "gene_name_id_dict": {f"GENE{i}": gene for i, gene in enumerate(genes)},
    }


def save(model: Any, folder: str | pathlib.Path, n_special: int, median: np.ndarray) -> None:
    """A folder as published: config.json, model.safetensors and the dictionaries."""
    model.save_pretrained(folder)
    for name, content in dictionaries(len(median), n_special, median).items():
        (pathlib.Path(folder) / f"{name}.json").write_text(json.dumps(content))


def golden(seed: int = 0) -> dict[str, np.ndarray]:
    """Everything in the golden file, flat: "<case>/<what>". V2 for the objective, V1 for the classifiers."""
    out: dict[str, np.ndarray] = {}
    for case, head, n_special in (("v2", "mlm", 4), ("cell", "cell", 2), ("gene", "gene", 2)):
        model = build(head, seed=seed + len(out))
        vocab_size = model.config.vocab_size
        batch = cells(4, vocab_size - n_special, 36, seed + 1)  # the first cell is longer than the network
        tokens = tokenise(batch, n_special, model.config.max_position_embeddings)
        found = {f"weights/{k}": v for k, v in state(model).items()} | batch | {"tokens": tokens}
        found |= run(model, tokens)
        if head == "mlm":
            shown, labels = hide(tokens, n_special, vocab_size, seed + 2)
            found |= {"shown": shown, "labels": labels, "shown_logits": run(model, shown)["logits"]}
            trained = train(model, shown, labels)
            found["loss"] = trained["loss"]
            for kind in ("gradients", "after"):
                found |= {f"{kind}/{k}": v for k, v in trained[kind].items()}
        out |= {f"{case}/{name}": value for name, value in found.items()}
    return out


def full(size: str | None = None) -> dict[str, Any]:
    """The published sizes (or one of them), two cells each, against scjax: one table of numbers."""
    import jax

    from scjax.interop import import_pretrained
    from scjax.models import build as build_ours
    from scjax.nn import bind

    report: dict[str, Any] = {"system": "geneformer", "parameters": {}, "max_abs": {}, "tolerance": TOLERANCE}
    for name in [size] if size else SIZES:
        layers, width, heads, ff, length, vocab_size, run_tokens = SIZES[name]
        n_special = 2 if name.startswith("v1") else 4
        theirs = build(
            jitter=0.02,
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=ff,
            max_position_embeddings=length,
        )
        batch = cells(2, vocab_size - n_special, run_tokens, seed=1)
        tokens = tokenise(batch, n_special, length)
        expected = run(theirs, tokens)
        with tempfile.TemporaryDirectory() as folder:
            save(theirs, folder, n_special, batch["median"])
            imported = import_pretrained("geneformer", folder).model
        del theirs
        n_genes = len(imported["vocabulary"])
        model = build_ours("geneformer", imported["config"], n_genes)
        module = bind(model, imported["params"], imported["buffers"])
        report["parameters"][name] = sum(leaf.size for leaf in jax.tree.leaves(imported["params"]))
        assert report["parameters"][name] == PUBLISHED[name], report["parameters"]
        ours = np.where(tokens < n_special, tokens + n_genes, tokens - n_special).astype(np.int32)
        x = jax.jit(module.run)(ours)
        logits = np.asarray(jax.jit(module.predict)(x))
        logits = np.concatenate([logits[..., n_genes:], logits[..., :n_genes]], -1)
        on = tokens != 0
        error = np.abs(np.asarray(x) - expected["hidden"][-1])[on].max()
        report["max_abs"][f"{name} last hidden state"] = float(error)
        report["max_abs"][f"{name} logits"] = float(np.abs(logits - expected["logits"])[on].max())
    return report


def main() -> None:
    GOLDEN.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDEN, **golden())
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
