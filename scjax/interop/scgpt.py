"""scGPT's checkpoints in and out: a folder with ``args.json``, ``vocab.json`` and the weights.

Queries, keys and values have three names: ``self_attn.Wqkv`` in the released files,
``self_attn._impl.Wqkv`` from newer code, ``self_attn.in_proj_`` from PyTorch's own layer. All three are read;
the first is written, which scGPT's own loader renames. Objective and heads are seen from the tensors.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from scjax.config import from_config
from scjax.genes import Vocabulary
from scjax.interop.files import read_json, read_tensors
from scjax.interop.mapping import Rule, attention_out, dense, export_tensors, norm, one, qkv
from scjax.interop.source import Source
from scjax.models.scgpt import PAD_VALUE, ScGPTConfig

SPECIALS = ("<pad>", "<cls>", "<eoc>")  # our order, which is that of the released files
WEIGHTS = ("best_model.pt", "model.safetensors", "best_model.safetensors")
TABLE = "encoder.embedding.weight"
IGNORED = {
    r"(dsbn\.bns\.\d+|bn)\.num_batches_tracked": "counts batches; running statistics do not depend on it",
    r"flag_encoder\.weight": "marks unknown genes, of which this model's objective has none",
}


# --------------------------------------------------------------------------- in
def read(path: str | pathlib.Path) -> Source:
    """Reads a checkpoint.

    Args:
      path: the folder.

    Raises:
      FileNotFoundError: one of the three files is not there.
      ValueError: settings and tensors disagree, or the vocabulary and the gene table do (names what).
    """
    path = pathlib.Path(path)
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), path / WEIGHTS[0])
    args, vocab, content = (
        read_json(path / "args.json"),
        read_json(path / "vocab.json"),
        read_tensors(weights),
    )
    content = content.get("model_state_dict", content)
    tensors = {canonical(str(name)): np.asarray(tensor) for name, tensor in content.items()}
    if TABLE not in tensors:
        some = ", ".join(sorted(tensors)[:4])
        raise ValueError(f"{weights} has no {TABLE}: not a checkpoint of scGPT? It holds {some}, ...")
    genes, order = gene_order(vocab, tensors[TABLE].shape[0], str(path / "vocab.json"))
    tensors[TABLE] = tensors[TABLE][order]
    config, notes = settings(args, tensors, str(path / "args.json"))
    buffers = {}
    if config["objective"] == "generative":
        buffers["calls"] = ScGPTConfig.second_pass_after
        notes.append("goes on in the second phase of pretraining, with the pass from the cell embedding")
    return Source("scgpt", config, Vocabulary(genes), tensors, buffers, notes)


def canonical(name: str) -> str:
    """One name for the three of queries, keys and values, and none for data parallelism."""
    return name.removeprefix("module.").replace("self_attn._impl.", "self_attn.").replace("Wqkv.", "in_proj_")


def gene_order(vocab: Mapping[str, int], n_rows: int, where: str) -> tuple[list[str], np.ndarray]:
    """Genes in the order of their ids, and the row of the table for each of them and the special tokens.

    Special tokens may have any ids; one that the file lacks is appended, as scGPT does.
    """
    ids = dict(vocab)
    for token in SPECIALS:
        ids.setdefault(token, len(ids))
    twice = [number for number, n in Counter(ids.values()).items() if n > 1]
    if twice:
        names = [name for name, number in ids.items() if number == twice[0]]
        raise ValueError(f"{where}: {' and '.join(names)} have the same id, {twice[0]}")
    if len(ids) != n_rows or set(ids.values()) != set(range(n_rows)):
        raise ValueError(
            f"{where} has {len(ids):,} tokens with ids {min(ids.values())} to {max(ids.values())}; the gene "
            f"table {TABLE} has {n_rows:,} rows"
        )
    genes = sorted((name for name in ids if name not in SPECIALS), key=ids.__getitem__)
    return genes, np.array([ids[name] for name in (*genes, *SPECIALS)])


def settings(
    args: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: str
) -> tuple[dict[str, Any], list[str]]:
    """``(config, notes)`` from args.json and from which tensors there are."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    def count(pattern: str) -> int:
        return len({found[1] for name in tensors if (found := re.match(pattern, name))})

    def rows(name: str) -> int:
        return int(tensors[name].shape[0]) if name in tensors else 0

    if "nheads" not in args:
        raise ValueError(f"{where} has no nheads, the number of heads, which no tensor tells")
    first = "transformer_encoder.layers.0.linear1.weight"
    if first not in tensors:
        raise ValueError(f"no tensor {first}: not a checkpoint of scGPT, or an incomplete one")
    sizes = {
        "embsize": int(tensors[TABLE].shape[1]),
        "nlayers": count(r"transformer_encoder\.layers\.(\d+)\."),
        "d_hid": rows(first),
    }
    for name, size in sizes.items():
        if args.get(name, size) != size:
            raise ValueError(f"{where} says {name} = {args[name]}; the tensors have {size}")
    if args.get("input_emb_style", "continuous") != "continuous":
        raise ValueError(f"{where}: input_emb_style = {args['input_emb_style']!r}; only continuous is known")
    style = args.get("input_style", "binned")
    if style not in ("binned", "log1p"):
        raise ValueError(f"{where}: input_style = {style!r}; binned and log1p are known")
    domains = count(r"dsbn\.bns\.(\d+)\.")
    batches = (rows("batch_encoder.embedding.weight"), rows("grad_reverse_discriminator.out_layer.weight"))
    generative = "flag_encoder.weight" in tensors and not (domains or has("bn.") or batches[1])
    zeros = has("decoder.zero_logit.")
    pad = float(args.get("pad_value", PAD_VALUE))
    config: dict[str, Any] = {
        "d_model": sizes["embsize"],
        "n_heads": int(args["nheads"]),
        "n_layers": sizes["nlayers"],
        "d_ff": sizes["d_hid"],
        "dropout": float(args.get("dropout", ScGPTConfig.dropout)),
        "max_length": int(args.get("max_seq_len", ScGPTConfig.max_length)),
        "values": style,
        "n_bins": int(args.get("n_bins", ScGPTConfig.n_bins)),
        "zeros": zeros,
        "zero_probability": zeros,
        "cls_value": float(args.get("cls_value", pad if generative else 0.0)),
        "mask_value": float(args.get("mask_value", ScGPTConfig.mask_value)),
        "objective": "generative" if generative else "masked",
        "mvc_weight": float(has("mvc_decoder.")),
        "n_batches": max(domains, *batches),
        "batch_decoder": batches[0] > 0,
        "batch_norm": "domain" if domains else "shared" if has("bn.") else "none",
        "dab_weight": float(batches[1] > 0),
        "n_outputs": rows("cls_decoder.out_layer.weight"),
    }
    ratios = args.get("mask_ratio", ())
    ratios = ratios if isinstance(ratios, (list, tuple)) else (ratios,)
    if ratios := tuple(float(r) for r in ratios if 0 < float(r) < 1):
        config["mask_fractions"] = ratios
    how = "in scGPT's pretraining" if generative else "in scGPT's fine-tuning"
    how = "the file says" if "cls_value" in args else how
    notes = [
        f'objective "{config["objective"]}"; CLS has the value {config["cls_value"]:g} as {how}',
        "queries, keys and values are listed below as self_attn.in_proj_",
    ]
    return config, notes


def rules(config: Mapping[str, Any], n_genes: int) -> list[Rule]:
    """Tensors of scGPT under :func:`canonical` names <-> variables; the gene table is in our order."""
    layer, block = "transformer_encoder.layers.{i}", "params/transformer/blocks"
    attention, heads = f"{layer}.self_attn", config["n_heads"]
    found = [
        *one(TABLE, "params/gene/embedding"),
        *norm("encoder.enc_norm", "params/gene_norm"),
        *dense("value_encoder.linear1", "params/value/layers/0"),
        *dense("value_encoder.linear2", "params/value/layers/1"),
        *norm("value_encoder.norm", "params/value_norm"),
        *qkv([f"{attention}.in_proj_weight|{attention}.in_proj_bias"], f"{block}/attention/qkv", heads),
        *attention_out(f"{attention}.out_proj", f"{block}/attention/out", heads),
        *dense(f"{layer}.linear1", f"{block}/up"),
        *dense(f"{layer}.linear2", f"{block}/down"),
        *norm(f"{layer}.norm1", f"{block}/norm1"),
        *norm(f"{layer}.norm2", f"{block}/norm2"),
        *_values("decoder.fc", "params/decoder/value"),
    ]
    if config["zero_probability"]:
        found += _values("decoder.zero_logit", "params/decoder/expressed")
    if config["mvc_weight"]:
        found += dense("mvc_decoder.gene2query", "params/mvc/query")
        found += dense("mvc_decoder.W", "params/mvc/value", bias=False)
        if config["zero_probability"]:
            found += dense("mvc_decoder.W_zero_logit", "params/mvc/expressed")
    if config["objective"] == "generative":
        found += one("flag_encoder.weight", "params/flag/embedding")
    if config["batch_decoder"]:
        found += one("batch_encoder.embedding.weight", "params/batch_vector/embed/embedding")
        found += norm("batch_encoder.enc_norm", "params/batch_vector/norm")
    if config["batch_norm"] == "domain":
        found += one("dsbn.bns.{i}.running_mean", "buffers/domain_norm/mean")
        found += one("dsbn.bns.{i}.running_var", "buffers/domain_norm/var")
    elif config["batch_norm"] == "shared":
        found += norm("bn", "params/domain_norm")
        for theirs, ours in (("running_mean", "mean"), ("running_var", "var")):
            found += one(f"bn.{theirs}", f"buffers/domain_norm/{ours}", lambda x: x[None], lambda x: x[0])
    if config["dab_weight"]:
        found += _head("grad_reverse_discriminator", "params/discriminator")
    if config["n_outputs"]:
        found += _head("cls_decoder", "params/head")
    return found


def _values(theirs: str, ours: str) -> list[Rule]:
    return [rule for i in range(3) for rule in dense(f"{theirs}.{2 * i}", f"{ours}/layers/{i}")]


def _head(theirs: str, ours: str) -> list[Rule]:
    found = dense(f"{theirs}.out_layer", f"{ours}/out")
    for i in range(2):
        found += dense(f"{theirs}._decoder.{3 * i}", f"{ours}/layers/{i}")
        found += norm(f"{theirs}._decoder.{3 * i + 2}", f"{ours}/norms/{i}")
    return found


# -------------------------------------------------------------------------- out
# what scGPT's own code cannot be told, and its value there
FIXED = {"norm": "post", "pool": "cls", "project_unknown": False}


def write(directory: str | pathlib.Path, model: Any) -> None:
    """Writes a model as scGPT's own tools read one: args.json, vocab.json, model.safetensors and, where torch
    is installed, best_model.pt. ``value_scale`` moves into the first and the last layers.

    Args:
      directory: to write into.
      model: a ``scjax.api.Model`` of this system.

    Raises:
      ValueError: the model departs from what scGPT's code can express (names how).
      ImportError: safetensors is missing.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError(f"export needs safetensors: pip install 'scjax[interop]' ({error})") from error
    config = from_config(ScGPTConfig, model.config, where="the model's config")
    for name, value in FIXED.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"scGPT's code has no {name} = {getattr(config, name)!r}, only {value!r}: this model would "
                'give other numbers there. format = "plain" takes any model'
            )
    if config.gene_table.kind != "random":
        raise ValueError(f"scGPT's code has no {config.gene_table.kind} gene table, only a learned one")
    directory = pathlib.Path(directory)
    variables = {"params": model.params, "buffers": model.buffers}
    found = export_tensors(rules(dataclasses.asdict(config), len(model.vocabulary)), variables)
    tensors = {name.replace("in_proj_", "Wqkv."): np.array(tensor) for name, tensor in found.items()}
    scale = config.value_scale
    tensors["value_encoder.linear1.weight"] *= scale
    for name in ("decoder.fc.4.weight", "decoder.fc.4.bias", "mvc_decoder.W.weight"):
        if name in tensors:
            tensors[name] /= scale
    for name in [name for name in tensors if name.endswith("running_mean")]:
        tensors[name.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    save_file(tensors, directory / "model.safetensors")
    try:
        import torch
    except ImportError:
        pass
    else:
        torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, directory / "best_model.pt")
    names = [*_names(model.vocabulary), *SPECIALS]
    (directory / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}, indent=0))
    generative = config.objective == "generative"
    padding = config.cls_value if generative else PAD_VALUE  # scGPT has one value for both in pretraining
    args = {
        "embsize": config.d_model,
        "nheads": config.n_heads,
        "d_hid": config.d_ff,
        "nlayers": config.n_layers,
        "n_layers_cls": 3,
        "dropout": config.dropout,
        "input_style": config.values,
        "input_emb_style": "continuous",
        "n_bins": config.n_bins,
        "max_seq_len": config.max_length,
        "mask_ratio": list(config.mask_fractions),
        "mask_value": config.mask_value / scale,
        "pad_token": SPECIALS[0],
        "pad_value": padding / scale,
        "cls_value": config.cls_value / scale,  # ours: scGPT's own code gives CLS what its caller does
        "MVC": bool(config.mvc_weight),
        "USE_GENERATIVE_TRAINING": generative,
        "training_tasks": "both" if generative else "pcpt",
        "no_cls": not config.n_outputs,
        "no_cce": True,
        "fast_transformer": True,
    }
    (directory / "args.json").write_text(json.dumps(args, indent=2) + "\n")


def _names(vocabulary: Vocabulary) -> list[str]:
    """Symbols, as scGPT names genes; the id where there is none, or several genes have the same."""
    times = Counter(vocabulary.symbols)
    pairs = zip(vocabulary.symbols, vocabulary.ids, strict=True)
    return [symbol if symbol and times[symbol] == 1 else gene_id for symbol, gene_id in pairs]
