"""What checkpoints of scBERT and CellLM have in common: layers of performer-pytorch and one gene table."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from scjax.genes import Vocabulary
from scjax.interop.files import existing, read_tensors
from scjax.interop.mapping import Rule, attention_out, dense, norm, one, qkv
from scjax.nn.performer import n_features

TABLE = "pos_emb.emb.weight"
LAYER = "performer.net.layers.{i}"
IGNORED = {
    r"(encoder\.)?performer\.proj_updater\..*": "a second name of the projections and their counter",
}


def read_state(path: str | pathlib.Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors of a ``.pth`` file and notes of what else is in it.

    Either the file is a dictionary of tensors or it holds one under "model_state_dict"; "module." before each
    name, as training on several devices leaves it, is dropped.

    Raises:
      ValueError: no such dictionary; says what there is.
    """
    content: Any = read_tensors(path)
    notes = []
    if isinstance(content, dict) and isinstance(content.get("model_state_dict"), dict):
        rest = sorted(set(content) - {"model_state_dict"})
        if rest:
            notes.append(f"left aside beside model_state_dict: {', '.join(rest)}")
        content = content["model_state_dict"]
    if not isinstance(content, dict) or not any(str(k).endswith(TABLE) for k in content):
        some = (
            ", ".join(sorted(map(str, content))[:6]) if isinstance(content, dict) else type(content).__name__
        )
        raise ValueError(f"{path} holds no tensor {TABLE}, by itself or in model_state_dict; there is {some}")
    return {str(k).removeprefix("module."): np.asarray(v) for k, v in content.items()}, notes


def split_table(tensors: Mapping[str, np.ndarray], n_special: int) -> dict[str, np.ndarray]:
    """The tensors with the gene table cut into its genes and the special tokens after them."""
    out: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if name.endswith(TABLE):
            n = len(tensor) - n_special
            out |= {f"{name}[genes]": tensor[:n], f"{name}[special]": tensor[n:]}
        else:
            out[name] = tensor
    return out


def sizes(tensors: Mapping[str, np.ndarray], prefix: str, n_tokens: int, where: Any) -> dict[str, Any]:
    """Hyper-parameters that the shapes tell.

    Raises:
      ValueError: a tensor is missing, or another number of tokens or of random features.
    """

    def shape(name: str) -> tuple[int, ...]:
        if prefix + name not in tensors:
            raise ValueError(f"{where} has no tensor {prefix + name}; it is no checkpoint of this system")
        return tuple(tensors[prefix + name].shape)

    layer = LAYER.replace("{i}", "0")
    tokens, d_model = shape("token_emb.weight")
    if tokens != n_tokens:
        raise ValueError(f"{where}: token_emb.weight has {tokens} tokens; this system has {n_tokens}")
    features, d_head = shape(f"{layer}.0.fn.fast_attention.projection_matrix")
    if features != n_features(d_head):
        raise ValueError(
            f"{where}: projection_matrix has {features} random features for heads of width {d_head}; "
            f"published are {n_features(d_head)}"
        )
    numbers = [re.match(re.escape(prefix) + r"performer\.net\.layers\.(\d+)\.", name) for name in tensors]
    return {
        "d_model": d_model,
        "n_heads": shape(f"{layer}.0.fn.to_q.weight")[0] // d_head,
        "d_head": d_head,
        "n_layers": 1 + max(int(number[1]) for number in numbers if number),
        "d_ff": shape(f"{layer}.1.fn.fn.w1.weight")[0],
        "gene_table": {"kind": "frozen"},
    }


def gene_list(
    genes: str | pathlib.Path | Vocabulary | None, n: int, where: Any, source: str
) -> tuple[Vocabulary, str]:
    """The genes in the order of the table, and a note.

    Args:
      genes: a vocabulary; its table (TSV with a column gene_id); or a text file with one symbol a line.
      n: rows of the table.
      where: the checkpoint, for messages.
      source: where the published list is to be had, for messages.

    Raises:
      ValueError: no list, or one of another length.
    """
    if genes is None:
        raise ValueError(
            f"{where} does not say which gene each of its {n:,} rows is: give the list with genes=FILE, a "
            f"text file with a symbol a line in the order of training. {source}"
        )
    if isinstance(genes, Vocabulary):
        vocabulary, told = genes, "a vocabulary that was given"
    else:
        file = existing(genes)
        lines = file.read_text(encoding="utf-8").splitlines()
        if lines and "gene_id" in lines[0].split("\t"):
            vocabulary = Vocabulary.from_tsv(file)
        else:
            vocabulary = Vocabulary([line.strip() for line in lines if line.strip()])
        told = str(file)
    if len(vocabulary) != n:
        raise ValueError(f"{told}: {len(vocabulary):,} genes; {where} has a table of {n:,}")
    return vocabulary, f"genes: {told}"


def performer_rules(prefix: str, n_heads: int) -> list[Rule]:
    """Embeddings, Performer layers and the last norm; ``prefix`` comes before each name of theirs."""
    layer, blocks = prefix + LAYER, "params/performer/blocks"
    return [
        *one(f"{prefix}token_emb.weight", "params/token"),
        *one(f"{prefix}{TABLE}[genes]", "buffers/gene/table"),
        *one(f"{prefix}{TABLE}[special]", "buffers/gene/special"),
        *norm(f"{layer}.0.norm", f"{blocks}/norm1"),
        *qkv([f"{layer}.0.fn.to_{x}" for x in "qkv"], f"{blocks}/attention/qkv", n_heads, bias=False),
        *attention_out(f"{layer}.0.fn.to_out", f"{blocks}/attention/out", n_heads),
        *one(
            f"{layer}.0.fn.fast_attention.projection_matrix", "buffers/performer/blocks/attention/projection"
        ),
        *norm(f"{layer}.1.norm", f"{blocks}/norm2"),
        *dense(f"{layer}.1.fn.fn.w1", f"{blocks}/up"),
        *dense(f"{layer}.1.fn.fn.w2", f"{blocks}/down"),
        *one(f"{prefix}performer.calls_since_last_redraw", "buffers/calls"),
        *norm(f"{prefix}norm", "params/norm"),
    ]


def map_head_rules(convolution: str, layers: tuple[str, ...]) -> list[Rule]:
    """Of GeneMapHead: a convolution (1, 1, 1, width) over a token's features, then dense layers."""
    return [
        *one(
            f"{convolution}.weight",
            "params/head/token/kernel",
            lambda w: w.reshape(-1, 1),
            lambda k: k.reshape(1, 1, 1, -1),
        ),
        *one(f"{convolution}.bias", "params/head/token/bias"),
        *(rule for i, name in enumerate(layers) for rule in dense(name, f"params/head/map/layers/{i}")),
    ]
