"""scFoundation's checkpoint in.

One file, ``models.ckpt``, holds three models of one shape: "cell" (for cell embeddings, annotation, drug
response), "rde" (read-depth enhancement, mapping) and "gene" (gene embeddings, expression). Each is
``{"config", "state_dict"}``. Which row of the gene table is which gene stands in a file apart,
``OS_scRNA_gene_index.19264.tsv`` of scFoundation's repository.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scjax.genes import Vocabulary
from scjax.interop.files import existing, read_tensors
from scjax.interop.mapping import Rule, attention_out, dense, norm, one, qkv
from scjax.interop.source import Source

WEIGHTS = "models.ckpt"
GENES = "OS_scRNA_gene_index.19264.tsv"
MODELS = ("cell", "rde", "gene")
ARCHITECTURE = "mae_autobin"
IGNORED: dict[str, str] = {}  # every one of the 265 tensors has its place


def read(
    path: str | pathlib.Path,
    *,
    which: str = "cell",
    genes: str | pathlib.Path | Vocabulary | None = None,
) -> Source:
    """Reads one of the three models.

    Args:
      path: models.ckpt, or the folder that holds it.
      which: "cell", "rde" or "gene".
      genes: the gene list, as the repository's TSV (columns gene_name and index) or as a Vocabulary in
        the order of the model's table; None looks for the TSV beside the weights.

    Raises:
      FileNotFoundError: the weights or the gene list are not there.
      ValueError: no such model in the file (lists those there are), a file of another make (says what
        differs), or a gene list of another length or order.
    """
    path = pathlib.Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    content = read_tensors(path)
    models = [name for name, model in content.items() if isinstance(model, dict) and "state_dict" in model]
    if which not in models:
        raise ValueError(
            f"{path} has no model {which!r}; "
            + (f"which = {' or '.join(map(repr, models))}" if models else _foreign(content))
        )
    theirs = _config(content[which].get("config"), f"{path}, model {which!r}")
    tensors = {
        str(name).split("model.", 1)[-1]: np.asarray(tensor)
        for name, tensor in content[which]["state_dict"].items()
    }
    n_genes = int(theirs["seq_len"]) - 2
    vocabulary, told = _vocabulary(genes, path, n_genes)
    encoder, decoder = theirs["encoder"], theirs["decoder"]
    config: dict[str, Any] = {
        "d_model": encoder["hidden_dim"],
        "n_heads": encoder["heads"],
        "n_layers": encoder["depth"],
        "d_ff": _size(tensors, "encoder.transformer_encoder.0.linear1.weight", 0),
        "decoder_d_model": decoder["hidden_dim"],
        "decoder_n_heads": decoder["heads"],
        "decoder_d_head": decoder["dim_head"],
        "decoder_n_layers": decoder["depth"],
        "decoder_d_ff": _size(tensors, "decoder.performer.net.layers.0.1.fn.fn.w1.weight", 0),
        "n_bins": theirs["bin_num"],
        "bin_alpha": theirs["bin_alpha"],
    }
    for ours, name in (
        ("encoder_length", "mae_encoder_max_seq_len"),
        ("mask_fraction", "value_mask_prob"),
        ("zero_mask_fraction", "zero_mask_prob"),
        ("replace_fraction", "replace_prob"),
        ("random_fraction", "random_token_prob"),
    ):
        if name in theirs:
            config[ours] = theirs[name]
    nothing = {name: np.zeros(n_genes, np.float32) for name in ("gene_mean/total", "gene_mean/count")}
    notes = [
        f"model {which!r} of {path.name}, which holds {', '.join(models)}",
        told,
        'for the numbers of the original one cell at a time: stabiliser = "global"',
    ]
    return Source("scfoundation", config, vocabulary, tensors, nothing, notes)


def _foreign(content: Mapping[Any, Any]) -> str:
    some = ", ".join(sorted(map(str, content))[:4])
    return f"scFoundation's holds {', '.join(MODELS)}, each with config and state_dict; this one {some}"


def _size(tensors: Mapping[str, np.ndarray], name: str, axis: int) -> int:
    if name not in tensors:
        raise ValueError(f"no tensor {name}: not a checkpoint of scFoundation, or an incomplete one")
    return int(tensors[name].shape[axis])


def _config(config: Any, where: str) -> dict[str, Any]:
    """Their settings in one dictionary; those of the model and of the data set are apart in the file."""
    try:
        name = config["model"]
        theirs = {**config["model_config"][name], **config["dataset_config"]["rnaseq"]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: the config has no {error}; it needs model, model_config and dataset_config.rnaseq"
        ) from error
    needed = {
        "": ("seq_len", "bin_num", "bin_alpha", "encoder", "decoder"),
        "encoder": ("hidden_dim", "heads", "depth", "module_type"),
        "decoder": ("hidden_dim", "heads", "depth", "dim_head", "module_type"),
    }
    for part, keys in needed.items():
        missing = [key for key in keys if key not in (theirs[part] if part else theirs)]
        if missing:
            raise ValueError(
                f"{where}: the config{f' of the {part}' * bool(part)} has no {', '.join(missing)}"
            )
    for what, value, expected in (
        ("model", name, ARCHITECTURE),
        ("encoder.module_type", theirs["encoder"]["module_type"], "transformer"),
        ("encoder.norm_first", theirs["encoder"].get("norm_first", False), False),
        ("decoder.module_type", theirs["decoder"]["module_type"], "performer"),
        ("bin_type", theirs.get("bin_type", "auto_bin"), "auto_bin"),
    ):
        if value != expected:
            raise ValueError(f"{where}: {what} is {value!r}; only {expected!r} is known here")
    return theirs


def _vocabulary(
    genes: str | pathlib.Path | Vocabulary | None, weights: pathlib.Path, n: int
) -> tuple[Vocabulary, str]:
    """The genes in the order of the table, and a line that says where they came from."""
    if genes is None:
        there = [folder / GENES for folder in (weights.parent, weights.parent.parent)]
        genes = next((file for file in there if file.is_file()), None)
        if genes is None:
            raise FileNotFoundError(
                f"{weights} does not say which gene is which row; that stands in {GENES} of scFoundation's "
                "repository (folder model). Put it beside the weights or give genes=FILE"
            )
    if isinstance(genes, Vocabulary):
        vocabulary, told = genes, "genes: a vocabulary that was given"
    else:
        vocabulary, told = Vocabulary(_gene_names(existing(genes))), f"genes: {genes}"
    if len(vocabulary) != n:
        raise ValueError(f"{told} has {len(vocabulary):,} genes, {weights} a table of {n:,}")
    return vocabulary, told


def _gene_names(file: pathlib.Path) -> Sequence[str]:
    table = pd.read_csv(file, sep="\t", keep_default_na=False)
    if list(table.columns[:2]) != ["gene_name", "index"]:
        raise ValueError(f"{file} has the columns {list(table.columns)[:4]}, not gene_name and index")
    if table["index"].tolist() != list(range(len(table))):
        raise ValueError(
            f"{file}: the column index does not count 0, 1, 2, ...; rows are missing or were moved"
        )
    return table["gene_name"].tolist()


def rules(config: Mapping[str, Any], n_genes: int) -> list[Rule]:
    """Tensors <-> variables; the gene table has genes, T, S and padding in the same order."""
    heads = int(config.get("n_heads", 12)), int(config.get("decoder_n_heads", 8))
    encoder, blocks = "encoder.transformer_encoder.{i}", "params/encoder/blocks"
    decoder, performers = "decoder.performer.net.layers.{i}", "params/decoder/blocks"
    table = [
        *one("pos_emb.weight", "params/gene/embedding"),
        *dense("token_emb.mlp", "params/value/up"),
        *dense("token_emb.mlp2", "params/value/mix"),
        *one("token_emb.emb.weight", "params/value/table"),
        Rule(
            ("token_emb.emb_mask.weight", "token_emb.emb_pad.weight"),
            "params/value/special",
            lambda *special: np.concatenate(special),
            lambda special: (special[:1], special[1:]),
        ),
        *qkv(
            [f"{encoder}.self_attn.in_proj_weight|{encoder}.self_attn.in_proj_bias"],
            f"{blocks}/attention/qkv",
            heads[0],
        ),
        *attention_out(f"{encoder}.self_attn.out_proj", f"{blocks}/attention/out", heads[0]),
        *dense(f"{encoder}.linear1", f"{blocks}/up"),
        *dense(f"{encoder}.linear2", f"{blocks}/down"),
        *norm(f"{encoder}.norm1", f"{blocks}/norm1"),
        *norm(f"{encoder}.norm2", f"{blocks}/norm2"),
        *norm("encoder.norm", "params/encoder_norm"),
        *dense("decoder_embed", "params/to_decoder"),
        *norm(f"{decoder}.0.norm", f"{performers}/norm1"),
        *qkv([f"{decoder}.0.fn.to_{x}" for x in "qkv"], f"{performers}/attention/qkv", heads[1]),
        *attention_out(f"{decoder}.0.fn.to_out", f"{performers}/attention/out", heads[1]),
        *one(
            f"{decoder}.0.fn.fast_attention.projection_matrix", "buffers/decoder/blocks/attention/projection"
        ),
        *norm(f"{decoder}.1.norm", f"{performers}/norm2"),
        *dense(f"{decoder}.1.fn.fn.w1", f"{performers}/up"),
        *dense(f"{decoder}.1.fn.fn.w2", f"{performers}/down"),
        *one("decoder.performer.calls_since_last_redraw", "buffers/calls"),
        *norm("decoder.norm", "params/decoder_norm"),
        *norm("norm", "params/norm"),
        *dense("to_final", "params/to_value"),
    ]
    if config.get("n_outputs"):
        table += [
            *one("norm.running_mean", "buffers/head/norm/mean", lambda x: x[None], lambda x: x[0]),
            *one("norm.running_var", "buffers/head/norm/var", lambda x: x[None], lambda x: x[0]),
            *dense("fc1.0", "params/head/hidden"),
            *dense("fc1.2", "params/head/out"),
        ]
    return table
