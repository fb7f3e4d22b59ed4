"""Geneformer's checkpoints (Hugging Face BERT) in and out.

A published folder holds ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``). Which row of
the table is which gene stands in a dictionary apart, ``token_dictionary*``, and what counts are divided by
in ``gene_median_dictionary*``: pickles or JSON, which Geneformer's repository keeps in ``geneformer/`` and
``geneformer/gene_dictionaries_30m/`` beside the models.
"""

from __future__ import annotations

import json
import pathlib
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scjax.genes import Vocabulary
from scjax.interop.files import read_dictionary, read_json, read_tensors
from scjax.interop.mapping import Rule, attention_out, dense, export_tensors, norm, one, qkv, rows
from scjax.interop.source import Source
from scjax.models.geneformer import EPSILON, SPECIALS

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
WORDS = "bert.embeddings.word_embeddings.weight"
IGNORED = {
    r"bert\.embeddings\.(position_ids|token_type_ids)": "constants 0, 1, 2, ... and 0: no parameters",
    r"cls\.predictions\.decoder\.(weight|bias)": "the same numbers as the word embeddings and the bias",
    r"cls\.seq_relationship\..*": "next-sentence head of BERT, not used by Geneformer",
    r"bert\.pooler\..*": "pooler of BERT, which only a classifier of cells reads",
}


# --------------------------------------------------------------------------- in
def read(
    path: str | pathlib.Path,
    *,
    token_dictionary: str | pathlib.Path | None = None,
    gene_medians: str | pathlib.Path | None = None,
    gene_names: str | pathlib.Path | None = None,
) -> Source:
    """Reads a folder as published, V1 or V2, with a masked-LM, a cell or a gene classification head.

    Args:
      path: the folder with config.json and the weights.
      token_dictionary: {Ensembl id: token}; None looks for one that fits beside the weights.
      gene_medians: {Ensembl id: median}; likewise.
      gene_names: {symbol: Ensembl id}; likewise, but symbols may be missing.

    Raises:
      FileNotFoundError: config.json, the weights, the token dictionary or the medians are not there.
      ValueError: not a Geneformer (says what differs), or a dictionary of another model.
    """
    folder = pathlib.Path(path)
    about = folder / "config.json"
    if not about.is_file():
        raise FileNotFoundError(
            f"{folder}: no config.json; a Geneformer folder has it beside {' or '.join(WEIGHTS)}"
        )
    theirs = read_json(about)
    _check_architecture(theirs, about)
    size = int(theirs["vocab_size"])

    tokens, token_file = _dictionary(
        folder, "token_dictionary", token_dictionary, lambda d: _tokens_of(d, size), "which gene is which row"
    )
    genes = sorted((t for t in tokens if t not in SPECIALS), key=tokens.__getitem__)
    medians, median_file = _dictionary(
        folder,
        "gene_median_dictionary",
        gene_medians,
        lambda d: None if set(d) & set(genes) else "none of its genes is in the token dictionary",
        "what the counts of a gene are divided by",
        token_file,
    )
    names, _ = _dictionary(folder, "gene_name_id_dict", gene_names, lambda d: None, "", token_file)
    specials = [name for name in SPECIALS if name in tokens]
    median = np.array([medians.get(gene, 0.0) for gene in genes], np.float32)

    tensors = _tensors(folder)
    order = np.array([tokens[name] for name in (*specials, *genes)])
    for name in (WORDS, "cls.predictions.bias"):  # to the order specials, then genes, whatever theirs is
        if name in tensors:
            if len(tensors[name]) != size:
                raise ValueError(
                    f"{name} has {len(tensors[name]):,} rows, config.json says vocab_size {size:,}"
                )
            tensors[name] = tensors[name][order]
    config: dict[str, Any] = {
        "d_model": theirs["hidden_size"],
        "n_heads": theirs["num_attention_heads"],
        "n_layers": theirs["num_hidden_layers"],
        "d_ff": theirs["intermediate_size"],
        "dropout": theirs["hidden_dropout_prob"],
        "max_length": theirs["max_position_embeddings"],
        "specials": "<cls>" in tokens,
    }
    if "classifier.weight" in tensors:
        cell = "bert.pooler.dense.weight" in tensors
        config |= {"n_outputs": len(tensors["classifier.weight"]), "head": "cell" if cell else "gene"}
    notes = [f"tokens: {token_file}", f"medians: {median_file}"]
    unranked = int((median <= 0).sum())
    if unranked:
        notes.append(f"{unranked:,} genes have no median: they get no rank and no model reads them")
    return Source("geneformer", config, _vocabulary(genes, names), tensors, {"median": median}, notes)


def _check_architecture(theirs: Mapping[str, Any], where: pathlib.Path) -> None:
    needed = ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    missing = [k for k in (*needed, "max_position_embeddings", "hidden_dropout_prob") if k not in theirs]
    if missing:
        raise ValueError(f"{where}: no {', '.join(missing)}; is it the config of a Hugging Face BERT?")
    for key, expected in (
        ("model_type", "bert"),
        ("hidden_act", "relu"),
        ("layer_norm_eps", EPSILON),
        ("position_embedding_type", "absolute"),
        ("tie_word_embeddings", True),
        ("type_vocab_size", 2),
        ("is_decoder", False),
    ):
        if theirs.get(key, expected) != expected:
            raise ValueError(f"{where}: {key} is {theirs[key]!r}; a Geneformer has {expected!r}")


def _tokens_of(tokens: Mapping[Any, Any], size: int) -> str | None:
    """What is wrong with a token dictionary for a table of ``size`` rows."""
    if sorted(tokens.values()) != list(range(size)):
        return f"it has {len(tokens):,} tokens, config.json says vocab_size {size:,}, numbered from 0"
    special = {str(name) for name in tokens if str(name).startswith("<")}
    if special not in (set(SPECIALS[:2]), set(SPECIALS)):
        return f"its special tokens are {sorted(special)}; V1 has {SPECIALS[:2]}, V2 {SPECIALS}"
    return None


def _dictionary(
    folder: pathlib.Path,
    stem: str,
    given: str | pathlib.Path | None,
    wrong: Callable[[dict[Any, Any]], str | None],
    purpose: str,
    sibling: pathlib.Path | None = None,
) -> tuple[dict[Any, Any], pathlib.Path | None]:
    """The dictionary that was given, or the first beside the weights in which nothing is wrong.

    That of the same name as ``sibling`` but for its stem comes first: the dictionaries of V1 and of V2 lie
    near one another and share most genes. Without a ``purpose`` the dictionary may be missing.
    """
    if given is not None:
        found = read_dictionary(given)
        problem = wrong(found)
        if problem:
            raise ValueError(f"{given} is not the {stem} of this model: {problem}")
        return found, pathlib.Path(given)
    near = [folder, folder / "geneformer", folder.parent, folder.parent / "geneformer"]
    places = [place for one in near for place in (one, one / "gene_dictionaries_30m")]
    files = [f for p in places for kind in ("json", "pkl") for f in sorted(p.glob(f"{stem}*.{kind}"))]
    if sibling is not None:
        first = sibling.with_name(sibling.name.replace("token_dictionary", stem))
        files = [first] * (first != sibling and first.is_file()) + files
    problems = []
    for file in files:
        found = read_dictionary(file)
        problem = wrong(found)
        if problem is None:
            return found, file
        problems.append(f"{file}: {problem}")
    if not purpose:
        return {}, None
    argument = {"token_dictionary": "token_dictionary", "gene_median_dictionary": "gene_medians"}[stem]
    if problems:
        raise ValueError(f"no {stem} here belongs to {folder}: {'; '.join(problems)}")
    raise FileNotFoundError(
        f"{folder}: the weights do not say {purpose}; that stands in {stem}_gc30M.pkl (V1) or "
        f"{stem}_gc104M.pkl (V2) of Geneformer's repository: put it beside them or give {argument}=FILE"
    )


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    there = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not there:
        raise FileNotFoundError(f"{folder}: no weights, neither {' nor '.join(WEIGHTS)}")
    tensors = read_tensors(there[0])
    if WORDS not in tensors and WORDS.removeprefix("bert.") in tensors:  # saved without a head
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    for name, tied in (("weight", WORDS), ("bias", "cls.predictions.bias")):
        name = f"cls.predictions.decoder.{name}"
        if name in tensors and tied not in tensors:
            tensors[tied] = tensors[name]
        if name in tensors and not np.array_equal(tensors[name], tensors[tied]):
            raise ValueError(f"{there[0]}: {name} is not {tied}; in a Geneformer they are one tensor")
    return tensors


def _vocabulary(genes: list[str], names: Mapping[str, str]) -> Vocabulary:
    """With symbols where known; a gene's second name becomes an alias."""
    known: dict[str, list[str]] = {}
    for symbol, gene in names.items():
        known.setdefault(str(gene), []).append(str(symbol))
    called = [known.get(gene, [gene]) for gene in genes]
    aliases = [tuple(name for name in c[1:] if "|" not in name) for c in called]
    return Vocabulary(genes, [c[0] for c in called], aliases=aliases)


# ------------------------------------------------------------------------ rules
def rules(config: Mapping[str, Any], n_genes: int) -> list[Rule]:
    """Tensors <-> variables; theirs has the special tokens before the genes, ours after them."""
    n_special = 4 if config.get("specials") else 2
    order = np.r_[np.arange(n_special, n_special + n_genes), np.arange(n_special)]
    heads, layer, blocks = (
        int(config.get("n_heads", 4)),
        "bert.encoder.layer.{i}",
        "params/transformer/blocks",
    )
    table: list[Rule] = [
        *rows(WORDS, "params/gene/embedding", order),
        *one("bert.embeddings.position_embeddings.weight", "params/rank"),
        *one("bert.embeddings.token_type_embeddings.weight", "params/kind"),
        *norm("bert.embeddings.LayerNorm", "params/norm"),
        *qkv(
            [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")],
            f"{blocks}/attention/qkv",
            heads,
        ),
        *attention_out(f"{layer}.attention.output.dense", f"{blocks}/attention/out", heads),
        *norm(f"{layer}.attention.output.LayerNorm", f"{blocks}/norm1"),
        *dense(f"{layer}.intermediate.dense", f"{blocks}/up"),
        *dense(f"{layer}.output.dense", f"{blocks}/down"),
        *norm(f"{layer}.output.LayerNorm", f"{blocks}/norm2"),
    ]
    if not config.get("n_outputs"):
        return [
            *table,
            *dense("cls.predictions.transform.dense", "params/transform"),
            *norm("cls.predictions.transform.LayerNorm", "params/transform_norm"),
            *rows("cls.predictions.bias", "params/bias", order),
        ]
    if config.get("head", "cell") == "cell":
        table += dense("bert.pooler.dense", "params/pooler")
    return table + dense("classifier", "params/head")


# -------------------------------------------------------------------------- out
def write(directory: str | pathlib.Path, model: Any) -> list[pathlib.Path]:
    """Writes a model as a folder that transformers and Geneformer's own tokenizer read.

    ``config.json`` and ``model.safetensors`` for ``BertForMaskedLM.from_pretrained(directory)`` (or the class
    of the model's head); ``token_dictionary``, ``gene_median_dictionary``, ``ensembl_mapping_dict`` and
    ``gene_name_id_dict`` as JSON and as the pickles of plain dictionaries that
    ``TranscriptomeTokenizer(gene_median_file=..., token_dictionary_file=..., gene_mapping_file=...)`` takes.

    Args:
      directory: the folder, made if it is not there.
      model: from ``scjax.load``.

    Returns:
      The files.

    Raises:
      ImportError: safetensors is missing.
      ValueError: the model's gene embedding is not a table of its own, which Geneformer's format needs.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError(f"export needs safetensors: pip install 'scjax[interop]' ({error})") from error
    from scjax.config import from_config
    from scjax.models.geneformer import GeneformerConfig

    c = from_config(GeneformerConfig, model.config, where="model")
    if c.gene_table.kind != "random":
        raise ValueError(
            f"the gene embedding of this model is {c.gene_table.kind}; Geneformer's format holds one learned "
            "vector a gene (gene_table.kind = random)"
        )
    vocabulary: Vocabulary = model.vocabulary
    specials = SPECIALS if c.specials else SPECIALS[:2]
    fields = {"n_heads": c.n_heads, "specials": c.specials, "n_outputs": c.n_outputs, "head": c.head}
    variables = {"params": model.params, "buffers": model.buffers}
    tensors = export_tensors(rules(fields, len(vocabulary)), variables)
    median, times = np.asarray(model.buffers["median"]), Counter(vocabulary.symbols)
    dictionaries: dict[str, dict[str, Any]] = {
        "token_dictionary": {name: i for i, name in enumerate((*specials, *vocabulary.ids))},
        "gene_median_dictionary": {
            gene: float(m) for gene, m in zip(vocabulary.ids, median, strict=True) if m > 0 and np.isfinite(m)
        },
        "ensembl_mapping_dict": {gene: gene for gene in vocabulary.ids},
        # a symbol that several genes have names none of them
        "gene_name_id_dict": {
            symbol: gene
            for symbol, gene in zip(vocabulary.symbols, vocabulary.ids, strict=True)
            if times[symbol] == 1
        },
    }
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "model.safetensors", folder / "config.json"]
    save_file(tensors, written[0], metadata={"format": "pt"})
    about = _their_config(c, len(vocabulary) + len(specials))
    written[1].write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for name, content in dictionaries.items():
        text, pickled = folder / f"{name}.json", folder / f"{name}.pkl"
        text.write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
        pickled.write_bytes(pickle.dumps(content, protocol=4))
        written += [text, pickled]
    return written


def _their_config(c: Any, vocab_size: int) -> dict[str, Any]:
    name = {"cell": "Sequence", "gene": "Token"}[c.head]
    head = f"BertFor{name}Classification" if c.n_outputs else "BertForMaskedLM"
    labels = {f"LABEL_{i}": i for i in range(c.n_outputs)}
    return {
        "architectures": [head],
        "model_type": "bert",
        "vocab_size": vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "intermediate_size": c.d_ff,
        "hidden_act": "relu",
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.dropout,
        "initializer_range": 0.02,
        "layer_norm_eps": EPSILON,
        "max_position_embeddings": c.max_length,
        "type_vocab_size": 2,
        "pad_token_id": 0,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        **({"id2label": {i: k for k, i in labels.items()}, "label2id": labels} if labels else {}),
    }
